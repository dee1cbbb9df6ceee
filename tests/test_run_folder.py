"""A run's folder holds one run: what was asked for, whole, trained by one process at a time."""

import dataclasses
import errno
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import training.run_folder as module
from dataload import Augmentation, CIFAR10DataModule, FastDataModule, Images, Splits, split
from models.bundle import sha256
from tests.warm import WarmProcess
from training import history, results, resume, runs
from training.checkpoints import ChecksumIO, newest_checkpoint, sidecar
from training.classifier import LitClassifier
from training.options import AutoChoice, RunOptions
from training.recipes import Recipe
from training.results import unfinished_run
from training.run_folder import (
    RunInUse,
    RunLock,
    earlier_auto_choice,
    run_folder,
    run_identity,
    weights_sha256,
)
from training.runs import train

RECIPE = Recipe("FastNet", epochs=3, batch_size=8, max_lr=0.01, bias_lr=1.0, muon_lr=0.1, cutout=0)
OPTIONS = RunOptions(seed=1)


@pytest.fixture(scope="module")
def few(tiny_splits) -> Splits:
    """16 / 8 / 40 images: enough for two steps an epoch."""
    train, val, test = (
        Images(*(a[:n] for a in p)) for p, n in zip(tiny_splits, (16, 8, 40), strict=False)
    )
    return Splits(train, val, test, tiny_splits.source)


def loaders(splits, kind=CIFAR10DataModule, **settings) -> CIFAR10DataModule:
    return kind(batch_size=8, num_workers=0, splits=splits, **settings)


@pytest.fixture
def data(few) -> CIFAR10DataModule:
    return loaders(few)


@pytest.fixture(scope="module")
def original(tmp_path_factory, few) -> Path:
    """The folder of a finished run, to be copied and damaged."""
    root = tmp_path_factory.mktemp("original")
    return train(RECIPE, loaders(few), root, OPTIONS).metrics_csv.parent


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / original.name)


def again(folder: Path, data: CIFAR10DataModule, **changes) -> results.Run:
    return train(RECIPE, data, folder.parent, dataclasses.replace(OPTIONS, **changes))


def interrupt(monkeypatch, epoch: int, data: CIFAR10DataModule, root: Path) -> None:
    """Train until this epoch begins, then stop as if the power had failed."""

    def fail(self) -> None:
        if self.current_epoch == epoch:
            raise ConnectionAbortedError

    with monkeypatch.context() as patch:
        patch.setattr(LitClassifier, "on_train_epoch_start", fail)
        with pytest.raises(ConnectionAbortedError):
            train(RECIPE, data, root, OPTIONS)


def weights(folder: Path) -> str:
    return weights_sha256(torch.load(newest_checkpoint(folder), weights_only=True)["state_dict"])


# ---- identity ------------------------------------------------------------------------------------


def test_whatever_shapes_the_weights_makes_another_folder(tiny_splits):
    images, labels = tiny_splits.train
    other_split = split(tiny_splits.train, tiny_splits.test, 0, tiny_splits.source)
    same_split = split(tiny_splits.train, tiny_splits.test, 42, tiny_splits.source)
    one_pixel = images.copy()
    one_pixel[0, 0, 0, 0] ^= 1
    changed = tiny_splits._replace(train=tiny_splits.train._replace(images=one_pixel))
    flipped = tiny_splits._replace(train=tiny_splits.train._replace(labels=labels[::-1].copy()))
    identities = [
        run_identity(RECIPE, loaders(tiny_splits), OPTIONS),
        run_identity(RECIPE, loaders(tiny_splits), RunOptions(seed=2)),
        run_identity(RECIPE, loaders(tiny_splits), RunOptions(1, precision="32-true")),
        run_identity(RECIPE, loaders(tiny_splits), RunOptions(1, precision="bf16-mixed")),
        run_identity(dataclasses.replace(RECIPE, max_lr=0.02), loaders(tiny_splits), OPTIONS),
        run_identity(RECIPE, loaders(tiny_splits, FastDataModule), OPTIONS),
        run_identity(RECIPE, loaders(tiny_splits, seed=7), OPTIONS),
        run_identity(RECIPE, loaders(tiny_splits, augmentation=Augmentation(cutout=12)), OPTIONS),
        run_identity(RECIPE, loaders(tiny_splits, augmentation=Augmentation(padding=2)), OPTIONS),
        run_identity(RECIPE, loaders(other_split), OPTIONS),
        run_identity(RECIPE, loaders(same_split), OPTIONS),
        run_identity(RECIPE, loaders(changed), OPTIONS),
        run_identity(RECIPE, loaders(flipped), OPTIONS),
        run_identity(
            RECIPE,
            loaders(tiny_splits),
            dataclasses.replace(OPTIONS, auto=AutoChoice({"ARCH": "auto"}, "")),
        ),
    ]
    folders = {run_folder("runs", identity) for identity in identities}
    assert len(folders) == len(identities)
    assert run_folder("runs", run_identity(RECIPE, loaders(tiny_splits), OPTIONS)) in folders


@pytest.fixture
def precisions(monkeypatch) -> list[str]:
    """Nothing is trained; what would have been is noted: the precision of each start."""
    found = []
    monkeypatch.setattr(
        runs, "fit", lambda _, started, *__, **___: found.append(started["resolved"]["precision"])
    )
    return found


def test_another_precision_than_the_one_asked_for_is_never_loaded(folder, data, precisions):
    again(folder, data, precision="bf16-mixed")
    assert precisions == ["bf16-mixed"]


def test_a_resumed_run_keeps_the_precision_it_began_with(data, tmp_path, monkeypatch, precisions):
    monkeypatch.setattr(resume, "native_precisions", lambda: ["32-true", "bf16-mixed"])
    for timed in ("bf16-mixed", "32-true"):  # the second time on a busy machine
        monkeypatch.setattr(resume, "choose_precision", lambda timed=timed: timed)
        train(RECIPE, data, tmp_path, OPTIONS)
    assert precisions == ["bf16-mixed", "bf16-mixed"]


@pytest.mark.parametrize("kind", ["precision", "device"])
def test_a_machine_that_cannot_continue_says_so_and_trains_nothing(
    data, tmp_path, monkeypatch, kind
):
    interrupt(monkeypatch, 1, data, tmp_path)
    (folder,) = tmp_path.glob("FastNet-*")
    path = folder / "started.json"
    started = json.loads(path.read_text())
    started["resolved"][kind] = {"precision": "16-mixed", "device": "cuda"}[kind]
    path.write_text(json.dumps(started))
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    with pytest.raises(
        ValueError, match="began with (16-mixed|cuda), and .* continue it .*, or set FRESH = True"
    ):
        train(RECIPE, data, tmp_path, OPTIONS)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before
    assert (
        train(RECIPE, data, tmp_path, dataclasses.replace(OPTIONS, fresh=True)).metadata["epochs"]
        == 3
    )  # as it was told
    assert len(list(tmp_path.glob("FastNet-*-before-*/epoch000.ckpt"))) == 1


def test_what_auto_chose_is_known_when_the_same_is_asked_for_again(data, tmp_path):
    asked, name = {"ARCH": "auto", "EPOCHS": 0}, "fastnet-4"
    wanted = {"recipe": asked, "seed": 42, "precision": "auto", "loader": "albumentations"}
    assert earlier_auto_choice(tmp_path, wanted) is None
    auto = AutoChoice(asked, name)
    run = train(RECIPE, data, tmp_path, RunOptions(auto=auto))
    assert run.metrics_csv.parent.name.startswith("auto-")
    assert earlier_auto_choice(tmp_path, wanted) == name
    for other in (
        {"recipe": asked | {"EPOCHS": 1}},
        {"seed": 7},
        {"precision": "32-true"},
        {"loader": "fast"},
    ):  # such a run is another one
        assert earlier_auto_choice(tmp_path, wanted | other) is None
    changed = dataclasses.replace(RECIPE, max_lr=0.02)  # in a later version of this project
    for state in ("finished", "interrupted"):
        with pytest.raises(ValueError, match="other hyperparameters than 'auto' chooses now"):
            train(changed, data, tmp_path, RunOptions(auto=auto))
        if state == "finished":
            (run.metrics_csv.parent / "finished.json").unlink()


def test_a_run_that_was_stopped_in_its_first_epoch_binds_no_other_machine(
    data, tmp_path, monkeypatch
):
    interrupt(monkeypatch, 0, data, tmp_path)
    (path,) = tmp_path.glob("FastNet-*/started.json")
    began = json.loads(path.read_text())
    began["resolved"]["device"] = "cuda"
    path.write_text(json.dumps(began))
    assert train(RECIPE, data, tmp_path, OPTIONS).metadata["epochs"] == 3
    assert json.loads(path.read_text())["resolved"]["device"] == "cpu"


def test_a_row_that_was_cut_off_is_no_earlier_epoch(tmp_path):
    for start, rows in enumerate(
        ("0,1.0\n1,1.1\n", "2,1.2\n3,1.3\n10,1.4\n1", "11,1.5\n12,1.6\n1")
    ):
        (tmp_path / f"version_{start}").mkdir()
        (tmp_path / f"version_{start}/metrics.csv").write_text(f"epoch,train_loss\n{rows}")
    assert history.read_metrics(tmp_path).epoch.tolist() == [0, 1, 2, 3, 10, 11, 12]


def test_the_metrics_of_an_epoch_are_one_row(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,lr_step,train_loss\n0,0.1,\n0,0.2,\n0,,1.5\n1,0.1,\n1,,1.0\n")
    wanted = [{"epoch": 0, "train_loss": 1.5}, {"epoch": 1, "train_loss": 1.0}]
    assert history.epoch_rows(path) == wanted


def test_what_auto_chose_is_forgotten_if_no_epoch_was_finished(tmp_path):
    wanted, resolved = {"recipe": {"ARCH": "auto"}, "seed": 42}, {"recipe_name": "fastnet-2"}
    identity = wanted | {"augmentation": {}}
    folder = tmp_path / "auto-1"
    folder.mkdir()
    started = {"identity": identity, "resolved": resolved, "run_id": "1"}
    (folder / "started.json").write_text(json.dumps(started))
    assert earlier_auto_choice(tmp_path, wanted) is None
    (folder / "epoch000.ckpt").touch()
    later = shutil.copytree(folder, tmp_path / "auto-0")
    started["resolved"]["recipe_name"] = "fastnet-4"
    (later / "started.json").write_text(json.dumps(started))
    for earlier, choice in ((folder, "fastnet-4"), (later, "fastnet-2")):
        os.utime(later / "started.json", (50, 50))
        os.utime(folder / "started.json", (50, 50))
        os.utime(earlier / "started.json", (0, 0))
        assert earlier_auto_choice(tmp_path, wanted) == choice  # of the latest


# ---- integrity -----------------------------------------------------------------------------------


def test_metadata_of_other_weights_are_noticed_and_training_continues(folder, data, capsys):
    wanted, metadata = weights(folder), json.loads((folder / "finished.json").read_text())
    newest = folder / "epoch002.ckpt"  # a synced drive has brought finished.json before it
    newest.unlink()
    sidecar(newest).unlink()
    assert weights(folder) != wanted
    run = again(folder, data)
    assert (
        "describes other weights than epoch001.ckpt, of epoch 2; training continues"
        in capsys.readouterr().out
    )
    assert (
        weights(folder) == wanted
        and run.metadata["weights_sha256"] == metadata["weights_sha256"] == wanted
    )


@pytest.mark.parametrize(
    ("files", "missing"),
    [("*.ckpt", "complete checkpoint"), ("started.json", "readable started.json")],
)
def test_a_finished_run_whose_files_are_not_there_yet_is_not_trained_again(
    folder, data, files, missing
):
    for path in folder.glob(files):
        path.unlink()
    with pytest.raises(
        ValueError, match=f"has no {missing}; .*wait until .*, else set FRESH = True"
    ):
        again(folder, data)
    assert again(folder, data, fresh=True).metadata["epochs"] == 3


@pytest.mark.parametrize("content", [None, b"", b"\xff\x00", b"[]", b'{"epochs": 3}'])
def test_checkpoints_of_which_nobody_knows_how_they_were_trained_are_left_alone(
    folder, data, content
):
    path = folder / "started.json"
    path.unlink() if content is None else path.write_bytes(content)
    (folder / "finished.json").unlink()
    with pytest.raises(ValueError, match="without a readable started.json.*FRESH = True"):
        again(folder, data)
    assert again(folder, data, fresh=True).metadata["epochs"] == 3


def test_files_that_a_synced_drive_adds_are_ignored(data, tmp_path, original, monkeypatch):
    interrupt(monkeypatch, 2, data, tmp_path)
    (folder,) = tmp_path.glob("FastNet-*")
    shutil.copytree(folder / "logs/version_0", folder / "logs/version_0 (1)")
    (folder / "logs/version_x").mkdir()
    (folder / "logs/version_7").write_text("a file")
    shutil.copy(folder / "epoch001.ckpt", folder / "epoch001 (1).ckpt")
    shutil.copy(folder / "started.json", folder / "started (1).json")
    sidecar(folder / "epoch001.ckpt").write_bytes(b"\xff\xfe\x00binary")
    run = train(RECIPE, data, tmp_path, OPTIONS)
    assert weights(folder) == weights(original) and run.metadata["epochs"] == 3


def test_two_checkpoints_are_kept_where_the_folder_has_moved(data, tmp_path, monkeypatch):
    interrupt(monkeypatch, 2, data, tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    train(RECIPE, data, tmp_path / "there", OPTIONS)
    names = sorted(path.name for path in tmp_path.glob("there/FastNet-*/*.ckpt*"))
    epochs = ("epoch001.ckpt", "epoch002.ckpt")
    assert names == [name + end for name in epochs for end in ("", ".sha256")]


def test_a_new_checkpoint_is_kept_beside_damaged_ones_of_later_epochs(tmp_path):
    for epoch in (0, 3, 4):
        (tmp_path / f"epoch00{epoch}.ckpt").touch()
    for epoch in (1, 2):
        ChecksumIO().save_checkpoint({"epoch": epoch}, tmp_path / f"epoch00{epoch}.ckpt")
    assert newest_checkpoint(tmp_path).name == "epoch002.ckpt"
    assert not (tmp_path / "epoch000.ckpt").exists()


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("epoch999.ckpt", "epoch1000.ckpt"):
        (tmp_path / name).write_bytes(name.encode())
        sidecar(tmp_path / name).write_text(sha256(tmp_path / name))
    assert newest_checkpoint(tmp_path).name == "epoch1000.ckpt"


def test_an_unfinished_run_counts_the_epochs_of_its_weights_not_of_its_log(
    data, tmp_path, monkeypatch
):
    interrupt(monkeypatch, 2, data, tmp_path)
    (folder,) = tmp_path.glob("FastNet-*")
    (folder / "epoch001.ckpt").unlink()  # killed after the log of the second epoch was written
    run = unfinished_run(folder)
    assert run.metadata["epochs"] == 1 and history.read_table(run.metrics_csv).epoch.max() == 0


def test_an_unfinished_run_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run that has finished an epoch"):
        unfinished_run(tmp_path)


# ---- ownership -----------------------------------------------------------------------------------


def hold(tell: Callable[[str], None], folder: Path) -> None:
    """Own a run's folder until somebody kills this process."""
    with RunLock(folder):
        tell("held")
        time.sleep(60)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(module, "LOCK_PATIENCE_SECONDS", 0.1)


@pytest.fixture
def holder(tmp_path):
    """Another process that owns the folder 'run'."""
    process = WarmProcess(hold, tmp_path / "run")
    assert next(iter(process)) == "held"
    yield process
    process.kill()


def test_the_second_process_is_told_who_trains_and_a_killed_owner_keeps_nothing(
    holder, tmp_path, impatient, faults
):
    with pytest.raises(
        RunInUse,
        match=rf"run is being trained in by process {holder.process.pid} on .*set CHECKPOINT_DIR",
    ):
        RunLock(tmp_path / "run").__enter__()
    holder.kill()
    with RunLock(tmp_path / "run"):
        assert json.loads((tmp_path / ".run.owner.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".run.owner.json").exists()
    faults("owner of a run folder killed (SIGKILL)", 1)


def test_two_trainings_at_once_are_one_training(data, tmp_path, impatient):
    with (
        RunLock(run_folder(tmp_path, run_identity(RECIPE, data, OPTIONS))),
        pytest.raises(RunInUse),
    ):
        train(RECIPE, data, tmp_path, OPTIONS)
    assert not list(tmp_path.glob("FastNet-*/*"))
    assert train(RECIPE, data, tmp_path, OPTIONS).metadata["epochs"] == 3


def test_a_machine_without_a_network_has_one_name_in_all_processes(monkeypatch):
    monkeypatch.setattr("uuid.getnode", lambda: 0x0123456789AB)  # made up: an odd first byte
    assert module.this_machine() == platform.node()
    monkeypatch.setattr("uuid.getnode", lambda: 0x0023456789AB)
    assert module.this_machine() == f"{platform.node()}-23456789ab"


def write_owner(folder: Path, host: str, age: float) -> None:
    """What another process has written beside the folder, so many seconds ago."""
    said = {
        "token": "other",
        "host": host,
        "pid": 7,
        "since": "noon",
        "heartbeat": time.time() - age,
    }
    folder.with_name(f".{folder.name}.owner.json").write_text(json.dumps(said))


@pytest.mark.parametrize(("age", "alive"), [(10, True), (290, True), (-20, True), (310, False)])
def test_on_another_machine_an_owner_is_dead_after_five_minutes_without_a_heartbeat(
    tmp_path, age, alive
):
    write_owner(tmp_path / "run", "elsewhere", age)
    if alive:
        with pytest.raises(RunInUse, match="by process 7 on elsewhere since noon"):
            RunLock(tmp_path / "run").__enter__()
    else:
        with RunLock(tmp_path / "run"):
            pass


def test_on_this_machine_the_lock_decides_not_the_heartbeat(tmp_path):
    write_owner(tmp_path / "run", RunLock(tmp_path / "run").this_process["host"], age=1)
    with RunLock(tmp_path / "run"):
        pass


def test_where_the_file_system_has_no_locks_the_heartbeat_decides(tmp_path, monkeypatch):
    def none(*_, **__):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.FileLock, "acquire", none)
    write_owner(tmp_path / "run", RunLock(tmp_path / "run").this_process["host"], age=1)
    with pytest.raises(RunInUse):
        RunLock(tmp_path / "run").__enter__()
    write_owner(tmp_path / "run", RunLock(tmp_path / "run").this_process["host"], age=400)
    with RunLock(tmp_path / "run"):
        pass


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_marker_that_a_killed_process_left_instead_of_a_lock_does_not_decide(
    tmp_path, monkeypatch
):
    """On such a file system filelock makes a file, which stays when its process is killed."""
    fcntl = pytest.importorskip("fcntl")

    def missing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    monkeypatch.setattr(module, "LOCK_PATIENCE_SECONDS", 0.1)
    Path(RunLock(tmp_path / "run").lock.lock_file).write_text("7\nelsewhere\n")
    write_owner(tmp_path / "run", "elsewhere", age=10)
    with pytest.raises(RunInUse):
        RunLock(tmp_path / "run").__enter__()
    write_owner(tmp_path / "run", "elsewhere", age=400)
    with RunLock(tmp_path / "run"):
        pass


def test_an_owner_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)
    with RunLock(tmp_path / "run"):
        beats = {json.loads((tmp_path / ".run.owner.json").read_text())["heartbeat"]}
        time.sleep(0.5)
        beats.add(json.loads((tmp_path / ".run.owner.json").read_text())["heartbeat"])
    assert len(beats) == 2


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"token": "other"}'])
def test_a_damaged_owner_file_names_nobody(tmp_path, content):
    (tmp_path / ".run.owner.json").write_bytes(content)
    with RunLock(tmp_path / "run"):
        pass


def test_a_run_that_was_taken_over_meanwhile_stops_before_its_next_checkpoint(
    data, tmp_path, monkeypatch
):
    folder = run_folder(tmp_path, run_identity(RECIPE, data, OPTIONS))

    def taken_over(self) -> None:
        if self.current_epoch == 1:
            write_owner(folder, "elsewhere", age=0)

    monkeypatch.setattr(LitClassifier, "on_train_epoch_start", taken_over)
    with pytest.raises(RunInUse, match="process 7 on elsewhere"):
        train(RECIPE, data, tmp_path, OPTIONS)
    assert {path.name for path in folder.glob("epoch*.ckpt")} == {"epoch000.ckpt"}
    assert (
        json.loads((tmp_path / f".{folder.name}.owner.json").read_text())["pid"] == 7
    )  # its file is left alone

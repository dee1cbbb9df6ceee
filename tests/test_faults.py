"""Faults, injected into the real thing: what happens is said, nothing is lost, and the next run goes on.

`make faults` runs the long form and prints a table; the tests run a short one.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch

import training.classifier
from dataload import CIFAR10DataModule
from tests.conftest import PROJECT
from training.checkpoints import newest_checkpoint, sidecar
from training.recipes import Recipe
from training.results import unfinished_run
from training.runs import train

LONG = os.environ.get("FAULTS") == "long"
RECIPE = Recipe("CustomResNet", epochs=3, batch_size=32, max_lr=0.02)
PHASES = ("step", "checkpoint", "validation", "epoch end", "log")

# A training run in a process of its own, which says on its standard output what it is about to do.
CHILD = """
import sys, numpy as np, torch
from dataload import CIFAR10DataModule, Images, Splits
from training import checkpoints, runs
from training.classifier import LitClassifier
from training.recipes import Recipe

def say(phase, function):
    def told(*args, **kwargs):
        print("phase", phase, flush=True)
        return function(*args, **kwargs)
    return told

LitClassifier.training_step = say("step", LitClassifier.training_step)
LitClassifier.validation_step = say("validation", LitClassifier.validation_step)
LitClassifier.log_epoch = say("epoch end", LitClassifier.log_epoch)
runs.CSVLogger.save = say("log", runs.CSVLogger.save)
checkpoints.sha256 = say("checkpoint", checkpoints.sha256)  # the file is written, its checksum is not
torch.set_num_threads(2)
rng = np.random.default_rng(0)
part = lambda n: Images(rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 10)
data = CIFAR10DataModule(batch_size=32, num_workers=0, splits=Splits(part(96), part(32), part(10), "noise"))
recipe = Recipe("FastNet", epochs=EPOCHS, batch_size=32, max_lr=0.01, bias_lr=1.0, muon_lr=0.1, low_res=0.5)
runs.train(recipe, data, sys.argv[1], seed=3, precision="32-true")
print("finished", flush=True)
"""


@pytest.fixture
def data(tiny_splits) -> CIFAR10DataModule:
    return CIFAR10DataModule(batch_size=32, num_workers=0, splits=tiny_splits)


# ---- killed --------------------------------------------------------------------------------------


def child(root: Path, epochs: int) -> subprocess.Popen:
    code = CHILD.replace("EPOCHS", str(epochs))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(root)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def kill_in(phase: str, root: Path, epochs: int, after: int) -> str | None:
    """Run until it has been in this phase `after` times, then kill it.

    Returns the phase, None if it was finished.
    """
    process = child(root, epochs)
    try:
        for line in process.stdout:
            after -= line.strip() == f"phase {phase}"
            if line.strip() == "finished":
                return None
            if after <= 0:
                process.send_signal(signal.SIGKILL)
                return phase
        raise AssertionError(f"the run ended by itself: {process.wait()}")
    finally:
        process.stdout.close()
        process.wait()


def weights_and_metrics(root: Path) -> tuple[dict, pd.DataFrame]:
    (folder,) = root.glob("FastNet-*")
    weights = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    table = pd.read_csv(folder / "metrics.csv").groupby("epoch").mean().drop(columns="seconds")
    return weights, table


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(tmp_path, faults):
    kills, epochs = (25, 14) if LONG else (5, 5)
    order = [PHASES[i % len(PHASES)] for i in range(kills)]
    generator = random.Random(0)
    phases = [
        kill_in(phase, tmp_path / "killed", epochs, generator.randint(1, 3)) for phase in order
    ]
    injected = [phase for phase in phases if phase]
    assert len(injected) == kills and all(injected.count(phase) >= kills // 5 for phase in PHASES)
    for root in (tmp_path / "killed", tmp_path / "quiet"):
        assert "finished" in child(root, epochs).communicate()[0]
    killed, quiet = (
        weights_and_metrics(tmp_path / "killed"),
        weights_and_metrics(tmp_path / "quiet"),
    )
    assert killed[0].keys() == quiet[0].keys()
    assert all(torch.equal(killed[0][name], quiet[0][name]) for name in quiet[0])
    pd.testing.assert_frame_equal(killed[1], quiet[1], check_like=True)
    for phase in PHASES:
        faults(
            f"killed (SIGKILL) in: {phase}",
            injected.count(phase),
            len(quiet[1]),
            len(killed[1]),
            "epochs",
        )


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "no checksum"])
def test_a_damaged_last_checkpoint_is_noticed_and_the_one_before_is_used(
    data, tmp_path, capsys, damage, faults
):
    stopped = dataclasses.replace(RECIPE, epochs=2)
    run = train(stopped, data, tmp_path, seed=1, precision="32-true")
    folder = run.metrics_csv.parent
    (folder / "finished.json").unlink()
    content = bytearray((folder / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut": content[:-9], "flipped": content, "empty": b"", "no checksum": None}[damage]
    if damaged is None:
        sidecar(folder / "last.ckpt").unlink()
    else:
        (folder / "last.ckpt").write_bytes(damaged)
    capsys.readouterr()
    again = train(stopped, data, tmp_path, seed=1, precision="32-true")
    assert "last.ckpt is incomplete or damaged and is not used" in capsys.readouterr().out
    pairs = zip(run.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    faults("damaged last.ckpt", 1, run.metadata["epochs"], again.metadata["epochs"], "epochs")


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"epochs": 3}', "\0\0\0"])
def test_a_damaged_result_is_noticed_and_made_again(data, tmp_path, capsys, content, faults):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    run = train(recipe, data, tmp_path, seed=1, precision="32-true")
    path = run.metrics_csv.parent / "finished.json"
    path.write_text(content)
    again = train(recipe, data, tmp_path, seed=1, precision="32-true")
    assert "is damaged" in capsys.readouterr().out
    assert (
        again.metadata["val_acc"] == run.metadata["val_acc"]
        and json.loads(path.read_text())["epochs"] == 1
    )
    faults("damaged finished.json", 1, run.metadata["epochs"], again.metadata["epochs"], "epochs")


def test_an_interrupt_says_how_to_go_on_and_leaves_a_usable_network(
    data, tmp_path, monkeypatch, faults
):
    step = training.classifier.LitClassifier.training_step

    def interrupted(self, *batch):
        if self.current_epoch == 2:
            raise KeyboardInterrupt
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(training.classifier.LitClassifier, "training_step", interrupted)
        with pytest.raises(
            KeyboardInterrupt, match=r"in epoch 3 of 3; run again .* unfinished_run\('(.*)'\)"
        ) as caught:
            train(RECIPE, data, tmp_path, seed=1, precision="32-true")
    assert (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )  # the next interrupt is heard as well
    folder = str(caught.value).split("'")[1]
    so_far = unfinished_run(folder)
    assert (
        so_far.metadata["epochs"] == 2
        and so_far.metadata["train_images"] == 64
        and 0 <= so_far.metadata["val_acc"] <= 1
    )
    assert so_far.model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    run = train(RECIPE, data, tmp_path, seed=1, precision="32-true")
    assert (
        run.metadata["epochs"] == 3
        and len(pd.read_csv(run.metrics_csv).dropna(subset="train_loss")) == 3
    )
    faults(
        "interrupted (SIGINT) while training", 1, RECIPE.epochs, run.metadata["epochs"], "epochs"
    )


# ---- places that cannot be written to ------------------------------------------------------------


@contextlib.contextmanager
def small_disk(megabytes: int):
    """A file system of that size, or pytest.skip where this user may not mount one."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("only root may mount a small disk")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def test_a_disk_too_small_for_the_checkpoints_is_said_before_the_first_epoch(data, faults):
    with small_disk(8) as disk:
        (disk / "older").write_text("kept")
        with pytest.raises(
            OSError, match=r"has \d MB left, its checkpoints may need 210 MB; make room"
        ):
            train(RECIPE, data, disk, precision="32-true")
        assert (disk / "older").read_text() == "kept" and not list(disk.glob("*/*.ckpt"))
    faults("disk too small", 1)


def test_a_disk_that_fills_up_meanwhile_leaves_the_last_checkpoint_usable(
    data, monkeypatch, faults
):
    """The room is there when the run begins; then something else takes it, in the second epoch."""
    with small_disk(300) as disk:
        log_epoch = training.classifier.LitClassifier.log_epoch

        def fill(self):
            if self.current_epoch == 1:
                with contextlib.suppress(OSError), (disk / "other").open("wb") as file:
                    while True:
                        file.write(bytes(1 << 20))
            log_epoch(self)

        with monkeypatch.context() as patch:
            patch.setattr(training.classifier.LitClassifier, "log_epoch", fill)
            with pytest.raises(
                (OSError, RuntimeError), match=r"(?i)no space|write|unexpected pos|enforce"
            ):
                train(RECIPE, data, disk, seed=1, precision="32-true")
        (disk / "other").unlink()
        (folder,) = disk.glob("CustomResNet-*")
        assert newest_checkpoint(folder).name in ("last.ckpt", "epoch000.ckpt")
        run = train(RECIPE, data, disk, seed=1, precision="32-true")
        assert run.metadata["epochs"] == 3
    faults("disk full in the second epoch", 1, RECIPE.epochs, run.metadata["epochs"], "epochs")


def test_a_read_only_folder_is_said_before_the_first_epoch(data, faults):
    with small_disk(8) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError, match="cannot write into .*Read-only.*set CHECKPOINT_DIR"):
            train(RECIPE, data, disk, precision="32-true")
    faults("read-only folder", 1)


def test_a_file_in_the_place_of_the_folder_is_said(data, tmp_path, faults):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(OSError, match="cannot write into"):
        train(RECIPE, data, tmp_path / "checkpoints", precision="32-true")
    assert (tmp_path / "checkpoints").read_text() == "a file"
    faults(
        "no folder but a file", 1, len("a file"), (tmp_path / "checkpoints").stat().st_size, "bytes"
    )


def test_a_folder_removed_meanwhile_is_made_again_with_what_is_known(
    data, tmp_path, capsys, monkeypatch, faults
):
    wanted = train(RECIPE, data, tmp_path / "quiet", seed=1, precision="32-true")
    log_epoch = training.classifier.LitClassifier.log_epoch

    def removed(self):
        if self.current_epoch == 1:
            shutil.rmtree(tmp_path / "removed")
        log_epoch(self)

    monkeypatch.setattr(training.classifier.LitClassifier, "log_epoch", removed)
    run = train(RECIPE, data, tmp_path / "removed", seed=1, precision="32-true")
    assert "was removed, or its disk is gone; it is made again" in capsys.readouterr().out
    pairs = zip(run.model.state_dict().values(), wanted.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    ours, theirs = (pd.read_csv(r.metrics_csv).groupby("epoch").mean() for r in (run, wanted))
    columns = ["train_loss", "train_acc", "val_loss", "val_acc"]
    pd.testing.assert_frame_equal(ours[columns], theirs[columns], rtol=1e-6)
    steps = [
        pd.read_csv(r.metrics_csv).dropna(subset="train_loss").step.tolist() for r in (run, wanted)
    ]
    assert steps == [[1, 3, 5]] * 2
    assert (
        train(RECIPE, data, tmp_path / "removed", seed=1, precision="32-true").metadata
        == run.metadata
    )
    faults("folder removed while training", 1, len(theirs), len(ours), "epochs")


@pytest.mark.parametrize(
    "content", [None, b"", b"\0\xff\0", b"epoch,train_loss\n0", b"nothing\nof,the,sort"]
)
def test_a_damaged_table_of_a_finished_run_is_made_again(data, tmp_path, capsys, content, faults):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    path = train(recipe, data, tmp_path, seed=1, precision="32-true").metrics_csv
    whole = pd.read_csv(path)
    path.unlink() if content is None else path.write_bytes(content)
    capsys.readouterr()
    train(recipe, data, tmp_path, seed=1, precision="32-true")
    printed = capsys.readouterr().out
    assert "it is made again" in printed and "epoch   1/1" in printed
    pd.testing.assert_frame_equal(pd.read_csv(path), whole)
    faults("damaged metrics.csv of a finished run", 1, len(whole), len(pd.read_csv(path)), "rows")


# ---- numbers and memory --------------------------------------------------------------------------


def test_a_rate_a_thousand_times_too_high_stops_in_words_and_keeps_the_checkpoint(
    tiny_splits, tmp_path, faults
):
    recipe = dataclasses.replace(RECIPE, epochs=30, max_lr=3e7, warmup=1.0)
    data = CIFAR10DataModule(batch_size=32, num_workers=0, splits=tiny_splits)
    with pytest.raises(
        FloatingPointError,
        match=r"the loss is (nan|inf) at step \d+, epoch \d+, with a learning rate of",
    ):
        train(recipe, data, tmp_path, precision="32-true")
    faults("learning rate far too high", 1)


def test_a_gpu_without_memory_says_which_setting_to_halve(data, tmp_path, monkeypatch, faults):
    def full(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(training.classifier.LitClassifier, "training_step", full)
    with pytest.raises(
        RuntimeError, match="too small for batches of 32 images; set BATCH_SIZE to 16"
    ):
        train(RECIPE, data, tmp_path, precision="32-true")
    faults("GPU out of memory (simulated)", 1)


# Does one thing again and again, and says how much memory the process has after the tenth time and
# after the last.
MEMORY = """
import sys, tempfile
from pathlib import Path
import numpy as np
from dataload import CIFAR10DataModule, CLASSES, denormalize
from evaluation.errors import plot_confusion
from models.registry import build
from tests.conftest import space_meta, wrong_predictions
from training.recipes import Recipe
from utils import display_gradcam_output, export_to_space

def memory():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

def again(name, action):
    for number in range(1, TIMES + 1):
        action()
        if number == 10:
            tenth = memory()
    print(name, tenth, memory(), flush=True)

rng = np.random.default_rng(0)
images, labels = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), np.arange(40) % 10
wrong, model = wrong_predictions(images, labels), build("FastNet").eval()
again("figure", lambda: display_gradcam_output(wrong, CLASSES, denormalize, model, [model.group3]))
with tempfile.TemporaryDirectory() as folder:
    confusion = plot_confusion(wrong, labels, CLASSES)
    again("export", lambda: export_to_space(folder, model, space_meta(), wrong, denormalize, confusion))
epochs, log_epoch = [], training.LitClassifier.log_epoch
training.LitClassifier.log_epoch = lambda self: (epochs.append(memory()), log_epoch(self))
from dataload import Images, Splits
data = CIFAR10DataModule(batch_size=20, num_workers=0, splits=Splits(*[Images(images, labels)] * 3, "noise"))
with tempfile.TemporaryDirectory() as folder:
    training.train(Recipe("FastNet", epochs=TIMES, batch_size=20, max_lr=0.01), data, folder, precision="32-true")
print("epoch", epochs[9], epochs[-1], flush=True)
"""


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="memory is read as Linux tells it"
)
def test_memory_at_the_end_is_that_after_the_tenth_time(faults):
    times = 50 if LONG else 14
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.replace("TIMES", str(times))],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    found = dict(re.findall(r"^(figure|export|epoch) ([\d.]+ [\d.]+)$", done.stdout, re.M))
    assert set(found) == {"figure", "export", "epoch"}, done.stderr[-2000:]
    for name, numbers in found.items():
        tenth, last = map(float, numbers.split())
        assert last < 1.05 * tenth, (name, tenth, last)
        faults(f"memory after {times} times: {name}", 1)

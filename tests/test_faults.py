"""Fault injection: each fault is reported, nothing is lost, and the next run continues.

`make faults` runs the long form and prints a table; the tests run a short one.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import training.classifier
from dataload import CLASSES, CIFAR10DataModule, Images, Splits, denormalize
from evaluation import bundle_check
from evaluation.errors import plot_confusion
from models.bundle import TrainingSchema, load_bundle
from models.registry import build
from tests.conftest import space_meta, weights_and_metrics, wrong_predictions
from tests.warm import WarmProcess
from training import checkpoints, runs
from training.checkpoints import newest_checkpoint, sidecar
from training.classifier import LitClassifier
from training.options import RunOptions
from training.recipes import Recipe
from training.results import Run
from training.run_folder import same_weights
from training.runs import train
from utils import display_gradcam_output, export_to_space

LONG = os.environ.get("FAULTS") == "long"
RECIPE = Recipe("FastNet", epochs=3, batch_size=32, max_lr=0.02)
OPTIONS = RunOptions(seed=1, precision="32-true")
PHASES = ("step", "checkpoint", "validation", "epoch end", "log")


def tell_and_train(tell: Callable[[str], None], root: Path, epochs: int) -> None:
    """Train, in a process of its own, and tell what happens next, before it happens."""

    def told(phase: str, function: Callable) -> Callable:
        def first_tell(*args, **kwargs):
            tell(phase)
            return function(*args, **kwargs)

        return first_tell

    LitClassifier.training_step = told("step", LitClassifier.training_step)
    LitClassifier.validation_step = told("validation", LitClassifier.validation_step)
    LitClassifier.log_epoch = told("epoch end", LitClassifier.log_epoch)
    runs.CSVLogger.save = told("log", runs.CSVLogger.save)
    # At this point the file is written, its checksum is not.
    checkpoints.sha256 = told("checkpoint", checkpoints.sha256)
    torch.set_num_threads(2)
    rng = np.random.default_rng(0)
    parts = [
        Images(rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 10)
        for n in (96, 32, 10)
    ]
    data = CIFAR10DataModule(batch_size=32, num_workers=0, splits=Splits(*parts, "noise"))
    recipe = Recipe("FastNet", epochs, 32, max_lr=0.01, bias_lr=1.0, muon_lr=0.1, low_res=0.5)
    train(recipe, data, root, RunOptions(seed=3, precision="32-true"))
    tell("finished")


@pytest.fixture
def data(tiny_splits) -> CIFAR10DataModule:
    return CIFAR10DataModule(batch_size=32, num_workers=0, splits=tiny_splits)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_splits) -> Callable[[int], tuple[Path, Run]]:
    """A function that trains by RECIPE, once for each number of epochs: (its root, the run).

    All files are whole again whenever it is called, in the same place: a test may damage them.
    """

    @functools.cache
    def trained(epochs: int) -> tuple[Path, Path, Run]:
        folder = tmp_path_factory.mktemp("finished")
        root, whole = folder / "checkpoints", folder / "whole"
        data = CIFAR10DataModule(batch_size=32, num_workers=0, splits=tiny_splits)
        run = train(dataclasses.replace(RECIPE, epochs=epochs), data, root, OPTIONS)
        return root, shutil.copytree(root, whole), run

    def restored(epochs: int) -> tuple[Path, Run]:
        root, whole, run = trained(epochs)
        shutil.rmtree(root)
        shutil.copytree(whole, root)
        return root, run

    return restored


# ---- killed --------------------------------------------------------------------------------------


def kill_in(phase: str, root: Path, epochs: int, after: int) -> str | None:
    """Run until it has been in this phase `after` times, then kill it.

    Returns the phase, None if it was finished.
    """
    process = WarmProcess(tell_and_train, root, epochs)
    try:
        for line in process:
            after -= line == phase
            if line == "finished":
                return None
            if after <= 0:
                return phase
        raise AssertionError("the run ended by itself")
    finally:
        process.kill()


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(tmp_path, faults):
    kills, epochs = (25, 14) if LONG else (5, 7)
    order = [PHASES[i % len(PHASES)] for i in range(kills)]
    generator = random.Random(0)
    phases = [
        kill_in(phase, tmp_path / "killed", epochs, generator.randint(1, 3)) for phase in order
    ]
    injected = [phase for phase in phases if phase]
    assert len(injected) == kills and all(injected.count(phase) >= kills // 5 for phase in PHASES)
    for root in (tmp_path / "killed", tmp_path / "quiet"):
        assert "finished" in list(WarmProcess(tell_and_train, root, epochs))
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
    data, capsys, damage, finished, faults
):
    stopped = dataclasses.replace(RECIPE, epochs=2)
    root, run = finished(2)
    folder = run.metrics_csv.parent
    (folder / "finished.json").unlink()
    newest = newest_checkpoint(folder)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut": content[:-9], "flipped": content, "empty": b"", "no checksum": None}[damage]
    if damaged is None:
        sidecar(newest).unlink()
    else:
        newest.write_bytes(damaged)
    capsys.readouterr()
    again = train(stopped, data, root, OPTIONS)
    assert f"{newest.name} is incomplete or damaged and is not used" in capsys.readouterr().out
    assert same_weights(run.model, again.model)
    faults(
        "damaged newest checkpoint", 1, run.metadata["epochs"], again.metadata["epochs"], "epochs"
    )


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"epochs": 3}', "\0\0\0"])
def test_a_damaged_result_is_noticed_and_made_again(data, capsys, content, finished, faults):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    root, run = finished(1)
    path = run.metrics_csv.parent / "finished.json"
    path.write_text(content)
    again = train(recipe, data, root, OPTIONS)
    assert "is damaged" in capsys.readouterr().out
    assert (
        again.metadata["val_acc"] == run.metadata["val_acc"]
        and json.loads(path.read_text())["epochs"] == 1
    )
    faults("damaged finished.json", 1, run.metadata["epochs"], again.metadata["epochs"], "epochs")


def test_an_interrupt_says_how_to_go_on_and_leaves_a_usable_network(
    data, tmp_path, monkeypatch, faults
):
    step, handler = training.classifier.LitClassifier.training_step, signal.getsignal(signal.SIGINT)

    def interrupted(self, *batch):
        if self.current_epoch == 2:
            raise KeyboardInterrupt
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(training.classifier.LitClassifier, "training_step", interrupted)
        with pytest.raises(
            KeyboardInterrupt, match=r"in epoch 3 of 3; run again .*: from training\.results"
        ) as caught:
            train(RECIPE, data, tmp_path, OPTIONS)
    assert signal.getsignal(signal.SIGINT) is handler  # the next interrupt is heard as before
    advice = str(caught.value).partition("learned: ")[2]
    names = {}
    exec(advice, names)  # as it says
    so_far = names["run"]
    TrainingSchema(**so_far.metadata)  # it can be exported
    assert (
        so_far.metadata["epochs"] == 2
        and so_far.metadata["train_images"] == 64
        and 0 <= so_far.metadata["val_acc"] <= 1
    )
    assert so_far.model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    run = train(RECIPE, data, tmp_path, OPTIONS)
    assert (
        run.metadata["epochs"] == 3
        and len(pd.read_csv(run.metrics_csv).dropna(subset="train_loss")) == 3
    )
    faults(
        "interrupted (SIGINT) while training", 1, RECIPE.epochs, run.metadata["epochs"], "epochs"
    )


# ---- places that cannot be written to ------------------------------------------------------------


# GitHub's machines, which set CI, let their user do anything; on another, nobody is asked.
HAS_SUDO = os.environ.get("CI") and os.geteuid() and shutil.which("sudo")
AS_ROOT = ["sudo", "-n"] if HAS_SUDO else []


@contextlib.contextmanager
def small_disk(megabytes: int):
    """A file system of that size, or pytest.skip where this user may not mount one."""
    with tempfile.TemporaryDirectory() as folder:
        options = f"size={megabytes}m,mode=1777"
        mount = [*AS_ROOT, "mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("only root may mount a small disk")
        try:
            yield Path(folder)
        finally:
            subprocess.run([*AS_ROOT, "umount", folder], check=True)


def test_a_disk_too_small_for_the_checkpoints_is_said_before_the_first_epoch(data, faults):
    with small_disk(8) as disk:
        (disk / "older").write_text("kept")
        with pytest.raises(
            OSError, match=r"has \d MB left, its checkpoints may need 47 MB; make room"
        ):
            train(RECIPE, data, disk, OPTIONS)
        assert (disk / "older").read_text() == "kept" and not list(disk.glob("*/*.ckpt"))
    faults("disk too small", 1)


def test_a_disk_too_small_for_a_fresh_run_beside_the_old_one_is_said(data, monkeypatch, finished):
    """With room for the checkpoints that would be replaced, not for others beside them."""
    root, run = finished(3)
    usage = shutil.disk_usage(root)._replace(free=20_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="has 20 MB left, its checkpoints may need 47 MB; make room"):
        train(RECIPE, data, root, dataclasses.replace(OPTIONS, fresh=True))
    assert train(RECIPE, data, root, OPTIONS).metadata == run.metadata


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
                train(RECIPE, data, disk, OPTIONS)
        (disk / "other").unlink()
        (folder,) = disk.glob("FastNet-*")
        assert newest_checkpoint(folder).name == "epoch000.ckpt"
        run = train(RECIPE, data, disk, OPTIONS)
        assert run.metadata["epochs"] == 3
    faults("disk full in the second epoch", 1, RECIPE.epochs, run.metadata["epochs"], "epochs")


def test_a_checkpoint_needs_no_room_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    path = tmp_path / "run/epoch000.ckpt"
    checkpoints.ChecksumIO().save_checkpoint({"epoch": 0}, path)
    assert checkpoints.is_complete(path)


def test_a_read_only_folder_is_said_before_the_first_epoch(data, faults):
    with small_disk(8) as disk:
        subprocess.run([*AS_ROOT, "mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OSError, match="cannot write into .*Read-only.*set CHECKPOINT_DIR"):
            train(RECIPE, data, disk, OPTIONS)
    faults("read-only folder", 1)


def test_a_file_in_the_place_of_the_folder_is_said(data, tmp_path, faults):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(OSError, match="cannot write into"):
        train(RECIPE, data, tmp_path / "checkpoints", OPTIONS)
    assert (tmp_path / "checkpoints").read_text() == "a file"
    faults(
        "no folder but a file", 1, len("a file"), (tmp_path / "checkpoints").stat().st_size, "bytes"
    )


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_folder_removed_meanwhile_is_made_again_with_what_is_known(  # noqa: PLR0913
    data, tmp_path, capsys, monkeypatch, finished, faults, epoch
):
    _, wanted = finished(3)
    log_epoch = training.classifier.LitClassifier.log_epoch

    def removed(self):
        if self.current_epoch == epoch:
            shutil.rmtree(tmp_path / "removed")
        log_epoch(self)

    monkeypatch.setattr(training.classifier.LitClassifier, "log_epoch", removed)
    run = train(RECIPE, data, tmp_path / "removed", OPTIONS)
    assert "was removed, or its disk is gone; it is made again" in capsys.readouterr().out
    assert same_weights(run.model, wanted.model)
    ours, theirs = (pd.read_csv(r.metrics_csv).groupby("epoch").mean() for r in (run, wanted))
    columns = ["train_loss", "train_acc", "val_loss", "val_acc"]
    pd.testing.assert_frame_equal(ours[columns], theirs[columns], rtol=1e-6)
    steps = [
        pd.read_csv(r.metrics_csv).dropna(subset="train_loss").step.tolist() for r in (run, wanted)
    ]
    assert steps == [[1, 3, 5]] * 2
    assert train(RECIPE, data, tmp_path / "removed", OPTIONS).metadata == run.metadata
    faults("folder removed while training", 1, len(theirs), len(ours), "epochs")


def test_a_cut_off_table_of_a_finished_run_is_made_again(data, capsys, finished):
    root, run = finished(3)
    path = run.metrics_csv
    whole, lines = pd.read_csv(path), path.read_text().splitlines(keepends=True)
    for count in range(1, len(lines)):
        path.write_text("".join(lines[:count]))
        capsys.readouterr()
        train(RECIPE, data, root, OPTIONS)
        printed = capsys.readouterr().out
        assert "of 3 epochs; it is made again" in printed and printed.count("train loss") == 3
        pd.testing.assert_frame_equal(pd.read_csv(path), whole)


@pytest.mark.parametrize(
    "content", [None, b"", b"\0\xff\0", b"epoch,train_loss\n0", b"nothing\nof,the,sort"]
)
def test_a_damaged_table_of_a_finished_run_is_made_again(data, capsys, content, finished, faults):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    root, run = finished(1)
    path = run.metrics_csv
    whole = pd.read_csv(path)
    path.unlink() if content is None else path.write_bytes(content)
    capsys.readouterr()
    train(recipe, data, root, OPTIONS)
    printed = capsys.readouterr().out
    assert "it is made again" in printed and "epoch   1/1" in printed
    pd.testing.assert_frame_equal(pd.read_csv(path), whole)
    faults("damaged metrics.csv of a finished run", 1, len(whole), len(pd.read_csv(path)), "rows")


# ---- numbers and memory --------------------------------------------------------------------------


def test_a_rate_far_too_high_stops_in_words(tiny_splits, tmp_path, faults):
    recipe = dataclasses.replace(RECIPE, epochs=30, max_lr=3e7, warmup=1.0)
    data = CIFAR10DataModule(batch_size=32, num_workers=0, splits=tiny_splits)
    with pytest.raises(
        FloatingPointError,
        match=r"the loss is (nan|inf) at step \d+, epoch \d+, with a learning rate of",
    ):
        train(recipe, data, tmp_path, OPTIONS)
    faults("learning rate far too high", 1)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GiB, max allowed: 9.1 GiB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't"),
    ],
    ids=["GPU", "GPU full before", "Apple GPU", "CPU"],
)
def test_too_little_memory_says_which_setting_to_halve(data, tmp_path, monkeypatch, faults, error):
    def full(self, *_):
        raise error

    monkeypatch.setattr(training.classifier.LitClassifier, "training_step", full)
    recipe = dataclasses.replace(RECIPE, batch_size=64, micro_batch=32)
    with pytest.raises(
        RuntimeError, match="too small for batches of 32 images; set BATCH_SIZE to 16"
    ):
        train(recipe, data, tmp_path, OPTIONS)
    faults(f"{type(error).__name__} for too little memory (simulated)", 1)


def megabytes() -> float:
    """The memory that this process has now, without what the allocator could give back."""
    with contextlib.suppress(AttributeError):  # of glibc
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def measure_memory(tell: Callable[[str], None], times: int) -> None:
    """Do one thing again and again; tell the memory after the tenth time and after the last."""

    def again(name: str, action: Callable[[], object]) -> None:
        found = []
        for _ in range(times):
            action()
            found.append(megabytes())
        tell(f"{name} {found[9]} {found[-1]}")

    # The comparison runs in another process, whose memory is its own.
    bundle_check.logits_of_bundle = lambda folder, images: load_bundle(folder)[0](images)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(40) % 10
    wrong, model = wrong_predictions(images, labels), build("FastNet").eval()
    figures = wrong, denormalize, plot_confusion(wrong, labels, CLASSES)
    layers = [model.group3]
    again("figure", lambda: display_gradcam_output(wrong, CLASSES, denormalize, model, layers))
    with tempfile.TemporaryDirectory() as folder:
        again("export", lambda: export_to_space(folder, model, space_meta(), *figures))
        found, log_epoch = [], LitClassifier.log_epoch
        LitClassifier.log_epoch = lambda self: (found.append(megabytes()), log_epoch(self))
        splits = Splits(*[Images(images, labels)] * 3, "noise")
        data = CIFAR10DataModule(batch_size=20, num_workers=0, splits=splits)
        recipe = Recipe("FastNet", epochs=times, batch_size=20, max_lr=0.01)
        train(recipe, data, folder, RunOptions(precision="32-true"))
    tell(f"epoch {found[9]} {found[-1]}")


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="memory is read as Linux tells it"
)
def test_memory_at_the_end_is_that_after_the_tenth_time(faults):
    times = 50 if LONG else 14
    found = {}
    for line in WarmProcess(measure_memory, times):
        name, *numbers = line.split()
        found[name] = [float(number) for number in numbers]
    assert set(found) == {"figure", "export", "epoch"}
    for name, (tenth, last) in found.items():
        assert last < 1.05 * tenth, (name, tenth, last)
        faults(f"memory after {times} times: {name}", 1)

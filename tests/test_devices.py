"""Several processes train as one.

Each image once, one log, one checkpoint; and after one was killed they go on.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient
from pytorch_lightning.utilities import rank_zero_only

import training.classifier
from dataload import (
    AlbumentationImageDataset,
    Augmentation,
    CIFAR10DataModule,
    FastDataModule,
    Images,
    Splits,
    shard_batches,
)
from models.errors import TrainingFailed
from tests.conftest import PROJECT, weights_and_metrics
from tests.warm import WarmProcess
from training import resume, run_folder, runs
from training.classifier import LitClassifier
from training.files import write_json
from training.history import read_table
from training.options import RunOptions
from training.recipes import Recipe
from training.run_folder import wait_until_begun
from training.runs import build_datamodule, train
from training.settings import resolve_placement
from training.switches import SWITCHES

RECIPE = Recipe(
    "FastNet",
    epochs=4,
    batch_size=64,
    micro_batch=32,
    max_lr=0.01,
    bias_lr=1.0,
    muon_lr=0.1,
    low_res=0.5,
    cutout=0,
)
OPTIONS = RunOptions(seed=3, precision="32-true")
TWO_PROCESSES = dataclasses.replace(OPTIONS, devices=2, strategy="ddp_notebook")


def coloured(count: int, seed: int) -> Images:
    """Images that a network can learn: their class is their colour, and each is another."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    noisy = np.random.default_rng(9).integers(0, 256, (10, 1, 1, 3))[labels] + rng.integers(
        -20, 21, (count, 32, 32, 3)
    )
    return Images(np.uint8(np.clip(noisy, 0, 255)), labels)


def small_data(kind=CIFAR10DataModule, **settings) -> CIFAR10DataModule:
    splits = Splits(coloured(256, 0), coloured(51, 1), coloured(20, 2), "colours")
    return kind(batch_size=32, num_workers=0, seed=3, splits=splits, **settings)


# ---- split batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("seed", [None, 5])
def test_all_processes_together_load_the_batches_of_one(processes, seed):
    alone = shard_batches(100, 16, seed)
    parts = [shard_batches(100, 16, seed, rank, processes) for rank in range(processes)]
    assert [sorted(sum(batch, [])) for batch in zip(*parts, strict=True)] == [
        sorted(batch) for batch in alone
    ]
    assert sorted(sum(alone, [])) == list(range(100)) and [len(batch) for batch in alone] == [
        16
    ] * 6 + [4]
    assert (sum(alone, []) == list(range(100))) == (seed is None)


def test_a_batch_that_is_too_small_for_all_processes_is_refused():
    with pytest.raises(
        ValueError,
        match="one has fewer images than there are processes, 5; choose another BATCH_SIZE",
    ):
        shard_batches(100, 16, 0, 0, 5)
    assert shard_batches(0, 16) == []


def epoch(rank: int, processes: int, **settings) -> tuple[torch.Tensor, list[list[int]]]:
    """What one of the processes is given in an epoch.

    All its images, and the labels of each of its batches.
    """
    data = small_data(**settings)
    place = {
        "global_rank": rank,
        "world_size": processes,
        "strategy": SimpleNamespace(root_device="cpu"),
    }
    data.trainer = SimpleNamespace(current_epoch=1, **place)
    batches = list(data.train_dataloader())
    return torch.cat([images for images, _ in batches]), [labels.tolist() for _, labels in batches]


@pytest.mark.numeric
@pytest.mark.parametrize("kind", [CIFAR10DataModule, FastDataModule])
def test_two_processes_are_given_the_images_of_one(kind):
    # At most mirrored: an image is known by the sum of its pixels.
    same = {"kind": kind, "augmentation": Augmentation(0, 0)}
    (first, left), (second, right), (alone, both) = (
        epoch(0, 2, **same),
        epoch(1, 2, **same),
        epoch(0, 1, **same),
    )
    assert [sorted(a + b) for a, b in zip(left, right, strict=True)] == [
        sorted(labels) for labels in both
    ]
    sums, wanted = (
        images.double().sum((1, 2, 3)).sort().values
        for images in (torch.cat([first, second]), alone)
    )
    assert len(first) == len(second) == 128 and torch.allclose(sums, wanted, atol=1e-3)


@pytest.mark.parametrize("kind", [CIFAR10DataModule, FastDataModule])
def test_two_processes_do_not_augment_alike(kind, monkeypatch):
    """One image everywhere, of plain rows.

    Neither the order nor the mirroring tells the processes apart.
    """
    images = np.repeat(np.repeat(coloured(1, 0).images[:, :, :1], 32, axis=2), 256, axis=0)
    monkeypatch.setattr(
        "tests.test_devices.coloured", lambda count, _: Images(images[:count], np.zeros(count, int))
    )
    first, second = (epoch(rank, 2, kind=kind)[0] for rank in range(2))
    assert first.shape == second.shape and not torch.equal(first, second)


# ---- two processes, in earnest -------------------------------------------------------------------


def train_as_rank(
    tell: Callable[[str], None], root: Path, rank: int, port: int, dies: bool
) -> None:
    """Train as one of two processes of torchrun; note the images, kill itself if told.

    What it prints goes to a file.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_RUN_ID"] = "a test"
    rank_zero_only.rank = rank  # Lightning reads it when it is imported, which was before
    torch.set_num_threads(1)
    get, step = AlbumentationImageDataset.__getitems__, LitClassifier.training_step
    loaded = []

    def noted(self, indices):
        if len(self) == 256:
            loaded.append(list(map(int, indices)))
        return get(self, indices)

    def deadly(self, batch, index):
        if rank == 1 and dies and self.current_epoch == 1 and index == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, index)

    AlbumentationImageDataset.__getitems__, LitClassifier.training_step = noted, deadly
    options = RunOptions(3, precision="32-true", **resolve_placement(SWITCHES))
    with (root / f"printed{rank}").open("w") as file, contextlib.redirect_stdout(file):
        run = train(RECIPE, small_data(), root, options)
    (root / f"rank{rank}.json").write_text(json.dumps({"loaded": loaded, "metadata": run.metadata}))
    tell("finished")


def train_in_two(root: Path, dies: bool = False) -> tuple[list[bool], str]:
    """Train in two processes, of which the second may die.

    Returns whether each has finished, and what both printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [WarmProcess(train_as_rank, root, rank, port, dies) for rank in range(2)]
    finished = ["finished" in list(process) for process in ranks[::-1]][::-1]
    for process in ranks:
        process.kill()
    return finished, "".join((root / f"printed{rank}").read_text() for rank in range(2))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, str]:
    """A run of two processes: (its root, what it printed)."""
    root = tmp_path_factory.mktemp("two")
    finished, printed = train_in_two(root)
    assert finished == [True, True]
    return root, printed


def test_two_processes_see_every_image_once_per_epoch(two):
    first, second = (
        json.loads((two[0] / f"rank{rank}.json").read_text())["loaded"] for rank in range(2)
    )
    assert len(first) == len(second) == 4 * 8  # batches of 16 images each
    for epoch in range(4):
        part = slice(8 * epoch, 8 * epoch + 8)
        assert sorted(sum(first[part] + second[part], [])) == list(range(256))


def test_two_processes_log_once_and_write_one_set_of_checkpoints(two):
    root, printed = two
    (folder,) = root.glob("FastNet-*")
    assert [path.name for path in (folder / "logs").iterdir()] == ["version_0"]
    table = pd.read_csv(folder / "metrics.csv")
    assert table.dropna(subset="train_loss").epoch.tolist() == [0, 1, 2, 3]
    assert table.dropna(subset="lr_step").step.tolist() == list(
        range(16)
    )  # four steps of 64 images an epoch
    assert {path.name for path in folder.glob("*.ckpt")} == {
        "epoch002.ckpt",
        "epoch003.ckpt",
    }
    assert printed.count("epoch   4/4") == 1
    metadata = json.loads((folder / "finished.json").read_text())
    assert metadata["hardware"].startswith("2 processes")
    assert metadata == json.loads((root / "rank1.json").read_text())["metadata"]


@pytest.mark.numeric
def test_two_processes_learn_what_one_learns(two, tmp_path):
    alone = train(RECIPE, small_data(), tmp_path, OPTIONS)
    one, both = (
        pd.read_csv(alone.metrics_csv),
        pd.read_csv(next(two[0].glob("FastNet-*")) / "metrics.csv"),
    )
    one, both = (table.groupby("epoch").mean() for table in (one, both))
    assert (
        one.lr.tolist() == both.lr.tolist() and one.lr_step.tolist() == both.lr_step.tolist()
    )  # the same rates
    for table in (one, both):
        assert table.train_acc.iloc[-1] > 0.95 and table.val_acc.iloc[-1] > 0.8
    assert abs(one.train_loss - both.train_loss).max() < 0.1


@pytest.mark.numeric
def test_the_epoch_s_metrics_are_those_of_all_images(two):
    """Of 51 validation images one process has 26, the other 25.

    The accuracy is a multiple of 1/51 all the same.
    """
    _, table = weights_and_metrics(two[0])
    for values, images in ((table.val_acc, 51), (table.train_acc, 256)):
        assert np.allclose(values * images, (values * images).round(), atol=1e-3)


def test_after_one_of_two_is_killed_they_go_on_as_if_nothing_had_happened(
    two, tmp_path, capsys, faults
):
    finished, _ = train_in_two(tmp_path, dies=True)
    assert finished == [False, False]
    (folder,) = tmp_path.glob("FastNet-*")
    assert not (folder / "finished.json").exists() and (folder / "epoch000.ckpt").exists()
    shutil.copytree(tmp_path, tmp_path / "alone")
    finished, printed = train_in_two(tmp_path)
    assert finished == [True, True] and printed.count("continuing the interrupted run") == 1
    (weights, table), (wanted, whole) = weights_and_metrics(tmp_path), weights_and_metrics(two[0])
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    pd.testing.assert_frame_equal(table, whole, check_like=True)
    faults("one of two processes killed (SIGKILL)", 1, len(whole), len(table), "epochs")
    capsys.readouterr()
    alone = train(RECIPE, small_data(), tmp_path / "alone", OPTIONS)
    assert "continuing the interrupted run" in capsys.readouterr().out
    assert read_table(alone.metrics_csv).dropna(subset="lr_step").step.tolist() == [*range(16)]


def test_one_process_loads_what_two_have_trained(two, tmp_path, capsys, monkeypatch):
    """So does a notebook that could not have trained it."""
    monkeypatch.setattr(runs, "choose_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(runs, "kernel_shell", lambda: object())
    train(RECIPE, small_data(), shutil.copytree(two[0], tmp_path / "copy"), TWO_PROCESSES)
    assert "trained on 2 processes" in capsys.readouterr().out


# ---- in a notebook -------------------------------------------------------------------------------


@pytest.mark.numeric
def test_a_notebook_trains_on_two_devices_and_shows_each_epoch_once(two, tmp_path, monkeypatch):
    """After the kernel has computed something itself, as the notebook does before it trains.

    It computed in two threads, which a process that is forked from it no longer has.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    setup = (
        "from tests.test_devices import RECIPE, small_data\n"
        "from training.options import RunOptions\n"
        "from training.range_test import range_test\n"
        "from training.runs import train\n"
        "from training.settings import SWITCHES, resolve_placement\n"
        "print(len(range_test(RECIPE, small_data(), steps=3)))"
    )
    fit = (
        "placement = resolve_placement(SWITCHES | {'DEVICES': '2'})\n"
        "options = RunOptions(3, precision='32-true', **placement)\n"
        f"run = train(RECIPE, small_data(), {str(tmp_path)!r}, options)\n"
        "print(run.metadata['hardware'])"
    )
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in (setup, fit)]
    )
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(PROJECT)}}).execute()
    printed = "".join(output.get("text", "") for output in notebook.cells[1].outputs)
    assert [printed.count(f"epoch   {number}/4") for number in (1, 2, 3, 4)] == [
        1
    ] * 4 and "2 processes" in printed
    (weights, _), (wanted, _) = weights_and_metrics(tmp_path), weights_and_metrics(two[0])
    assert all(torch.allclose(weights[name], wanted[name], rtol=1e-2, atol=1e-3) for name in wanted)


def test_what_goes_wrong_in_one_of_the_processes_is_said_in_one_line(tmp_path, monkeypatch, faults):
    step = training.classifier.LitClassifier.training_step

    def bad(self, batch, index):
        images = batch[0] * float("nan") if self.global_rank == 1 else batch[0]
        return step(self, (images, batch[1]), index)

    monkeypatch.setattr(training.classifier.LitClassifier, "training_step", bad)
    with pytest.raises(
        RuntimeError, match=r"^models.errors.Diverged: the loss is nan at step 1, epoch 1"
    ):
        train(RECIPE, small_data(), tmp_path, TWO_PROCESSES)
    faults("a loss that is no number in one of two processes", 1)


def test_a_process_that_is_killed_is_said_in_one_line(tmp_path, monkeypatch, faults):
    def killed(self, *_):
        if self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(5)  # fails after the other one

    monkeypatch.setattr(training.classifier.LitClassifier, "training_step", killed)
    with pytest.raises(RuntimeError, match=r"^process 1 terminated with signal SIGKILL$"):
        train(RECIPE, small_data(), tmp_path, TWO_PROCESSES)
    faults("one of two processes killed", 1)


def test_a_gpu_of_several_without_memory_says_which_setting_to_halve(tmp_path, monkeypatch, faults):
    def full(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(training.classifier.LitClassifier, "training_step", full)
    with pytest.raises(
        RuntimeError, match="too small for batches of 32 images; set BATCH_SIZE to 16"
    ):
        train(RECIPE, small_data(), tmp_path, TWO_PROCESSES)
    faults("one of two GPUs out of memory (simulated)", 1)


NOT_HERE = [  # device, its number, whether in a notebook, asked for, answer
    ("cuda", 4, True, {"devices": 4}, "torchrun --nproc-per-node 4 -m training"),
    ("cuda", 1, True, {"devices": 2}, "expected DEVICES of at most 1, the GPUs here, got 2"),
    ("cuda", 1, True, {"strategy": "ddp_notebook"}, "cannot be forked; set STRATEGY"),
    ("cuda", 1, False, {"strategy": "ddp_notebook", "devices": "auto"}, "cannot be forked"),
    ("cpu", 0, True, {"strategy": "ddp"}, "expected STRATEGY 'auto' in a notebook, got 'ddp'"),
    ("mps", 1, False, {"devices": 2}, "expected DEVICES of at most 1"),
]


@pytest.mark.parametrize(("device", "count", "in_notebook", "asked", "answer"), NOT_HERE)
def test_devices_that_cannot_train_from_here_are_refused_before_a_run_begins(
    tmp_path, monkeypatch, device, count, in_notebook, asked, answer
):
    monkeypatch.setattr(runs, "choose_device", lambda: torch.device(device))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(runs, "kernel_shell", lambda: object() if in_notebook else None)
    with pytest.raises(ValueError, match=answer):
        train(RECIPE, small_data(), tmp_path, RunOptions(**asked))
    assert not any(tmp_path.iterdir())


def test_a_system_without_forks_is_sent_to_torchrun(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(ValueError, match="Windows, cannot be forked"):
        train(RECIPE, small_data(), tmp_path, TWO_PROCESSES)


# ---- the script ----------------------------------------------------------------------------------


TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["python", "torchrun"])
def test_the_script_trains_by_the_notebook_s_switches(tmp_path, launcher):
    """Without torchrun, Lightning starts the second process.

    CIFAR-10 is stood in for by a few images.
    """
    script = tmp_path / "small.py"
    script.write_text(
        "import training.__main__ as m, tests.test_devices as t\n"
        "m.load_splits = lambda *_: t.small_data().splits\n"
        "m.main()"
    )
    switches = {
        "ARCH": "FastNet",
        "EPOCHS": "1",
        "BATCH_SIZE": "250",
        "CHECKPOINT_DIR": str(tmp_path),
        "DEVICES": "2",
    }
    environment = {f"ERA_{name}": value for name, value in switches.items()} | {
        "PYTHONPATH": str(PROJECT)
    }
    environment |= {"SMOKE_TEST": ""}  # a smoke test keeps its checkpoints elsewhere
    done = subprocess.run(
        [sys.executable, *launcher, script],
        cwd=PROJECT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (finished,) = tmp_path.glob("FastNet-1-*/finished.json")
    metadata = json.loads(finished.read_text())
    assert metadata["batch_size"] == 250 and metadata["hardware"].startswith("2 processes")


@pytest.mark.parametrize("fresh", [False, True])
def test_the_other_processes_train_as_the_first_one_began(
    tmp_path, monkeypatch, tiny_splits, fresh
):
    """The first process may be on a machine with another CPU, and choose another precision."""
    monkeypatch.setattr(resume, "native_precisions", lambda: ["32-true", "bf16-mixed"])
    recipe, options = Recipe("ResNet18", batch_size=32), RunOptions(fresh=fresh)
    data, folder = build_datamodule(recipe, tiny_splits, 0), tmp_path / "run"
    if fresh:  # there is a finished run, which the first process sets aside
        monkeypatch.setattr(resume, "choose_precision", lambda: "32-true")
        resume.start_or_resume(folder, {"precision": "auto"}, recipe, data, options)
        write_json(folder / "finished.json", {})
    found, waits, wait = [], threading.Event(), resume.wait_until_begun
    monkeypatch.setattr(resume, "wait_until_begun", lambda *given: waits.set() or wait(*given))

    def start_as(rank: int, precision: str) -> None:
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        monkeypatch.setattr(resume, "choose_precision", lambda: precision)
        found.append(resume.start_or_resume(folder, {"precision": "auto"}, recipe, data, options))

    other = threading.Thread(target=start_as, args=(1, "32-true"))
    other.start()
    assert waits.wait(60)
    start_as(0, "bf16-mixed")
    other.join(60)
    assert found[0] == found[1] and found[0]["resolved"]["precision"] == "bf16-mixed"
    assert len(list(tmp_path.glob("run-before-*"))) == fresh


def test_processes_that_do_not_see_the_first_one_begin_end(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "START_PATIENCE_SECONDS", 0.2)
    with pytest.raises(TrainingFailed, match="did not begin a run in .*run, which all of them"):
        wait_until_begun(tmp_path / "run", None)


def test_the_settings_reach_the_trainer(monkeypatch, tmp_path):
    given = {}

    class Trainer(runs.pl.Trainer):
        def __init__(self, **settings):
            given.update(settings)
            raise InterruptedError

    monkeypatch.setattr(runs.pl, "Trainer", Trainer)
    recipe = dataclasses.replace(RECIPE, epochs=1)
    options = dataclasses.replace(OPTIONS, devices=4, num_nodes=3, strategy="ddp")
    with pytest.raises(InterruptedError):
        train(recipe, small_data(), tmp_path, options)
    assert (given["devices"], given["num_nodes"], given["strategy"]) == (4, 3, "ddp")
    assert given["use_distributed_sampler"] is False  # the loaders split the batches themselves
    with pytest.raises(InterruptedError):
        train(recipe, small_data(), tmp_path / "default", RunOptions(precision="32-true"))
    assert given["devices"] == 1  # a benchmark's training neither starts nor waits for others

"""Every file that is read, changed at random, gives a named error or a correct answer.

Never a crash, never another network. Checksums are made right again after each change, so that the
parser is reached as well.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cifar10.download import md5, verify
from models.bundle import load_bundle, sha256, sha256_of_keys
from models.errors import ProjectError
from models.registry import build
from tests.faults import FAULTS
from tools import publish
from training import budget
from training.checkpoints import load_checkpoint
from training.classifier import LitClassifier
from training.files import read_json
from training.history import read_metrics
from training.run_folder import METADATA_KEYS
from training.settings import SWITCHES, resolve

EXAMPLES = 500 if os.environ.get("FAULTS") == "long" else 40
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat", "zero"]),
        st.floats(0, 1),
        st.integers(1, 255),
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[tuple[str, float, int]]) -> bytes:
    """The content with bytes flipped, cut off, put in, repeated or made zero, at these places."""
    content = bytearray(content)
    for kind, place, value in edits:
        at = int(place * max(0, len(content) - 1))
        if kind == "flip" and content:
            content[at] ^= value
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = bytes([value])
        elif kind == "repeat":
            content[at:at] = content[at : at + value]
        elif content:
            content[at : at + value] = bytes(len(content[at : at + value]))
    return bytes(content)


def refused_or(what: str, read: Callable[[], object], check: Callable[[object], None]) -> None:
    """Read; an error of the project's or an OSError names what is wrong, any other fails.

    An answer has to be right.
    """
    fault = FAULTS[f"changed at random: {what}"]
    fault.injected += 1
    try:
        answer = read()
    except (ProjectError, OSError) as problem:
        assert str(problem)
    else:
        check(answer)
    fault.survived += 1


def test_the_edits_change_what_they_should():
    assert (
        edited(b"abcd", [("cut", 0.5, 1)]) == b"a"
        and edited(b"abcd", [("zero", 0, 2)]) == b"\0\0cd"
    )
    assert (
        edited(b"abcd", [("flip", 1, 1)]) == b"abce"
        and edited(b"ab", [("repeat", 0, 2)]) == b"abab"
    )


@pytest.fixture(scope="module")
def batch() -> bytes:
    """A CIFAR-10 batch of three images, as the original files are written."""
    import pickle

    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    return pickle.dumps(
        {b"batch_label": b"one", b"labels": [1, 2, 9], b"data": pixels, b"filenames": [b"a"] * 3}, 2
    )


@FUZZ
@given(edits=EDITS)
def test_a_batch(batch, tmp_path, edits):
    """Its md5 is compared before it is unpickled."""
    (tmp_path / "batch").write_bytes(batch)
    right = md5(tmp_path / "batch")
    (tmp_path / "batch").write_bytes(edited(batch, edits))

    def check(_):
        assert (tmp_path / "batch").read_bytes() == batch

    refused_or("a batch", lambda: verify(tmp_path, {"batch": right}), check)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small checkpoint as Lightning writes it."""
    classifier = LitClassifier(network="FastNet")
    path = tmp_path_factory.mktemp("checkpoint") / "epoch000.ckpt"
    content = {"state_dict": classifier.state_dict(), "hyper_parameters": dict(classifier.hparams)}
    torch.save(content | {"pytorch-lightning_version": "2.6.6", "epoch": 0}, path)
    return path


@settings(FUZZ, max_examples=max(15, EXAMPLES // 4) if EXAMPLES < 500 else EXAMPLES)
@given(edits=EDITS)
def test_a_checkpoint_whose_checksum_is_right(checkpoint, tmp_path, edits):
    (tmp_path / "epoch000.ckpt").write_bytes(edited(checkpoint.read_bytes(), edits))
    shapes = shapes_of(build("FastNet"))

    def check(answer):
        classifier, epochs = answer
        assert (
            classifier.recipe.network == "FastNet"
            and shapes_of(classifier.model) == shapes
            and epochs == 1
        )

    refused_or(
        "a checkpoint", lambda: load_checkpoint(tmp_path / "epoch000.ckpt", "FastNet"), check
    )


@pytest.fixture(scope="module")
def bundle(exported_space, tmp_path_factory) -> Path:
    return shutil.copytree(exported_space, tmp_path_factory.mktemp("fuzz") / "space")


def with_sums(folder: Path, meta: object) -> None:
    """Write model.json, with right checksums if it can have any."""
    if isinstance(meta, dict):
        meta["sha256"] |= {
            "weights": sha256(folder / "model.safetensors"),
            "keys": sha256_of_keys(meta),
        }
    (folder / "model.json").write_text(json.dumps(meta))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 100) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@FUZZ
@given(data=st.data())
def test_a_description_whose_checksum_is_right(bundle, tmp_path, data):
    """One value of model.json becomes any other."""
    content = (bundle / "model.json").read_text()
    meta = json.loads(content)
    key = data.draw(st.sampled_from(sorted(set(meta) - {"sha256"})))
    old, meta[key] = meta[key], data.draw(JSON)
    try:
        with_sums(bundle, meta)
        refused_or(
            "a value of model.json",
            lambda: load_bundle(bundle),
            lambda answer: check_bundle(*answer, key, old),
        )
    finally:
        (bundle / "model.json").write_text(content)


def same(first: object, second: object) -> None:
    assert first == second


def shapes_of(model) -> dict:
    return {name: tuple(values.shape) for name, values in model.state_dict().items()}


def check_bundle(model, meta: dict, key: str, old: object) -> None:
    """What was read despite the change must be usable by the app in the same way."""
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, len(meta["classes"]))
    assert meta["image_size"] == 32 and len(meta["mean"]) == len(meta["std"]) == 3
    assert (
        all(isinstance(name, str) for name in meta["classes"]) and len(set(meta["classes"])) == 10
    )
    assert meta["temperature"] is None or 0 < meta["temperature"] < 1e6
    assert meta["confidence_threshold"] is None or 0 <= meta["confidence_threshold"] <= 1
    assert [stage["name"] for stage in meta["stages"]] == [stage.name for stage in model.stages()]
    assert isinstance(meta["training"], dict)
    if key in ("architecture", "source"):
        assert meta[key] == old


@FUZZ
@given(edits=EDITS)
def test_a_description_with_changed_bytes(bundle, edits):
    content = (bundle / "model.json").read_bytes()
    try:
        (bundle / "model.json").write_bytes(edited(content, edits))
        refused_or(
            "model.json",
            lambda: load_bundle(bundle),
            lambda answer: same(json.loads(content), answer[1]),
        )
    finally:
        (bundle / "model.json").write_bytes(content)


@settings(FUZZ, max_examples=max(15, EXAMPLES // 4) if EXAMPLES < 500 else EXAMPLES)
@given(edits=EDITS)
def test_weights_whose_checksum_is_right(bundle, edits):
    description, weights = (
        (bundle / "model.json").read_text(),
        (bundle / "model.safetensors").read_bytes(),
    )
    shapes = shapes_of(build(json.loads(description)["architecture"]))
    try:
        (bundle / "model.safetensors").write_bytes(edited(weights, edits))
        with_sums(bundle, json.loads(description))
        refused_or(
            "model.safetensors",
            lambda: load_bundle(bundle),
            lambda answer: same(shapes, shapes_of(answer[0])),
        )
    finally:
        (bundle / "model.json").write_text(description)
        (bundle / "model.safetensors").write_bytes(weights)


@FUZZ
@given(edits=EDITS)
def test_facts_of_a_finished_run(tmp_path, edits):
    metadata = {
        "epochs": 3,
        "seconds": 1.5,
        "hardware": "CPU",
        "train_images": 64,
        "data": "CIFAR-10",
        "val_acc": 0.5,
        "weights_sha256": "0" * 64,
    }
    path = tmp_path / "finished.json"
    path.write_text(json.dumps(metadata))
    assert read_json(path, METADATA_KEYS) == metadata
    path.write_bytes(edited(json.dumps(metadata).encode(), edits))

    def check(found):
        assert found is None or set(found) >= METADATA_KEYS

    refused_or("finished.json", lambda: read_json(tmp_path / "finished.json", METADATA_KEYS), check)


@FUZZ
@given(edits=EDITS)
def test_results_of_a_run(tmp_path, edits):
    content = edited(b'{"data": "CIFAR-10", "test_acc": 0.93}', edits)
    (tmp_path / "results.json").write_bytes(content)
    refused_or(
        "results.json",
        lambda: publish.read_results(tmp_path),
        lambda answer: same(not answer or answer == json.loads(content), True),
    )


@FUZZ
@given(edits=EDITS)
def test_the_table_of_a_run(tmp_path, edits):
    table = pd.DataFrame(
        {"epoch": [0, 1], "step": [1, 3], "train_loss": [2.0, 1.0], "val_acc": [0.4, 0.5]}
    )
    folder = tmp_path / "logs/version_0"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_bytes(edited(table.to_csv(index=False).encode(), edits))

    def check(answer):
        assert answer.empty or pd.api.types.is_numeric_dtype(answer.epoch)

    refused_or("metrics.csv", lambda: read_metrics(tmp_path / "logs"), check)


@pytest.fixture
def pace(monkeypatch):
    """A CPU of known speed: `ARCH = "auto"` times none."""
    monkeypatch.setattr(budget, "seconds_per_batch", lambda *_: 1.0)


@pytest.mark.usefixtures("plain_environment", "pace")
@FUZZ
@given(name=st.sampled_from(sorted(SWITCHES)), value=JSON)
def test_a_setting_of_the_notebook(name, value):
    def check(settings):
        assert type(value) in (type(SWITCHES[name]), int)  # an OPACITY may be a whole number
        assert (
            settings.recipe.epochs >= 1
            and 1 <= settings.num_samples <= 20
            and 0 <= settings.opacity <= 1
        )

    refused_or("a switch of the notebook", lambda: resolve(SWITCHES | {name: value}), check)

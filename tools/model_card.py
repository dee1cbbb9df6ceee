"""Writes the model card of a network that was trained on CIFAR-10, with its measured results."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from models.errors import InvalidValue
from models.stage import Network
from training.recipes import MEASURED

TEXT = Path(__file__).with_name("model_card.md")
DATASET = "uoft-cs/cifar10"  # CIFAR-10 on Hugging Face


def measured_ece(meta: dict) -> float | None:
    """Look up the expected calibration error of a network on the test images.

    Args:
        meta: the keys of its model.json.

    Returns:
        The ECE of the benchmark's run with the same recipe, number of training images and seed,
        which must have the same accuracy as well: otherwise it has other weights. None if there is
        no such run, or its ECE is not measured.
    """
    training = meta["training"]
    wanted = (training.get("recipe"), training["train_images"], None)
    for row in json.loads(MEASURED.read_text(encoding="utf-8")):
        if (row["recipe"], row["train_images"], row["without"]) == wanted:
            for seed, run in zip(row["seeds"], row["runs"], strict=True):
                if (seed, run["single"]) == (training["seed"], meta["test_acc"]):
                    return run["ece"]
    return None


def eval_results(meta: dict) -> list[EvalResult]:
    """List what was measured on the test split of CIFAR-10, as fractions."""
    found = [
        ("accuracy", "Accuracy", meta["test_acc"]),
        ("accuracy", "Accuracy with TTA", meta["test_acc_tta"]),
        ("expected_calibration_error", "ECE", measured_ece(meta)),
    ]
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=DATASET,
            dataset_name="CIFAR-10",
            dataset_split="test",
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for kind, name, value in found
        if value is not None
    ]


def model_card(model: Network, meta: dict, repo_id: str) -> ModelCard:
    """Write the model card of a network.

    Args:
        model: the network.
        meta: the keys of its model.json.
        repo_id: 'user/name' of the repository on Hugging Face, which the card's code downloads.

    Raises:
        ValueError: if the network was trained on something else than CIFAR-10.
    """
    if meta["training"]["data"] != "CIFAR-10":
        got = meta["training"]["data"]
        raise InvalidValue(f"expected a network trained on CIFAR-10 for a model card, got {got!r}")
    results = eval_results(meta)
    data = ModelCardData(
        license="mit",
        library_name="pytorch",
        pipeline_tag="image-classification",
        datasets=[DATASET],
        metrics=["accuracy"],
        tags=["cifar10", "grad-cam", "education"],
        model_name=meta["architecture"],
        eval_results=results,
    )
    rows = [f"| {one.metric_name} | {100 * one.metric_value:.2f} % |" for one in results]
    values = {
        **meta,
        "classes": ", ".join(meta["classes"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "minutes": meta["training"]["seconds"] / 60,
        "results": "\n".join(rows),
        "repo_id": repo_id,
    }
    text = TEXT.read_text(encoding="utf-8").format(**values)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")

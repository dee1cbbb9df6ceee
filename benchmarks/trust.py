"""What takes minutes to compute about the committed network: `python -m benchmarks.trust`.

It measures, on the first test images: the heatmaps while the layers become random, deletion and
insertion in four orders, and the accuracy on corrupted images. It writes
benchmarks/results/trust.json, from which the notebook draws; `weights` in it is the checksum of the
network's weights. CIFAR-10 is read from DATA_DIR.
"""

import json
from pathlib import Path

import pandas as pd

from benchmarks.accuracy import RESULTS
from dataload import CLASSES, Images, load_splits, normalize
from evaluation import robustness, saliency_checks
from models.bundle import load_bundle
from models.stage import Network
from tools.project import SPACE
from training.console import command_line
from training.files import write_whole
from training.hardware import choose_device, hardware
from training.switches import data_folder

HEATMAPS, CORRUPTED = 100, 1000  # images


def measure(model: Network, test: Images, heatmaps: int, corrupted: int) -> dict:
    """Compute all that the notebook draws from the file.

    Args:
        model: the network.
        test: the test images, of which the first ones are used.
        heatmaps: images whose heatmaps are tested.
        corrupted: images that are corrupted.

    Returns:
        cascade, deletion, insertion, robustness and predictions, as JSON can hold them.
    """
    device = str(choose_device())
    model, images = model.eval().to(device), normalize(test.images[:heatmaps])
    said = robustness.corrupted_predictions(model, device, test.images[0], CLASSES)
    table = robustness.corrupted_accuracy(model, device, test.first(corrupted))
    curves = {
        name: saliency_checks.curves_to_json(compute(model, images))
        for name, compute in (
            ("deletion", saliency_checks.deletion),
            ("insertion", saliency_checks.insertion),
        )
    }
    cascade = saliency_checks.cascading_randomization(model, images)
    tables = {"robustness": table.to_dict("list"), "predictions": said.to_dict("list")}
    return {"cascade": cascade.to_json(), **curves, **tables}


def read(path: Path = RESULTS / "trust.json") -> dict:
    """Read what `main` has written, as evaluation's drawing functions take it.

    Returns:
        cascade, a Cascade; deletion, insertion, robustness and predictions, tables; weights, the
        checksum of the network's weights; images and corrupted, how many images were used.
    """
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["cascade"] = saliency_checks.Cascade.from_json(stored["cascade"])
    for name in ("deletion", "insertion"):
        stored[name] = saliency_checks.curves_from_json(stored[name])
    for name in ("robustness", "predictions"):
        stored[name] = pd.DataFrame(stored[name]).rename_axis("strength")
    return stored


def main() -> None:
    """Measure the committed network and write the file."""
    parser = command_line(__doc__)
    parser.add_argument("--space", type=Path, default=SPACE, help="folder of the network")
    parser.add_argument("--images", type=int, default=HEATMAPS, help="whose heatmaps are tested")
    parser.add_argument("--corrupted", type=int, default=CORRUPTED, help="images to corrupt")
    parser.add_argument("--out", type=Path, default=RESULTS / "trust.json")
    args = parser.parse_args()
    model, meta = load_bundle(args.space)
    test = load_splits(data_folder()).test
    found = measure(model, test, args.images, args.corrupted)
    about = {"weights": meta["sha256"]["weights"], "machine": hardware()}
    about |= {"images": args.images, "corrupted": args.corrupted}
    write_whole(args.out, json.dumps(about | found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()

"""The functions that the lesson began with, and the export of a trained network into space/."""

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor

from cifar10.images import CLASSES
from evaluation.bundle_check import check_bundle
from evaluation.curves import plot_metrics
from evaluation.drawing import Plot, save_figure
from evaluation.errors import MAX_TILES, Misclassified, draw_tiles, get_misclassified_data
from evaluation.gradcam import display_gradcam_output
from models import bundle
from models.registry import FOLDER, source_files, source_of
from models.stage import Network
from training.files import write_json

__all__ = [
    "Plot",
    "display_gradcam_output",
    "export_to_space",
    "get_misclassified_data",
    "load_app",
    "plot_metrics",
    "refresh_sources",
    "space_files",
]

# ---- what a Space consists of --------------------------------------------------------------------

APP_FOLDER = Path(__file__).resolve().parent / "space"
APP_FILES = (
    "app.py",
    "answers.py",
    "batches.py",
    "checks.py",
    "classifier.py",
    "drawing.py",
    "pictures.py",
    "temporary_files.py",
    "style.css",
    "head.html",
    "about.md",
    "README.md",
    "requirements.txt",
)
EXAMPLES = (*(f"{name}.png" for name in CLASSES), "CREDITS.md", "LICENSE-*.txt")  # in examples/


def app_files(space: Path) -> list[str]:
    """List the files of the app, which no training changes, relative to the folder of a Space."""
    examples = (path for name in EXAMPLES for path in (space / "examples").glob(name))
    files = [path for path in (*(space / name for name in APP_FILES), *examples) if path.is_file()]
    return sorted(path.relative_to(space).as_posix() for path in files if not path.is_symlink())


def space_files(space: Path, meta: dict) -> list[str]:
    """List all files of a Space, those of the app and of its bundle; others are their owner's.

    Args:
        space: the folder.
        meta: the keys of its model.json.

    Returns:
        Names relative to the folder, sorted.
    """
    return sorted([*app_files(space), *bundle.bundle_files(meta)])


# ---- writing a bundle ----------------------------------------------------------------------------


def write_weights(model: Network, path: Path) -> None:
    """Write the weights of a network in fp16."""
    halved = {
        name: (w.half() if w.is_floating_point() else w).contiguous()
        for name, w in model.cpu().state_dict().items()
    }
    save_file(halved, path)
    path.chmod(0o644)  # safetensors makes it readable for its owner only


def copy_sources(source: Path, folder: Path) -> None:
    """Copy the file of a network's class, and the sources that it needs, into a new bundle."""
    (folder / "models").mkdir()
    for path in source_files(source):
        shutil.copyfile(path, folder / "models" / path.name)


def tile_metadata(sample: Misclassified) -> dict:
    """Describe a tile of misclassified.png as misclassified.json does."""
    probabilities = [round(prob, 6) for prob in sample.probs.tolist()]
    return {"true": sample.label, "predicted": sample.pred, "probabilities": probabilities}


def write_bundle(
    folder: Path,
    model: Network,
    meta: dict,
    misclassified: Sequence[Misclassified],
    inv_normalize: Callable[[Tensor], Tensor],
    confusion: Figure,
) -> dict:
    """Write everything of a Space that training decides into an empty folder.

    Arguments, and the keys that are returned, are those of `export_to_space`.
    """
    source = source_of(model)
    copy_sources(source, folder)
    write_weights(model, folder / bundle.WEIGHTS)
    draw_tiles(misclassified, inv_normalize).save(folder / "misclassified.png", optimize=True)
    tiles = [tile_metadata(sample) for sample in misclassified[:MAX_TILES]]
    write_json(folder / "misclassified.json", tiles)
    save_figure(confusion, folder / "confusion_matrix.png")
    stages = [{"name": stage.name, "size": stage.size} for stage in model.stages()]
    meta = meta | {"architecture": type(model).__name__, "source": source.name, "stages": stages}
    # As when read: lists for tuples, plain numbers for those of NumPy and torch.
    return seal_bundle(folder, json.loads(json.dumps(meta, default=float)))


def seal_bundle(folder: Path, meta: dict) -> dict:
    """Write model.json, with the checksums of all other files of a bundle.

    Args:
        folder: of the bundle.
        meta: the keys of model.json; checksums among them are replaced.

    Returns:
        All keys of model.json.
    """
    apart = (bundle.WEIGHTS, "model.json")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in apart)
    sums = {
        "weights": bundle.sha256(folder / bundle.WEIGHTS),
        "keys": bundle.sha256_of_keys(meta),
        "files": {path.relative_to(folder).as_posix(): bundle.sha256(path) for path in files},
    }
    meta = meta | {"sha256": sums}
    bundle.check_schema(meta, folder / "model.json")
    write_json(folder / "model.json", meta)
    return meta


# ---- the export ----------------------------------------------------------------------------------


def copy_app(folder: Path) -> None:
    """Copy the files of the app into another folder."""
    for name in app_files(APP_FOLDER):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(APP_FOLDER / name, folder / name)


def export_to_space(
    space: str | Path,
    model: Network,
    meta: dict,
    misclassified: Sequence[Misclassified],
    inv_normalize: Callable[[Tensor], Tensor],
    confusion: Figure,
) -> dict:
    """Write the bundle of a trained network, and the project's app, into the folder of a Space.

    The new bundle is written to a folder of its own, then loaded and run in a process that has
    nothing else, and only then replaces the old one, in one step: see models/bundle.py. Files that
    belong neither to the bundle nor to the app stay.

    Args:
        space: the folder; it is created if it does not exist.
        model: the network; it is put into eval mode and moved to the CPU.
        meta: the keys of model.json that are not known here: classes, mean, std, image_size,
            temperature, confidence_threshold, test_acc, test_acc_tta, training.
        misclassified: test images, of which the first 50 are shown.
        inv_normalize: normalised (3, H, W) -> [0, 1].
        confusion: the figure of the confusion matrix.

    Returns:
        The keys of model.json.

    Raises:
        ValueError: if the bundle cannot be loaded or gives other logits; nothing is changed then.
    """
    space, model = Path(space), model.eval()
    with bundle.new_bundle(space) as folder:
        written = write_bundle(folder, model, meta, misclassified, inv_normalize, confusion)
        check_bundle(folder, model, written["image_size"])
        if space.resolve() != APP_FOLDER:
            copy_app(folder)
    return written


def refresh_sources(space: str | Path) -> dict:
    """Replace the sources of a Space by the project's, after a change that keeps the logits.

    Args:
        space: the folder.

    Returns:
        The keys of model.json.

    Raises:
        ValueError: if the network gives other logits with the new sources; nothing is changed then.
    """
    space = Path(space)
    model, meta = bundle.load_bundle(space)
    with bundle.new_bundle(space) as folder:
        copy_sources(FOLDER / meta["source"], folder)
        for name in (bundle.WEIGHTS, *bundle.PICTURES):
            shutil.copyfile(space / name, folder / name)
        written = seal_bundle(folder, meta)
        check_bundle(folder, model, meta["image_size"])
    return written


# ---- serving it ----------------------------------------------------------------------------------


@contextlib.contextmanager
def imports_from_folder(folder: Path) -> Iterator[None]:
    """Let the modules in a folder be imported within the block, as they are in it now."""
    names = [path.stem for path in folder.glob("*.py")]
    for name in names:
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)


def load_app(space: str | Path) -> ModuleType:
    """Load the app of a Space anew, with the network and the sources that are in its folder now.

    `import app` would return the first one for as long as Python runs.
    `load_app(space).serve()` serves it.
    """
    space = Path(space).resolve()
    _, contents = bundle.read_bundle(space)
    loader = SourceFileLoader("space_app", str(space / "app.py"))
    spec = ModuleSpec(loader.name, loader, origin=loader.path)
    spec.has_location = True  # the app needs its __file__
    app = module_from_spec(spec)
    with imports_from_folder(space), bundle.imports_from_bundle(space, contents):
        loader.exec_module(app)
    return app

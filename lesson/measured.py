"""Measurements that need not be repeated, because the committed network has had them."""

from torch.utils.data import DataLoader

from evaluation.predict import accuracy, predict
from models.stage import Network
from training.run_folder import weights_sha256


def same_weights(first: Network, second: Network) -> bool:
    """Tell whether two networks have the same names and values of weights."""
    return weights_sha256(first.state_dict()) == weights_sha256(second.state_dict())


def tta_accuracy(
    model: Network, device: str, loader: DataLoader, known: tuple[Network, dict] | None
) -> float:
    """Return the accuracy with test-time augmentation, which costs six predictions of each image.

    Args:
        model: the network.
        device: where to compute.
        loader: of the test images.
        known: a network whose accuracy on the same images was measured before, and the keys of its
            model.json; None if there is none.

    Returns:
        A fraction: the one in model.json if the weights are the same, else it is measured.
    """
    if known and known[1]["test_acc_tta"] is not None and same_weights(model, known[0]):
        return known[1]["test_acc_tta"]
    return accuracy(*predict(model, device, loader, tta=True))

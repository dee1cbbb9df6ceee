"""Whitening: filters of a first convolution that are computed from the images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Limits the amplification of directions with little variance, which are mostly noise.
LEAST_VARIANCE = 5e-4
PART = 500  # images at a time: the patches of all would need much memory


@torch.no_grad()
def whiten(conv: nn.Conv2d, images: Tensor) -> None:
    """Set the filters of a convolution so that their outputs are decorrelated.

    They become the eigenvectors of the second moment of image patches, each divided by the root of
    its eigenvalue, then the negatives of these. Source: arXiv:2404.00498.

    Args:
        conv: with filters (2 * 3 * k * k, 3, k, k).
        images: normalised training images, (N, 3, 32, 32).
    """
    side, count = conv.kernel_size[0], conv.weight[0].numel()
    moment = torch.zeros(count, count, dtype=torch.double)
    for part in images.split(PART):
        patches = F.unfold(part.cpu(), side).transpose(1, 2).reshape(-1, count).double()
        moment += patches.T @ patches
    moment /= len(patches) / len(part) * len(images)  # the number of all patches
    variances, directions = torch.linalg.eigh(moment)  # the smallest first
    filters = (directions / (variances + LEAST_VARIANCE).sqrt()).T.flip(0)
    filters = filters.reshape(count, *conv.weight.shape[1:])
    conv.weight.copy_(torch.cat([filters, -filters]))

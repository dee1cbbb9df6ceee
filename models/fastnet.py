"""FastNet: about 94 % on CIFAR-10 in eight epochs, for machines without a GPU.

In the family of Keller Jordan's airbench94 (arXiv:2404.00498): a stem that is computed from the
data instead of learned, then three groups of two convolutions. No residual sums: a network this
shallow learns without them if its convolutions begin as the identity. 1,972,792 parameters, 118
million multiply-adds per image.

Takes normalised images (N, 3, 32, 32) and returns logits (N, num_classes). Nothing works in place,
for Grad-CAM.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.stage import Stage, check_images

STEM = 24  # filters: the 12 directions in which 2x2 patches of 3 colours vary, and their negatives


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm whose scale stays 1.

    What follows can scale, and only the bias is left to learn, quickly.
    """
    norm = nn.BatchNorm2d(channels, eps=1e-12)
    norm.weight.requires_grad_(False)
    return norm


def dirac_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """3x3 convolution whose first filters pass their input on unchanged, so the signal gets through from the start."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:in_channels])
    return conv


class Group(nn.Sequential):
    """(N, in, S, S) -> (N, out, S // 2, S // 2).

    Pooling comes early: it quarters the work of all that follows.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            dirac_conv(in_channels, out_channels),
            nn.MaxPool2d(2),
            batch_norm(out_channels),
            nn.GELU(),
            dirac_conv(out_channels, out_channels),
            batch_norm(out_channels),
            nn.GELU(),
        )


class FastNet(nn.Module):
    """Logits of normalised images: (N, 3, 32, 32) -> (N, num_classes).

    ValueError for another shape.

    In training mode also (N, 3, 24, 24), for a start at low resolution.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(3, STEM, 2)  # (N, 24, 31, 31); see whiten
        self.stem.weight.requires_grad_(False)
        self.group1 = Group(STEM, 64)  #     (N,  64, 15, 15)
        self.group2 = Group(64, 256)  #      (N, 256,  7,  7)
        self.group3 = Group(256, 256)  #     (N, 256,  3,  3)
        self.head = nn.Linear(256, num_classes, bias=False)
        nn.init.normal_(
            self.head.weight, std=1 / 256
        )  # small logits: the first steps are not thrown far

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Make the stem from normalised images (N, 3, 32, 32): what it returns has uncorrelated channels.

        Its filters are the eigenvectors of the patches' covariance, each divided by the deviation along it.
        """
        patches = F.unfold(images, 2).transpose(1, 2).reshape(-1, 12).double()
        values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
        # 5e-4 keeps the directions of hardly any variance, which are mostly noise, from being blown
        # up.
        filters = (vectors / (values + 5e-4).sqrt()).T.flip(0).reshape(12, 3, 2, 2)
        self.stem.weight.copy_(torch.cat([filters, -filters]))

    def stages(self) -> list[Stage]:
        """The four maps, finest first.

        The last, before the pooling over the whole map, is the default for Grad-CAM.
        """
        sizes = {"stem": 31, "group1": 15, "group2": 7, "group3": 3}
        return [Stage(name, getattr(self, name), size) for name, size in sizes.items()]

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.training)
        x = F.gelu(self.stem(images))
        x = self.group3(self.group2(self.group1(x)))
        return self.head(x.amax((2, 3)))

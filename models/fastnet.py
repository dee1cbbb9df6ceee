"""FastNet: about 93 % on CIFAR-10 in seven epochs, for machines without a GPU.

In the family of Keller Jordan's airbench94 (arXiv:2404.00498): a whitening layer whose filters are
computed from the data instead of learned, then three groups of two convolutions. There are no
residual sums: so shallow a network trains without them. Its convolutions begin as the identity.
1,972,792 parameters, 105 million multiply-adds per image.

No tensor operation works in place: Grad-CAM keeps the tensors that the stages return.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.stage import Network, Stage, check_images

STEM = 24  # filters: the 12 principal directions of 2x2 patches in 3 colours, and their negatives


class PooledConv(nn.Conv2d):
    """A 3x3 convolution that computes only what a 2x2 pooling behind it reads.

    The pooling leaves out the last of an odd number of rows and of columns. So this maps
    (N, in, S, S) to (N, out, S - 1, S - 1) where S is odd, and keeps an even S. All sides in this
    network are odd: that saves a tenth of its work.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Convolve with a border of zeros, on the right and below only where it is read."""
        right, below = (1 - side % 2 for side in (images.shape[3], images.shape[2]))
        return F.conv2d(F.pad(images, (1, right, 1, below)), self.weight)


def dirac_conv(in_channels: int, out_channels: int, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    """Return a 3x3 convolution of a kind, with identity (Dirac) initialisation.

    Its first in_channels filters pass their input on unchanged; the others are random.
    """
    conv = kind(in_channels, out_channels, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:in_channels])
    return conv


class Group(nn.Sequential):
    """Two convolutions that halve the feature map: (N, in, S, S) -> (N, out, S // 2, S // 2).

    Pooling comes early: all layers behind it have a quarter of the work.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            dirac_conv(in_channels, out_channels, PooledConv),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(out_channels, eps=1e-12),
            nn.GELU(),
            dirac_conv(out_channels, out_channels),
            nn.BatchNorm2d(out_channels, eps=1e-12),
            nn.GELU(),
        )


class FastNet(Network):
    """A network of a whitening layer and three groups, for fast training.

    Args:
        num_classes: the number of logits.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(3, STEM, 2)  # (N, 24, 31, 31); random until training whitens it
        self.stem.weight.requires_grad_(False)
        self.group1 = Group(STEM, 64)  #     (N,  64, 15, 15)
        self.group2 = Group(64, 256)  #      (N, 256,  7,  7)
        self.group3 = Group(256, 256)  #     (N, 256,  3,  3)
        self.head = nn.Linear(256, num_classes, bias=False)
        nn.init.normal_(self.head.weight, std=1 / 256)  # small logits keep the first steps small

    def whitening_layer(self) -> nn.Conv2d:
        """Return the stem."""
        return self.stem

    def stages(self) -> list[Stage]:
        """List the outputs of the stem and the groups, finest first.

        The last, before the pooling over all cells, is the default for Grad-CAM.
        """
        sizes = {"stem": 31, "group1": 15, "group2": 7, "group3": 3}
        return [Stage(name, getattr(self, name), size) for name, size in sizes.items()]

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits of normalised images: (N, 3, 32, 32) -> (N, num_classes)."""
        check_images(images, self.training)
        x = F.gelu(self.stem(images))
        x = self.group3(self.group2(self.group1(x)))
        return self.head(x.amax((2, 3)))

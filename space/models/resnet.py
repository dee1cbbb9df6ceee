"""Two residual networks for 32x32 images, and the table that describes any network.

ResNet18: He et al. 2015 (arXiv:1512.03385), with the stem of kuangliu/pytorch-cifar: a 3x3
convolution and no max-pooling, because 32x32 leaves nothing to throw away. 11,173,962 parameters.
CustomResNet: the nine-layer network of David Page's "How to train your ResNet". 6,575,370
parameters.

Both take normalised images (N, 3, 32, 32) and return logits (N, num_classes). Nothing here works in
place: Grad-CAM keeps the tensors that the stages return and reads them after the whole network has
run.
"""

import contextlib
import copy
import io

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.stage import Stage, check_images

LOGIT_SCALE = 0.125  # of CustomResNet, from Page: what max-pooling leaves is large, and without it learning is unstable


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, in, S, S) -> (N, out, S/stride, S/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        # No bias: the BatchNorm behind each convolution has one.
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Two blocks, of which the first may halve the map."""
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride), BasicBlock(out_channels, out_channels, 1)
    )


class ResNet18(nn.Module):
    """Logits of normalised images.

    (N, 3, 32, 32) -> (N, num_classes). ValueError for another shape.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = stage(64, 64, stride=1)  #    (N,  64, 32, 32)
        self.layer2 = stage(64, 128, stride=2)  #   (N, 128, 16, 16)
        self.layer3 = stage(128, 256, stride=2)  #  (N, 256,  8,  8)
        self.layer4 = stage(256, 512, stride=2)  #  (N, 512,  4,  4)
        self.linear = nn.Linear(512, num_classes)

    def stages(self) -> list[Stage]:
        """The four maps after their residual sums, finest first.

        The last is the default for Grad-CAM.
        """
        sizes = {"layer1": 32, "layer2": 16, "layer3": 8, "layer4": 4}
        return [Stage(name, getattr(self, name), size) for name, size in sizes.items()]

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.training)
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = x.mean((2, 3))  # (N, 512)
        return self.linear(x)


def conv_block(in_channels: int, out_channels: int, pool: bool = False) -> list[nn.Module]:
    """3x3 convolution, BatchNorm, ReLU.

    With pool, 2x2 max-pooling before the BatchNorm halves the map.
    """
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return [conv, *([nn.MaxPool2d(2)] if pool else []), nn.BatchNorm2d(out_channels), nn.ReLU()]


class CustomResNet(nn.Module):
    """Logits of normalised images.

    (N, 3, 32, 32) -> (N, num_classes). ValueError for another shape.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        # A residual sum is no module, so Grad-CAM could not find it. The Identity that receives it
        # can be found.
        self.preplayer1 = nn.Sequential(
            *conv_block(3, 64)
        )  #                             (N,  64, 32, 32)
        self.convblock1 = nn.Sequential(
            *conv_block(64, 128, pool=True)
        )  #                (N, 128, 16, 16)
        self.resblock1 = nn.Sequential(*conv_block(128, 128))
        self.resblock2 = nn.Sequential(*conv_block(128, 128))
        self.convblock2 = nn.Sequential(
            nn.Identity(), *conv_block(128, 256, pool=True)
        )  # (N, 256, 8, 8)
        self.convblock3 = nn.Sequential(
            *conv_block(256, 512, pool=True)
        )  #               (N, 512,  4,  4)
        self.resblock3 = nn.Sequential(*conv_block(512, 512))
        self.resblock4 = nn.Sequential(*conv_block(512, 512))
        self.maxpoollayer1 = nn.Sequential(
            nn.Identity(), nn.AdaptiveMaxPool2d(1)
        )  #       (N, 512,  1,  1)
        self.ffconnectedlayer1 = nn.Linear(512, num_classes)
        self.dropout = nn.Dropout(
            0.0
        )  # before the linear layer; short runs underfit, so nothing is dropped

    def stages(self) -> list[Stage]:
        """Four maps, finest first.

        'resblock2' and 'resblock4' are the residual sums, the last is the default.
        """
        return [
            Stage("preplayer1", self.preplayer1, 32),
            Stage("resblock2", self.convblock2[0], 16),
            Stage("convblock2", self.convblock2, 8),
            Stage("resblock4", self.maxpoollayer1[0], 4),
        ]

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.training)
        x = self.convblock1(self.preplayer1(images))
        x = x + self.resblock2(self.resblock1(x))
        x = self.convblock3(self.convblock2(x))
        x = x + self.resblock4(self.resblock3(x))
        x = self.maxpoollayer1(x).flatten(1)  # (N, 512)
        return LOGIT_SCALE * self.ffconnectedlayer1(self.dropout(x))


def torchsummary_table(model: nn.Module) -> str:
    """Torchsummary's table of all layers for one (3, 32, 32) image.

    Its MB are MiB; it counts activations twice.
    """
    import torchsummary

    # torchsummary runs two random images through the network: on a copy, in eval mode, with the
    # random state put back, so that neither BatchNorm's statistics nor anybody's next random number
    # changes.
    model = copy.deepcopy(model).cpu().float().eval()
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()) as printed:
        torchsummary.summary(model, (3, 32, 32), device="cpu")
    return printed.getvalue().strip("\n")


def lightning_table(model: nn.Module) -> str:
    """Lightning's table of the direct children: name, type and parameters."""
    import pytorch_lightning as pl
    from pytorch_lightning.utilities.model_summary import ModelSummary

    wrapper = pl.LightningModule()
    for name, child in model.named_children():
        wrapper.add_module(name, child)
    # Lightning 2.6 adds the columns Mode and FLOPs and three lines about them; they say nothing
    # here.
    lines = [
        line.split(" | ")[:4] for line in str(ModelSummary(wrapper, max_depth=1)).splitlines()[:-3]
    ]
    rule = "-" * len(" | ".join(lines[0]))
    return "\n".join(rule if set(line[0]) == {"-"} else " | ".join(line) for line in lines)


def model_summary(model: nn.Module) -> str:
    """Describe a network: torchsummary's table for ResNet18, Lightning's for any other.

    Changes nothing in it.
    """
    return torchsummary_table(model) if isinstance(model, ResNet18) else lightning_table(model)

"""Two residual networks for 32x32 images, and a table that describes any network.

ResNet18: He et al. 2015 (arXiv:1512.03385), with the stem of kuangliu/pytorch-cifar: a 3x3
convolution without max-pooling, because images of 32x32 are small already. 11,173,962 parameters.
CustomResNet: the nine-layer network of David Page's "How to train your ResNet", but pooled before
BatchNorm and with biases. 6,575,370 parameters.

Both take normalised images (N, 3, 32, 32) and return logits (N, num_classes). No tensor operation
works in place: Grad-CAM keeps the tensors that the stages return and reads them after the whole
network has run.
"""

import contextlib
import copy
import io

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.stage import Network, Stage, check_images

# Of CustomResNet, from Page: the features after max-pooling are large, and without the factor
# training is unstable.
LOGIT_SCALE = 0.125


class BasicBlock(nn.Module):
    """A residual block: two 3x3 convolutions and a shortcut around them.

    Args:
        in_channels: of the input, (N, in_channels, S, S).
        out_channels: of the output, (N, out_channels, S / stride, S / stride).
        stride: of the first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        # No bias: the BatchNorm after each convolution has one. Padding: a border of zeros.
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
        """Compute relu(F(x) + shortcut(x))."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Return two blocks: (N, in_channels, S, S) -> (N, out_channels, S / stride, S / stride)."""
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride), BasicBlock(out_channels, out_channels, 1)
    )


class ResNet18(Network):
    """A network of four stages with two residual blocks each.

    Args:
        num_classes: the number of logits.
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
        """List the four stages, each after its last residual sum, finest first.

        The last one is the default for Grad-CAM.
        """
        sizes = {"layer1": 32, "layer2": 16, "layer3": 8, "layer4": 4}
        return [Stage(name, getattr(self, name), size) for name, size in sizes.items()]

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits of normalised images: (N, 3, 32, 32) -> (N, num_classes)."""
        check_images(images, self.training)
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = x.mean((2, 3))  # (N, 512)
        return self.linear(x)


def conv_block(in_channels: int, out_channels: int, pool: bool = False) -> list[nn.Module]:
    """Return a 3x3 convolution, BatchNorm and ReLU: (N, in, S, S) -> (N, out, S, S).

    With pool, 2x2 max-pooling before the BatchNorm halves S.
    """
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return [conv, *([nn.MaxPool2d(2)] if pool else []), nn.BatchNorm2d(out_channels), nn.ReLU()]


class CustomResNet(Network):
    """A network of nine layers with two residual blocks.

    Args:
        num_classes: the number of logits.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        # Grad-CAM hooks modules, and a residual sum is none: an Identity that receives it is one.
        self.preplayer1 = nn.Sequential(*conv_block(3, 64))  # (N, 64, 32, 32)
        self.convblock1 = nn.Sequential(*conv_block(64, 128, pool=True))  # (N, 128, 16, 16)
        self.resblock1 = nn.Sequential(*conv_block(128, 128))
        self.resblock2 = nn.Sequential(*conv_block(128, 128))
        # (N, 256, 8, 8)
        self.convblock2 = nn.Sequential(nn.Identity(), *conv_block(128, 256, pool=True))
        self.convblock3 = nn.Sequential(*conv_block(256, 512, pool=True))  # (N, 512, 4, 4)
        self.resblock3 = nn.Sequential(*conv_block(512, 512))
        self.resblock4 = nn.Sequential(*conv_block(512, 512))
        self.maxpoollayer1 = nn.Sequential(nn.Identity(), nn.AdaptiveMaxPool2d(1))  # (N, 512, 1, 1)
        self.ffconnectedlayer1 = nn.Linear(512, num_classes)
        self.dropout = nn.Dropout(0.0)  # 0: short trainings underfit

    def stages(self) -> list[Stage]:
        """List four stages, finest first; the last one is the default for Grad-CAM.

        'resblock2' and 'resblock4' are residual sums.
        """
        return [
            Stage("preplayer1", self.preplayer1, 32),
            Stage("resblock2", self.convblock2[0], 16),
            Stage("convblock2", self.convblock2, 8),
            Stage("resblock4", self.maxpoollayer1[0], 4),
        ]

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits of normalised images: (N, 3, 32, 32) -> (N, num_classes)."""
        check_images(images, self.training)
        x = self.convblock1(self.preplayer1(images))
        x = x + self.resblock2(self.resblock1(x))
        x = self.convblock3(self.convblock2(x))
        x = x + self.resblock4(self.resblock3(x))
        x = self.maxpoollayer1(x).flatten(1)  # (N, 512)
        return LOGIT_SCALE * self.ffconnectedlayer1(self.dropout(x))


def torchsummary_table(model: nn.Module) -> str:
    """Return torchsummary's table of all layers for one image (3, 32, 32).

    Its MB are MiB, and it counts activations twice.
    """
    import torchsummary

    # torchsummary runs two random images through the network. A copy in eval mode and a restored
    # random state keep BatchNorm's statistics and the next random numbers unchanged.
    model = copy.deepcopy(model).cpu().float().eval()
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stdout(io.StringIO()) as printed:
        torchsummary.summary(model, (3, 32, 32), device="cpu")
    return printed.getvalue().strip("\n")


def lightning_table(model: nn.Module) -> str:
    """Return Lightning's table of the direct children: name, type and parameters."""
    import pytorch_lightning as pl
    from pytorch_lightning.utilities.model_summary.model_summary import ModelSummary

    wrapper = pl.LightningModule()
    for name, child in model.named_children():
        wrapper.add_module(name, child)
    # Lightning 2.6 adds the columns Mode and FLOPs, which are of no use here, and three lines.
    table = str(ModelSummary(wrapper, max_depth=1)).splitlines()[:-3]
    lines = [line.split(" | ")[:4] for line in table]
    rule = "-" * len(" | ".join(lines[0]))
    return "\n".join(rule if set(line[0]) == {"-"} else " | ".join(line) for line in lines)


def model_summary(model: nn.Module) -> str:
    """Return a table of a network's layers, and leave the network unchanged.

    It is torchsummary's for ResNet18 and Lightning's for any other network.
    """
    # By name: the class of a network that came out of a bundle is the bundle's own.
    is_resnet18 = type(model).__name__ == ResNet18.__name__
    return torchsummary_table(model) if is_resnet18 else lightning_table(model)

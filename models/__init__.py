"""The networks, how they are trained, and how they are explained."""

from torch import nn

from models.fastnet import FastNet
from models.resnet import CustomResNet, ResNet18

NETWORKS = {"ResNet18": ResNet18, "CustomResNet": CustomResNet, "FastNet": FastNet}


def build(arch: str, num_classes: int = 10) -> nn.Module:
    """Make the network of that name; ValueError with the possible names for any other."""
    if arch not in NETWORKS:
        raise ValueError(f"unknown network {arch!r}, expected one of {', '.join(NETWORKS)}")
    return NETWORKS[arch](num_classes)

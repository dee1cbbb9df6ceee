"""The published airbench94 schedule as a plain loop, to compare FastNet's training with.

Keller Jordan's airbench94 with Muon (arXiv:2404.00498 and its repository) reaches 94.0 % with
test-time augmentation (TTA) in 8 epochs: batches of 2,000, channels_last, all images resident and
augmented in batches. It computes in fp16, here in bf16 or fp32: the comparison is in one precision.
There is no Lightning, there are no micro-batches, every convolution computes its whole output, and
memory is allocated in the system's ordinary pages.
"""

import argparse
import json
import sys
import time
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import all_images
from dataload import load_splits, normalize
from evaluation.predict import accuracy, tta_logits
from models.fastnet import FastNet
from training.hardware import choose_precision
from training.optimizer import MuonWithSGD
from training.switches import data_folder
from training.whitening import whiten

EPOCHS, BATCH_SIZE = 8, 2000
STEM_BIAS_EPOCHS = 3  # after so many, the first layer's bias is not trained any more


def augmented_epoch(images: Tensor, epoch: int, flip: Tensor) -> Tensor:
    """Shift images by up to 2 pixels, and mirror each in every other epoch.

    Args:
        images: (N, 3, 32, 32).
        epoch: From 0.
        flip: (N,) bool, which images are mirrored in even epochs; the others are in odd ones.

    Returns:
        The augmented images, of the same shape.
    """
    images = torch.where((flip ^ (epoch % 2 == 1)).view(-1, 1, 1, 1), images.flip(-1), images)
    padded = F.pad(images, (2, 2, 2, 2), "reflect")
    shifted = torch.empty_like(images)
    shifts = torch.randint(0, 5, (len(images), 2))
    for dy in range(5):
        for dx in range(5):
            chosen = (shifts == torch.tensor([dy, dx])).all(1)
            shifted[chosen] = padded[chosen, :, dy : dy + 32, dx : dx + 32]
    return shifted


def published_groups(net: FastNet) -> list[dict]:
    """Group the trained parameters as airbench94 does, each group with its peak learning rate.

    The published rates are for the sum of the loss over a batch; here it is the mean.
    """
    trained = [p for p in net.parameters() if p.requires_grad]
    filters = [p for p in trained if p.ndim == 4]
    biases = [p for p in trained if p.ndim == 1 and p is not net.stem.bias]
    bias_lr, head_lr = 0.053 * BATCH_SIZE, 0.67 * BATCH_SIZE / 256**2
    decay = 2e-6 * BATCH_SIZE
    sgd = {"momentum": 0.85, "muon": False}
    bias_sgd = {"lr": bias_lr, "weight_decay": decay / bias_lr, **sgd}
    head_sgd = {"lr": head_lr, "weight_decay": decay / head_lr, **sgd}
    return [
        {"params": filters, "lr": 0.24, "momentum": 0.6, "muon": True, "epochs": EPOCHS},
        {"params": biases, **bias_sgd, "epochs": EPOCHS},
        {"params": [net.head.weight], **head_sgd, "epochs": EPOCHS},
        {"params": [net.stem.bias], **bias_sgd, "epochs": STEM_BIAS_EPOCHS},
    ]


def published_network() -> FastNet:
    """Return FastNet with convolutions that compute their whole output, pooled or not."""
    net = FastNet()
    for group in (net.group1, net.group2, net.group3):
        ours = cast(nn.Conv2d, group[0])
        whole = nn.Conv2d(ours.in_channels, ours.out_channels, 3, padding=1, bias=False)
        whole.weight = ours.weight
        group[0] = whole
    return net


class Reference:
    """FastNet and what its published training needs, on resident images.

    Args:
        images: (N, 3, 32, 32), normalised.
        labels: (N,).
        seed: Of the initial weights, the order and the augmentation.
        precision: 'bf16-mixed' or '32-true'; Muon's steps are computed in the same.
    """

    def __init__(self, images: Tensor, labels: Tensor, seed: int, precision: str):
        torch.manual_seed(seed)
        self.images, self.labels, self.done = images, labels, 0
        self.bf16 = precision == "bf16-mixed"
        self.net = published_network()
        # torch's stubs lack this form of `to`
        self.net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        whiten(self.net.stem, images[:5000])
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.4
                module.weight.requires_grad_(False)  # the scales stay 1
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        self.optimizer = MuonWithSGD(published_groups(self.net), lr=0.24, dtype=dtype)
        for group in self.optimizer.param_groups:
            group["peak"] = group["lr"]
        self.flip = torch.rand(len(images)) < 0.5
        self.steps = len(images) // BATCH_SIZE

    def epoch(self) -> float:
        """Train for one epoch and return its seconds."""
        start = time.perf_counter()
        self.net.train()
        self.net.stem.get_parameter("bias").requires_grad_(self.done < STEM_BIAS_EPOCHS)
        images = augmented_epoch(self.images, self.done, self.flip).contiguous(
            memory_format=torch.channels_last
        )
        order = torch.randperm(len(images))[: self.steps * BATCH_SIZE]
        for step, batch in enumerate(order.view(-1, BATCH_SIZE)):
            self.set_rates(self.done * self.steps + step)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = F.cross_entropy(
                    self.net(images[batch]), self.labels[batch], label_smoothing=0.2
                )
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return time.perf_counter() - start

    def set_rates(self, steps: int) -> None:
        """Let each learning rate fall in a straight line, to its value after so many steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * max(0, 1 - steps / (group["epochs"] * self.steps))

    @torch.no_grad()
    def accuracies(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the accuracy on normalised images, 'single' without TTA and 'tta' with it."""
        self.net.eval()
        batches = images.contiguous(memory_format=torch.channels_last).split(500)
        logits = torch.cat([self.net(batch) for batch in batches])
        averaged = torch.cat([tta_logits(self.net, batch) for batch in batches])
        return {"single": accuracy(logits, labels), "tta": accuracy(averaged, labels)}


def main() -> None:
    """Obey the lines of the standard input, 'epoch' or 'test'; print each result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=0, help="train on the first N images only")
    parser.add_argument("--precision", default=choose_precision(), help="Lightning's name")
    args = parser.parse_args()
    splits = load_splits(data_folder())
    train = splits.train.first(args.images) if args.images else all_images(splits).train
    images, labels = train.images, torch.from_numpy(train.labels).long()
    reference = Reference(normalize(images), labels, 0, args.precision)
    for line in sys.stdin:
        if line.strip() == "epoch":
            print(json.dumps({"seconds": reference.epoch()}), flush=True)
        else:
            test = normalize(splits.test.images), torch.from_numpy(splits.test.labels)
            print(json.dumps(reference.accuracies(*test)), flush=True)


if __name__ == "__main__":
    main()

"""The published airbench94 schedule, plainly: what FastNet's training in Lightning is compared with.

Keller Jordan's airbench94 with Muon (arXiv:2404.00498 and its repository) reaches 94.0 % (six views) in 8 epochs:
batches of 2,000, bf16 autocast (like ours, only where the machine has it), channels_last, all
images resident and augmented in batches. Here without Lightning, without micro-batches and with
memory as it comes.
"""

import argparse
import json
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy import all_images
from dataload import load_splits, normalize
from evaluation.predict import accuracy, tta_logits
from models.fastnet import FastNet
from training.hardware import choose_precision
from training.optimizer import MuonWithSGD

EPOCHS, BATCH_SIZE = 8, 2000


def augmented_epoch(images: Tensor, epoch: int, flip: Tensor) -> Tensor:
    """All images (N, 3, 32, 32) shifted by up to 2 pixels; each mirrored in every other epoch."""
    images = torch.where((flip ^ (epoch % 2 == 1)).view(-1, 1, 1, 1), images.flip(-1), images)
    padded = F.pad(images, (2, 2, 2, 2), "reflect")
    shifted = torch.empty_like(images)
    shifts = torch.randint(0, 5, (len(images), 2))
    for dy in range(5):
        for dx in range(5):
            chosen = (shifts == torch.tensor([dy, dx])).all(1)
            shifted[chosen] = padded[chosen, :, dy : dy + 32, dx : dx + 32]
    return shifted


class Reference:
    """FastNet on resident images (N, 3, 32, 32), normalised, with labels (N,).

    One call of `epoch` after the other.
    """

    def __init__(self, images: Tensor, labels: Tensor, seed: int):
        torch.manual_seed(seed)
        self.images, self.labels, self.done = images, labels, 0
        self.bf16 = choose_precision() == "bf16-mixed"  # emulated, it takes many times as long
        self.net = FastNet().to(memory_format=torch.channels_last)
        self.net.whiten(images[:5000])
        for module in self.net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.4
        filters = [p for p in self.net.parameters() if p.ndim == 4 and p.requires_grad]
        biases = [
            p
            for p in self.net.parameters()
            if p.ndim == 1 and p.requires_grad and p is not self.net.stem.bias
        ]
        bias_lr, head_lr = (
            0.053 * BATCH_SIZE,
            0.67 * BATCH_SIZE / 256**2,
        )  # published for the sum over the batch
        decay = 2e-6 * BATCH_SIZE
        sgd = {"momentum": 0.85, "muon": False}
        self.optimizer = MuonWithSGD(
            [
                {"params": filters, "lr": 0.24, "momentum": 0.6, "muon": True},
                {"params": biases, "lr": bias_lr, "weight_decay": decay / bias_lr, **sgd},
                {
                    "params": [self.net.head.weight],
                    "lr": head_lr,
                    "weight_decay": decay / head_lr,
                    **sgd,
                },
                {
                    "params": [self.net.stem.bias],
                    "lr": bias_lr,
                    "weight_decay": decay / bias_lr,
                    **sgd,
                },
            ],
            lr=0.24,
            dtype=torch.bfloat16 if self.bf16 else torch.float32,
        )
        for group in self.optimizer.param_groups:
            group["peak"] = group["lr"]
        self.flip = torch.rand(len(images)) < 0.5
        self.steps = len(images) // BATCH_SIZE

    def epoch(self) -> float:
        """Train for one epoch; returns its seconds."""
        start = time.perf_counter()
        self.net.train()
        images = augmented_epoch(self.images, self.done, self.flip).contiguous(
            memory_format=torch.channels_last
        )
        for step, batch in enumerate(
            torch.randperm(len(images))[: self.steps * BATCH_SIZE].view(-1, BATCH_SIZE)
        ):
            now = self.done * self.steps + step
            for group, epochs in zip(
                self.optimizer.param_groups, (EPOCHS, EPOCHS, EPOCHS, 3), strict=True
            ):
                group["lr"] = group["peak"] * max(0, 1 - now / (epochs * self.steps))
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = F.cross_entropy(
                    self.net(images[batch]), self.labels[batch], label_smoothing=0.2
                )
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return time.perf_counter() - start

    @torch.no_grad()
    def accuracies(self, images: Tensor, labels: Tensor) -> dict:
        """On normalised images (N, 3, 32, 32): with a single view of each, and with six."""
        self.net.eval()
        batches = images.contiguous(memory_format=torch.channels_last).split(500)
        single = torch.cat([self.net(batch) for batch in batches])
        six = torch.cat([tta_logits(self.net, batch) for batch in batches])
        return {"single": accuracy(single, labels), "tta": accuracy(six, labels)}


def main() -> None:
    """Do what the lines of the standard input say, 'epoch' or 'test', and print what was measured, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=0, help="train on the first N images only")
    splits = load_splits(os.environ.get("DATA_DIR", "data"))
    count = parser.parse_args().images
    train = all_images(splits).train if not count else splits.train
    images, labels = train.images[: count or None], train.labels[: count or None]
    reference = Reference(normalize(images), torch.from_numpy(labels).long(), seed=0)
    for line in sys.stdin:
        if line.strip() == "epoch":
            print(json.dumps({"seconds": reference.epoch()}), flush=True)
        else:
            test = normalize(splits.test.images), torch.from_numpy(splits.test.labels)
            print(json.dumps(reference.accuracies(*test)), flush=True)


if __name__ == "__main__":
    main()

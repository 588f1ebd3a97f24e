"""Each loss in a plain PyTorch training loop: python examples/plain_pytorch.py [--steps 40] [loss ...]

A small convolutional teacher, a smaller student, and images that the program makes; no data, no other packages. The
lines to copy are those of `recipe`: what a loss is built with, and what it is called with.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from otkd_fast.losses import KD2M, WKL, SinKD, WCoRD, WKDFeature, WKDLogit, wkd_cost

CLASSES, SAMPLES, BATCH = 6, 192, 32
LOSSES = ("SinKD", "WKDLogit", "WKDFeature", "KD2M", "WCoRD", "WKL")


class Network(nn.Module):
    """Returns logits (B, C), the last feature map (B, c, 8, 8) and pooled features (B, c)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, 1, 1)
        )
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = F.relu(self.body(x))
        pooled = maps.mean((-2, -1))
        return self.head(pooled), maps, pooled


def make_images() -> tuple[Tensor, Tensor]:
    """Noise around one pattern a class: (SAMPLES, 3, 8, 8) and labels."""
    generator = torch.Generator().manual_seed(0)
    patterns = 3.0 * torch.randn(CLASSES, 3, 1, 1, generator=generator) + torch.randn(
        CLASSES, 3, 8, 8, generator=generator
    )
    labels = torch.arange(SAMPLES) % CLASSES
    return (patterns[labels] + torch.randn(SAMPLES, 3, 8, 8, generator=generator)) / 3.0, labels


def train_teacher(images: Tensor, labels: Tensor) -> Network:
    torch.manual_seed(1)
    teacher = Network(16)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(teacher(images)[0], labels).backward()
        optimizer.step()
    return teacher.eval().requires_grad_(False)


def recipe(name: str, teacher: Network) -> tuple[Callable, list[nn.Parameter]]:
    """The distillation term as a function of a batch's outputs, and the parameters that it brings along."""
    if name == "SinKD":
        sinkd = SinKD(reduction="mean")
        return lambda s, t, y, index, progress: 0.8 * sinkd(s[0], t[0]), []
    if name == "WKDLogit":
        cost = wkd_cost(teacher.head.weight, method="cosine")  # or from features: see docs/losses.md
        wkd = WKDLogit(cost=cost, temperature=4.0, gamma=20.0)
        return lambda s, t, y, index, progress: wkd(s[0], t[0], y), []
    if name == "WKDFeature":
        projector = nn.Conv2d(8, 16, 1)
        wkd_feature = WKDFeature(ratio=4.0, grid=2)
        return lambda s, t, y, index, progress: 1e-3 * wkd_feature(projector(s[1]), t[1]), [*projector.parameters()]
    if name == "KD2M":
        projector = nn.Linear(8, 16)
        kd2m = KD2M(metric="cw2", solver="sinkhorn")
        return lambda s, t, y, index, progress: 2e-3 * kd2m(projector(s[2]), t[2], y), [*projector.parameters()]
    if name == "WCoRD":
        wcord = WCoRD(8, 16, num_samples=SAMPLES, num_negatives=64, embedding_dim=32)
        return lambda s, t, y, index, progress: wcord(s[2], t[2], index), [*wcord.parameters()]
    cost = wkd_cost(teacher.head.weight, method="cosine")
    wkl = WKL(cost=cost, temperature=4.0, gamma=20.0)
    return lambda s, t, y, index, progress: wkl(s[0], t[0], y, progress), []


def distil(name: str, steps: int) -> tuple[list[float], float]:
    """Distillation terms of all steps, and the student's accuracy on the images that it was trained with."""
    images, labels = make_images()
    teacher = train_teacher(images, labels)
    torch.manual_seed(2)
    student = Network(8)
    distillation, more = recipe(name, teacher)
    trained = [*student.parameters(), *more]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    history = []
    for step in range(steps):
        index = torch.randperm(SAMPLES)[:BATCH]
        batch, target = images[index], labels[index]
        outputs = student(batch)
        with torch.no_grad():
            teacher_outputs = teacher(batch)
        term = distillation(outputs, teacher_outputs, target, index, step / steps)
        loss = F.cross_entropy(outputs[0], target) + term
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 2.0)
        optimizer.step()
        history.append(term.item())
    with torch.no_grad():
        accuracy = (student(images)[0].argmax(1) == labels).float().mean().item()
    return history, accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "losses", nargs="*", default=LOSSES, metavar="loss", help=f"of {', '.join(LOSSES)}; default: all"
    )
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    for name in arguments.losses:
        if name not in LOSSES:
            parser.error(f"loss: expected one of {', '.join(LOSSES)}, got {name}")
        history, accuracy = distil(name, arguments.steps)
        tenth = max(len(history) // 10, 1)
        first, last = (sum(part) / tenth for part in (history[:tenth], history[-tenth:]))
        print(f"{name:12s} distillation term {first:8.4f} -> {last:8.4f}, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()

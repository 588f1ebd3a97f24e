"""Every method of otkd_fast.losses on handwritten digits: `python examples/distill_digits.py --method all`.

Teacher and student are small convolutional networks that give a map of features, its mean over the positions and
logits; a 1 x 1 convolution, trained along, brings the student's map to the teacher's channels. Every method is
CE(y, s) + weight x its loss. The published weights belong to other networks and data: here `weight` is the best of
five on validation rows (`--tune`), all other parameters are the published ones, or scaled as said beside them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from digits_data import BATCH, Digits, Progress, batches, load, mean_and_error
from torch import Tensor, nn
from torch.nn import functional as F

from otkd_fast import losses

TEACHER_EPOCHS, STUDENT_EPOCHS, STUDENT_ROWS = 20, 100, 128
TEACHER_CHANNELS, STUDENT_CHANNELS = (32, 64), (4, 8)
TUNING_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
FIRST_TUNING_SEED = 1000


@dataclass
class Outputs:
    """What a network says of b images."""

    maps: Tensor  # (b, C, 4, 4)
    features: Tensor  # (b, C)
    logits: Tensor  # (b, 10)


@dataclass
class Step:
    """What a loss may look at."""

    student: Outputs
    teacher: Outputs
    labels: Tensor  # (b,)
    rows: Tensor  # (b,) places of the images in the training set
    progress: float  # 0 at the start, 1 at the end of the training


class Network(nn.Module):
    """Two convolutions on 8 x 8 images; with `project`, maps and features in that number of channels."""

    def __init__(self, channels: tuple[int, int], project: int | None = None) -> None:
        super().__init__()
        first, second = channels
        self.body = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(first, second, 3, padding=1), nn.BatchNorm2d(second), nn.ReLU(),
        )  # fmt: skip
        self.project = nn.Conv2d(second, project, 1) if project else nn.Identity()
        self.head = nn.Linear(second, 10)

    def forward(self, x: Tensor) -> Outputs:
        maps = self.body(x.unflatten(-1, (1, 8, 8)))
        logits = self.head(maps.mean((-2, -1)))
        maps = self.project(maps)
        return Outputs(maps, maps.mean((-2, -1)), logits)


class Method:
    """`build(teacher features, labels of the training rows)` gives the loss of a Step; `weight` is the tuned one."""

    def __init__(self, weight: float, build: Callable[[Tensor, Tensor], Callable[[Step], Tensor]]) -> None:
        self.weight, self.build = weight, build


def on_logits(loss: nn.Module) -> Callable[[Tensor, Tensor], Callable[[Step], Tensor]]:
    return lambda features, labels: lambda step: loss(step.student.logits, step.teacher.logits)


def on_features(loss: nn.Module) -> Callable[[Tensor, Tensor], Callable[[Step], Tensor]]:
    return lambda features, labels: lambda step: loss(step.student.features, step.teacher.features, step.labels)


def kl(features: Tensor, labels: Tensor) -> Callable[[Step], Tensor]:
    def loss(step: Step) -> Tensor:
        student, teacher = (F.log_softmax(out.logits / 4, -1) for out in (step.student, step.teacher))
        return 16 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)

    return loss


def wkd_logit(features: Tensor, labels: Tensor) -> Callable[[Step], Tensor]:
    cost = losses.wkd_cost(features, labels, classes=10, kappa=1.0)
    loss = losses.WKDLogit(cost=cost, temperature=2.0, gamma=30.0)
    return lambda step: loss(step.student.logits, step.teacher.logits, step.labels)


def wkl(features: Tensor, labels: Tensor) -> Callable[[Step], Tensor]:
    cost = losses.wkd_cost(features, labels, classes=10, kappa=1.0)
    loss = losses.WKL(cost=cost, temperature=2.0, gamma=30.0)
    return lambda step: loss(step.student.logits, step.teacher.logits, step.labels, step.progress)


def wkd_feature(covariance: str) -> Callable[[Tensor, Tensor], Callable[[Step], Tensor]]:
    loss = losses.WKDFeature(ratio=2.0, covariance=covariance)
    return lambda features, labels: lambda step: loss(step.student.maps, step.teacher.maps)


def wcord(features: Tensor, labels: Tensor) -> Callable[[Step], Tensor]:
    width = features.shape[1]
    critic = losses.WCoRD(width, width, num_samples=len(labels), num_negatives=64, embedding_dim=32, hidden_dim=32)

    def loss(step: Step) -> Tensor:
        return critic(step.student.features, step.teacher.features, step.rows)

    loss.parameters = list(critic.parameters())
    return loss


METHODS: dict[str, Method] = {
    "cross-entropy": Method(0.0, lambda features, labels: lambda step: step.student.logits.sum()),
    "KL": Method(1.0, kl),
    "SinKD": Method(0.08, on_logits(losses.SinKD(reduction="mean"))),
    "WKD-L": Method(0.1, wkd_logit),
    "WKD-F": Method(0.1, wkd_feature("diagonal")),
    "WKD-F full": Method(0.1, wkd_feature("full")),
    "WKL": Method(1.0, wkl),
    "KD2M W2": Method(0.1, on_features(losses.KD2M(metric="w2", solver="sinkhorn", epsilon=0.1))),
    "KD2M CW2": Method(3.0, on_features(losses.KD2M(metric="cw2", solver="sinkhorn", epsilon=0.1, num_classes=10))),
    "KD2M W2 Gaussian": Method(0.1, on_features(losses.KD2M(metric="w2_gaussian"))),
    "KD2M W2 Gaussian, full": Method(0.1, on_features(losses.KD2M(metric="w2_gaussian", covariance="full"))),
    "KD2M MMD": Method(0.1, on_features(losses.KD2M(metric="mmd", kernel="rbf"))),
    "WCoRD": Method(3.0, wcord),
}


def train_teacher(data: Digits, epochs: int, seed: int) -> Network:
    torch.manual_seed(seed)
    teacher = Network(TEACHER_CHANNELS)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for rows in batches(data, epochs, seed):
        optimizer.zero_grad()
        F.cross_entropy(teacher(data.train_x[rows]).logits, data.train_y[rows]).backward()
        optimizer.step()
    return teacher.eval()


def train_student(
    data: Digits, taught: Outputs, name: str, weight: float, epochs: int, seed: int
) -> tuple[Network, float]:
    """The student, and the median milliseconds of a step; weights and batches depend on the seed, not on the method."""
    torch.manual_seed(seed)
    few = Digits(data.train_x[:STUDENT_ROWS], data.train_y[:STUDENT_ROWS], data.test_x, data.test_y)
    student = Network(STUDENT_CHANNELS, project=TEACHER_CHANNELS[1])
    distil = METHODS[name].build(taught.features[:STUDENT_ROWS], few.train_y)
    trained = [*student.parameters(), *getattr(distil, "parameters", ())]  # WCoRD has embeddings and a critic
    optimizer = torch.optim.Adam(trained, lr=5e-3)
    steps = list(batches(few, epochs, seed))
    times = []
    for k, rows in enumerate(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        out = student(few.train_x[rows])
        teacher = Outputs(taught.maps[rows], taught.features[rows], taught.logits[rows])
        loss = F.cross_entropy(out.logits, few.train_y[rows])
        if weight:
            loss = loss + weight * distil(Step(out, teacher, few.train_y[rows], rows, k / len(steps)))
        loss.backward()
        optimizer.step()
        times.append(1e3 * (time.perf_counter() - start))
    return student.eval(), statistics.median(times)


@torch.no_grad()
def accuracy(model: Network, data: Digits) -> float:
    """Share of the test rows that are right, in percent."""
    return 100.0 * (model(data.test_x).logits.argmax(-1) == data.test_y).float().mean().item()


def compare(settings: dict[str, tuple[str, float]], seeds: range, quick: bool, validation: bool) -> dict[str, dict]:
    """label -> accuracies and ms a step, one number a seed, for each (method, weight); also of the teacher."""
    results: dict[str, dict] = {label: {"accuracy": [], "step_ms": []} for label in ("teacher", *settings)}
    teacher_epochs, student_epochs = (2, 2) if quick else (TEACHER_EPOCHS, STUDENT_EPOCHS)
    progress = Progress(len(seeds) * len(results), "teachers and students")
    for seed in seeds:
        data = load(seed, validation)
        teacher = train_teacher(data, teacher_epochs, seed)
        results["teacher"]["accuracy"].append(accuracy(teacher, data))
        progress.step()
        with torch.no_grad():
            taught = teacher(data.train_x)
            scale = taught.maps.std()  # the losses on features see numbers of order 1
            taught = Outputs(taught.maps / scale, taught.features / scale, taught.logits)
        for label, (name, weight) in settings.items():
            student, step_ms = train_student(data, taught, name, weight, student_epochs, seed)
            results[label]["accuracy"].append(accuracy(student, data))
            results[label]["step_ms"].append(step_ms)
            progress.step()
    return results


def markdown(result: dict) -> str:
    lines = [
        "# Distilling handwritten digits by every method",
        "",
        f"{result['seeds']} seeds (split, weights, order); the student sees {STUDENT_ROWS} training rows, {BATCH} a "
        f"batch, {STUDENT_EPOCHS} epochs. CE + weight x loss. One thread; {result['seconds']:.0f} s in all.",
        *(["", "**Quick run: too little training for any conclusion.**"] if result["quick"] else []),
        "",
        "| method | weight | test accuracy, % | standard error | ms a step |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["methods"].items():
        mean, error = mean_and_error(row["accuracy"])
        weight = f"{METHODS[name].weight:g}" if name in METHODS else ""
        step = f"{statistics.median(row['step_ms']):.2f}" if row["step_ms"] else ""
        lines.append(f"| {name} | {weight} | {mean:.2f} | {error:.2f} | {step} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, result: dict) -> None:
    """Accuracy with standard errors against the time of a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for k, (name, row) in enumerate(result["methods"].items()):
        mean, error = mean_and_error(row["accuracy"])
        if row["step_ms"]:
            marker = "os^"[k // 10]  # there are ten colours
            axes.errorbar(statistics.median(row["step_ms"]), mean, yerr=error, fmt=marker, capsize=3, label=name)
        else:
            axes.axhline(mean, color="black", linewidth=0.8, label=name)
    axes.set(xlabel="ms a training step", ylabel="test accuracy, % (mean and standard error)")
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=150)


def tune(names: list[str], seeds: int) -> None:
    """Prints the validation accuracy of each method at several weights, around the one that is set."""
    settings = {
        f"{name}, weight {METHODS[name].weight * factor:g}": (name, METHODS[name].weight * factor)
        for name in names for factor in (TUNING_FACTORS if METHODS[name].weight else (1.0,))
    }  # fmt: skip
    results = compare(settings, range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds), quick=False, validation=True)
    for label in settings:
        print(f"{statistics.mean(results[label]['accuracy']):7.2f} {label}")


def run(names: list[str], out: Path, seeds: int, quick: bool, tuning: bool) -> None:
    """Trains a student by each method, writes digits_methods.md, .json and .png, prints the table."""
    names = list(METHODS) if names == ["all"] else names
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise SystemExit(f"--method: expected 'all' or some of {', '.join(map(repr, METHODS))}, got {unknown[0]!r}")
    if tuning:
        tune(names, seeds)
        return
    start = time.perf_counter()
    methods = compare({name: (name, METHODS[name].weight) for name in names}, range(seeds), quick, validation=False)
    result = {"quick": quick, "seeds": seeds, "methods": methods, "seconds": time.perf_counter() - start}
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(result)
    try:
        draw(out / "digits_methods.png", result)
        text += "\n![accuracy against time](digits_methods.png)\n"
    except ImportError as error:
        text += f"\nLeft out: the plot ({error}).\n"
    (out / "digits_methods.md").write_text(text)
    (out / "digits_methods.json").write_text(json.dumps(result, indent=1) + "\n")
    print(text)

"""How the time grows with n, B, d and T, against the operation counts and the floor: a part of `python -m bench run`.

Fitted exponents (last points, least squares on logarithms) stand beside those of the operation counts. The floor of a
point is the larger of compulsory bytes over the fastest copy and multiply-adds over the fastest product, both measured
here on the same threads. It counts no more than a processor has to do: a subtraction beside a multiply-add is free
(other units), three operations of |x - y| summed are one and a half, an exponential is a polynomial of 6 multiply-adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import otkd_fast

from .measure import interleaved_medians

EPSILON = 0.1
EXPONENTIAL = 6  # multiply-adds
PLOT = Path(__file__).parents[1] / "docs" / "scaling.png"
VARIABLES = ("n", "B", "d", "T")


@dataclass(frozen=True)
class Work:
    """What no way of computing it can leave out: bytes in and out, multiply-adds, exponentials."""

    bytes: float
    operations: float
    exponentials: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """One line of the plot: the time of `call(value)()` over `values`; `exponent` is what the operation count says."""

    kernel: str
    variable: str
    values: tuple[int, ...]
    call: Callable[[int], Callable[[], object]]
    exponent: float
    work: Callable[[int], Work]


def _random(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def _masses(*shape: int) -> torch.Tensor:
    return torch.softmax(torch.randn(*shape, generator=torch.Generator().manual_seed(1)), dim=-1)


def dense(batch: int, n: int, num_iters: int, backward: bool) -> Callable[[], object]:
    cost = _random(batch, n, n).requires_grad_(backward)

    def call() -> object:
        value = otkd_fast.sinkhorn(cost, epsilon=EPSILON, num_iters=num_iters).transport_cost.sum()
        return torch.autograd.grad(value, cost) if backward else value

    return call


def shared(batch: int, n: int, num_iters: int, backward: bool) -> Callable[[], object]:
    cost, a, b = _random(n, n), _masses(batch, n).requires_grad_(backward), _masses(batch, n).flip(0)

    def call() -> object:
        value = otkd_fast.sinkhorn(cost, a, b, epsilon=EPSILON, num_iters=num_iters).transport_cost.sum()
        return torch.autograd.grad(value, a) if backward else value

    return call


def points(n: int, num_iters: int, storage: str, d: int = 64) -> Callable[[], object]:
    x, y = _random(n, d), _random(n, d).flip(0)
    options = {"metric": "sqeuclidean", "epsilon": d / 64, "num_iters": num_iters, "storage": storage}
    return lambda: otkd_fast.sinkhorn_points(x, y, **options).transport_cost


def cost_l1(n: int, d: int) -> Callable[[], object]:
    x, y = _random(n, d), _random(n, d)
    return lambda: otkd_fast.cost_matrix(x, y, metric="l1")


def dense_work(batch: int, n: int, t: int, backward: bool) -> Work:
    entries = batch * n * n
    return Work(4 * entries * (2 if backward else 1), entries * (6 * t if backward else 2 * t), entries)


def shared_work(batch: int, n: int, t: int, backward: bool) -> Work:
    return Work(4 * (n * n + 3 * batch * n), batch * n * n * (4 * t if backward else 2 * t), n * n)


def points_work(n: int, t: int, d: int, streamed: bool) -> Work:
    """Stored: the costs once. Streamed: once an iteration, with an exponential each."""
    passes = t if streamed else 1
    return Work(8 * n * d, n * n * (d * passes + 2 * t), n * n * passes)


def l1_work(n: int, d: int) -> Work:
    return Work(4 * (2 * n * d + n * n), 1.5 * n * n * d)


SIDES, LARGE_SIDES = (64, 128, 256, 512, 1024), (64, 128, 256, 512, 1024, 2048)
POINTS, FEATURES = (128, 256, 512, 1024, 2048), (4, 16, 64, 256, 1024)
BATCHES, LENGTHS = (4, 16, 64, 256, 1024), (5, 10, 20, 40, 80)
SWEEPS = (
    Sweep("L1 cost, d = 256", "n", POINTS, lambda n: cost_l1(n, 256), 2, lambda n: l1_work(n, 256)),
    Sweep("dense, forward", "n", LARGE_SIDES, lambda n: dense(1, n, 20, False), 2,
          lambda n: dense_work(1, n, 20, False)),
    Sweep("dense, forward and backward", "n", LARGE_SIDES, lambda n: dense(1, n, 20, True), 2,
          lambda n: dense_work(1, n, 20, True)),
    Sweep("shared cost, forward", "n", SIDES, lambda n: shared(64, n, 20, False), 2,
          lambda n: shared_work(64, n, 20, False)),
    Sweep("shared cost, forward and backward", "n", SIDES, lambda n: shared(64, n, 20, True), 2,
          lambda n: shared_work(64, n, 20, True)),
    Sweep("points, d = 64, stored, forward", "n", POINTS, lambda n: points(n, 20, "stored"), 2,
          lambda n: points_work(n, 20, 64, False)),
    Sweep("points, d = 64, streamed, forward", "n", POINTS, lambda n: points(n, 20, "streamed"), 2,
          lambda n: points_work(n, 20, 64, True)),
    Sweep("dense 64 x 64, forward", "B", BATCHES, lambda b: dense(b, 64, 20, False), 1,
          lambda b: dense_work(b, 64, 20, False)),
    Sweep("shared 256 x 256, forward", "B", BATCHES, lambda b: shared(b, 256, 20, False), 1,
          lambda b: shared_work(b, 256, 20, False)),
    Sweep("L1 cost, n = 512", "d", FEATURES, lambda d: cost_l1(512, d), 1, lambda d: l1_work(512, d)),
    Sweep("points 512 x 512, streamed, forward", "d", FEATURES, lambda d: points(512, 10, "streamed", d), 1,
          lambda d: points_work(512, 10, d, True)),
    Sweep("dense 512 x 512, forward", "T", (*LENGTHS, 160), lambda t: dense(1, 512, t, False), 1,
          lambda t: dense_work(1, 512, t, False)),
    Sweep("dense 512 x 512, forward and backward", "T", LENGTHS, lambda t: dense(1, 512, t, True), 1,
          lambda t: dense_work(1, 512, t, True)),
    Sweep("shared 256 x 256 x 64, forward", "T", (*LENGTHS, 160), lambda t: shared(64, 256, t, False), 1,
          lambda t: shared_work(64, 256, t, False)),
    Sweep("points 512 x 512, streamed, forward", "T", LENGTHS, lambda t: points(512, t, "streamed"), 1,
          lambda t: points_work(512, t, 64, True)),
)  # fmt: skip


def rates(seconds: float) -> dict[str, float]:
    """The fastest that was seen: bytes a second of a copy, multiply-adds a second of a product.

    A product: of square matrices, and the matrix-by-batch products of one more iteration on a shared cost.
    """
    copies = {size: torch.rand(size) for size in (1 << 16, 1 << 18, 1 << 22)}
    targets = {size: torch.empty(size) for size in copies}
    squares = {size: torch.rand(size, size) for size in (256, 512, 1024)}
    calls = {f"copy {n}": (lambda n=n: targets[n].copy_(copies[n])) for n in copies}
    calls |= {f"product {n}": (lambda n=n: squares[n] @ squares[n]) for n in squares}
    calls |= {"short": shared(512, 256, 10, False), "long": shared(512, 256, 60, False)}
    with torch.no_grad():
        ms = interleaved_medians(calls, seconds)
    products = [n**3 / ms[f"product {n}"] for n in squares]
    products.append(2 * 50 * 512 * 256**2 / max(ms["long"] - ms["short"], 1e-9))
    return {
        "copy_bytes_per_s": 1e3 * max(8 * n / ms[f"copy {n}"] for n in copies),
        "multiply_adds_per_s": 1e3 * max(products),
    }


def floor_ms(work: Work, rate: dict[str, float]) -> float:
    return 1e3 * max(
        work.bytes / rate["copy_bytes_per_s"],
        (work.operations + EXPONENTIAL * work.exponentials) / rate["multiply_adds_per_s"],
    )


def fitted_exponent(values: tuple[int, ...], times: list[float], last: int = 3) -> float:
    """Slope of log time over log value through the last points, by least squares."""
    x = [math.log(value) for value in values[-last:]]
    y = [math.log(time) for time in times[-last:]]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def measure_sweep(sweep: Sweep, seconds: float, rate: dict[str, float], points: int | None = None) -> dict:
    """`points`: only the first so many values."""
    values = sweep.values[:points]
    times = interleaved_medians({str(value): sweep.call(value) for value in values}, seconds)
    milliseconds = [times[str(value)] for value in values]
    return {
        "kernel": sweep.kernel,
        "variable": sweep.variable,
        "values": list(values),
        "milliseconds": milliseconds,
        "floor_ms": [floor_ms(sweep.work(value), rate) for value in values],
        "exponent_of_operations": sweep.exponent,
        "fitted_exponent": fitted_exponent(values, milliseconds),
    }


def draw(path: Path, rows: list[dict]) -> None:
    """A panel for each variable; dotted, in the same colour: the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(12, 9), layout="constrained")
    panels = grid.flatten()
    for panel, variable in zip(panels, VARIABLES, strict=True):
        for row in (row for row in rows if row["variable"] == variable):
            label = f"{row['kernel']}: {row['fitted_exponent']:.2f}"
            (line,) = panel.loglog(row["values"], row["milliseconds"], "o-", label=label)
            if "floor_ms" in row:
                panel.loglog(row["values"], row["floor_ms"], ":", color=line.get_color())
        panel.set(xlabel=variable, ylabel="ms")
        if panel.lines:
            panel.legend(fontsize=7, title="fitted exponent; dotted: the floor", title_fontsize=7)
        panel.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """The sweeps alone: the record's sweeps are measured again."""
    from . import run

    return run.main(["--ops", "none", "--no-memory", "--merge", *([] if arguments is None else arguments)])


if __name__ == "__main__":
    raise SystemExit(main())

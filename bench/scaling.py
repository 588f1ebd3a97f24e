"""How the time grows with n, B and T, against the exponents of the operation counts: `python -m bench.scaling`.

Writes a JSON file with the times and the fitted exponents (last points, least squares on logarithms), and a plot.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import otkd_fast

from .measure import interleaved_medians
from .run import RESULTS, machine

EPSILON = 0.1
PLOT = Path(__file__).parents[1] / "docs" / "scaling.png"


@dataclass(frozen=True)
class Sweep:
    """One line of the plot: the time of `call(value)()` over `values`; `exponent` is what the operation count says."""

    kernel: str
    variable: str
    values: tuple[int, ...]
    call: Callable[[int], Callable[[], object]]
    exponent: float


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


def points(n: int, num_iters: int, storage: str) -> Callable[[], object]:
    x, y = _random(n, 64), _random(n, 64).flip(0)
    options = {"metric": "sqeuclidean", "epsilon": 1.0, "num_iters": num_iters, "storage": storage}
    return lambda: otkd_fast.sinkhorn_points(x, y, **options).transport_cost


def cost_l1(n: int, d: int) -> Callable[[], object]:
    x, y = _random(n, d), _random(n, d)
    return lambda: otkd_fast.cost_matrix(x, y, metric="l1")


SWEEPS = (
    Sweep("L1 cost, d = 256", "n", (128, 256, 512, 1024, 2048), lambda n: cost_l1(n, 256), 2),
    Sweep("dense, forward", "n", (64, 128, 256, 512, 1024, 2048), lambda n: dense(1, n, 20, False), 2),
    Sweep("dense, forward and backward", "n", (64, 128, 256, 512, 1024, 2048), lambda n: dense(1, n, 20, True), 2),
    Sweep("shared cost, forward", "n", (64, 128, 256, 512, 1024), lambda n: shared(64, n, 20, False), 2),
    Sweep("shared cost, forward and backward", "n", (64, 128, 256, 512, 1024), lambda n: shared(64, n, 20, True), 2),
    Sweep("points, d = 64, stored, forward", "n", (128, 256, 512, 1024, 2048), lambda n: points(n, 20, "stored"), 2),
    Sweep(
        "points, d = 64, streamed, forward", "n", (128, 256, 512, 1024, 2048), lambda n: points(n, 20, "streamed"), 2
    ),
    Sweep("dense 64 x 64, forward", "B", (4, 16, 64, 256, 1024), lambda batch: dense(batch, 64, 20, False), 1),
    Sweep("shared 256 x 256, forward", "B", (4, 16, 64, 256, 1024), lambda batch: shared(batch, 256, 20, False), 1),
    Sweep("dense 512 x 512, forward", "T", (5, 10, 20, 40, 80, 160), lambda t: dense(1, 512, t, False), 1),
    Sweep("dense 512 x 512, forward and backward", "T", (5, 10, 20, 40, 80), lambda t: dense(1, 512, t, True), 1),
    Sweep("shared 256 x 256 x 64, forward", "T", (5, 10, 20, 40, 80, 160), lambda t: shared(64, 256, t, False), 1),
    Sweep("points 512 x 512, streamed, forward", "T", (5, 10, 20, 40, 80), lambda t: points(512, t, "streamed"), 1),
)


def fitted_exponent(values: tuple[int, ...], times: list[float], last: int = 3) -> float:
    """Slope of log time over log value through the last points, by least squares."""
    x = [math.log(value) for value in values[-last:]]
    y = [math.log(time) for time in times[-last:]]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def measure_sweep(sweep: Sweep, seconds: float) -> dict:
    times = interleaved_medians({str(value): sweep.call(value) for value in sweep.values}, seconds)
    milliseconds = [times[str(value)] for value in sweep.values]
    return {
        "kernel": sweep.kernel,
        "variable": sweep.variable,
        "values": list(sweep.values),
        "milliseconds": milliseconds,
        "exponent_of_operations": sweep.exponent,
        "fitted_exponent": fitted_exponent(sweep.values, milliseconds),
    }


def draw(path: Path, rows: list[dict]) -> None:
    """A panel for each variable; dotted: the exponent of the operation count through the last point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    variables = ("n", "B", "T")
    figure, panels = pyplot.subplots(1, len(variables), figsize=(14, 4.6), layout="constrained")
    for panel, variable in zip(panels, variables, strict=True):
        for row in (row for row in rows if row["variable"] == variable):
            values, times = row["values"], row["milliseconds"]
            label = f"{row['kernel']}: {row['fitted_exponent']:.2f}"
            (line,) = panel.loglog(values, times, "o-", label=label)
            floor = [times[-1] * (value / values[-1]) ** row["exponent_of_operations"] for value in values]
            panel.loglog(values, floor, ":", color=line.get_color())
        panel.set_xlabel(variable)
        if panel.lines:
            panel.legend(fontsize=7, title="fitted exponent", title_fontsize=7)
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("ms")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling_cpu.json")
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each line")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for sweep in SWEEPS:
        rows.append(measure_sweep(sweep, options.seconds))
        print(f"{rows[-1]['kernel']}: {rows[-1]['variable']}^{rows[-1]['fitted_exponent']:.2f}", flush=True)
    options.out.write_text(json.dumps({"machine": machine(), "dtype": "float32", "sweeps": rows}, indent=1) + "\n")
    draw(options.plot, rows)
    print(f"wrote {options.out} and {options.plot}")


if __name__ == "__main__":
    main()

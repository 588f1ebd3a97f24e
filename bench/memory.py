"""Peak memory of a forward and backward pass above its inputs, each in a process of its own (Linux)."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import otkd_fast

from . import sinkhorn_shared
from .measure import forward_backward

WKD_BATCH, WKD_CLASSES, WKD_ITERS = 256, 1000, 10
POINTS, FEATURES, POINTS_ITERS = 50_000, 16, 3


def _wkd(build: Callable) -> tuple:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(WKD_BATCH, WKD_CLASSES, generator=generator) for _ in range(2))
    return build(sinkhorn_shared.class_cost(WKD_CLASSES)), student.requires_grad_(), teacher


def _points(gradient: str) -> tuple:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(POINTS, FEATURES, generator=generator) for _ in range(2))
    options = {"metric": "sqeuclidean", "epsilon": 8.0, "num_iters": POINTS_ITERS, "gradient": gradient}
    return lambda x, y: otkd_fast.sinkhorn_points(x, y, **options).regularized_cost, x.requires_grad_(), y


CASES = {
    "wkd otkd_fast": lambda: _wkd(lambda cost: sinkhorn_shared.mean_cost(otkd_fast.sinkhorn, cost, WKD_ITERS)),
    "wkd matrix products, PyTorch": lambda: _wkd(lambda cost: sinkhorn_shared.matrix_products(cost, WKD_ITERS)),
    "wkd released form": lambda: _wkd(lambda cost: sinkhorn_shared.released(cost, WKD_ITERS)),
    "points otkd_fast, unrolled gradient": lambda: _points("unroll"),
    "points otkd_fast, envelope gradient": lambda: _points("envelope"),
}
TITLES = {
    "wkd": f"WKD-L, B = {WKD_BATCH}, n = {WKD_CLASSES}, {WKD_ITERS} iterations",
    "points": f"Sinkhorn between points, n = m = {POINTS}, d = {FEATURES}, {POINTS_ITERS} iterations",
}


def _status(key: str) -> float:
    """MB of VmRSS (now) or VmHWM (the peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _run(name: str, threads: int) -> dict:
    torch.set_num_threads(threads)
    function, x, y = CASES[name]()
    small = [tensor.detach()[:2, : min(tensor.shape[1], 1000)] for tensor in (x, y)]
    forward_backward(lambda a, b: (a - b).square().sum(), small[0].requires_grad_(), small[1])  # autograd's own start
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    forward_backward(function, x, y)
    return {"case": name, "peak_mb": _status("VmHWM") - before}


def measure_all(threads: int = 2, names: list[str] | None = None) -> list[dict]:
    """One row a case: {"case": name, "peak_mb": MB above the inputs}, or {"case": name, "skipped": why}.

    `names`: of these cases only.
    """
    rows = []
    for name in CASES if names is None else names:
        command = [sys.executable, "-m", "bench.memory", name, "--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        rows.append(json.loads(done.stdout) if done.returncode == 0 else {"case": name, "skipped": last})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(json.dumps(_run(options.case, options.threads)))

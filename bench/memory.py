"""Peak memory of a forward and backward pass above its inputs, each in a process of its own (Linux)."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import otkd_fast

from . import gaussian, loss_wkd, sinkd, sinkhorn_dense, sinkhorn_shared
from .measure import forward_backward

WKD_BATCH, WKD_CLASSES, WKD_ITERS = 256, 1000, 10
POINTS, FEATURES, POINTS_ITERS = 50_000, 16, 3
DENSE, GAUSSIAN, SINKD, MAPS = "1024x32x32", "100x16x512", "1024x1000", "256x512x7x7, grid 4"


def _wkd(build: Callable) -> tuple:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(WKD_BATCH, WKD_CLASSES, generator=generator) for _ in range(2))
    return build(sinkhorn_shared.class_cost(WKD_CLASSES)), student.requires_grad_(), teacher


def _points(gradient: str) -> tuple:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(POINTS, FEATURES, generator=generator) for _ in range(2))
    options = {"metric": "sqeuclidean", "epsilon": 8.0, "num_iters": POINTS_ITERS, "gradient": gradient}
    return lambda x, y: otkd_fast.sinkhorn_points(x, y, **options).regularized_cost, x.requires_grad_(), y


def _peer(family, size: str, name: str, x: torch.Tensor, y: torch.Tensor) -> tuple:
    """A peer of a family on (x, y): its function gives a number, or several whose sum is taken."""
    function = next(peer for peer in family.peers if peer.name == name).build(size)
    return lambda x, y: function(x, y).sum(), x.requires_grad_(), y


def _sinkd(name: str) -> tuple:
    return _peer(sinkd.FAMILY, SINKD, name, *sinkd.logits(*map(int, SINKD.split("x"))))


def _dense(name: str) -> tuple:
    batch, n, _ = map(int, DENSE.split("x"))
    generator = torch.Generator().manual_seed(0)
    marginals = torch.softmax(torch.randn(batch, 2, n, generator=generator), -1)
    return _peer(sinkhorn_dense.FAMILY, DENSE, name, torch.rand(batch, n, n, generator=generator), marginals)


def _gaussian(name: str) -> tuple:
    return _peer(gaussian.DISTANCES, GAUSSIAN, name, *gaussian.features(GAUSSIAN))


def _maps(name: str) -> tuple:
    student, teacher = loss_wkd.random_pair(MAPS, 1.0)
    return _peer(loss_wkd.FEATURE_FAMILY, MAPS, name, student.detach(), teacher)


CASES: dict[str, Callable[[], tuple]] = {
    "wkd otkd_fast": lambda: _wkd(lambda cost: sinkhorn_shared.mean_cost(otkd_fast.sinkhorn, cost, WKD_ITERS)),
    "wkd matrix products, PyTorch": lambda: _wkd(lambda cost: sinkhorn_shared.matrix_products(cost, WKD_ITERS)),
    "wkd released form": lambda: _wkd(lambda cost: sinkhorn_shared.released(cost, WKD_ITERS)),
    "points otkd_fast, unrolled gradient": lambda: _points("unroll"),
    "points otkd_fast, envelope gradient": lambda: _points("envelope"),
    "sinkd otkd_fast": lambda: _sinkd("otkd_fast"),
    "sinkd released loop, PyTorch": lambda: _sinkd("released"),
    "sinkd POT ot.sinkhorn": lambda: _sinkd("pot"),
    "dense otkd_fast": lambda: _dense("otkd_fast"),
    "dense scaling loop, PyTorch": lambda: _dense("scaling"),
    "dense POT ot.batch, scalings": lambda: _dense("pot-batch"),
    "dense OTT-JAX, vmap (with its compilation)": lambda: _dense("ott"),
    "gaussian otkd_fast": lambda: _gaussian("otkd_fast"),
    "gaussian covariances, eigh": lambda: _gaussian("eigh"),
    "maps otkd_fast": lambda: _maps("otkd_fast"),
    "maps released form": lambda: _maps("released"),
}
TITLES = {
    "wkd": f"WKD-L, B = {WKD_BATCH}, n = {WKD_CLASSES}, {WKD_ITERS} iterations",
    "points": f"Sinkhorn between points, n = m = {POINTS}, d = {FEATURES}, {POINTS_ITERS} iterations",
    "sinkd": f"SinKD, {SINKD.replace('x', ' x ')}",
    "dense": f"Sinkhorn, {DENSE.replace('x', ' x ')}",
    "gaussian": f"Gaussian W2^2 from features, {GAUSSIAN.replace('x', ' x ')}",
    "maps": f"WKD-F, {MAPS.replace('x', ' x ')}",
}


def _status(key: str) -> float:
    """MB of VmRSS (now) or VmHWM (the peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _run(name: str, threads: int) -> dict:
    torch.set_num_threads(threads)
    function, x, y = CASES[name]()
    small = [tensor.detach()[:2, :1000] for tensor in (x, y)]
    forward_backward(lambda a, b: (a.sum() - b.sum()).square(), small[0].requires_grad_(), small[1])  # autograd's start
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    forward_backward(function, x, y)
    return {"case": name, "peak_mb": _status("VmHWM") - before}


def _measured(name: str, threads: int) -> dict:
    command = [sys.executable, "-m", "bench.memory", name, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"case": name, "skipped": last}


def measure_all(threads: int = 2, names: list[str] | None = None, processes: int = 2) -> list[dict]:
    """One row a case: {"case": name, "peak_mb": MB above the inputs}, or {"case": name, "skipped": why}.

    `names`: of these cases only. Memory does not depend on what else runs: two processes at a time.
    """
    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(lambda name: _measured(name, threads), CASES if names is None else names))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(json.dumps(_run(options.case, options.threads)))

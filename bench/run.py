"""Measures SinKD and the L1 cost matrix against their peers and writes one JSON file: `python -m bench.run`."""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import tempfile
from pathlib import Path

import torch

from otkd_fast import reference
from otkd_fast.reference import sinkd as oracle

from . import cases, peers
from .measure import forward_backward, measure

RESULTS = Path(__file__).parent / "results"


def sinkd_problem(size: cases.Size) -> tuple[tuple, tuple]:
    """Inputs (student with gradient, teacher) and the float64 reference's value and gradient."""
    student, teacher = cases.logits(size)
    published = functools.partial(
        oracle.sinkd, temperature=cases.TEMPERATURE, epsilon=cases.EPSILON, num_iters=cases.NUM_ITERS
    )
    expected = forward_backward(published, student.double().requires_grad_(), teacher.double())
    return (student.requires_grad_(), teacher), expected


def cost_problem(size: cases.Size) -> tuple[tuple, tuple]:
    """Inputs (x with gradient, y, gradient of the output) and the float64 value and gradient of the L1 cost."""
    x, y = cases.probabilities(size)
    grad = torch.randn(size.b, size.b, generator=torch.Generator().manual_seed(1))
    l1 = functools.partial(reference.cost_matrix, metric="l1")
    expected = forward_backward(l1, x.double().requires_grad_(), y.double(), grad.double())
    return (x.requires_grad_(), y, grad), expected


def sinkhorn_problem(batch: int, n: int) -> tuple[tuple, tuple]:
    """Inputs (cost (B, n, n) with gradient, marginals (B, 2, n), output gradient (B,)) and the float64 answer."""
    generator = torch.Generator().manual_seed(2)
    cost = torch.rand(batch, n, n, generator=generator)
    marginals = torch.softmax(torch.randn(batch, 2, n, generator=generator), dim=-1)
    solve = peers.transport_cost(reference.sinkhorn)
    grad = torch.ones(batch)
    expected = forward_backward(solve, cost.double().requires_grad_(), marginals.double(), grad.double())
    return (cost.requires_grad_(), marginals, grad), expected


def measure_sinkd(size: cases.Size, seconds: float, names: set[str] | None = None) -> dict:
    """SinKD, forward and backward to the student's logits; `names` chooses among the peers."""
    inputs, expected = sinkd_problem(size)
    chosen = tuple(p for p in peers.SINKD_PEERS if names is None or p.name in names)
    return {
        "op": "sinkd",
        "size": str(size),
        "parameters": {"temperature": cases.TEMPERATURE, "epsilon": cases.EPSILON, "num_iters": cases.NUM_ITERS},
        "results": measure(chosen, inputs, expected, seconds),
    }


def measure_cost(size: cases.Size, seconds: float) -> dict:
    """L1 cost matrix b x b of probability rows, forward and backward to x."""
    inputs, expected = cost_problem(size)
    results = measure(peers.COST_PEERS, inputs, expected, seconds)
    return {"op": "cost_matrix_l1", "size": str(size), "parameters": {}, "results": results}


def machine() -> dict:
    """What the numbers were taken on, and with."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    versions = {}
    for package in ("otkd_fast", "torch", "numpy", "pot", "geomloss"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": "cpu",
        "cpu": model,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def make_report(measured: list[dict]) -> dict:
    """What goes into the JSON file: the measured cases with date, dtype and machine."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"created": now, "dtype": "float32", "machine": machine(), "cases": measured}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json", help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each problem after its first calls")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--sizes", nargs="*", choices=[str(s) for s in cases.SIZES], help="default: all of them")
    parser.add_argument(
        "--peers", nargs="*", choices=[p.name for p in peers.SINKD_PEERS], help="SinKD peers, default: all of them"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    # an empty cache of compiled code: the first call of torch.compile is a first call
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="otkd_fast_bench_"))
    sizes = [s for s in cases.SIZES if not options.sizes or str(s) in options.sizes]
    names = None if not options.peers else set(options.peers) | {"otkd_fast"}
    measured = []
    for size in sizes:
        for result in (measure_sinkd(size, options.seconds, names), measure_cost(size, options.seconds)):
            measured.append(result)
            for name, row in result["results"].items():
                shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items())
                print(f"{result['op']:15} {result['size']:10} {name:18} {shown}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(make_report(measured), indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

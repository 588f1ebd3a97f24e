"""Measures every family of cases against its peers and writes one JSON file: `python -m bench.run`.

In pieces: `--merge` keeps what the file already holds of the same machine and versions, and replaces what is measured
again.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import tempfile
from pathlib import Path

import torch

from . import (
    cost_l1,
    gaussian,
    loss_wkd,
    matrix_roots,
    memory,
    results_file,
    sinkd,
    sinkhorn_dense,
    sinkhorn_points,
    sinkhorn_ragged,
    sinkhorn_shared,
)
from .family import Family
from .measure import measure

RESULTS = Path(__file__).parent / "results"
FAMILIES = (
    sinkd.FAMILY,
    cost_l1.FAMILY,
    sinkhorn_shared.FAMILY,
    sinkhorn_dense.FAMILY,
    sinkhorn_points.FAMILY,
    sinkhorn_ragged.FAMILY,
    loss_wkd.LOGIT_FAMILY,
    loss_wkd.FEATURE_FAMILY,
    matrix_roots.ROOTS,
    matrix_roots.NORMS,
    gaussian.DISTANCES,
    gaussian.COVARIANCES,
    gaussian.MOMENTS,
)


def measure_case(family: Family, size: str, seconds: float, names: set[str] | None = None, min_rounds: int = 5) -> dict:
    """One line of the family's table; `names` chooses among the peers (otkd_fast is always there)."""
    chosen = tuple(p for p in family.peers_of(size) if names is None or p.name in names | {"otkd_fast"})
    results = measure(family.problem(size), chosen, size, seconds, min_rounds)
    return {"op": family.op, "size": size, "parameters": family.parameters, "results": results}


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


def make_report(measured: list[dict], memory_rows: list[dict] | None = None) -> dict:
    """What goes into the JSON file: the measured cases with date, dtype and machine."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {
        "created": now,
        "dtype": "float32",
        "machine": machine(),
        "cases": measured,
        "memory": memory_rows or [],
    }


def merged(old: dict, new: dict) -> dict:
    """`new` with the cases and memory rows of `old` that it does not measure again, in the order of the families."""
    if old["machine"] != new["machine"]:
        changed = [key for key in new["machine"] if old["machine"].get(key) != new["machine"][key]]
        results_file.fail(f"--merge: expected a file of this machine and these versions, {', '.join(changed)} differ")
    cases = {(case["op"], case["size"]): case for case in (*old["cases"], *new["cases"])}
    order = [(family.op, size) for family in FAMILIES for size in family.sizes]
    rows = {row["case"]: row for row in (*old.get("memory", []), *new["memory"])}
    return new | {
        "cases": [cases[key] for key in order if key in cases],
        "memory": [rows[name] for name in memory.CASES if name in rows],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    ops = [family.op for family in FAMILIES]
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json", help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=15.0, help="time for each case after its first calls")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--ops", nargs="*", choices=(*ops, "none"), default=ops, help="default: all of them")
    parser.add_argument("--sizes", nargs="*", help="default: all of them")
    parser.add_argument("--peers", nargs="*", help="default: all of them")
    parser.add_argument("--rounds", type=int, default=5, help="least rounds over the peers of a case")
    parser.add_argument("--memory", nargs="*", choices=list(memory.CASES), help="peak memory of these; default: all")
    parser.add_argument("--no-memory", action="store_true", help="leave out the measurements of peak memory")
    parser.add_argument("--merge", action="store_true", help="keep the rest of what the file already holds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    # an empty cache of compiled code: the first call of torch.compile is a first call
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="otkd_fast_bench_"))
    names = None if not options.peers else set(options.peers)
    measured = []
    for family in (family for family in FAMILIES if family.op in options.ops):
        for size in (size for size in family.sizes if not options.sizes or size in options.sizes):
            result = measure_case(family, size, options.seconds, names, options.rounds)
            measured.append(result)
            for name, row in result["results"].items():
                shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items())
                print(f"{result['op']:15} {result['size']:10} {name:18} {shown}", flush=True)
    rows = [] if options.no_memory else memory.measure_all(options.threads, options.memory)
    for row in rows:
        print(row, flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = make_report(measured, rows)
    if options.merge and options.out.exists():
        report = merged(results_file.load(options.out), report)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

"""Measures every family of cases against its peers, memory, and how the time grows, into one JSON file.

With the defaults about nine minutes on two cores. Progress goes to standard error, a line a case to standard output.

  python -m bench run                                    all of it, into bench/results/cpu.json
  python -m bench run --quick --out quick.json           a minute: does everything work here?
  python -m bench run --ops sinkd sinkhorn --peers pot   some families, against POT alone
  python -m bench run --ops sqrtm --merge                these again, the rest of the file stays

A peer that is not installed is left out, and the report says so; one that --peers names has to be there. --merge takes
a file of the same processor, threads, Python and package versions; whether otkd_fast was built with CUDA (the label
+cpu or +cu130) makes no difference to the CPU's kernels, and none here.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

from . import (
    cost_l1,
    gaussian,
    loss_features,
    loss_others,
    loss_sinkd,
    loss_wkd,
    matrix_roots,
    memory,
    results_file,
    scaling,
    sinkd,
    sinkhorn_dense,
    sinkhorn_points,
    sinkhorn_ragged,
    sinkhorn_shared,
    training_step,
)
from .family import Family
from .measure import measure
from .peers import INSTALL
from .progress import Progress

RESULTS = Path(__file__).parent / "results"
FAMILIES = (
    sinkd.FAMILY,
    cost_l1.FAMILY,
    sinkhorn_shared.FAMILY,
    sinkhorn_dense.FAMILY,
    sinkhorn_points.FAMILY,
    sinkhorn_ragged.FAMILY,
    *loss_sinkd.FAMILIES,
    loss_wkd.LOGIT_FAMILY,
    loss_wkd.FEATURE_FAMILY,
    *loss_others.FAMILIES,
    *loss_features.FAMILIES,
    training_step.FAMILY,
    matrix_roots.ROOTS,
    matrix_roots.NORMS,
    gaussian.DISTANCES,
    gaussian.COVARIANCES,
    gaussian.MOMENTS,
)
# Where torch.compile is measured by default, in families of several sizes: it compiles for ten seconds each.
COMPILED_AT = {
    "sinkd": ("64x100", "1024x1000"),
    "sinkd_published": ("64x100 T30",),
    "sinkd_sample": ("64x100",),
    "sinkhorn": ("10000x4x4", "1024x16x16", "1x500x500"),
    "sinkhorn_shared": ("100",),
    "wkd_logit": ("64x100",),
    "wcord_local": (),
    "training_step": ("convolutions 64x100, WKD-F",),
}
LEFT_OUT = "compiled at other sizes; --full measures it here too"
LATE = "the run was late (--minutes), and compilation takes ten seconds"
PACKAGES = ("otkd_fast", "torch", "numpy", "pot", "geomloss", "ott-jax", "jax", "pykeops", "scipy")
SLOW_GUESS = 5.0  # seconds of a case that no record knows


def measure_case(
    family: Family, size: str, seconds: float, names: set[str] | None = None, min_rounds: int = 5, full: bool = False,
    late: bool = False,
) -> dict:  # fmt: skip
    """One line of the family's table; `names` chooses among the peers (otkd_fast is always there)."""
    start = time.monotonic()
    chosen = tuple(p for p in family.peers_of(size) if names is None or p.name in names | {"otkd_fast"})
    here = not late and (full or names is not None or size in COMPILED_AT.get(family.op, (size,)))
    left_out = {p.name for p in chosen if p.name.endswith("-compiled") and not here}
    run = tuple(p for p in chosen if p.name not in left_out)
    results = measure(family.problem(size), run, size, seconds, min_rounds)
    results |= {name: {"skipped": LATE if late else LEFT_OUT} for name in left_out}
    taken = time.monotonic() - start
    return {
        "op": family.op, "size": size, "parameters": family.parameters, "created": now(), "took_s": round(taken, 1),
        "results": results,
    }  # fmt: skip


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


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
    for package in PACKAGES:
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


def make_report(measured: list[dict], memory_rows: list[dict] | None = None, growth: dict | None = None) -> dict:
    """What goes into the JSON file: the measured cases with date, dtype and machine."""
    return {
        "format": results_file.FORMAT,
        "created": now(),
        "dtype": "float32",
        "machine": machine(),
        "cases": measured,
        "memory": memory_rows or [],
        **({"rates": {}, "sweeps": []} if growth is None else growth),
    }


def merged(old: dict, new: dict) -> dict:
    """`new` with what `old` holds and it does not measure again, in the order of the families."""
    changed = results_file.differences(old["machine"], new["machine"])
    if changed:
        results_file.fail(
            f"--merge: expected a file of this machine and these versions; these differ: {', '.join(changed)}"
        )
    cases = {(case["op"], case["size"]): case for case in (*old["cases"], *new["cases"])}
    order = [(family.op, size) for family in FAMILIES for size in family.sizes]
    rows = {row["case"]: row for row in (*old.get("memory", []), *new["memory"])}
    kept = new if new["sweeps"] else old
    return new | {
        "cases": [cases[key] for key in order if key in cases],
        "memory": [rows[name] for name in memory.CASES if name in rows],
        "rates": kept.get("rates", {}),
        "sweeps": kept.get("sweeps", []),
    }


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ops = [family.op for family in FAMILIES]
    add = parser.add_argument
    add("--out", type=Path, default=RESULTS / "cpu.json", help="JSON file to write (default: %(default)s)")
    add("--seconds", type=float, default=1.0, help="time for each case after its first calls (default: %(default)s)")
    add("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    add("--ops", nargs="*", default=ops, metavar="OP", help=f"families, or none; default: all of {', '.join(ops)}")
    add("--sizes", nargs="*", metavar="SIZE", help="sizes as the tables write them, without spaces around x")
    add("--peers", nargs="*", metavar="PEER", help="peers by name, as the JSON has them; otkd_fast is always measured")
    add("--rounds", type=int, default=3, help="least rounds over the peers of a case (default: %(default)s)")
    add("--memory", nargs="*", choices=list(memory.CASES), help="peak memory of these; default: all")
    add("--no-memory", action="store_true", help="leave out the measurements of peak memory")
    add("--no-scaling", action="store_true", help="leave out how the time grows with n, B, d and T")
    add("--merge", action="store_true", help="keep the rest of what the file already holds")
    add("--minutes", type=float, default=6.5, help="after these the rest is timed shortly, and nothing is compiled")
    add("--full", action="store_true", help="torch.compile at every size: some five minutes more")
    add("--quick", action="store_true", help="first size of each family, short times, nothing compiled: a trial")
    options = parser.parse_args(arguments)
    _check(options, ops)
    return options


def _check(options: argparse.Namespace, ops: list[str]) -> None:
    """Ends with 2 and a sentence before anything is measured."""
    known = {
        "--ops": (options.ops, {*ops, "none"}),
        "--sizes": (options.sizes, {size for family in FAMILIES for size in family.sizes}),
        "--peers": (options.peers, {peer.name for family in FAMILIES for peer in family.peers}),
    }
    for flag, (given, allowed) in known.items():
        for word in given or ():
            if word not in allowed:
                results_file.fail(f"{flag}: expected some of {', '.join(sorted(allowed))}, got {word!r}")
    for flag, value in (("--threads", options.threads), ("--rounds", options.rounds), ("--seconds", options.seconds)):
        if not value > 0:
            results_file.fail(f"{flag}: expected a number above 0, got {value:g}")
    for name in options.peers or ():
        package = INSTALL.get(name)
        if package and not _installed(package):
            results_file.fail(f"--peers: {name} is not installed: pip install {package}")
    if not options.out.parent.is_dir():
        results_file.fail(f"--out: there is no folder {options.out.parent}")
    if options.merge and not options.out.exists():
        results_file.fail(f"--merge: there is no file {options.out} to merge into")


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def line_of(case: dict) -> str:
    """The case in one line: our time, the peers' ratios, what failed."""
    own = case["results"]["otkd_fast"]
    if "wrong" in own:
        return f"{case['op']} {case['size']}: {own['wrong']}"
    key = "forward_backward_ms" if "forward_backward_ms" in own else "forward_ms"
    ours = own[key]
    parts = []
    for name, row in case["results"].items():
        if name != "otkd_fast" and key in row:
            parts.append(f"{name} {row[key] / ours:.1f} x")
        elif name != "otkd_fast":
            parts.append(f"{name} {'WRONG' if 'wrong' in row else 'skipped' if 'skipped' in row else 'forward only'}")
    return f"{case['op']} {case['size']}: {ours:.3g} ms; {', '.join(parts)}"


def plan(options: argparse.Namespace) -> list[tuple[Family, str]]:
    """What is measured: (family, size)."""
    pairs = []
    for family in (family for family in FAMILIES if family.op in options.ops):
        sizes = [size for size in family.sizes if not options.sizes or size in options.sizes]
        pairs += [(family, size) for size in (sizes[:1] if options.quick else sizes)]
    return pairs


def expected_seconds(pairs: list[tuple[Family, str]]) -> list[float]:
    """How long each took in the record, for the progress bar."""
    try:
        cases = json.loads((RESULTS / "cpu.json").read_text())["cases"]
    except (OSError, ValueError, KeyError, TypeError):
        cases = []
    took = {(case["op"], case["size"]): case.get("took_s", SLOW_GUESS) for case in cases}
    return [took.get((family.op, size), SLOW_GUESS) for family, size in pairs]


def names_of(options: argparse.Namespace) -> set[str] | None:
    """The peers to measure, None for all."""
    if options.peers:
        return set(options.peers)
    if not options.quick:
        return None
    compiled = ("compiled", "log-envelope", "keops", "ott")
    return {p.name for f in FAMILIES for p in f.peers if not p.name.endswith(compiled)}


def main(arguments: list[str] | None = None) -> int:
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    # empty caches of compiled code: the first call of a compiler is a first call
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="otkd_fast_bench_"))
    os.environ.setdefault("KEOPS_CACHE_FOLDER", tempfile.mkdtemp(prefix="otkd_fast_bench_keops_"))
    seconds, rounds = (0.02, 1) if options.quick else (options.seconds, options.rounds)
    pairs, names = plan(options), names_of(options)
    memory_names = None if options.no_memory else options.memory if options.memory is not None else list(memory.CASES)
    sweeps = () if options.no_scaling else scaling.SWEEPS
    if options.quick:
        memory_names, sweeps = memory_names and memory_names[:2], sweeps[:2]
    weights = expected_seconds(pairs) + ([30.0] if memory_names else []) + [2 * seconds] * (len(sweeps) + bool(sweeps))
    if not weights:
        results_file.fail("nothing to measure: these --ops have none of these --sizes")
    progress = Progress(weights)
    measured = []
    for family, size in pairs:
        progress.step(f"{family.op} {size}")
        late = time.monotonic() - progress.start > 60 * options.minutes and not options.full
        share = 0.3 if late else 1.0
        measured.append(measure_case(family, size, share * seconds, names, rounds, options.full, late))
        progress.print(line_of(measured[-1]))
    rows = []
    if memory_names:
        progress.step("peak memory")
        rows = memory.measure_all(options.threads, memory_names)
    growth = {"rates": {}, "sweeps": []}
    if sweeps:
        progress.step("rates of copy and product")
        growth["rates"] = scaling.rates(2 * seconds)
    for sweep in sweeps:
        progress.step(f"{sweep.kernel}, by {sweep.variable}")
        points = 3 if options.quick else None
        growth["sweeps"].append(scaling.measure_sweep(sweep, 2 * seconds, growth["rates"], points))
    progress.finish()
    report = make_report(measured, rows, growth)
    if options.merge:
        report = merged(results_file.load(options.out), report)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {options.out}")
    return int(any("wrong" in case["results"]["otkd_fast"] for case in measured))


if __name__ == "__main__":
    raise SystemExit(main())

"""Everything that a machine with a GPU can show, in one command: `python -m bench.gpu --out DIR`, or `make gpu`.

Parts, in this order, each callable by itself with --parts:
  info       device, driver, versions, what runs where, the self-test
  suite      the tests of tests/gpu on the device
  graphs     every operator captured into a CUDA graph, inputs changed, replayed: equal to the eager result
  sanitizer  compute-sanitizer's memcheck, racecheck, synccheck and initcheck over the operators at small sizes
  speed      each case of bench/gpu_cases.py: accuracy first, then times against every peer that is installed, cold
             cache, medians, eager and as a replayed graph, the floor by bytes, products and exponentials beside them

Writes DIR/<device>.json and DIR/<device>.md after each part and each case, so that an interrupted run leaves what it
had. What `--minutes` leave no time for is said to be skipped. A part that cannot run says why at once. Without a GPU:
`--device cpu --small` tries the program itself.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from otkd_fast import _dispatch

from .gpu_cases import CASES, SMALL_CASES, Case
from .gpu_measure import Clock, captured, floor_ms, rates, relative_error, value_and_gradients
from .run import machine

ROOT = Path(__file__).parents[1]
PARTS = ("info", "suite", "graphs", "sanitizer", "speed")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def part_info(options, report: dict) -> dict:
    done = subprocess.run([sys.executable, "-m", "otkd_fast", "--json"], capture_output=True, text=True)
    if not done.stdout.startswith("{"):
        raise RuntimeError((done.stderr.strip().splitlines() or ["python -m otkd_fast printed nothing"])[-1])
    return {"ok": done.returncode == 0, "otkd_fast": json.loads(done.stdout)}


def part_suite(options, report: dict) -> dict:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    seconds = 0.6 * left(options)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").decode(errors="replace").strip().splitlines()
        return {"ok": False, "skipped": f"not through after {seconds:.0f} s", "summary": lines[-12:]}
    return {"ok": done.returncode == 0, "summary": done.stdout.strip().splitlines()[-12:]}


def left(options) -> float:
    """Seconds until the end of the run, at least one."""
    return max(1.0, options.end - time.perf_counter())


def backends_of(device: torch.device) -> list[str]:
    """Backends that have kernels for this kind of device, and the reference."""
    names = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    return [*(n for n in names if any(row[n] is None for row in _dispatch.availability().values())), "reference"]


def part_graphs(options, report: dict) -> dict:
    if options.device.type != "cuda":
        raise RuntimeError("CUDA graphs need a GPU")
    rows = []
    for case in SMALL_CASES:
        for backend in backends_of(options.device)[:-1]:
            row = {"case": case.name, "backend": backend}
            try:
                inputs, loss = case.inputs(options.device), case.ours(backend)
                leaves = [x.clone().requires_grad_(k < case.differentiated) for k, x in enumerate(inputs)]
                out = []

                def call(out=out, loss=loss, leaves=leaves, count=case.differentiated):
                    value = loss(*leaves)
                    out[:] = [value.detach(), *torch.autograd.grad(value, leaves[:count])]

                graph = captured(call)
                with torch.no_grad():
                    for leaf in leaves:
                        leaf.copy_(leaf.roll(1, 0))
                graph.replay()
                replayed = [x.clone() for x in out]
                eager = value_and_gradients(loss, tuple(x.detach() for x in leaves), case.differentiated)
                row["equal_bits"] = all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))
            except Exception as error:
                row["failed"] = first_line(error)
            rows.append(row)
    return {"ok": all(row.get("equal_bits") for row in rows), "rows": rows}


def part_sanitizer(options, report: dict) -> dict:
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if options.device.type != "cuda" or program is None:
        raise RuntimeError("compute-sanitizer needs a GPU and the CUDA toolkit" if program is None else "needs a GPU")
    rows = []
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "99"]
        command += [sys.executable, "-m", "bench.gpu", "--small-cases-only"]
        seconds = min(options.sanitizer_seconds, 0.4 * left(options))
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            rows.append({"tool": tool, "ok": False, "last": [f"not through after {seconds:.0f} s"]})
            continue
        rows.append({"tool": tool, "ok": done.returncode == 0, "last": (done.stdout + done.stderr).splitlines()[-3:]})
    return {"ok": all(row["ok"] for row in rows), "rows": rows}


def run_small_cases(device: torch.device) -> None:
    """Each operator once, forward and backward: what the sanitizer watches."""
    for case in SMALL_CASES:
        for backend in backends_of(device)[:-1]:
            value_and_gradients(case.ours(backend), case.inputs(device), case.differentiated)
            print(case.name, backend, flush=True)


def part_speed(options, report: dict) -> dict:
    clock = Clock(options.device)
    rate = rates(clock, 0.2)
    rows = []
    result = {"ok": True, "rates": rate, "cases": rows, "seconds": 0.0}
    for case in SMALL_CASES if options.small else CASES:
        if time.perf_counter() > options.end:
            rows.append({"case": case.name, "variants": {}, "skipped": "no time left, see --minutes"})
            continue
        try:
            rows.append(measure_case(case, clock, rate, options))
        except RuntimeError as error:  # the inputs or the reference do not fit into memory
            rows.append({"case": case.name, "variants": {}, "skipped": first_line(error)})
        print(json.dumps(rows[-1]), flush=True)
        result["ok"] = all(not r.get("wrong") for c in rows for r in c["variants"].values())
        save(report | {"parts": report["parts"] | {"speed": result}}, options)
    return result


def measure_case(case: Case, clock: Clock, rate: dict[str, float], options) -> dict:
    """Every backend and peer of a case: errors against the reference in float64, then times."""
    if clock.on_gpu and torch.cuda.mem_get_info(clock.device)[0] < case.gigabytes * 2**30:
        return {"case": case.name, "variants": {}, "skipped": f"needs {case.gigabytes:g} GiB of free memory"}
    inputs = case.inputs(clock.device)
    expected = expected_of(case, inputs)
    builders = {f"otkd_fast {b}": (lambda b=b: case.ours(b)) for b in backends_of(clock.device)}
    builders |= {name: build for name, build in case.peers.items() if not (options.small and "compile" in name)}
    variants = {}
    for name, build in builders.items():
        other = name in case.other_answer
        try:
            variants[name] = measure_variant(case, build(), inputs, expected, other, clock, options.seconds)
        except ImportError as error:
            variants[name] = {"skipped": f"not installed ({error})"}
        except Exception as error:  # out of memory, an unsupported peer: the run goes on and says so
            variants[name] = {"skipped": f"{type(error).__name__}: {first_line(error)}"}
    return {"case": case.name, "floor_ms": floor_ms(case.work, rate), "variants": variants}


def expected_of(case: Case, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """Value and gradients by the reference in float64; None where that takes too much memory."""
    try:
        wide = tuple(x.double() for x in inputs)
        return value_and_gradients(case.ours("reference"), wide, case.differentiated)
    except torch.OutOfMemoryError:
        return None


def measure_variant(case, loss, inputs, expected, other_answer: bool, clock: Clock, seconds: float) -> dict:
    start = time.perf_counter()
    actual = value_and_gradients(loss, inputs, case.differentiated)
    row: dict = {"first_call_s": time.perf_counter() - start}
    if expected is None:
        row["unchecked"] = "the reference in float64 does not fit into memory"
    elif other_answer:
        row["another_problem"] = True
    else:
        row["value_error"], *gradients = (relative_error(a, e) for a, e in zip(actual, expected, strict=True))
        row["gradient_error"] = max(gradients)
        if not (row["value_error"] <= case.tolerance and row["gradient_error"] <= 30 * case.tolerance):
            return row | {"wrong": f"value {row['value_error']:.1e}, gradient {row['gradient_error']:.1e}"}
    plain = tuple(x.detach() for x in inputs)
    leaves = tuple(x.detach().requires_grad_(k < case.differentiated) for k, x in enumerate(inputs))

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(loss(*leaves), leaves[: case.differentiated])

    with torch.no_grad():
        row["forward_ms"] = clock.median(lambda: loss(*plain), seconds)
    row["forward_backward_ms"] = clock.median(both, seconds)
    if row["forward_backward_ms"] > 500:
        return row | {"no_graph": "it takes longer than half a second"}
    try:
        replayed = clock.replayed(both, seconds)
        row |= {} if replayed is None else {"graph_ms": replayed}
    except Exception as error:
        row["no_graph"] = first_line(error)
    return row


def markdown(report: dict) -> str:
    lines = [f"# {report['device']}", "", f"{report['created']}, torch {report['machine']['versions']['torch']}.", ""]
    for name, part in report["parts"].items():
        state = part.get("skipped") or ("ok" if part["ok"] else "FAILED")
        lines.append(f"- {name}: {state} ({part['seconds']:.0f} s)")
    for case in report["parts"].get("speed", {}).get("cases", []):
        floor = f"floor {case['floor_ms']:.4f} ms" if "floor_ms" in case else case["skipped"]
        lines += ["", f"## {case['case']}", "", floor, ""]
        lines += ["| ms | forward | forward + backward | as a graph | over the floor | error |", "|---" * 6 + "|"]
        for name, row in case["variants"].items():
            if "forward_ms" not in row:
                lines.append(f"| {name} | {row.get('skipped') or 'wrong: ' + row['wrong']} | | | | |")
                continue
            graph = f"{row['graph_ms']:.4f}" if "graph_ms" in row else ""
            over = row.get("graph_ms", row["forward_backward_ms"]) / case["floor_ms"]
            error = f"{row['value_error']:.1e}" if "value_error" in row else "another problem"
            times = f"{row['forward_ms']:.4f} | {row['forward_backward_ms']:.4f} | {graph}"
            lines.append(f"| {name} | {times} | {over:.1f} x | {error} |")
    return "\n".join(lines) + "\n"


def save(report: dict, options) -> None:
    (options.out / f"{options.stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / f"{options.stem}.md").write_text(markdown(report))


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def find_device(wanted: str) -> torch.device:
    device = torch.device(wanted)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "bench.gpu: no GPU that torch can use (torch.cuda.is_available() is False); `--device cpu --small` tries "
            "the program without one", file=sys.stderr,
        )  # fmt: skip
        raise SystemExit(2)
    return device


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the two files")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all of them")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the program")
    parser.add_argument("--small", action="store_true", help="small cases, short times")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each time that is measured")
    parser.add_argument("--minutes", type=float, default=9.0, help="no case is begun after so many")
    parser.add_argument("--sanitizer-seconds", type=float, default=120.0, help="limit for each of its tools")
    parser.add_argument("--small-cases-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.end = time.perf_counter() + 60 * options.minutes
    options.device = find_device(options.device)
    if options.small_cases_only:
        run_small_cases(options.device)
        return 0
    if options.small:
        options.seconds = min(options.seconds, 0.01)
    name = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "cpu-trial"
    options.stem = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()
    report: dict = {
        "created": time.strftime("%Y-%m-%d %H:%M:%S"), "device": name, "machine": machine(), "parts": {},
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    for part in (part for part in PARTS if part in options.parts):
        print(f"== {part}", flush=True)
        start = time.perf_counter()
        try:
            result = globals()[f"part_{part}"](options, report)
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            result = {"ok": False, "skipped": first_line(error)}
        report["parts"][part] = result | {"seconds": time.perf_counter() - start}
        save(report, options)
    print(markdown(report))
    return 0 if all(part["ok"] or part.get("skipped") for part in report["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The JSON file of `bench run`, read with care: a file of another kind or version is refused with a sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NoReturn

FORMAT = 2
KEYS = {"created", "dtype", "machine", "cases"}


def load(path: Path) -> dict:
    """The report in `path`; ends the program with 2 and a sentence where there is none."""
    try:
        report = json.loads(Path(path).read_text())
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except ValueError as error:
        fail(f"{path}: expected a JSON file written by `python -m bench run` ({error})")
    missing = KEYS - set(report) if isinstance(report, dict) else KEYS
    if missing:
        fail(f"{path}: expected a file written by `python -m bench run`; it lacks {', '.join(sorted(missing))}")
    if report.get("format") != FORMAT:
        got = report.get("format", "1 or older")
        fail(
            f"{path}: written by another version of the benchmarks: expected format {FORMAT}, got {got}; measure again"
        )
    return report


def fail(sentence: str) -> NoReturn:
    print(f"bench: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def differences(old: dict, new: dict) -> list[str]:
    """What keeps two machines' numbers from standing in one table: processor, threads, Python, versions.

    Not the build of the operating system; not a package that only one of them has; not whether otkd_fast was built with
    CUDA, since the CPU's kernels are the same (its version label, +cpu or +cu130). Without kernels (+reference) it is
    another one.
    """
    keys = ("device", "cpu", "instruction_set", "threads", "python")
    changed = [f"{key} ({old.get(key)}, now {new.get(key)})" for key in keys if old.get(key) != new.get(key)]
    before, after = old["versions"], new["versions"]
    for package in sorted(before.keys() & after.keys()):
        then, now = (_without_cuda(package, versions[package]) for versions in (before, after))
        if then and now and then != now:
            changed.append(f"{package} ({before[package]}, now {after[package]})")
    return changed


def _without_cuda(package: str, version: str | None) -> str | None:
    if package != "otkd_fast" or version is None:
        return version
    base, _, label = version.partition("+")
    return f"{base}+cpu" if label.startswith("cu") else version

"""The JSON file of bench.run, read with care: a file of another kind or version is refused with a sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

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
        fail(f"{path}: expected a file of this version of `python -m bench run`; it lacks {', '.join(sorted(missing))}")
    return report


def fail(sentence: str) -> None:
    print(f"bench: {sentence}", file=sys.stderr)
    raise SystemExit(2)

"""Compares two files of `python -m bench run` by ratios.

A ratio is a peer's time over otkd_fast's, in the same run, so that another machine or a slow day changes it little. For
each case and direction the ratios to all peers that both files have are averaged (geometrically); one that is
smaller by more than the limit is a regression, and the command ends with 1, else with 0. It ends with 2 and a sentence
where a file is missing, is of another kind or version, or has nothing in common with the other one.

  python -m bench compare old.json new.json
  python -m bench compare old.json new.json --limit 30
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from .results_file import fail, load

OURS = "otkd_fast"
KEYS = {"forward_ms": "forward", "forward_backward_ms": "forward and backward"}


def ratios(case: dict, key: str) -> dict[str, float]:
    """Peer -> its time over ours."""
    ours = case["results"].get(OURS, {}).get(key)
    if not ours:
        return {}
    return {name: row[key] / ours for name, row in case["results"].items() if name != OURS and key in row}


def compare(old: dict, new: dict) -> list[tuple[str, str, str, int, float]]:
    """(op, size, direction, peers in common, new mean ratio over old) of every case that both have."""
    before = {(case["op"], case["size"]): case for case in old["cases"]}
    rows = []
    for case in new["cases"]:
        other = before.get((case["op"], case["size"]))
        for key, direction in KEYS.items() if other else ():
            then, now = ratios(other, key), ratios(case, key)
            common = sorted(then.keys() & now.keys())
            if common:
                change = math.exp(sum(math.log(now[peer] / then[peer]) for peer in common) / len(common))
                rows.append((case["op"], case["size"], direction, len(common), change))
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--limit", type=float, default=15.0, help="per cent that a ratio may lose (default 15)")
    options = parser.parse_args(arguments)
    if not 0 < options.limit < 100:
        fail(f"--limit: expected per cent between 0 and 100, got {options.limit:g}")
    rows = compare(load(options.old), load(options.new))
    if not rows:
        fail(f"{options.old} and {options.new} have no case with a common peer")
    worse = 0
    for op, size, direction, peers, change in rows:
        bad = change < 1 - options.limit / 100
        worse += bad
        mark = "  REGRESSION" if bad else ""
        print(f"{op:22} {size:14} {direction:21} {peers} peers  ratio x {change:.2f}{mark}")
    print(f"{worse} of {len(rows)} ratios lost more than {options.limit:g} %")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Benchmarks of otkd_fast against its peers: POT, geomloss, OTT-JAX, KeOps, SciPy, and the published codes' loops.

  python -m bench run       measure all: answers first, then times, memory, growth; nine minutes; bench/results/cpu.json
  python -m bench report    tables from that file; with --update-docs into README and docs
  python -m bench plots     pictures from that file: ratios, accuracy against time, memory, time against size
  python -m bench scaling   measure again how the time grows with n, B, d and T, into the same file
  python -m bench compare   OLD.json NEW.json: ends with 1 where ratios to the peers became worse

To begin with: python -m bench run --quick --out quick.json && python -m bench report quick.json

`python -m bench COMMAND --help` says more. A time is taken only of an answer that is right. Exit code 2: an argument or
a file that cannot be used. `pip install 'otkd_fast[bench]'` brings POT, geomloss and matplotlib; `ott-jax` and
`pykeops` (which needs a C++ compiler) are extra. On a GPU: python -m bench.gpu.
"""

from __future__ import annotations

import importlib
import sys

COMMANDS = ("run", "report", "plots", "scaling", "compare")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        got = repr(arguments[0]) if arguments else "nothing"
        print(f"bench: expected one of {', '.join(COMMANDS)}, got {got}\n\n{__doc__.strip()}", file=sys.stderr)
        return 2
    return importlib.import_module(f".{arguments[0]}", __package__).main(arguments[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())

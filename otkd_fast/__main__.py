"""``python -m otkd_fast [--json]``: what is installed, what each operator can run on, and whether it computes right.

``python -m otkd_fast cost-matrix``: the cost between categories for WKD-L.
"""

from __future__ import annotations

import argparse
import json
import sys

from otkd_fast import _cost_matrix_command, _info


def main(arguments: list[str] | None = None) -> int:
    """Print the report; 0, or 1 if a compiled backend disagrees with the reference. Or run the command named first."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["cost-matrix"]:
        return _cost_matrix_command.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m otkd_fast",
        description="What is installed, what each operator can run on, and a one-second test of every compiled\n"
        "backend against the reference. Exit code 1 if that test fails.",
        epilog="Commands:\n"
        "  python -m otkd_fast               this report and self-test\n"
        "  python -m otkd_fast --json        the same for programs\n"
        "  python -m otkd_fast cost-matrix   the cost between categories for WKD-L, file to file; --help says all\n"
        "In a clone also: python -m bench --help, the benchmarks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if arguments and not arguments[0].startswith("-"):
        parser.error(f"expected the command cost-matrix, or none, got {arguments[0]!r}")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(arguments)
    report = _info.report()
    print(json.dumps(report, indent=2) if options.json else _info.text(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

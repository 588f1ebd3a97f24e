"""Draws Markdown tables from the JSON of bench.run: `python -m bench.report [--update-docs]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import scaling
from .family import Family
from .memory import TITLES as MEMORY_TITLES
from .run import FAMILIES, RESULTS

README_OPS = ("sinkd", "sinkhorn_shared", "cost_matrix_l1")
ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SCALING = RESULTS / "scaling_cpu.json"
OURS = "otkd_fast"


def milliseconds(value: float) -> str:
    """Three significant digits, never in scientific notation."""
    return (
        f"{value:.3f}"
        if value < 1
        else f"{value:.2f}"
        if value < 10
        else f"{value:.1f}"
        if value < 100
        else f"{value:.0f}"
    )


def table(cases: list[dict], peers: tuple, required: dict, key: str) -> list[str]:
    """One line a size; each peer's time with its ratio to ours (and the ratio that is required, where there is one)."""
    lines = ["| size | " + " | ".join(p.label for p in peers) + " |", "|---" * (len(peers) + 1) + "|"]
    for case in cases:
        ours = case["results"][OURS].get(key)
        cells = [case["size"].replace("x", " x ")]
        for peer in peers:
            row = case["results"].get(peer.name, {"skipped": "not run"})
            if key not in row:
                cells.append("wrong answer" if "wrong" in row else "-")
            elif peer.name == OURS or ours is None:
                cells.append(f"**{milliseconds(row[key])}**" if peer.name == OURS else milliseconds(row[key]))
            else:
                need = required.get(case["size"], {}).get(peer.name)
                asked = f", at least {need:g}" if need is not None else ""
                cells.append(f"{milliseconds(row[key])} ({row[key] / ours:.1f} x{asked})")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def first_calls(family: Family, cases: list[dict]) -> str:
    """Seconds of the first forward and backward of each peer, over the sizes."""
    parts = []
    for peer in family.peers:
        seconds = [
            c["results"][peer.name]["first_call_s"] for c in cases if "first_call_s" in c["results"].get(peer.name, {})
        ]
        if seconds:
            low, high = f"{min(seconds):.2g}", f"{max(seconds):.2g}"
            parts.append(f"{peer.label} {low if low == high else f'{low} to {high}'} s")
    return "First call (forward and backward): " + "; ".join(parts) + "."


def neighbours(family: Family, cases: list[dict]) -> list[str]:
    """What the peers with another answer solve, and by how much their value differs."""
    lines = []
    for peer in family.peers:
        found = [c["results"].get(peer.name, {}).get("value_differs_from_ours_by") for c in cases]
        found = [value for value in found if value is not None]
        if found:
            low, high = f"{min(found):.2%}", f"{max(found):.2%}"
            by = low if low == high else f"{low} to {high}"
            lines += ["", f"{peer.label}: {peer.note} Its value differs by {by} here.".replace(":  ", ": ")]
    return lines


def left_out(cases: list[dict]) -> list[str]:
    labels = {(family.op, peer.name): peer.label for family in FAMILIES for peer in family.peers}
    rows = [(c, name, row) for c in cases for name, row in c["results"].items()]
    return [
        f"- {labels[c['op'], n]} at {c['size']} ({c['op']}): {r.get('skipped') or r['wrong']}"
        for c, n, r in rows
        if "skipped" in r or "wrong" in r
    ]


def memory_table(rows: list[dict]) -> list[str]:
    lines = ["", "Peak memory above the inputs, forward and backward, MB", "", "| case | MB |", "|---|---|"]
    for row in rows:
        group, variant = row["case"].split(" ", 1)
        shown = f"{row['peak_mb']:.0f}" if "peak_mb" in row else row["skipped"]
        lines.append(f"| {MEMORY_TITLES[group]}: {variant} | {shown} |")
    return lines


def section(family: Family, cases: list[dict]) -> list[str]:
    """The tables of one family."""
    lines = ["", f"{family.title}: forward and backward", ""]
    lines += [*table(cases, family.peers, family.required, "forward_backward_ms"), "", "Forward only", ""]
    lines += [*table(cases, family.peers, family.required_forward, "forward_ms"), "", first_calls(family, cases)]
    return lines + neighbours(family, cases)


def heading(report: dict) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    threads, cpu = f"{machine['threads']} threads of {machine['cpu']}", machine["instruction_set"]
    return (
        f"{report['dtype']}, {threads} ({cpu}), {versions}, {report['created'][:10]}. Medians in milliseconds, the "
        "variants interleaved in one run, after the answers were checked against float64; in brackets the ratio to "
        "otkd_fast."
    )


def markdown(report: dict, ops: tuple[str, ...] | None = None) -> str:
    """The tables with what they were measured on, and where a peer's answer differs; `ops` chooses families."""
    lines = [heading(report)]
    cases = [case for case in report["cases"] if ops is None or case["op"] in ops]
    for family in FAMILIES:
        own = [case for case in cases if case["op"] == family.op]
        lines += section(family, own) if own else []
    if ops is None and report.get("memory"):
        lines += memory_table(report["memory"])
    missing = left_out(cases)
    return "\n".join(lines + (["", "Left out:", "", *missing] if missing else []))


def scaling_markdown(report: dict) -> str:
    """The fitted exponents beside those of the operation counts."""
    machine = report["machine"]
    on = f"{machine['threads']} threads of {machine['cpu']} ({machine['instruction_set']})"
    lines = [
        f"{report['dtype']}, {on}. Exponents of the time: by the operation count, and fitted to the last three points.",
        "",
        "| kernel | variable | from ... to | operations | measured | ms at the end |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["sweeps"]:
        first, last = row["values"][0], row["values"][-1]
        exponents = f"{row['exponent_of_operations']:g} | {row['fitted_exponent']:.2f}"
        end = milliseconds(row["milliseconds"][-1])
        lines.append(f"| {row['kernel']} | {row['variable']} | {first} ... {last} | {exponents} | {end} |")
    return "\n".join(lines)


def update(page: Path, text: str, source: str, maker: str = "bench.run") -> None:
    """Puts the text between the two markers of a page."""
    old = page.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        raise SystemExit(f"{page}: expected one {BEGIN} and one {END}")
    head, rest = old.split(BEGIN)
    tail = rest.split(END)[1]
    made = f"Made by `python -m {maker}` and `python -m bench.report --update-docs` from `{source}`."
    page.write_text(f"{head}{BEGIN}\n{text}\n\n{made}\n{END}{tail}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("json", type=Path, nargs="?", default=RESULTS / "cpu.json", help="file written by bench.run")
    parser.add_argument("--update-docs", action="store_true", help=f"write README and docs, between {BEGIN} and {END}")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="gets some of the tables")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "benchmarks.md", help="gets all of them")
    parser.add_argument("--scaling", type=Path, default=SCALING, help="file written by bench.scaling, if it is there")
    parser.add_argument("--plot", type=Path, default=scaling.PLOT, help="gets their plot")
    parser.add_argument("--numerics", type=Path, default=ROOT / "docs" / "numerics.md", help="gets the exponents")
    options = parser.parse_args(arguments)
    report = json.loads(options.json.read_text())
    if options.update_docs:
        source = f"bench/results/{options.json.name}"
        update(options.readme, markdown(report, README_OPS), source)
        update(options.docs, markdown(report), source)
        if options.scaling.exists():
            sweeps = json.loads(options.scaling.read_text())
            update(options.numerics, scaling_markdown(sweeps), f"bench/results/{options.scaling.name}", "bench.scaling")
            scaling.draw(options.plot, sweeps["sweeps"])
    else:
        print(markdown(report))


if __name__ == "__main__":
    main()

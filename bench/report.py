"""Markdown tables from the JSON file of `python -m bench run`; with --update-docs between the markers of the pages.

python -m bench report                       all tables to standard output
python -m bench report quick.json            those of another file
python -m bench report --update-docs         into README.md, docs/benchmarks.md, docs/numerics.md; docs/scaling.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import published, scaling
from .family import Family
from .measure import SLOW, VERY_SLOW
from .memory import TITLES as MEMORY_TITLES
from .results_file import fail, load
from .run import FAMILIES, RESULTS
from .summary import OURS, summary

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PICTURES = ("<!-- pictures:begin -->", "<!-- pictures:end -->")


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
    """One line a size; each peer's time with its ratio to ours (and the ratio that is required, where there is one).

    Peers that have no number at any size are left out: they are listed below the tables.
    """
    rows_of = {p.name: [case["results"].get(p.name, {}) for case in cases] for p in peers}
    peers = tuple(p for p in peers if any(key in row or "wrong" in row for row in rows_of[p.name]))
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


def compared(family: Family, cases: list[dict]) -> str:
    """What is equal where times are compared: iterations, the answer, or the marginal error, with its numbers."""
    groups: dict[str, list[str]] = {}
    for peer in family.peers:
        rows = [c["results"].get(peer.name, {}) for c in cases]
        if peer.name == OURS or not any("forward_ms" in row for row in rows):
            continue
        text = peer.label
        reached = [
            f"{row['marginal_error']:.1e} after {row['steps']} steps, otkd_fast {row['marginal_error_of_ours']:.1e}"
            for row in rows if "marginal_error" in row
        ]  # fmt: skip
        text += f" ({'; '.join(reached)})" if reached else ""
        groups.setdefault(family.equal_of(peer), []).append(text)
    said = {"iterations": "Equal iterations", "the answer": "Equal answer", "marginal error": "Equal marginal error"}
    return ". ".join(f"{said.get(what, f'Equal: {what}')}: {', '.join(names)}" for what, names in groups.items()) + "."


def left_out(cases: list[dict]) -> list[str]:
    labels = {(family.op, peer.name): peer.label for family in FAMILIES for peer in family.peers}
    rows = [(c, name, row) for c in cases for name, row in c["results"].items()]
    return [
        f"- {labels.get((c['op'], n), n)} at {c['size']} ({c['op']}): {r.get('skipped') or r['wrong']}"
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
    if any("forward_backward_ms" in case["results"][OURS] for case in cases):
        lines += [*table(cases, family.peers, family.required, "forward_backward_ms"), "", "Forward only", ""]
    else:
        lines = ["", f"{family.title}: forward only", ""]
    lines += [*table(cases, family.peers, family.required_forward, "forward_ms"), "", compared(family, cases)]
    lines += ["", first_calls(family, cases)]
    return lines + neighbours(family, cases)


def dates(report: dict) -> str:
    """The day of a run in one go; of cases that were put together, how many runs and from when to when."""
    days = sorted({case.get("created", report["created"])[:10] for case in report["cases"]} or {report["created"][:10]})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}, put together from runs of {len(days)} days"


def measured_on(report: dict) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    threads, cpu = f"{machine['threads']} threads of {machine['cpu']}", machine["instruction_set"]
    return (
        f"{report['dtype']}, {threads} ({cpu}), {versions}, {dates(report)}. Medians, the variants interleaved in one "
        "run, after the answers were checked against float64."
    )


def heading(report: dict) -> str:
    return (
        f"{measured_on(report)} Milliseconds; in brackets the ratio to otkd_fast. "
        f"A call of more than {SLOW:g} s was timed twice, one of more than {VERY_SLOW:g} s once."
    )


def short(report: dict) -> str:
    """The README's table: a line a family."""
    text = (
        "How many times as long the fastest other takes that gives the same answer (released loops, POT, geomloss, "
        "OTT-JAX, KeOps, PyTorch, torch.compile, as far as they solve the same problem), at the size where otkd_fast "
        "stands worst and where it stands best; below 1 the other is faster. All times, sizes, peers and answers: "
        "[benchmarks](docs/benchmarks.md)."
    )
    return "\n".join([measured_on(report), "", text, "", *summary(report)])


def markdown(report: dict) -> str:
    """The tables with what they were measured on, and where a peer's answer differs."""
    lines, cases = [heading(report)], report["cases"]
    for family in FAMILIES:
        own = [case for case in cases if case["op"] == family.op and OURS in case["results"]]
        lines += section(family, own) if own else []
    if report.get("memory"):
        lines += memory_table(report["memory"])
    missing = left_out(cases)
    return "\n".join(lines + (["", "Left out:", "", *missing] if missing else []))


def scaling_markdown(report: dict) -> str:
    """The fitted exponents beside those of the operation counts, and the distance from the floor."""
    machine, rate = report["machine"], report.get("rates")
    on = f"{machine['threads']} threads of {machine['cpu']} ({machine['instruction_set']})"
    lines = [f"{report['dtype']}, {on}. Exponents of the time: of the operation count; fitted to the last points."]
    if rate:
        lines[0] += (
            f" The floor is the larger of bytes at {rate['copy_bytes_per_s'] / 1e9:.0f} GB/s and multiply-adds "
            f"at {rate['multiply_adds_per_s'] / 1e9:.0f} G/s, the fastest copy and product of that run; an exponential "
            "counts as 6 multiply-adds, a subtraction beside a multiply-add as nothing."
        )
    lines += ["", "| kernel | variable | from ... to | operations | measured | ms at the end | times the floor |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in report["sweeps"]:
        first, last = row["values"][0], row["values"][-1]
        exponents = f"{row['exponent_of_operations']:g} | {row['fitted_exponent']:.2f}"
        end = row["milliseconds"][-1]
        over = f"{end / row['floor_ms'][-1]:.1f}" if "floor_ms" in row else ""
        cells = f"{row['variable']} | {first} ... {last} | {exponents} | {milliseconds(end)} | {over}"
        lines.append(f"| {row['kernel']} | {cells} |")
    return "\n".join(lines)


def pictures(report: dict) -> str:
    """Links to what `python -m bench plots` draws from this report."""
    present = {case["op"] for case in report["cases"] if len(case["results"]) > 1}
    lines = [f"![{f.op}: {f.title}](plots/{f.op}.png)" for f in FAMILIES if f.op in present]
    lines.append("![Accuracy of the value against time](plots/accuracy.png)")
    lines += ["![Peak memory](plots/memory.png)"] if report.get("memory") else []
    lines += ["![Time against n, B, d and T, dotted: the floor](scaling.png)"] if report.get("sweeps") else []
    return "\n\n".join(lines)


def update(page: Path, text: str, source: str, markers: tuple[str, str] = (BEGIN, END)) -> None:
    """Puts the text between the two markers of a page."""
    begin, end = markers
    try:
        old = page.read_text()
    except OSError as error:
        fail(f"{page}: {error.strerror}")
    if old.count(begin) != 1 or old.count(end) != 1:
        fail(f"{page}: expected one {begin} and one {end}")
    head, rest = old.split(begin)
    tail = rest.split(end)[1]
    made = f"Made by `python -m bench run` and `python -m bench report --update-docs` from `{source}`."
    page.write_text(f"{head}{begin}\n{text}\n\n{made}\n{end}{tail}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("json", type=Path, nargs="?", default=RESULTS / "cpu.json", help="file of bench run (default: %(default)s)")
    add("--update-docs", action="store_true", help=f"write the pages, between {BEGIN} and {END}")
    add("--readme", type=Path, default=ROOT / "README.md", help="gets a line a family")
    add("--docs", type=Path, default=ROOT / "docs" / "benchmarks.md", help="gets all of them")
    add("--numerics", type=Path, default=ROOT / "docs" / "numerics.md", help="gets the exponents and floors")
    add("--plot", type=Path, default=scaling.PLOT, help="gets their plot")
    options = parser.parse_args(arguments)
    report = load(options.json)
    if not options.update_docs:
        print(markdown(report))
        if report.get("sweeps"):
            print(f"\n{scaling_markdown(report)}")
        return 0
    source = f"bench/results/{options.json.name}"
    cases = ["", "The published problems, and where each is measured:", "", *published.markdown()]
    update(options.readme, short(report), source)
    update(options.docs, markdown(report) + "\n" + "\n".join(cases), source)
    update(options.docs, pictures(report), source, PICTURES)
    if report.get("sweeps"):
        update(options.numerics, scaling_markdown(report), source)
        try:
            scaling.draw(options.plot, report["sweeps"])
        except ImportError:
            fail("the plot needs matplotlib: pip install 'otkd_fast[bench]'")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

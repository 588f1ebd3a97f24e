"""Draws Markdown tables from the JSON of bench.run: `python -m bench.report [--update-readme]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .cases import REQUIRED_COST, REQUIRED_SINKD
from .peers import COST_PEERS, GEOMLOSS_NOTE, SINKD_PEERS
from .run import RESULTS

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
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
    lines = ["| b x d | " + " | ".join(p.label for p in peers) + " |", "|---" * (len(peers) + 1) + "|"]
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


def first_calls(cases: list[dict]) -> str:
    """Seconds of the first forward and backward of each peer, over the sizes."""
    parts = []
    for peer in SINKD_PEERS:
        seconds = [
            c["results"][peer.name]["first_call_s"] for c in cases if "first_call_s" in c["results"].get(peer.name, {})
        ]
        if seconds:
            low, high = f"{min(seconds):.2g}", f"{max(seconds):.2g}"
            parts.append(f"{peer.label} {low if low == high else f'{low} to {high}'} s")
    return "First call (forward and backward): " + "; ".join(parts) + "."


def left_out(cases: list[dict]) -> list[str]:
    labels = {p.name: p.label for p in SINKD_PEERS + COST_PEERS}
    rows = [(c, name, row) for c in cases for name, row in c["results"].items()]
    return [
        f"- {labels[n]} at {c['size']} ({c['op']}): {r.get('skipped') or r['wrong']}"
        for c, n, r in rows
        if "skipped" in r or "wrong" in r
    ]


def markdown(report: dict) -> str:
    """The tables with what they were measured on, and where a peer's answer differs."""
    machine, cases = report["machine"], report["cases"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    sinkd = [c for c in cases if c["op"] == "sinkd"]
    cost = [c for c in cases if c["op"] == "cost_matrix_l1"]
    lines = [
        f"{report['dtype']}, {machine['threads']} threads of {machine['cpu']} "
        f"({machine['instruction_set']}), {versions}, {report['created'][:10]}. Medians in milliseconds, the variants "
        "interleaved in one run, after the answers were checked against float64; in brackets the ratio to otkd_fast.",
    ]
    if sinkd:
        p = sinkd[0]["parameters"]
        title = (
            f"SinKD, L1 cost on softmax(z / {p['temperature']:g}), epsilon {p['epsilon']:g}, "
            f"{p['num_iters']} iterations, unrolled gradient"
        )
        lines += [
            "",
            f"{title}: forward and backward",
            "",
            *table(sinkd, SINKD_PEERS, REQUIRED_SINKD, "forward_backward_ms"),
        ]
        lines += ["", "Forward only", "", *table(sinkd, SINKD_PEERS, {}, "forward_ms"), "", first_calls(sinkd)]
        differences = [c["results"].get("geomloss", {}).get("value_differs_from_ours_by") for c in sinkd]
        differences = [d for d in differences if d is not None]
        if differences:
            low, high = f"{min(differences):.1%}", f"{max(differences):.1%}"
            by = low if low == high else f"{low} to {high}"
            lines += ["", f"{GEOMLOSS_NOTE} Its value differs from the published loss by {by} here."]
    if cost:
        lines += [
            "",
            "L1 cost matrix (b x b): forward and backward",
            "",
            *table(cost, COST_PEERS, REQUIRED_COST, "forward_backward_ms"),
        ]
        lines += ["", "Forward only", "", *table(cost, COST_PEERS, REQUIRED_COST, "forward_ms")]
    missing = left_out(cases)
    return "\n".join(lines + (["", "Left out:", "", *missing] if missing else []))


def update(readme: Path, text: str, source: str) -> None:
    """Puts the text between the two markers of the README."""
    old = readme.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        raise SystemExit(f"{readme}: expected one {BEGIN} and one {END}")
    head, rest = old.split(BEGIN)
    tail = rest.split(END)[1]
    made = f"Made by `python -m bench.run` and `python -m bench.report --update-readme` from `{source}`."
    readme.write_text(f"{head}{BEGIN}\n{text}\n\n{made}\n{END}{tail}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("json", type=Path, nargs="?", default=RESULTS / "cpu.json", help="file written by bench.run")
    parser.add_argument("--update-readme", action="store_true", help=f"write the tables between {BEGIN} and {END}")
    parser.add_argument("--readme", type=Path, default=Path(__file__).parent.parent / "README.md")
    options = parser.parse_args(arguments)
    text = markdown(json.loads(options.json.read_text()))
    if options.update_readme:
        update(options.readme, text, f"bench/results/{options.json.name}")
    else:
        print(text)


if __name__ == "__main__":
    main()

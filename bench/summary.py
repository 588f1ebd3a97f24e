"""A line a family: otkd_fast against the fastest other that gives the same answer, at its worst and its best size."""

from __future__ import annotations

import re

from .family import Family
from .run import FAMILIES

OURS = "otkd_fast"


def fastest_other(family: Family, case: dict, key: str) -> tuple[float, str] | None:
    """(its time over ours, its label); None where nobody else, or we, have a time."""
    ours = case["results"][OURS].get(key)
    others, named = [], ""
    for peer in family.peers:
        label = peer.label.replace("the same", named)  # 'the same, torch.compile' follows what it is the same as
        named = named if label != peer.label else label
        row = case["results"].get(peer.name, {})
        if peer.same_answer and not peer.name.startswith(OURS) and key in row:
            others.append((row[key], label))
    if ours is None or not others:
        return None
    time, label = min(others)
    return time / ours, label


def span(family: Family, cases: list[dict], key: str) -> str:
    """'lowest x (size: who) to highest x (size: who)' over the cases, '-' without any."""
    ratios = []
    for case in cases:
        found = fastest_other(family, case, key)
        if found:
            ratios.append((found[0], f"{found[0]:.1f} x ({case['size']}: {found[1]})"))
    if not ratios:
        return "-"
    low, high = min(ratios)[1], max(ratios)[1]
    return low if low == high else f"{low} to {high}"


def summary(report: dict) -> list[str]:
    lines = ["| problem | cases | forward and backward | forward |", "|---|---|---|---|"]
    for family in FAMILIES:
        cases = [case for case in report["cases"] if case["op"] == family.op and OURS in case["results"]]
        if cases:
            spans = " | ".join(span(family, cases, key) for key in ("forward_backward_ms", "forward_ms"))
            problem = re.split(r" \(|:", family.title)[0]
            lines.append(f"| {problem} | {len(cases)} | {spans} |")
    return lines

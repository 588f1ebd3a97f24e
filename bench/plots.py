"""Pictures from a file of `python -m bench run`: a bar chart of ratios a family, accuracy against time, peak memory,
and the time against n, B, d and T with the floor drawn in. Needs matplotlib.

  python -m bench plots                        docs/plots/*.png from bench/results/cpu.json
  python -m bench plots quick.json --out out   from another file, elsewhere
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import scaling
from .memory import TITLES
from .results_file import fail, load
from .run import FAMILIES, RESULTS

OURS = "otkd_fast"
OUT = Path(__file__).parents[1] / "docs" / "plots"


def pyplot():
    try:
        import matplotlib
    except ImportError:
        fail("plots need matplotlib: pip install 'otkd_fast[bench]'")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def direction(cases: list[dict]) -> str:
    """The key of forward and backward, or of forward where there is no gradient."""
    both = any("forward_backward_ms" in case["results"][OURS] for case in cases)
    return "forward_backward_ms" if both else "forward_ms"


def ratio_bars(plt, family, cases: list[dict], path: Path) -> None:
    """A group of bars a size: each peer's time over ours, forward and backward, logarithmic; below 1 it is faster."""
    key = direction(cases)
    peers = [p for p in family.peers if p.name != OURS and any(key in c["results"].get(p.name, {}) for c in cases)]
    figure, axes = plt.subplots(figsize=(9, 3.6))
    width = 0.8 / max(1, len(peers))
    for k, peer in enumerate(peers):
        heights = [c["results"].get(peer.name, {}).get(key, float("nan")) / c["results"][OURS][key] for c in cases]
        places = [i + (k - (len(peers) - 1) / 2) * width for i in range(len(cases))]
        bars = axes.bar(places, heights, width, label=peer.label)
        axes.bar_label(bars, [f"{h:.1f}" if h == h else "" for h in heights], fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_yscale("log")
    sizes = [c["size"].replace("x", " x ") for c in cases]
    axes.set_xticks(range(len(cases)), sizes, rotation=20 if sum(map(len, sizes)) > 80 else 0)
    axes.set_ylabel("time over otkd_fast's")
    axes.set_title(f"{family.title}: {'forward' if key == 'forward_ms' else 'forward and backward'}", fontsize=9)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def accuracy(plt, report: dict, path: Path) -> None:
    """Error of the value against float64 over the time relative to ours, a point for each case and peer."""
    points: dict[str, list[tuple[float, float]]] = {}
    for case in report["cases"]:
        ours = case["results"].get(OURS, {}).get("forward_ms")
        for name, row in case["results"].items():
            if ours and "forward_ms" in row and row.get("value_error", 0) > 0:
                points.setdefault(name, []).append((row["forward_ms"] / ours, row["value_error"]))
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, pairs in sorted(points.items(), key=lambda item: item[0] != OURS):
        axes.scatter(*zip(*pairs, strict=True), s=36 if name == OURS else 18, label=name)
    axes.set(xscale="log", yscale="log", xlabel="forward time over otkd_fast's", ylabel="relative error of the value")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def memory_bars(plt, rows: list[dict], path: Path) -> None:
    rows = [row for row in rows if "peak_mb" in row]
    labels = [f"{TITLES.get(row['case'].split(' ', 1)[0], '')}: {row['case'].split(' ', 1)[1]}" for row in rows]
    figure, axes = plt.subplots(figsize=(9, 0.5 + 0.35 * len(rows)))
    bars = axes.barh(labels, [row["peak_mb"] for row in rows])
    axes.bar_label(bars, [f"{row['peak_mb']:.0f}" for row in rows], fontsize=7)
    axes.set(xscale="log", xlabel="peak memory above the inputs, forward and backward, MB")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, nargs="?", default=RESULTS / "cpu.json", help="file written by bench run")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder for the PNG files (default {OUT})")
    options = parser.parse_args(arguments)
    report, plt = load(options.json), pyplot()
    options.out.mkdir(parents=True, exist_ok=True)
    for family in FAMILIES:
        cases = [c for c in report["cases"] if c["op"] == family.op and "forward_ms" in c["results"].get(OURS, {})]
        if cases and any(len(case["results"]) > 1 for case in cases):
            ratio_bars(plt, family, cases, options.out / f"{family.op}.png")
    accuracy(plt, report, options.out / "accuracy.png")
    if report.get("memory"):
        memory_bars(plt, report["memory"], options.out / "memory.png")
    if report.get("sweeps"):
        scaling.draw(options.out / "scaling.png", report["sweeps"])
    print("\n".join(str(path) for path in sorted(options.out.glob("*.png"))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

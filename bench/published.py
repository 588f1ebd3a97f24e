"""The published problems as data: what the distillation methods really pose, and where each is measured.

The loss families take their sizes from this table (`sizes_of`); a test holds the rest of it against the families.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """`measured`: (op of the family, size) pairs; `less`: what is not measured of it, and why."""

    id: str
    problem: str
    batch: str
    n: str
    d: str
    iterations: str
    epsilon: str
    masses: str
    gradient: str
    measured: tuple[tuple[str, str], ...]
    less: str = ""


CASES = (
    Case("K1", "WKD-L, WKL, CIFAR-100", "64", "100 shared, one class left out", "-", "10", "0.05", "softmax",
         "unrolled, rows", (("wkd_logit", "64x100"), ("wkl", "64x100 dwkd_dkd"))),
    Case("K2", "WKD-L, ImageNet", "256", "1000 shared, one class left out", "-", "10", "0.05", "softmax",
         "unrolled, rows", (("wkd_logit", "256x1000"),)),
    Case("K3", "WKL over all classes, for the log", "64", "100 shared", "-", "10", "0.05", "softmax", "none",
         (("wkl_value", "64x100"),)),
    Case("K4", "SinKD, GLUE", "1", "16, 32, 64", "2, 3", "20", "0.1", "uniform", "unrolled, through the cost",
         (("sinkd_published", "16x2 T20"), ("sinkd_published", "32x2 T20"), ("sinkd_published", "64x3 T20"))),
    Case("K5", "SinKD, CIFAR-100", "1", "8, stress to 512", "100", "30", "0.1", "uniform",
         "unrolled, through the cost",
         (("sinkd_published", "8x100 T30"), ("sinkd_published", "64x100 T30"), ("sinkd_published", "512x100 T30"))),
    Case("K6", "SinKD, flattened", "1", "192 (GLUE), 800, 6400", "on the line", "sort", "0", "uniform", "exact",
         (("sinkd_flattened", "64x3"), ("sinkd_flattened", "8x100"), ("sinkd_flattened", "64x100"))),
    Case("K7", "SinKD, sample-wise", "8, 64", "2, 3, 100", "scalars", "20", "0.1", "softmax", "unrolled",
         (("sinkd_sample", "8x2"), ("sinkd_sample", "64x3"), ("sinkd_sample", "64x100"))),
    Case("K8", "SinKD, tokens of a language model, bfloat16", "1", "8 to 1024", "32128, 50257", "20", "0.1",
         "uniform", "unrolled, through the cost", (("sinkd_tokens", "64x32128"), ("sinkd_tokens", "128x50257")),
         "more than 128 tokens: seconds a call on two cores"),
    Case("K9", "MultiLevelOT", "1 to 8", "L x L, L 8 to 512", "50", "10", "0.1", "uniform", "unrolled",
         (("multi_level_ot", "1x8x32000"), ("multi_level_ot", "4x64x8000"), ("multi_level_ot", "8x256x1000")),
         "small vocabularies where there are many tokens: memory"),
    Case("K10", "KD2M, W2 and joint W2", "1", "128", "512", "exact", "0", "uniform", "plan constant",
         (("kd2m", "128x512 w2"), ("kd2m", "128x512 jw2"))),
    Case("K11", "KD2M, class-conditional W2", "10, about 72, ragged", "about 13, 1 to 5", "512", "exact", "0",
         "uniform", "plan constant", (("kd2m", "128x512 cw2, 10 classes"), ("kd2m", "128x512 cw2, 100 classes"))),
    Case("K12", "WCoRD, local", "1", "64", "128, cosine", "50", "0.1; 0.5 (IPOT)", "uniform", "plan constant",
         (("wcord_local", "64x128 sinkhorn"), ("wcord_local", "64x128 ipot"))),
    Case("K13", "CRD, WCoRD, global", "64", "16385 negatives", "128", "-", "-", "-", "autograd",
         (("wcord_global", "64x2048x128"),), "2048 of 16384 negatives: gather and products, by PyTorch on both sides"),
    Case("M1", "WKD-F, moments, CIFAR-100", "64", "(256, 8, 8), one window", "-", "-", "-", "-", "autograd",
         (("wkd_feature", "64x256x8x8, grid 1"),)),
    Case("M2", "WKD-F, moments, ImageNet", "256", "(512, 7, 7), 4 x 4 windows", "-", "-", "-", "-", "autograd",
         (("wkd_feature", "256x512x7x7, grid 4"),), "(2048, 7, 7): four times as much of the same"),
    Case("M3", "KD2M, moments over the batch", "1", "(128, 512)", "-", "-", "-", "-", "autograd",
         (("kd2m", "128x512 w2_gaussian"),)),
    Case("M4", "Bures distance, full covariance from features", "32 to 100", "-", "128, 512", "-", "-", "-", "autograd",
         (("gaussian_wasserstein", "32x49x512"), ("gaussian_wasserstein", "100x16x512"),
          ("gaussian_wasserstein", "64x196x128"))),
)  # fmt: skip


def sizes_of(op: str) -> tuple[str, ...]:
    """The sizes at which the table wants a family measured, in its order."""
    return tuple(size for case in CASES for own, size in case.measured if own == op)


def markdown() -> list[str]:
    """The table, for the report."""
    lines = ["| | problem | B | n, m | d | iterations | epsilon | masses | gradient | measured as |", "|---" * 10 + "|"]
    for case in CASES:
        where = "; ".join(f"{op} {size}" for op, size in case.measured)
        cells = (case.batch, case.n, case.d, case.iterations, case.epsilon, case.masses, case.gradient)
        less = f" (not: {case.less})" if case.less else ""
        lines.append(f"| {case.id} | {case.problem} | {' | '.join(cells)} | {where}{less} |")
    return lines

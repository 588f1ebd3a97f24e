"""Losses of rows as their users call them: what their behaviour is tested with.

A case has a module for given options, and inputs for it: student, teacher, then what else `forward` takes by position
before the mask. Rows are samples along the first axis.
"""

import functools

import torch
import wkd_cases

from otkd_fast.losses import WKL, UniversalLogitDistillation, WKDFeature, WKDLogit, WKLFeature

CLASSES = 5
COST = wkd_cases.distances(CLASSES)


def logits(rows=6, dtype=torch.float64):
    student, teacher, labels = wkd_cases.sample(rows, CLASSES)
    return student.to(dtype), teacher.to(dtype), labels


def maps(rows=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)
    return tuple(torch.randn(rows, 3, 4, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def two_vocabularies(rows=6, dtype=torch.float64):
    student, teacher, _ = logits(rows, dtype)
    return student, torch.cat([teacher, teacher[:, :2] - 1], 1)


def with_progress(inputs, **options):
    return *inputs(**options), 0.7


CASES = {
    "WKDLogit released": (functools.partial(WKDLogit, cost=COST, gamma=5.0), logits),
    "WKDLogit paper": (functools.partial(WKDLogit, cost=COST, gamma=5.0, variant="paper"), logits),
    "WKL dwkd_dkd": (functools.partial(WKL, cost=COST, gamma=5.0), functools.partial(with_progress, logits)),
    "WKL wkd_kl paper": (
        functools.partial(WKL, cost=COST, mode="wkd_kl", variant="paper"),
        functools.partial(with_progress, logits),
    ),
    "WKDFeature diagonal": (functools.partial(WKDFeature, grid=2), maps),
    "WKDFeature position": (functools.partial(WKDFeature, statistics="position"), maps),
    "WKDFeature full": (functools.partial(WKDFeature, covariance="full"), maps),
    "WKLFeature": (WKLFeature, functools.partial(with_progress, maps)),
    "ULD": (UniversalLogitDistillation, two_vocabularies),
}
# those whose rows have labels
LABELLED = [name for name in CASES if name.startswith(("WKDLogit", "WKL "))]

"""Packed problems, and the loop over them that they are compared with."""

from typing import NamedTuple

import torch
from torch import Tensor

import otkd_fast
from otkd_fast.functional._sinkhorn_options import OUTPUTS
from otkd_fast.testing import random_problem

SIZES = [(3, 5), (1, 1), (7, 2), (17, 33), (1, 4), (6, 6)]


class Packed(NamedTuple):
    cost: Tensor  # (E,)
    a: Tensor  # (N,)
    b: Tensor  # (M,)
    row_offsets: Tensor  # (K + 1,)
    column_offsets: Tensor

    @property
    def offsets(self):
        return {"row_offsets": self.row_offsets, "column_offsets": self.column_offsets}

    def to(self, dtype):
        return self._replace(cost=self.cost.to(dtype), a=self.a.to(dtype), b=self.b.to(dtype))


def pack(problems):
    """Of a list of (cost (n, m), a, b)."""
    rows, columns = ([0, *torch.tensor([s[k] for s in map(lambda p: p[0].shape, problems)]).cumsum(0)] for k in (0, 1))
    tensors = [torch.cat([p[k].reshape(-1) for p in problems]) for k in range(3)]
    return Packed(*tensors, torch.tensor(rows), torch.tensor(columns))


def random_packed(generator, sizes=SIZES, **options):
    """Problems of these sizes, and the same packed."""
    problems = [random_problem(n, m, generator=generator, **options) for n, m in sizes]
    return problems, pack(problems)


def loop(problems, **options):
    """The fields of a result, packed, of one call of sinkhorn for each problem."""
    results = [otkd_fast.sinkhorn(*problem, **options) for problem in problems]
    names = ("transport_cost", "regularized_cost", "marginal_error", "num_iters")
    fields = {name: torch.stack([getattr(result, name) for result in results]) for name in names}
    fields |= {name: torch.cat([getattr(result, name) for result in results]) for name in ("f", "g")}
    return fields | {"plan": torch.cat([result.plan().reshape(-1) for result in results])}


def total(values, weights, covered=OUTPUTS):
    """sum_o <weights_o, output_o> over the outputs that are covered and the entries that are finite."""
    result = 0
    for name in covered:
        value = values[name] if isinstance(values, dict) else getattr(values, name)
        result = result + (weights[name].to(value.dtype) * torch.where(value.isfinite(), value, 0)).sum()
    return result

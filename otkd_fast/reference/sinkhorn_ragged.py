"""Sinkhorn on packed problems of different sizes: a loop over the problems, written for reading."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .cost_matrix import cost_matrix
from .sinkhorn import SinkhornOutputs, sinkhorn


def cost_matrix_ragged(x: Tensor, y: Tensor, *, row_offsets: Tensor, column_offsets: Tensor, metric: str) -> Tensor:
    """Packed costs (E,) between the points (N, d) and (M, d) of each problem; see :func:`sinkhorn_ragged`."""
    rows, columns = _slices(row_offsets), _slices(column_offsets)
    parts = [cost_matrix(x[i], y[j], metric=metric).reshape(-1) for i, j in zip(rows, columns, strict=True)]
    return torch.cat([x[:0].sum(-1) + y[:0].sum(-1), *parts])


def sinkhorn_ragged(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    row_offsets: Tensor,
    column_offsets: Tensor,
    initial_potentials: tuple[Tensor | None, Tensor | None] | None = None,
    **options,
) -> SinkhornOutputs:
    """K problems; values (K,), potentials f (N,) and g (M,). The offsets are read on the host.

    A problem without rows or without columns runs no iteration; the mass on its other side cannot be served.

    Args:
        cost: (E,) the (n_k, m_k) costs one after the other, row by row.
        a: (N,) masses, None for 1 / n_k each; b: (M,).
        row_offsets: (K + 1,) where the rows of each problem start, and the end; column_offsets: (K + 1,).
        initial_potentials: None or (f (N,), g (M,)), each may be None.
        options: those of :func:`otkd_fast.reference.sinkhorn`.
    """
    f, g = initial_potentials or (None, None)
    outputs, start = [], 0
    for i, j in zip(_slices(row_offsets), _slices(column_offsets), strict=True):
        n, m = i.stop - i.start, j.stop - j.start
        block = cost[start : start + n * m].reshape(n, m)
        parts = [None if tensor is None else tensor[k] for tensor, k in ((a, i), (b, j), (f, i), (g, j))]
        outputs.append(_one(block, *parts, options))
        start += n * m
    if not outputs:
        scalar = cost.sum() + sum(weights.sum() for weights in (a, b) if weights is not None)
        none = scalar.expand(0)
        return SinkhornOutputs(none, none, none, none, none.detach(), torch.empty_like(none, dtype=torch.int64))
    value, regularized, f, g, error, count = zip(*outputs, strict=True)
    scalars = (torch.stack(part) for part in (value, regularized, error, count))
    value, regularized, error, count = scalars
    return SinkhornOutputs(value, regularized, torch.cat(f), torch.cat(g), error, count)


def _slices(offsets: Tensor) -> list[slice]:
    return [slice(*pair) for pair in pairwise(offsets.tolist())]


def _one(
    cost: Tensor, a: Tensor | None, b: Tensor | None, f: Tensor | None, g: Tensor | None, options: dict
) -> SinkhornOutputs:
    n, m = cost.shape
    if n and m:
        return sinkhorn(cost, a, b, initial_potentials=(f, g), **options)
    # a row and a column that take no mass, so that the definitions for what cannot be served apply
    padded = torch.cat([torch.cat([cost, cost.new_full((n, 1), torch.inf)], 1), cost.new_full((1, m + 1), torch.inf)])
    a, b = (
        torch.cat([cost.new_full((size,), 1 / max(size, 1)) if weights is None else weights, cost.new_zeros(1)])
        for weights, size in ((a, n), (b, m))
    )
    out = sinkhorn(padded, a, b, **options)
    return out._replace(f=out.f[:n], g=out.g[:m], num_iters=torch.zeros_like(out.num_iters))

"""Sinkhorn on problems of different sizes, as class-conditional transport has them, with the gradient to the costs."""

from __future__ import annotations

import torch
from torch import Tensor

import otkd_fast

from .family import Family, Function, Peer, Problem
from .measure import forward_backward

EPSILON, NUM_ITERS = 0.1, 20
SIZES = ("1000x1-8", "100x8-32", "100x16-128")  # problems, smallest and largest n and m


def _offsets(size: str) -> tuple[Tensor, Tensor]:
    """Those of the rows and of the columns, (K + 1,)."""
    count, bounds = size.split("x")
    low, high = map(int, bounds.split("-"))
    sizes = torch.randint(low, high + 1, (2, int(count)), generator=torch.Generator().manual_seed(3))
    rows, columns = torch.nn.functional.pad(sizes.cumsum(1), (1, 0))
    return rows, columns


def _ours(size: str) -> Function:
    rows, columns = _offsets(size)
    options = {"row_offsets": rows, "column_offsets": columns, "epsilon": EPSILON, "num_iters": NUM_ITERS}

    def solve(cost: Tensor, masses: Tensor) -> Tensor:
        a, b = masses.split([int(rows[-1]), int(columns[-1])])
        return otkd_fast.sinkhorn_ragged(cost, a, b, **options).transport_cost

    return solve


def _scaling_loop(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The textbook iteration on scalings in plain PyTorch, rows first: cost (..., n, m) -> <P, C> (...)."""
    kernel = torch.exp(-cost / EPSILON)
    v = torch.ones_like(b)
    for _ in range(NUM_ITERS):
        u = a / (kernel @ v.unsqueeze(-1)).squeeze(-1)
        v = b / (kernel.mT @ u.unsqueeze(-1)).squeeze(-1)
    return (u.unsqueeze(-1) * kernel * v.unsqueeze(-2) * cost).sum((-2, -1))


def _one_by_one(size: str) -> Function:
    rows, columns = _offsets(size)
    n, m = rows.diff(), columns.diff()

    def solve(cost: Tensor, masses: Tensor) -> Tensor:
        a, b = masses.split([int(rows[-1]), int(columns[-1])])
        blocks = zip(cost.split((n * m).tolist()), a.split(n.tolist()), b.split(m.tolist()), strict=True)
        return torch.stack([_scaling_loop(c.reshape(len(p), len(q)), p, q) for c, p, q in blocks])

    return solve


def _padded(size: str) -> Function:
    """One batch of the largest size: rows and columns beyond a problem's own have kernel 0 and no mass."""
    rows, columns = _offsets(size)
    n, m = rows.diff(), columns.diff()
    most_n, most_m = int(n.max()), int(m.max())
    in_rows, in_columns = torch.arange(most_n) < n[:, None], torch.arange(most_m) < m[:, None]
    inside = in_rows[:, :, None] & in_columns[:, None, :]

    def solve(cost: Tensor, masses: Tensor) -> Tensor:
        a, b = masses.split([int(rows[-1]), int(columns[-1])])
        whole = cost.new_zeros(inside.shape).masked_scatter(inside, cost)
        kernel = torch.where(inside, torch.exp(-whole / EPSILON), 0)
        a, b = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x, mask in ((a, in_rows), (b, in_columns)))
        v = in_columns.to(cost.dtype)
        for _ in range(NUM_ITERS):
            u = a / torch.where(in_rows, (kernel @ v.unsqueeze(-1)).squeeze(-1), 1)
            v = b / torch.where(in_columns, (kernel.mT @ u.unsqueeze(-1)).squeeze(-1), 1)
        return (u.unsqueeze(-1) * kernel * v.unsqueeze(-2) * whole).sum((-2, -1))

    return solve


PEERS = (
    Peer("otkd_fast", "otkd_fast", _ours),
    Peer("padded", "scaling loop, PyTorch, padded", _padded),
    Peer("one-by-one", "scaling loop, PyTorch, one by one", _one_by_one),
)


def problem(size: str) -> Problem:
    rows, columns = _offsets(size)
    entries = int((rows.diff() * columns.diff()).sum())
    generator = torch.Generator().manual_seed(4)
    cost = torch.rand(entries, generator=generator)
    sides = [torch.rand(int(offsets[-1]), generator=generator) for offsets in (rows, columns)]
    totals = [torch.segment_reduce(x, "sum", lengths=o.diff()) for x, o in zip(sides, (rows, columns), strict=True)]
    masses = torch.cat(
        [x / t.repeat_interleave(o.diff()) for x, t, o in zip(sides, totals, (rows, columns), strict=True)]
    )
    grad = torch.ones(len(rows) - 1)
    expected = forward_backward(_one_by_one(size), cost.double().requires_grad_(), masses.double(), grad.double())
    return Problem((cost.requires_grad_(), masses, grad), expected)


FAMILY = Family(
    op="sinkhorn_ragged",
    title=f"Packed problems of different sizes (problems x range of n and m), epsilon {EPSILON:g} of the largest cost, "
    f"{NUM_ITERS} iterations, unrolled gradient of <P, C> to the costs",
    sizes=SIZES,
    problem=problem,
    peers=PEERS,
    parameters={"epsilon": EPSILON, "num_iters": NUM_ITERS},
)

"""Means and standard deviations over windows, forward and backward (reference/moments.py).

x as (outer, s0, s1, s2, inner), float32 or float64, with (g0, g1, g2) windows; window i of g on an axis of s goes from
floor(i s / g) to ceil((i + 1) s / g). Forward: a program has one window and a block of the inner axis and reads it
twice: deviations are taken from the window's first element, then from their mean, so that a large mean costs no digits
and a constant window has exactly 0. Backward: the window moments again, then a pass over the elements; one is in at
most two windows of each axis. About 2 (forward) and 4 (backward) elements moved for one of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.moments import _layout, _ordered, _restored
from ._runtime import SIGNATURE_DTYPES, AotCase, cdiv, empty, jit, on_device, power_of_2, scalar, tl

_SIZES = ("s0", "s1", "s2", "g0", "g1", "g2", "inner")


@jit
def _start(index, size, count):
    return index * size // count


@jit
def _stop(index, size, count):
    return ((index + 1) * size + count - 1) // count


@jit(generic=_SIZES[:-1])
def window_kernel(
    x, mean, std, eps: tl.float64, s0, s1, s2, g0, g1, g2, inner, UNBIASED: tl.constexpr, FROM_FIRST: tl.constexpr,
    BW: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Moments of one window for BI inner positions; FROM_FIRST: the mean minus the window's first element."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    blocks = tl.cdiv(inner, BI)
    program = tl.program_id(0)
    k = (program % blocks) * BI + tl.arange(0, BI)
    cell = program // blocks  # of all (outer, g0, g1, g2)
    i2, i1, i0 = cell % g2, cell // g2 % g1, cell // (g2 * g1) % g0
    outer = (cell // (g2 * g1 * g0)).to(tl.int64)
    from0, from1, from2 = _start(i0, s0, g0), _start(i1, s1, g1), _start(i2, s2, g2)
    n0, n1, n2 = _stop(i0, s0, g0) - from0, _stop(i1, s1, g1) - from1, _stop(i2, s2, g2) - from2
    count = n0 * n1 * n2
    inside = k < inner
    base = (outer * s0 + from0) * s1 * s2 + from1.to(tl.int64) * s2 + from2
    first = tl.load(x + base * inner + k, mask=inside, other=0)
    sums = tl.zeros((BW, BI), DTYPE)
    for begin in range(0, count, BW):
        e = begin + tl.arange(0, BW)
        at = base + (e // (n2 * n1)).to(tl.int64) * s1 * s2 + (e // n2 % n1) * s2 + e % n2
        mask = (e < count)[:, None] & inside[None, :]
        sums += tl.where(mask, tl.load(x + at[:, None] * inner + k[None, :], mask=mask, other=0) - first[None, :], 0)
    centre = tl.sum(sums, 0) / count
    squares = tl.zeros((BW, BI), DTYPE)
    for begin in range(0, count, BW):
        e = begin + tl.arange(0, BW)
        at = base + (e // (n2 * n1)).to(tl.int64) * s1 * s2 + (e // n2 % n1) * s2 + e % n2
        mask = (e < count)[:, None] & inside[None, :]
        value = tl.load(x + at[:, None] * inner + k[None, :], mask=mask, other=0) - first[None, :] - centre[None, :]
        squares += tl.where(mask, value * value, 0)
    variance = tl.sum(squares, 0) / (count - 1 if UNBIASED else count) + scalar(eps, DTYPE)
    target = cell.to(tl.int64) * inner + k
    tl.store(mean + target, centre if FROM_FIRST else first + centre, mask=inside)
    tl.store(std + target, tl.sqrt(variance) if DTYPE == tl.float64 else tl.sqrt_rn(variance), mask=inside)


@jit(generic=_SIZES[:-1])
def element_kernel(
    x, centre, std, grad_mean, grad_std, out, size, s0, s1, s2, g0, g1, g2, inner, HAS_MEAN: tl.constexpr,
    HAS_STD: tl.constexpr, UNBIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK elements: over the windows that each is in."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    k = at % inner
    p2, p1, p0 = at // inner % s2, at // (inner * s2) % s1, at // (inner * s2 * s1) % s0
    outer = at // (inner * s2 * s1 * s0)
    value = tl.load(x + at, mask=mask, other=0)
    total = tl.zeros((BLOCK,), x.dtype.element_ty)
    for combination in range(8):
        i0 = p0 * g0 // s0 + combination // 4
        i1 = p1 * g1 // s1 + combination // 2 % 2
        i2 = p2 * g2 // s2 + combination % 2
        from0, from1, from2 = _start(i0, s0, g0), _start(i1, s1, g1), _start(i2, s2, g2)
        there = mask & (i0 < g0) & (i1 < g1) & (i2 < g2) & (from0 <= p0) & (from1 <= p1) & (from2 <= p2)
        count = (_stop(i0, s0, g0) - from0) * (_stop(i1, s1, g1) - from1) * (_stop(i2, s2, g2) - from2)
        cell = (((outer * g0 + i0) * g1 + i1) * g2 + i2) * inner + k
        share = tl.zeros((BLOCK,), x.dtype.element_ty)
        if HAS_MEAN:
            share += tl.load(grad_mean + cell, mask=there, other=0) / count
        if HAS_STD:
            origin = (((outer * s0 + from0) * s1 + from1) * s2 + from2) * inner + k
            deviation = value - tl.load(x + origin, mask=there, other=0) - tl.load(centre + cell, mask=there, other=0)
            root = tl.load(std + cell, mask=there, other=0)
            slope = tl.load(grad_std + cell, mask=there, other=0) / tl.where(root == 0, 1, root)
            share += tl.where(root == 0, 0, slope * deviation / (count - 1 if UNBIASED else count))
        total += tl.where(there, share, 0)
    tl.store(out + at, total, mask=mask)


def _moments(x: Tensor, layout: tuple, mean: Tensor, std: Tensor, unbiased: bool, eps: float, from_first: bool) -> None:
    outer, sizes, counts, inner = layout
    blocks = window_tiles(inner)
    cells = outer * counts[0] * counts[1] * counts[2]
    window_kernel[(cells * cdiv(inner, blocks["BI"]),)](
        x, mean, std, eps, *sizes, *counts, inner, UNBIASED=unbiased, FROM_FIRST=from_first, **blocks,
        enable_fp_fusion=True,
    )  # fmt: skip


def window_tiles(inner: int) -> dict[str, int]:
    """Elements of the window and of the inner axis at a time; the lanes lie along the one that is longer."""
    lanes = power_of_2(inner, 1, 64)
    return {"BW": 128 // lanes, "BI": lanes, "num_warps": 2}


def feature_moments_fwd(
    x: Tensor, dim: list[int], grid: list[int], unbiased: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, in the shape of x with `grid` on the axes `dim`."""
    order, layout = _layout(x, dim, grid)
    x = _ordered(x, order).contiguous()
    shape = _window_shape(x, order, dim, grid)
    mean, std = empty(shape, x), empty(shape, x)
    if mean.numel():
        with on_device(x):
            _moments(x, layout, mean, std, unbiased, eps, False)
    return _restored(mean, order), _restored(std, order)


def _window_shape(x: Tensor, order: list[int] | None, dim: list[int], grid: list[int]) -> list[int]:
    """Shape of the moments of x, whose axes are in `order`."""
    shape = list(x.shape)
    for axis, count in zip(dim, grid, strict=True):
        shape[axis if order is None else order.index(axis)] = count
    return shape


def feature_moments_bwd(
    x: Tensor, grad_mean: Tensor | None, grad_std: Tensor | None, dim: list[int], grid: list[int], unbiased: bool,
    eps: float,
) -> Tensor:  # fmt: skip
    """Gradient of x."""
    order, layout = _layout(x, dim, grid)
    x = _ordered(x, order).contiguous()
    grad_mean, grad_std = (_ordered(t, order) for t in (grad_mean, grad_std))
    out = empty(x.shape, x)
    if x.numel() == 0:
        return _restored(out, order)
    _, sizes, counts, inner = layout
    with on_device(x):
        centre = std = x
        if grad_std is not None:
            centre, std = empty(grad_std.shape, x), empty(grad_std.shape, x)
            _moments(x, layout, centre, std, unbiased, eps, True)
        element_kernel[(cdiv(x.numel(), 256),)](
            x, centre, std, x if grad_mean is None else grad_mean, x if grad_std is None else grad_std, out, x.numel(),
            *sizes, *counts, inner, HAS_MEAN=grad_mean is not None, HAS_STD=grad_std is not None, UNBIASED=unbiased,
            BLOCK=256, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return _restored(out, order)


def aot_cases() -> list[AotCase]:
    """Long and short inner axes."""
    cases = []
    for dtype in (torch.float32, torch.float64):
        kind = f"*{SIGNATURE_DTYPES[dtype]}:16"
        ints = dict.fromkeys(_SIZES, "i32")
        for inner in (1, 512):
            blocks = window_tiles(inner)
            cases.append(AotCase(
                f"windows inner {inner} {kind[1:5]}", window_kernel,
                {"x": kind, "mean": kind, "std": kind, "eps": "fp64"} | ints,
                {"UNBIASED": True, "FROM_FIRST": False, "BW": blocks["BW"], "BI": blocks["BI"]},
                num_warps=blocks["num_warps"], quick=inner == 1 and dtype == torch.float32,
            ))  # fmt: skip
        cases.append(AotCase(
            f"elements {kind[1:5]}", element_kernel,
            dict.fromkeys(("x", "centre", "std", "grad_mean", "grad_std", "out"), kind) | {"size": "i64"} | ints,
            {"HAS_MEAN": True, "HAS_STD": True, "UNBIASED": True, "BLOCK": 256},
        ))  # fmt: skip
    return cases

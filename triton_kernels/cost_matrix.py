"""Pairwise cost matrices, forward and backward, softmax included (reference/cost_matrix.py).

    l1           C_ij = sum_k |x_ik - y_jk|
    sqeuclidean  C_ij = sum_k (x_ik - y_jk)^2,   l2: its root
    cosine       C_ij = 1 - <x_i, y_j> / (|x_i| |y_j|) = (|x_i - y_j|^2 - (|x_i| - |y_j|)^2) / (2 |x_i| |y_j|)

x (B, n, d), y (B, m, d), contiguous; either may be (., d) only and shared by the batch. Rows may be logits: softmax is
then taken where a row is loaded, from its maximum and sum (`_Rows`), and no copy of it is in memory. float16 and
bfloat16 are read as they are and computed in float32, float64 in float64. Differences are formed before anything is
squared, and no product runs on tensor cores: near-coincident rows keep full relative accuracy. Sums have a fixed order.
For cosine, y is first multiplied by the power of two that brings its length next to that of x, pair by pair.

Forward: a program has a tile of BI x BJ pairs, 32 lanes of partial sums a pair, one sum over the lanes at the end.
2 n m d operations. Where tiles are few, the features are split between programs; `finish_kernel` adds up the parts.
Backward, an operand: a program has BI rows x BK features of the gradient and runs over the other side's rows. (2 to 5)
n m d operations. The softmax's derivative is part of it where a row fits in the tile, else it is a second kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._cost_matrix_kernels import METRICS, backward_kernel, finish_kernel, forward_kernel, rows_kernel, softmax_kernel
from ._runtime import SIGNATURE_DTYPES, AotCase, cdiv, empty, on_device, power_of_2

_ROW_BLOCK = 1024  # features that a program of `rows_kernel` and `softmax_kernel` takes at a time
_FUSED_FEATURES = 512  # rows up to here fit in a tile of the backward kernel
_INLINE_FEATURES = 2048  # up to here the forward kernel looks for maximum and sum of its rows by itself
_SPLIT_FEATURES = 1024  # a program of the forward kernel has at least so many, if the features are split
_FEW_PROGRAMS = 264  # two a multiprocessor
_WORKSPACE_BYTES = 32 << 20  # for gradients of half-precision softmaxed rows, kept in float32


def _forward_tiles(double: bool, pairs: int) -> dict[str, int]:
    """Tile and warps: small ones where there is little to do."""
    if double or pairs < 512 * _FEW_PROGRAMS:
        return {"BI": 8, "BJ": 8, "num_warps": 4}
    return {"BI": 16, "BJ": 32, "num_warps": 16}


def _backward_tiles(d: int, softmax: bool, metric: str) -> dict[str, int]:
    """Tile, rows of the other side at a time, warps; FUSED: with the derivative of the softmax."""
    if softmax and 128 < d <= _FUSED_FEATURES:
        return {"BI": 4, "BJ": 2, "BK": power_of_2(d), "num_warps": 8, "FUSED": True}
    return {"BI": 8, "BJ": 2 if metric == "cosine" else 4, "BK": 128, "num_warps": 4, "FUSED": softmax and d <= 128}


def _sizes(x: Tensor, y: Tensor) -> tuple[tuple[int, ...], int, int, int, int]:
    """Batch shape (of the operand that has one), number of problems, n, m, d."""
    batch = x.shape[:-2] if x.dim() >= y.dim() else y.shape[:-2]
    return tuple(batch), torch.Size(batch).numel(), x.shape[-2], y.shape[-2], x.shape[-1]


class _Rows:
    """One operand: its rows, and what the kernels need to know of each (shift and factor, and the norm for cosine)."""

    def __init__(self, rows: Tensor, temperature: float, metric: str, batch_dims: int, known: bool) -> None:
        self.rows, self.d = rows.contiguous(), rows.shape[-1]
        self.softmax, self.cosine = temperature > 0, metric == "cosine"
        self.inverse = 1 / temperature if self.softmax else 1.0
        self.shared = rows.dim() - 2 < batch_dims
        self.known = known and (self.softmax or self.cosine)
        count = self.rows.numel() // self.d if self.known else 0
        kind = _compute_dtype(rows)
        self.shift, self.factor = empty((count,), rows, kind), empty((count,), rows, kind)
        self.norm = empty((count if self.cosine else 0,), rows, torch.float64)
        if count:
            rows_kernel[(count,)](
                self.rows, self.shift, self.factor, self.norm, self.inverse, self.d, SOFTMAX=self.softmax,
                COSINE=self.cosine, DOUBLE=kind == torch.float64, BLOCK=_ROW_BLOCK, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip

    @property
    def arguments(self) -> tuple:
        return self.rows, self.shift, self.factor, self.norm, self.inverse


def _compute_dtype(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def cost_matrix_fwd(x: Tensor, y: Tensor, metric: str, temperature_x: float, temperature_y: float) -> Tensor:
    """(*B, n, m), float64 for float64 rows, else float32."""
    batch, problems, n, m, d = _sizes(x, y)
    kind = _compute_dtype(x)
    cost = empty((*batch, n, m), x, kind)
    if cost.numel() == 0 or d == 0:
        return cost.zero_()
    with on_device(x):
        known = metric == "cosine" or d > _INLINE_FEATURES
        own = _Rows(x, temperature_x, metric, len(batch), known)
        other = _Rows(y, temperature_y, metric, len(batch), known)
        tiles = _forward_tiles(kind == torch.float64, problems * n * m)
        programs = problems * cdiv(n, tiles["BI"]) * cdiv(m, tiles["BJ"])
        splits = max(1, min(cdiv(_FEW_PROGRAMS, programs), d // _SPLIT_FEATURES))
        length = cdiv(cdiv(d, splits), 32) * 32
        splits = cdiv(d, length)
        parts = cost if splits == 1 else empty((splits, problems, n, m), x, kind)
        forward_kernel[(programs * splits,)](
            *own.arguments, *other.arguments, parts, problems, n, m, d, length, SHARED_X=own.shared,
            SHARED_Y=other.shared, SOFTMAX_X=own.softmax, SOFTMAX_Y=other.softmax, KNOWN=known, METRIC=METRICS[metric],
            WHOLE=splits == 1, DOUBLE=kind == torch.float64, **tiles, enable_fp_fusion=True,
        )  # fmt: skip
        if splits > 1:
            finish_kernel[(cdiv(cost.numel(), 256),)](
                parts, own.norm, other.norm, cost, cost.numel(), n, m, splits, SHARED_X=own.shared,
                SHARED_Y=other.shared, METRIC=METRICS[metric], DOUBLE=kind == torch.float64, BLOCK=256, num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip
    return cost


def cost_matrix_bwd(
    x: Tensor, y: Tensor, cost: Tensor, grad_cost: Tensor, metric: str, temperature_x: float, temperature_y: float,
    need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients in the shapes and dtypes of x and y; (0,) where not needed."""
    batch, _, n, m, d = _sizes(x, y)
    if cost.numel() == 0 or d == 0:
        return tuple(empty(rows.shape if need else (0,), rows).zero_() for rows, need in ((x, need_x), (y, need_y)))
    cost, grad_cost = cost.contiguous(), grad_cost.to(cost.dtype).contiguous()
    with on_device(x):
        own = _Rows(x, temperature_x, metric, len(batch), True)
        other = _Rows(y, temperature_y, metric, len(batch), True)
        grad_x = _gradient(own, other, cost, grad_cost, metric, n, m, (m, 1)) if need_x else empty((0,), x)
        grad_y = _gradient(other, own, cost, grad_cost, metric, m, n, (1, m)) if need_y else empty((0,), y)
    return grad_x, grad_y


def _gradient(
    own: _Rows, other: _Rows, cost: Tensor, grad_cost: Tensor, metric: str, n: int, m: int, steps: tuple[int, int]
) -> Tensor:
    """Gradient of the operand `own` with n rows; C_ij of its row i and the other's row j is at steps . (i, j)."""
    problems, d, kind, double = cost.numel() // (n * m), own.d, cost.dtype, cost.dtype == torch.float64
    tiles = _backward_tiles(d, own.softmax, metric)
    apart = own.softmax and not tiles["FUSED"]  # the softmax's derivative has its own kernel
    summed = own.shared and problems > 1
    out = empty((problems, n, d), own.rows, kind if summed else own.rows.dtype)
    staged = apart and out.dtype != kind
    for problem, count, row, rows in _launches(problems, n, d) if staged else ((0, problems, 0, n),):
        stage = empty((count, rows, d), out, kind) if staged else out
        grid = (count * cdiv(rows, tiles["BI"]) * cdiv(d, tiles["BK"]),)
        backward_kernel[grid](
            *own.arguments, *other.arguments, cost, grad_cost, stage, problem, row, rows, n, m, d, *steps,
            SHARED_X=own.shared, SHARED_Y=other.shared, SOFTMAX_X=own.softmax, SOFTMAX_Y=other.softmax,
            METRIC=METRICS[metric], DOUBLE=double, **tiles, enable_fp_fusion=True,
        )  # fmt: skip
        if apart:
            softmax_kernel[(count * rows,)](
                own.rows, own.shift, own.factor, own.inverse, stage, out, problem, row, rows, n, d, SHARED=own.shared,
                DOUBLE=double, BLOCK=_ROW_BLOCK, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    out = out.sum(0).to(own.rows.dtype) if summed else out
    return out.view(own.rows.shape)


def _launches(problems: int, n: int, d: int) -> list[tuple[int, int, int, int]]:
    """(problem, number of problems, row, number of rows) of launches whose float32 gradients fit in the workspace."""
    rows = max(1, min(n, _WORKSPACE_BYTES // (4 * d)))
    if rows < n:
        return [(b, 1, row, min(rows, n - row)) for b in range(problems) for row in range(0, n, rows)]
    count = max(1, _WORKSPACE_BYTES // (4 * n * d))
    return [(b, min(count, problems - b), 0, n) for b in range(0, problems, count)]


def aot_cases() -> list[AotCase]:
    """One case a kernel, metric and dtype that differ in code."""
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for metric in (
            ("l1", "l2", "cosine") if dtype == torch.float32 else ("l1",)
        ):  # sqeuclidean: as l2, without the root
            cases += _metric_cases(dtype, metric)
    return cases


def _metric_cases(dtype: torch.dtype, metric: str) -> list[AotCase]:
    double = dtype == torch.float64
    data, kind = f"*{SIGNATURE_DTYPES[dtype]}:16", "*fp64:16" if double else "*fp32:16"
    sides = {}
    for side in ("x", "y"):
        sides |= {side: data, f"shift_{side}": kind, f"factor_{side}": kind, f"norm_{side}": "*fp64:16"}
        sides[f"inverse_{side}"] = "fp64"
    shared = {"SHARED_X": False, "SHARED_Y": False}
    flags = {**shared, "METRIC": METRICS[metric], "DOUBLE": double}
    ints = dict.fromkeys(("n", "m", "d"), "i32")
    label = f"{metric} {str(dtype).removeprefix('torch.')}"
    cases = []
    for softmax in (False, True):
        soft = {"SOFTMAX_X": softmax, "SOFTMAX_Y": softmax}
        what = f"{label} softmax" if softmax else label
        for pairs in (1, 1 << 30):
            tiles = _forward_tiles(double, pairs)
            size = "small" if pairs == 1 else "large"
            cases.append(AotCase(
                f"forward {what} {size}", forward_kernel,
                sides | {"out": kind, "problems": "i32", "length": "i32"} | ints,
                flags | soft | {"KNOWN": metric == "cosine" or pairs > 1, "WHOLE": pairs == 1}
                | {"BI": tiles["BI"], "BJ": tiles["BJ"]},
                num_warps=tiles["num_warps"], quick=softmax and metric == "l1" and not double,
            ))  # fmt: skip
        for d in (128, 512) if softmax else (1024,):
            tiles = _backward_tiles(d, softmax, metric)
            warps = tiles.pop("num_warps")
            steps = dict.fromkeys(("problem", "row", "rows", "step_i", "step_j"), "i32")
            cases.append(AotCase(
                f"backward {what} {d}", backward_kernel,
                sides | {"cost": kind, "grad_cost": kind, "out": data} | ints | steps,
                flags | soft | tiles, num_warps=warps,
                quick=d == 128 and metric == "l1" and dtype == torch.float32,
            ))  # fmt: skip
        one = {"shift": kind, "factor": kind}
        if softmax or metric == "cosine":
            cases.append(AotCase(
                f"rows {what}", rows_kernel, {"rows": data, "norm": "*fp64:16", "inverse": "fp64", "d": "i32"} | one,
                {"SOFTMAX": softmax, "COSINE": metric == "cosine", "DOUBLE": double, "BLOCK": _ROW_BLOCK},
            ))  # fmt: skip
    if metric == "l1":
        cases.append(AotCase(
            f"softmax {label}", softmax_kernel,
            {"x": data, "inverse": "fp64", "grad": kind, "out": data, "d": "i32", "n": "i32"} | one
            | dict.fromkeys(("problem", "row", "rows"), "i32"),
            {"SHARED": False, "DOUBLE": double, "BLOCK": _ROW_BLOCK},
        ))  # fmt: skip
    if dtype != torch.bfloat16:
        cases.append(AotCase(
            f"finish {label}", finish_kernel,
            {"parts": kind, "norm_x": "*fp64:16", "norm_y": "*fp64:16", "out": kind, "size": "i32", "splits": "i32"}
            | {"n": "i32", "m": "i32"},
            flags | {"BLOCK": 256},
        ))  # fmt: skip
    return cases

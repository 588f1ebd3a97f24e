"""Polar factors and nuclear norms (reference/polar.py).

K (B, n, m), float32 or float64. Up to 64 x 64: a program a matrix, all on the chip, one launch: 3 products of N^3 a
a step, 6 N^3 steps operations, 2 n m elements moved. Beyond: batched products, three launches a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._matrix import LARGEST, polar_batched, polar_factor, product_cases, schedule, scratch_of, staged, tiles, total
from ._runtime import HELD, SIGNATURE_DTYPES, AotCase, empty, jit, on_device, tl


@jit(generic=("n", "m", "steps"))
def polar_kernel(K, P, norm, coefficients, scratch, n, m, steps, N: tl.constexpr, STAGED: tl.constexpr):
    """Polar factor and nuclear norm of one matrix."""
    batch = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, N), tl.arange(0, N)
    mask = (i < n)[:, None] & (j < m)[None, :]
    at = batch * n * m + i[:, None] * m + j[None, :]
    given = tl.load(K + at, mask=mask, other=0)
    factor, refined = polar_factor(given, coefficients, steps, scratch + batch * (3 * N * N), N, STAGED)
    tl.store(P + at, factor, mask=mask)
    given = tl.load(K + at, mask=mask, other=0)
    tl.store(norm + batch, total(given.to(tl.float64) * refined).to(norm.dtype.element_ty))


def polar_fwd(K: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """P (*B, n, m) and nuclear norms (*B)."""
    K = K.contiguous()
    *batch, n, m = K.shape
    if K.numel() == 0:
        return empty(K.shape, K), empty(batch, K).zero_()
    with on_device(K):
        if max(n, m) > LARGEST:
            P, norm = polar_batched(K.view(-1, n, m), steps)
            return P.view(K.shape), norm.to(K.dtype).view(batch)
        P, norm = empty(K.shape, K), empty(batch, K)
        coefficients = schedule(steps, K.dtype, K.device)
        size = tiles(max(n, m), K.dtype)
        polar_kernel[(norm.numel(),)](
            K, P, norm, coefficients, scratch_of(norm.numel(), size["N"], K), n, m, coefficients.shape[0] - 1,
            STAGED=staged(size["N"], K.dtype), **size,
            enable_fp_fusion=True,
        )  # fmt: skip
    return P, norm


def aot_cases() -> list[AotCase]:
    """Each size and dtype."""
    cases = product_cases()
    for dtype in (torch.float32, torch.float64):
        kind = f"*{SIGNATURE_DTYPES[dtype]}:16"
        for n in (16, 32, 64):
            size = tiles(n, dtype)
            cases.append(AotCase(
                f"polar {n} {kind[1:5]}", polar_kernel,
                dict.fromkeys(("K", "P", "norm", "coefficients", "scratch"), kind)
                | dict.fromkeys(("n", "m", "steps"), "i32"),
                {"N": size["N"], "STAGED": staged(size["N"], dtype)}, num_warps=size["num_warps"], num_stages=1,
                may_spill=HELD if (n, dtype) == (64, torch.float32) else "",
                quick=n == 32 and dtype == torch.float32,
            ))  # fmt: skip
    return cases

"""Distances between Gaussians with their gradients, each in one op.

``gaussian_wasserstein_from_samples``: W2^2 between the Gaussians fitted to two samples (``csrc/cpu/gaussian.cpp``,
``csrc/cuda/gaussian.cu``).
``bures_distance``: between covariances, from one Cholesky factor and one batch of eigenvalue problems
(``csrc/cpu/lane_eigen.h``), or from two Cholesky factors and the polar factor of their product (``csrc/cpu/polar.cpp``;
on CUDA: ``csrc/cuda/bures.cu``).

The gradients come with the value, for an incoming gradient of 1; one that is not needed is an empty tensor (0,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..reference.psd_factor import symmetric
from . import _library, polar, sqrtm
from ._library import native

# batches of float32 matrices up to this size are solved side by side, by eigenvalues; others by polar factors
_SIDE_BY_SIDE, _FEWEST = 32, 8
_VALUES_ALONE = 512  # float32: from here on the value without a gradient, too, by eigenvalues (without eigenvectors)
# What is computed here: matrices whose Cholesky pivots, relative to their variances, are above the rounding of float32,
# and products whose singular values are above this fraction of the largest; the reference's formulas do the others.
_PIVOT, _SMALLEST_ROOT = 3e-8, 3e-6
# Polar factors: |P|^2 - d adds up what is missing of the squares of its d singular values; at most this, and this times
# d for their rounding.
_MISSING = {torch.float32: (1e-3, 3e-6), torch.float64: (1e-10, 1e-14)}
# Steps by a guess of the condition number; 7, 9 and 11 steps serve 1e3, 1e4 and 1e5, and those of float64 its digits.
_STEPS = {torch.float32: ((1e2, 7), (1e3, 9)), torch.float64: ((1e3, 9),)}
_CHUNK_BYTES = 2 << 20
# without the inverse root, products of any rank will do for factors with pivots above this
_GOOD_PIVOT = 1e-3


def _fake(x: Tensor, y: Tensor, unbiased: bool, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape[:-2]),
        x.new_empty(x.shape if need_x else (0,)),
        y.new_empty(y.shape if need_y else (0,)),
    )


def _cpu(x: Tensor, y: Tensor, unbiased: bool, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    *batch, n, d = x.shape
    m = y.shape[-2]
    value, grad_x, grad_y = outputs = _fake(x, y, unbiased, need_x, need_y)
    if value.numel() == 0:
        return outputs
    code, problems, threads = _library.dtype_code(x), _library.product(batch), torch.get_num_threads()
    scratch = _library.workspace(native.gaussian_samples_workspace(code, problems, n, m, d, threads))
    native.gaussian_samples(
        code, x.data_ptr(), y.data_ptr(), value.data_ptr(), grad_x.data_ptr(), grad_y.data_ptr(), scratch.data_ptr(),
        problems, n, m, d, unbiased, threads,
    )  # fmt: skip
    return outputs


def _cuda(x: Tensor, y: Tensor, unbiased: bool, need_x: bool, need_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    n, d, m = *x.shape[-2:], y.shape[-2]
    value, grad_x, grad_y = outputs = _fake(x, y, unbiased, need_x, need_y)
    if value.numel() == 0:
        return outputs
    if min(n, m) > d > sqrtm.CUDA_LIMIT:
        found = reference.wasserstein_from_samples(x, y, unbiased=unbiased, need_x=need_x, need_y=need_y)
        return tuple(t if got is None else got for t, got in zip(outputs, found, strict=True))
    code, results = _library.dtype_code(x), tuple(t.data_ptr() if t.numel() else 0 for t in outputs)
    sizes = (value.numel(), n, m, d, unbiased)
    call = (x.data_ptr(), y.data_ptr(), *results)
    needed = _library.cuda.gaussian_samples_workspace(code, (*call, 0, *sizes), _library.place(x))
    scratch = _library.cuda_workspace(x, needed)
    _library.launch("gaussian_wasserstein", x, "gaussian_samples", code, (*call, scratch.data_ptr(), *sizes))
    return outputs


_library.register(
    "gaussian_wasserstein_from_samples(Tensor x, Tensor y, bool unbiased, bool need_x, bool need_y) "
    "-> (Tensor, Tensor, Tensor)",
    _fake,
    _cpu,
    cuda=_cuda,
    triton="gaussian_wasserstein:from_samples",
)


def _bures_fake(A: Tensor, B: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        A.new_empty(A.shape[:-2]),
        A.new_empty(A.shape if need_a else (0,)),
        B.new_empty(B.shape if need_b else (0,)),
    )


def _bures_cpu(A: Tensor, B: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape, d = A.shape, A.shape[-1]
    outputs = _bures_fake(A, B, need_a, need_b)
    if A.numel() == 0:
        return outputs
    A, B = A.reshape(-1, d, d), B.reshape(-1, d, d)
    # in float64 the squares of singular values would cost half of the digits
    side_by_side, alone = d <= _SIDE_BY_SIDE and len(A) >= _FEWEST, d >= _VALUES_ALONE and not (need_a or need_b)
    one_factor = A.dtype == torch.float32 and (side_by_side or alone)
    compute = _from_one_factor if one_factor else _from_two_factors
    value, grad_a, grad_b, right = compute(A, B, need_a, need_b)
    if not right.all():
        rest = right.logical_not().nonzero().squeeze(-1)
        answers = reference.bures(A[rest], B[rest], need_a=need_a, need_b=need_b, polar=_polar_of_singular)
        for own, answer in zip((value, grad_a, grad_b), answers, strict=True):
            if own is not None:
                own[rest] = answer
    grads = ((grad_a, need_a), (grad_b, need_b))
    return value.view(shape[:-2]), *(grad.view(shape) if need else value.new_empty(0) for grad, need in grads)


def _polar_of_singular(K: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    return polar._cpu(K, steps + 2)  # down to 1e-6 of the largest singular value, for the digits of the norm


def _from_one_factor(
    A: Tensor, B: Tensor, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Value, gradients, and which matrices of the batch are right, from B = L L^T and M = L^T A L.

    The trace of (A^(1/2) B A^(1/2))^(1/2) is that of M^(1/2); the transport maps are L M^(-1/2) L^T from A to B and
    L^-T M^(1/2) L^-1 from B to A. In float64: M has the squares of the singular values that matter.
    """
    if need_a and not need_b:  # the map that needs no inverse root
        value, grad_b, grad_a, right = _from_one_factor(B, A, need_b, need_a)
        return value, grad_a, grad_b, right
    wide_a, wide_b = symmetric(A), symmetric(B)  # (P, d, d)
    L, pivot = _cholesky(wide_b)
    M = L.mT @ wide_a @ L
    if A.shape[-1] > _SIDE_BY_SIDE:  # no gradient is wanted
        finite = M.isfinite().all(-1).all(-1)[:, None, None]
        roots = torch.linalg.eigvalsh(torch.where(finite, M, 0)).clamp_(min=0).sqrt_()
        roots = torch.where(finite[:, 0], roots, torch.nan)
    else:
        root, aux = sqrtm._fwd_cpu(M, False, "tridiagonal")
        vectors, roots = aux[:, :-1], aux[:, -1].abs()  # eigenvectors in rows, their eigenvalues (P, d)
    variances = wide_b.diagonal(dim1=-2, dim2=-1)
    value = wide_a.diagonal(dim1=-2, dim2=-1).sum(-1) + variances.sum(-1) - 2 * roots.sum(-1)
    regular = roots.amin(-1) > _SMALLEST_ROOT * roots.amax(-1)
    right = (pivot > _PIVOT) & value.isfinite()
    if need_b:
        right &= regular | (pivot > _GOOD_PIVOT) if not need_a else regular
    grad_a = grad_b = None
    if need_a:
        half = vectors @ L.mT / roots.sqrt().unsqueeze(-1)  # (P, d, d)
        grad_a = _less_map(half.mT @ half, A.dtype)
    if need_b:
        half = torch.linalg.solve_triangular(L.mT, root, upper=True)
        grad_b = _less_map(torch.linalg.solve_triangular(L, half, upper=False, left=False), A.dtype)
    return value.clamp_(min=0).to(A.dtype), grad_a, grad_b, right


def _from_two_factors(
    A: Tensor, B: Tensor, need_a: bool, need_b: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The same from A = F F^T, B = G G^T, P = polar(F^T G): F P G^-1 maps B to A, and G P^T F^-1 maps A to B.

    The polar factor of large ones is of the dtype of A and B, all else in float64. A few matrices at a time: new memory
    for all of them would cost as much as the products.
    """
    count, d, _ = A.shape
    size = min(count, max(2, _CHUNK_BYTES // (8 * d * d)))
    buffers = [A.new_empty((size, d, d), dtype=torch.float64) for _ in range(4)]
    value, right = A.new_empty(count, dtype=torch.float64), A.new_empty(count, dtype=torch.bool)
    grad_a, grad_b = (A.new_empty(A.shape) if need else None for need in (need_a, need_b))
    for begin in range(0, count, size):
        part = slice(begin, begin + size)
        F, G, K, X = (buffer[: len(A[part])] for buffer in buffers)
        pivot = torch.minimum(_factor(A[part], F, X), _factor(B[part], G, X))
        torch.bmm(F.mT, G, out=K)
        P, missing = _polar(K if d <= _SIDE_BY_SIDE else K.to(A.dtype), F, G)
        P = P.double()
        value[part] = F.square().sum((-2, -1)) + G.square().sum((-2, -1)) - 2 * (K * P).sum((-2, -1))
        right[part] = (pivot > _PIVOT) & value[part].isfinite() & ~missing
        for grad, source, image, factor in ((grad_a, G, P.mT, F), (grad_b, F, P, G)):
            if grad is not None:
                torch.bmm(source, image, out=K)
                torch.linalg.solve_triangular(factor, K, upper=False, left=False, out=X)
                torch.add(X, X.mT, out=K).mul_(-0.5).diagonal(dim1=-2, dim2=-1).add_(1)
                grad[part] = K
    return value.clamp_(min=0).to(A.dtype), grad_a, grad_b, right


def _factor(A: Tensor, L: Tensor, scratch: Tensor) -> Tensor:
    """L (P, d, d), float64, as :func:`_cholesky`; its smallest pivots (P,)."""
    scratch.copy_(A).add_(A.mT).mul_(0.5)
    factor, pivot = _cholesky(scratch)
    L.copy_(factor)
    return pivot


def _polar(K: Tensor, F: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Polar factors of K = F^T G (P, d, d), and which of them (P,) are not orthogonal: too small singular values."""
    base, slope = _MISSING[K.dtype]
    most = base + slope * K.shape[-1]

    def missing(P: Tensor) -> Tensor:
        return (P.double().square().sum((-2, -1)) - P.shape[-1]).abs() > most

    smallest = F.diagonal(dim1=-2, dim2=-1).amin(-1) * G.diagonal(dim1=-2, dim2=-1).amin(-1)  # (P,)
    guess = float((torch.linalg.matrix_norm(K.double()) / smallest).amax())
    steps = next((steps for limit, steps in _STEPS[K.dtype] if guess < limit), 11)
    P, _ = polar._cpu(K, steps)
    wrong = missing(P)
    if wrong.any():
        # P has the same polar factor and larger singular values than K: as if there had been more steps
        P[wrong] = polar._cpu(P[wrong], 11)[0]
        wrong = missing(P)
    return P, wrong


def _cholesky(A: Tensor) -> tuple[Tensor, Tensor]:
    """L (P, d, d) with A = L L^T, and its smallest pivot relative to the variance, 0 where there is no L (P,)."""
    L, info = torch.linalg.cholesky_ex(A)
    pivots = L.diagonal(dim1=-2, dim2=-1).square() / A.diagonal(dim1=-2, dim2=-1)
    return L, torch.where(info == 0, pivots.amin(-1), 0)


def _less_map(T: Tensor, dtype: torch.dtype) -> Tensor:
    """I - T, exactly symmetric."""
    T = symmetric(T).neg_().contiguous()
    T.diagonal(dim1=-2, dim2=-1).add_(1)
    return T.to(dtype)


def _bures_cuda(A: Tensor, B: Tensor, need_a: bool, need_b: bool) -> tuple[Tensor, Tensor, Tensor]:
    A, B = A.contiguous(), B.contiguous()
    value, grad_a, grad_b = outputs = _bures_fake(A, B, need_a, need_b)
    d = A.shape[-1]
    if value.numel() == 0:
        return outputs
    if d > sqrtm.CUDA_LIMIT:
        found = reference.bures(A, B, need_a=need_a, need_b=need_b)
        return tuple(t if got is None else got for t, got in zip(outputs, found, strict=True))
    code, results = _library.dtype_code(A), tuple(t.data_ptr() if t.numel() else 0 for t in outputs)
    call, sizes = (A.data_ptr(), B.data_ptr(), *results), (value.numel(), d)
    needed = _library.cuda.bures_workspace(code, (*call, 0, *sizes), _library.place(A))
    scratch = _library.cuda_workspace(A, needed)
    _library.launch("bures_distance", A, "bures", code, (*call, scratch.data_ptr(), *sizes))
    return outputs


_library.register(
    "bures_distance(Tensor A, Tensor B, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
    _bures_fake,
    _bures_cpu,
    cuda=_bures_cuda,
    triton="bures:bures",
)

"""sqrtm: square roots of symmetric positive semidefinite matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._dispatch import resolve
from ..ops._library import operators
from ..ops.sqrtm import chosen_alone
from ._autograd import apply_eager, eager, keep_signature, mapped, needs_function, transformed
from ._matrices import check_flag, check_square
from ._validate import HALF_DTYPES, check_choice
from ._value_and_gradients import only_first_derivative

_FORWARD = operators("sqrtm_fwd")
_BACKWARD = operators("sqrtm_bwd")

ALGORITHMS = ("auto", "eigh", "jacobi", "tridiagonal", "polar", "newton_schulz")
_COMPILED_ONLY = ("jacobi", "tridiagonal")


def sqrtm(
    A: Tensor,
    *,
    inverse: bool = False,
    algorithm: str = "auto",
    check: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Square root S of symmetric positive semidefinite matrices, S S = A, or its inverse.

    Only the symmetric part of `A` counts, and of it the part with eigenvalues >= 0: rounding makes a semidefinite
    matrix indefinite. The gradient solves the Lyapunov equation S X + X S = G; it is finite for repeated eigenvalues
    and, where A is singular, leaves out what has no finite derivative (docs/numerics.md). With `inverse`, directions
    in which A is 0 up to the rounding of its entries are left out: the pseudo-inverse of S.

    Args:
        A: (..., d, d), d >= 1, float16, bfloat16, float32 or float64.
        inverse: A^(-1/2) instead of A^(1/2).
        algorithm: 'auto': by size and backend. 'eigh': eigenvectors by LAPACK. 'jacobi': by Jacobi rotations,
            'tridiagonal': by Householder reflections, then QL iterations in float64, many matrices at a time, or by
            halves for float32 beyond d = 96 (both in compiled backends only). 'polar': polar factor of a Cholesky
            factor, products of matrices only. 'newton_schulz': the coupled iteration of the literature, for comparison;
            for well-conditioned matrices.
        check: raise for matrices that are not finite or have an eigenvalue that is negative beyond rounding. It costs
            their eigenvalues, and cannot be asked for under torch.compile and torch.func. Without it, NaN or infinities
            give NaN in that matrix, and negative eigenvalues count as 0.
        backend: 'auto', 'reference', 'cpu', 'cuda' or 'triton'; None: see :func:`otkd_fast.backend`.

    Returns:
        (..., d, d), symmetric, in the dtype of `A`. Half-precision inputs are computed in float32 and rounded once.

    Raises:
        TypeError: an argument of the wrong type, an integer or complex tensor.
        ValueError: matrices that are not square, an unknown word, 'jacobi' or 'tridiagonal' on the reference backend,
            or what `check` found.
        RuntimeError: the named backend is not available; or a second derivative is asked for.

    Sources: Higham, Functions of Matrices (2008), chapters 6 and 8.

    >>> import torch, otkd_fast
    >>> otkd_fast.sqrtm(torch.tensor([[5.0, 5.0], [5.0, 10.0]])).round(decimals=5)
    tensor([[2., 1.],
            [1., 3.]])
    """
    check_square("A", A)
    check_flag("inverse", inverse)
    check_choice("algorithm", algorithm, ALGORITHMS)
    check_flag("check", check)
    backend = resolve("sqrtm", A.device, backend)
    if backend == "reference" and algorithm in _COMPILED_ONLY:
        raise ValueError(f"algorithm: '{algorithm}' exists in compiled backends only, got backend 'reference'")
    if check:
        _check_semidefinite(A)
    dtype = A.dtype
    if dtype in HALF_DTYPES:
        A = A.float()
    if needs_function(A):
        S = _apply(A, inverse, algorithm, backend)
    else:
        alone = backend == "cpu" and not inverse
        S = _forward(A, inverse, chosen_alone(algorithm, A) if alone else algorithm, backend)[0]
    return S if S.dtype == dtype else S.to(dtype)


def _check_semidefinite(A: Tensor) -> None:
    """ValueError unless every matrix is finite and positive semidefinite up to rounding."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        raise ValueError("check: expected False under torch.compile and torch.func, which hide the values, got True")
    wide = A.detach().double()
    if not wide.isfinite().all():
        raise ValueError("A: expected finite entries")
    values = torch.linalg.eigvalsh((wide + wide.mT) / 2)  # (..., d), ascending
    tolerance = 8 * wide.shape[-1] ** 0.5 * torch.finfo(A.dtype).eps * torch.linalg.vector_norm(values, dim=-1)
    wrong = (values[..., 0] < -tolerance).reshape(-1)
    if wrong.any():
        problem = int(wrong.to(torch.uint8).argmax())
        smallest, largest = (values[..., k].reshape(-1)[problem].item() for k in (0, -1))
        where = f" in matrix {problem} of the batch" if A.dim() > 2 else ""
        raise ValueError(f"A: expected eigenvalues >= 0, got {smallest:.4g} (the largest is {largest:.4g}){where}")


def _forward(A: Tensor, inverse: bool, algorithm: str, backend: str) -> tuple[Tensor, Tensor]:
    return (reference.sqrtm_fwd if backend == "reference" else _FORWARD[backend])(A, inverse, algorithm)


def _backward(A, S, aux, grad, inverse: bool, algorithm: str, backend: str) -> Tensor:
    return (reference.sqrtm_bwd if backend == "reference" else _BACKWARD[backend])(A, S, aux, grad, inverse, algorithm)


def _apply(A: Tensor, inverse: bool, algorithm: str, backend: str) -> Tensor:
    if eager():
        return apply_eager(_SqrtmEager, A, inverse, algorithm, backend)
    return _Sqrtm.apply(A, inverse, algorithm, backend)[0]


class _SqrtmEager(torch.autograd.Function):
    """_Sqrtm without what compilers and transforms need: `aux` is no output (10 us less a step)."""

    @staticmethod
    def forward(ctx, A, inverse, algorithm, backend):
        S, aux = _forward(A, inverse, algorithm, backend)
        ctx.options = inverse, algorithm, backend
        ctx.save_for_backward(A, S, aux)
        return S

    @staticmethod
    def backward(ctx, grad):
        backward = _SqrtmBackward.apply if torch.is_grad_enabled() else _backward
        return backward(*ctx.saved_tensors, grad, *ctx.options), None, None, None


@keep_signature
class _Sqrtm(torch.autograd.Function):
    @staticmethod
    def forward(A, inverse, algorithm, backend):
        return _forward(A, inverse, algorithm, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        A, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(A, *output)

    @staticmethod
    def backward(ctx, grad, _grad_aux):
        if grad is None:
            return (None,) * 4
        backward = _SqrtmBackward.apply if transformed() else _backward
        return backward(*ctx.saved_tensors, grad, *ctx.options), None, None, None

    @staticmethod
    def vmap(info, in_dims, A, *options):
        S, aux = _Sqrtm.apply(mapped(A, in_dims[0], info.batch_size), *options)
        return (S, aux), (0, 0 if aux.dim() > 1 else None)


@keep_signature
class _SqrtmBackward(torch.autograd.Function):
    """The gradient as a node, where autograd records the backward pass: its derivative is an error."""

    @staticmethod
    def forward(A, S, aux, grad, inverse, algorithm, backend):
        return _backward(A, S, aux, grad, inverse, algorithm, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise only_first_derivative("sqrtm")

    @staticmethod
    def vmap(info, in_dims, A, S, aux, grad, *options):
        A, S, grad = (
            mapped(t, d, info.batch_size) for t, d in zip((A, S, grad), (*in_dims[:2], in_dims[3]), strict=True)
        )
        aux = mapped(aux, in_dims[2], info.batch_size) if aux.dim() > 1 else aux
        return _SqrtmBackward.apply(A, S, aux, grad, *options), 0

"""Squared 2-Wasserstein distances between Gaussians: from samples, from covariances, from standard deviations."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .. import ops as _ops  # noqa: F401  registers torch.ops.otkd_fast.*
from .. import reference
from .._dispatch import resolve
from ..ops._library import operators
from ._matrices import check_features, check_flag, check_not_empty, check_square, common_batch, in_float32
from ._validate import check_tensor
from ._value_and_gradients import value_and_gradients

_FROM_SAMPLES = operators("gaussian_wasserstein_from_samples")
_BURES = operators("bures_distance")


def gaussian_wasserstein_from_samples(
    x: Tensor, y: Tensor, *, unbiased: bool = False, backend: str | None = None
) -> Tensor:
    r"""Squared 2-Wasserstein distance between the Gaussians fitted to two samples.

    With means, centred rows X, Y and covariances X^T X / n, Y^T Y / m,

        W2^2 = |mean_x - mean_y|^2 + |X|^2 / n + |Y|^2 / m - 2 <K, P>,    K = X Y^T / sqrt(n m)

    where <K, P> with the polar factor P of K is the nuclear norm of K, which is the trace of the root that the usual
    formula has. No d x d matrix and no matrix root is formed: the cost is that of an n x m problem (d x d if n and m
    are both larger than d). The value is never negative. The gradient in x is that of P held fixed: bounded, and finite
    for identical, constant and zero features. A gradient that is not asked for (a teacher's) is not computed.

    Args:
        x: (..., n, d) samples in rows, n, d >= 1, float16, bfloat16, float32 or float64.
        y: (..., m, d), same dtype and device; the same batch axes as `x`, or one of the two has none and is shared.
        unbiased: covariances divide by n - 1 and m - 1.
        backend: 'auto', 'reference', 'cpu', 'cuda' or 'triton'; None: see :func:`otkd_fast.backend`.

    Returns:
        (...) in the dtype of `x`; float32 for half-precision inputs, which are computed in float32.

    Raises:
        TypeError: an argument of the wrong type, an integer or complex tensor.
        ValueError: wrong rank, sizes, dtypes or devices that do not match, no rows, no features, or a single row with
            unbiased=True.
        RuntimeError: the named backend is not available; or a second derivative is asked for.

    Sources: Dowson and Landau (1982); Gelbrich (1990); the trace as a nuclear norm: docs/numerics.md.

    >>> import torch, otkd_fast
    >>> x = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    >>> otkd_fast.gaussian_wasserstein_from_samples(x, 3 * x)
    tensor(4.)
    >>> otkd_fast.gaussian_wasserstein_from_samples(x, x + torch.tensor([0.0, 2.0]))
    tensor(4.)
    """
    check_tensor("x", x, 2, "(..., n, d)")
    check_tensor("y", y, 2, "(..., m, d)")
    check_flag("unbiased", unbiased)
    for name, rows in (("x", x), ("y", y)):
        check_not_empty(name, rows, 2)
        if unbiased and rows.shape[-2] == 1:
            raise ValueError(f"{name}: expected at least two rows with unbiased=True, got shape {tuple(rows.shape)}")
    check_features("y", y, "x", x)
    x, y = in_float32(*common_batch(x=(x, 2), y=(y, 2)))
    backend = resolve("gaussian_wasserstein", x.device, backend)
    compute = partial(_from_samples, unbiased=unbiased, backend=backend)
    return value_and_gradients("gaussian_wasserstein_from_samples", compute, x, y)


def _from_samples(x, y, need_x, need_y, *, unbiased, backend):
    if backend != "reference":
        return _FROM_SAMPLES[backend](x, y, unbiased, need_x, need_y)
    return reference.wasserstein_from_samples(x, y, unbiased=unbiased, need_x=need_x, need_y=need_y)


def bures_distance(A: Tensor, B: Tensor, *, backend: str | None = None) -> Tensor:
    r"""Squared Bures distance tr A + tr B - 2 tr (A^(1/2) B A^(1/2))^(1/2) between covariance matrices.

    It is the squared 2-Wasserstein distance between Gaussians of equal means. The last trace is computed as the nuclear
    norm of F^T G for factors A = F F^T, B = G G^T. The gradient in B is I - T with the transport map T from B to A, by
    the polar factor of F^T G: nothing is divided by gaps or sums of eigenvalues. Where B is singular, T is that of its
    range (docs/numerics.md): finite everywhere, and 0 at A = B for regular A.

    Only the symmetric parts of `A` and `B` count, and only the positive semidefinite part of these.

    Args:
        A: (..., d, d), d >= 1, float16, bfloat16, float32 or float64.
        B: (..., d, d), same dtype and device; the same batch axes as `A`, or one of the two has none and is shared.
        backend: 'auto', 'reference', 'cpu', 'cuda' or 'triton'; None: see :func:`otkd_fast.backend`.

    Returns:
        (...), >= 0, in the dtype of `A`; float32 for half-precision inputs, which are computed in float32. NaN or
        infinities in one pair of a batch give NaN for that one.

    Raises:
        TypeError: an argument of the wrong type, an integer or complex tensor.
        ValueError: matrices that are not square or of different sizes, dtypes or devices that do not match.
        RuntimeError: the named backend is not available; or a second derivative is asked for.

    Sources: Bhatia, Jain and Lim, On the Bures-Wasserstein distance (2019).

    >>> import torch, otkd_fast
    >>> A, B = torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([1.0, 9.0]))
    >>> otkd_fast.bures_distance(A, B)
    tensor(5.)
    """
    check_square("A", A)
    check_square("B", B)
    check_features("B", B, "A", A)
    A, B = in_float32(*common_batch(A=(A, 2), B=(B, 2)))
    backend = resolve("gaussian_wasserstein", A.device, backend)
    return value_and_gradients("bures_distance", partial(_bures, backend=backend), A, B)


def _bures(A, B, need_a, need_b, *, backend):
    if backend in _BURES:
        return _BURES[backend](A, B, need_a, need_b)
    return reference.bures(A, B, need_a=need_a, need_b=need_b)


def gaussian_wasserstein(
    mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor, *, backend: str | None = None
) -> Tensor:
    r"""Squared 2-Wasserstein distance between Gaussians: |mean_x - mean_y|^2 + bures_distance(cov_x, cov_y).

    From samples, :func:`gaussian_wasserstein_from_samples` is faster and keeps twice as many digits: a covariance has
    the squares of the singular values of its samples.

    Args:
        mean_x, mean_y: (..., d), float16, bfloat16, float32 or float64.
        cov_x, cov_y: (..., d, d), same dtype and device, symmetric positive semidefinite; see :func:`bures_distance`.
            Batch axes are the same wherever there are any.
        backend: 'auto', 'reference', 'cpu', 'cuda' or 'triton'; None: see :func:`otkd_fast.backend`.

    Returns:
        (...), >= 0, in the dtype of `mean_x`; float32 for half-precision inputs, which are computed in float32.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`bures_distance`.

    >>> import torch, otkd_fast
    >>> mean, cov = torch.zeros(2), torch.eye(2)
    >>> otkd_fast.gaussian_wasserstein(mean, cov, mean + 1, 4 * cov)
    tensor(4.)
    """
    mean_x, cov_x, mean_y, cov_y = gaussian_arguments(mean_x, cov_x, mean_y, cov_y)
    return (mean_x - mean_y).square().sum(-1) + bures_distance(cov_x, cov_y, backend=backend)


def gaussian_arguments(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> list[Tensor]:
    """Means (..., d) and covariances (..., d, d), checked, with the same batch axes, at least float32."""
    for name, mean in (("mean_x", mean_x), ("mean_y", mean_y)):
        check_tensor(name, mean, 1, "(..., d)")
        check_not_empty(name, mean, 1)
        check_features(name, mean, "mean_x", mean_x)
    for name, cov in (("cov_x", cov_x), ("cov_y", cov_y)):
        check_square(name, cov)
        check_features(name, cov, "mean_x", mean_x)
    operands = {"mean_x": (mean_x, 1), "cov_x": (cov_x, 2), "mean_y": (mean_y, 1), "cov_y": (cov_y, 2)}
    return in_float32(*common_batch(**operands))


def gaussian_wasserstein_diagonal(mean_x: Tensor, std_x: Tensor, mean_y: Tensor, std_y: Tensor) -> Tensor:
    r"""Squared 2-Wasserstein distance between Gaussians with diagonal covariances.

    sum_k (mean_x_k - mean_y_k)^2 + (std_x_k - std_y_k)^2, the form that the released WKD-F and KD2M codes compute. Any
    order of differentiation; computed in PyTorch on every device.

    Args:
        mean_x, std_x, mean_y, std_y: (..., d), the same dtype and device, the same batch axes wherever there are any.

    Returns:
        (...) in the dtype of `mean_x`; float32 for half-precision inputs, which are computed in float32.

    Raises:
        TypeError: an argument of the wrong type, an integer or complex tensor.
        ValueError: shapes, dtypes or devices that do not match.

    Sources: WKD (arXiv 2412.08139), feature loss; KD2M (arXiv 2504.01757), below equation 5.

    >>> import torch, otkd_fast
    >>> otkd_fast.gaussian_wasserstein_diagonal(*(torch.tensor([v, 1.0]) for v in (0.0, 1.0, 3.0, 5.0)))
    tensor(25.)
    """
    mean_x, std_x, mean_y, std_y = diagonal_arguments(mean_x=mean_x, std_x=std_x, mean_y=mean_y, std_y=std_y)
    return ((mean_x - mean_y).square() + (std_x - std_y).square()).sum(-1)


def diagonal_arguments(**operands: Tensor) -> list[Tensor]:
    """Means and standard deviations (..., d), checked, with the same batch axes, at least float32."""
    first_name, first = next(iter(operands.items()))
    for name, value in operands.items():
        check_tensor(name, value, 1, "(..., d)")
        check_not_empty(name, value, 1)
        check_features(name, value, first_name, first)
    return in_float32(*common_batch(**{name: (value, 1) for name, value in operands.items()}))

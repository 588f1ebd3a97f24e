"""Square roots and polar factors of batches of matrices (B x d x d), condition 1e4, with a gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import otkd_fast
from otkd_fast.reference.polar import SCHEDULES, polar_svd
from otkd_fast.testing import covariance

from .family import Family, Function, Peer, Problem

SIZES = ("256x8", "256x16", "256x32", "128x64", "64x128", "32x256", "8x512")
NORM_SIZES = ("256x16", "64x49", "32x128")
SPECTRUM = "geometric 1e4"
NEWTON_SCHULZ_STEPS = 16
EIGH_NOTE = "An eigenvalue of a float32 matrix is off by its rounding times the largest one: the gradient loses digits."
EIGH_ERRORS = (5e-5, 5e-3)


def eigh_root(A: Tensor, _: Tensor | None = None) -> Tensor:
    """V sqrt(w) V^T, differentiated through the eigenvectors."""
    values, V = torch.linalg.eigh(A)
    return (V * values.clamp(min=0).sqrt().unsqueeze(-2)) @ V.mT


def newton_schulz_root(A: Tensor, _: Tensor | None = None) -> Tensor:
    """The coupled iteration, differentiated through its steps."""
    norm = A.square().sum((-2, -1), keepdim=True).sqrt()
    identity = torch.eye(A.shape[-1], dtype=A.dtype)
    Y, Z = A / norm, identity.expand_as(A)
    for _step in range(NEWTON_SCHULZ_STEPS):
        T = (3 * identity - Z @ Y) / 2
        Y, Z = Y @ T, T @ Z
    return Y * norm.sqrt()


def _ours(**options) -> Callable[[str], Function]:
    return lambda size: lambda A, _: otkd_fast.sqrtm(A, **options)


def _pot(size: str) -> Function:
    import ot

    root = ot.backend.TorchBackend().sqrtm
    return lambda A, _: root(A)


def _scipy(size: str) -> Function:
    from scipy.linalg import sqrtm

    return lambda A, _: torch.from_numpy(sqrtm(A.detach().numpy()).real)


ROOT_PEERS = (
    Peer("otkd_fast", "otkd_fast", _ours()),
    Peer("eigh", "torch.linalg.eigh, autograd", lambda size: eigh_root, note=EIGH_NOTE, max_errors=EIGH_ERRORS),
    Peer("pot", "POT TorchBackend.sqrtm", _pot, note=EIGH_NOTE, max_errors=EIGH_ERRORS),
    Peer("newton-schulz", "Newton-Schulz, PyTorch", lambda size: newton_schulz_root, max_errors=(1e-4, 5e-2),
         sizes=SIZES[:5]),
    Peer("scipy", "scipy.linalg.sqrtm", _scipy, forward_only=True, sizes=SIZES[:4]),
)  # fmt: skip


def _batch(size: str) -> tuple[Tensor, torch.Generator]:
    batch, d = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(5)
    return covariance(SPECTRUM, d, generator=generator, batch=(batch,)).float(), generator


def root_problem(size: str) -> Problem:
    A, generator = _batch(size)
    grad = torch.randn(A.shape, generator=generator)
    wide = A.double()
    values, V = torch.linalg.eigh(wide)
    s = values.clamp(min=0).sqrt()
    root = (V * s.unsqueeze(-2)) @ V.mT
    symmetric = (grad.double() + grad.double().mT) / 2
    gradient = V @ ((V.mT @ symmetric @ V) / (s.unsqueeze(-1) + s.unsqueeze(-2))) @ V.mT
    return Problem((A.requires_grad_(), torch.empty(0), (grad + grad.mT) / 2), (root, gradient))


def svd_norm(K: Tensor, _: Tensor | None = None) -> Tensor:
    return torch.linalg.svdvals(K).sum(-1)


class _PolarByProducts(torch.autograd.Function):
    """The same polynomials in PyTorch's matrix products."""

    @staticmethod
    def forward(ctx, K):
        X = K / K.square().sum((-2, -1), keepdim=True).sqrt()
        for a, b, c in SCHEDULES[11]:
            gram = X.mT @ X
            X = a * X + X @ (b * gram + c * (gram @ gram))
        ctx.save_for_backward(X)
        return (K * X).sum((-2, -1))

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad[..., None, None]


def products_norm(K: Tensor, _: Tensor | None = None) -> Tensor:
    return _PolarByProducts.apply(K)


NORM_PEERS = (
    Peer("otkd_fast", "otkd_fast", lambda size: lambda K, _: otkd_fast.polar(K)[1]),
    Peer("svd", "torch.linalg.svdvals, autograd", lambda size: svd_norm),
    Peer("products", "the same products, PyTorch", lambda size: products_norm),
)


def norm_problem(size: str) -> Problem:
    batch, d = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(6)
    K = (
        covariance("geometric 1e2", d, generator=generator, batch=(batch,))
        @ torch.linalg.qr(torch.randn(batch, d, d, generator=generator, dtype=torch.float64)).Q
    )
    K = K.float()
    P, norm = polar_svd(K.double(), 1e-12)
    return Problem((K.requires_grad_(), torch.empty(0), torch.ones(batch)), (norm, P))


ROOTS = Family(
    op="sqrtm",
    title="Square roots of B x d x d, condition 1e4",
    sizes=SIZES,
    problem=root_problem,
    peers=ROOT_PEERS,
    parameters={"spectrum": SPECTRUM},
    required={size: {"eigh": r} for size, r in zip(SIZES, (20, 12, 6, 3, 1.8, 1.2, 1), strict=True)},
    required_forward={size: {"eigh": r} for size, r in zip(SIZES, (20, 12, 6, 3, 1.8, 1.2, 1), strict=True)},
    notes=(EIGH_NOTE,),
)
NORMS = Family(
    op="polar",
    title="Polar factors and nuclear norms of B x d x d, condition 1e2",
    sizes=NORM_SIZES,
    problem=norm_problem,
    peers=NORM_PEERS,
)

"""Gaussian distances from features, and their moments, with the gradient to the student's features."""

from __future__ import annotations

import torch
from torch import Tensor

import otkd_fast
from otkd_fast.reference.gaussian import bures, wasserstein_from_samples
from otkd_fast.reference.moments import feature_moments
from otkd_fast.testing import covariance

from .family import Family, Function, Peer, Problem
from .matrix_roots import eigh_root, products_norm
from .measure import forward_backward

SIZES = ("32x49x512", "100x16x512", "64x196x128")
COVARIANCE_SIZES = ("256x8", "64x32", "32x64", "16x128", "4x256")
MOMENT_SIZES = ("64x512x7x7 grid 1", "64x512x7x7 grid 4", "256x2048 batch")
DEFICIENT_NOTE = (
    "Fewer rows than features: the covariances are singular, and float32 eigenvalues of them carry errors of 1e-3 in "
    "the value and up to 1e-1 in the gradient, which are accepted here."
)
DEFICIENT_ERRORS = (1e-2, 0.5)


def features(size: str) -> tuple[Tensor, Tensor]:
    """Student and teacher (B, n, d), rectified; the student resembles the teacher."""
    batch, n, d = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(7)
    teacher = torch.relu(torch.randn(batch, n, d, generator=generator))
    student = torch.relu(teacher + 0.5 * torch.randn(batch, n, d, generator=generator))
    return student, teacher


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(-2, keepdim=True)
    return mean, (x - mean) / x.shape[-2] ** 0.5


def _trace(A: Tensor) -> Tensor:
    return A.diagonal(dim1=-2, dim2=-1).sum(-1)


def by_covariances(x: Tensor, y: Tensor) -> Tensor:
    """tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2 with both roots by eigh; eigenvalues of 0 get no gradient."""
    (mean_x, X), (mean_y, Y) = _centred(x), _centred(y)
    A, B = X.mT @ X, Y.mT @ Y
    root = eigh_root(B)  # of the teacher: no gradient through its eigenvectors
    middle = root @ A @ root
    values = torch.linalg.eigvalsh((middle + middle.mT) / 2)
    smallest = 1e-6 * values.detach().amax(-1, keepdim=True)
    fidelity = torch.where(values > smallest, values.clamp(min=0) + 1e-30, 0 * values + 1e-30).sqrt().sum(-1)
    return (mean_x - mean_y).square().sum((-2, -1)) + _trace(A) + _trace(B) - 2 * fidelity


def by_products(x: Tensor, y: Tensor) -> Tensor:
    """The nuclear form in PyTorch's matrix products."""
    (mean_x, X), (mean_y, Y) = _centred(x), _centred(y)
    squares = X.square().sum((-2, -1)) + Y.square().sum((-2, -1))
    return (mean_x - mean_y).square().sum((-2, -1)) + squares - 2 * products_norm(X @ Y.mT)


def by_svd(x: Tensor, y: Tensor) -> Tensor:
    """The nuclear form by singular values."""
    (mean_x, X), (mean_y, Y) = _centred(x), _centred(y)
    squares = X.square().sum((-2, -1)) + Y.square().sum((-2, -1))
    norm = torch.linalg.svdvals(X @ Y.mT).sum(-1)
    return (mean_x - mean_y).square().sum((-2, -1)) + squares - 2 * norm


def _mean_of(function: Function) -> Function:
    return lambda x, y: function(x, y).mean()


def _pot(size: str) -> Function:
    import ot

    def loss(x: Tensor, y: Tensor) -> Tensor:
        values = []
        for own, other in zip(x, y, strict=True):
            (mean_x, X), (mean_y, Y) = _centred(own), _centred(other)
            distance = ot.gaussian.bures_wasserstein_distance(mean_x[0], mean_y[0], X.mT @ X, Y.mT @ Y)
            values.append(distance.squeeze() ** 2)
        return torch.stack(values).mean()

    return loss


DISTANCE_PEERS = (
    Peer("otkd_fast", "otkd_fast", lambda size: _mean_of(otkd_fast.gaussian_wasserstein_from_samples)),
    Peer("eigh", "covariances, eigh, autograd", lambda size: _mean_of(by_covariances), note=DEFICIENT_NOTE,
         max_errors=DEFICIENT_ERRORS),
    Peer("pot", "POT, one by one", _pot, note=DEFICIENT_NOTE, max_errors=DEFICIENT_ERRORS, sizes=SIZES[2:]),
    Peer("products", "nuclear form, PyTorch products", lambda size: _mean_of(by_products), sizes=SIZES[:2]),
    Peer("svd", "nuclear form, singular values", lambda size: _mean_of(by_svd), sizes=SIZES[:2]),
)  # fmt: skip


def distance_problem(size: str) -> Problem:
    student, teacher = features(size)
    value, grad, _ = wasserstein_from_samples(student.double(), teacher.double(), need_y=False)
    return Problem((student.requires_grad_(), teacher), (value.mean(), grad / len(student)))


def bures_by_eigh(A: Tensor, B: Tensor) -> Tensor:
    """tr A + tr B - 2 tr (B^1/2 A B^1/2)^1/2, both roots by eigh."""
    root = eigh_root(B)
    middle = root @ A @ root
    values = torch.linalg.eigvalsh((middle + middle.mT) / 2)
    return _trace(A) + _trace(B) - 2 * values.clamp(min=0).sqrt().sum(-1)


def bures_by_factors(norm: Function) -> Function:
    """The nuclear norm of L_A^T L_B for Cholesky factors."""

    def distance(A: Tensor, B: Tensor) -> Tensor:
        return _trace(A) + _trace(B) - 2 * norm(torch.linalg.cholesky(A).mT @ torch.linalg.cholesky(B))

    return distance


def _pot_covariances(size: str) -> Function:
    import ot

    def loss(A: Tensor, B: Tensor) -> Tensor:
        zero = torch.zeros(A.shape[-1])
        pairs = zip(A, B, strict=True)
        values = [ot.gaussian.bures_wasserstein_distance(zero, zero, *pair).squeeze() ** 2 for pair in pairs]
        return torch.stack(values).mean()

    return loss


ROOTS_NOTE = "Roots of float32 covariances by eigenvalues lose digits of the gradient, which is accepted here."
ROOTS_ERRORS = (1e-4, 2e-2)
COVARIANCE_PEERS = (
    Peer("otkd_fast", "otkd_fast", lambda size: _mean_of(otkd_fast.bures_distance)),
    Peer("eigh", "eigh, autograd", lambda size: _mean_of(bures_by_eigh), note=ROOTS_NOTE, max_errors=ROOTS_ERRORS),
    Peer("pot", "POT, one by one", _pot_covariances, note=ROOTS_NOTE, max_errors=ROOTS_ERRORS),
    Peer("products", "Cholesky, PyTorch products", lambda size: _mean_of(bures_by_factors(products_norm))),
    Peer("svd", "Cholesky, singular values",
         lambda size: _mean_of(bures_by_factors(lambda K: torch.linalg.svdvals(K).sum(-1)))),
)  # fmt: skip


def covariance_problem(size: str) -> Problem:
    batch, d = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(9)
    A, B = (covariance(f"geometric {k}", d, generator=generator, batch=(batch,)).float() for k in ("1e4", "1e2"))
    value, grad, _ = bures(A.double(), B.double(), need_b=False)
    return Problem((A.requires_grad_(), B), (value.mean(), grad / batch))


def _moment_call(size: str) -> dict:
    if size.endswith("batch"):
        return {"dim": (0,), "grid": (1,)}
    return {"dim": (2, 3), "grid": (int(size.split()[-1]),) * 2}


def _our_moments(size: str) -> Function:
    call = _moment_call(size) | {"unbiased": True, "eps": 1e-5}
    return lambda x, _: torch.stack(tuple(otkd_fast.feature_moments(x, **call)))


def _plain_moments(size: str) -> Function:
    """Windows in a loop, as the released codes have them."""
    call = _moment_call(size) | {"unbiased": True, "eps": 1e-5}

    def moments(x: Tensor, _: Tensor) -> Tensor:
        if call["grid"] == (1,) * len(call["dim"]):
            variance, mean = torch.var_mean(x, call["dim"], correction=1, keepdim=True)
            return torch.stack((mean, (variance + call["eps"]).sqrt()))
        g, (h, w) = call["grid"][0], x.shape[-2:]
        cells = []
        for i in range(g):
            for j in range(g):
                part = x[..., i * h // g : -(-(i + 1) * h // g), j * w // g : -(-(j + 1) * w // g)]
                variance, mean = torch.var_mean(part, (-2, -1), correction=1)
                cells.append(torch.stack((mean, (variance + call["eps"]).sqrt())))
        return torch.stack(cells, -1).unflatten(-1, (g, g))

    return moments


MOMENT_PEERS = (
    Peer("otkd_fast", "otkd_fast", _our_moments),
    Peer("plain", "torch.var_mean, a window at a time", _plain_moments),
)


def moment_problem(size: str) -> Problem:
    generator = torch.Generator().manual_seed(8)
    x = torch.relu(torch.randn(tuple(map(int, size.split()[0].split("x"))), generator=generator))

    def exact(x: Tensor, _: Tensor) -> Tensor:
        return torch.stack(feature_moments(x, unbiased=True, eps=1e-5, **_moment_call(size)))

    shape = list(x.shape)
    for axis, count in zip(*_moment_call(size).values(), strict=True):
        shape[axis] = count
    grad = torch.randn((2, *shape), generator=generator)
    expected = forward_backward(exact, x.double().requires_grad_(), torch.empty(0), grad.double())
    return Problem((x.requires_grad_(), torch.empty(0), grad), expected)


DISTANCES = Family(
    op="gaussian_wasserstein",
    title="Gaussian W2^2 from features (B x n x d), gradient to the student",
    sizes=SIZES,
    problem=distance_problem,
    peers=DISTANCE_PEERS,
    required={"32x49x512": {"eigh": 300, "products": 2}, "100x16x512": {"eigh": 2000, "products": 2}},
    notes=(DEFICIENT_NOTE,),
)
COVARIANCES = Family(
    op="bures_distance",
    title="Squared Bures distance of covariances (B x d x d, condition 1e4 and 1e2), gradient to the first",
    sizes=COVARIANCE_SIZES,
    problem=covariance_problem,
    peers=COVARIANCE_PEERS,
    notes=(ROOTS_NOTE,),
)
MOMENTS = Family(
    op="feature_moments",
    title="Means and standard deviations (unbiased) of windows, as WKD-F takes them, or over the batch",
    sizes=MOMENT_SIZES,
    problem=moment_problem,
    peers=MOMENT_PEERS,
)

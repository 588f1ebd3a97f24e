"""float16 and bfloat16 inputs of every op: not more than twice the error of PyTorch in the same dtype.

Both are compared with the float64 answer for the same, rounded, inputs. PyTorch's are the formulas as one writes them,
all in half precision: log-domain Sinkhorn by logsumexp, roots by the coupled iteration that needs no eigenvalues.
"""

import pytest
import torch

pytest.importorskip("triton")

import otkd_fast  # noqa: E402
from otkd_fast import losses  # noqa: E402
from otkd_fast.testing import covariance  # noqa: E402
from otkd_fast.testing.guarded import guarded  # noqa: E402

EPSILON, ITERATIONS = 0.5, 3
OFFSETS = {"row_offsets": torch.tensor([0, 2, 6]), "column_offsets": torch.tensor([0, 4, 6])}


def plain_cost(x, y, metric):
    difference = x.unsqueeze(-2) - y.unsqueeze(-3)
    if metric == "l1":
        return difference.abs().sum(-1)
    if metric == "sqeuclidean":
        return difference.square().sum(-1)
    if metric == "l2":
        return difference.square().sum(-1).sqrt()
    unit_x, unit_y = (z / z.square().sum(-1, keepdim=True).sqrt() for z in (x, y))
    return 1 - unit_x @ unit_y.mT


def plain_transport(cost, a=None, b=None):
    """<P, C> after a fixed number of iterations."""
    n, m = cost.shape[-2:]
    a = torch.full(cost.shape[:-1], 1 / n, dtype=cost.dtype) if a is None else a
    b = torch.full((*cost.shape[:-2], m), 1 / m, dtype=cost.dtype) if b is None else b
    g = torch.zeros_like(b)
    for _ in range(ITERATIONS):
        f = EPSILON * (a.log() - ((g.unsqueeze(-2) - cost) / EPSILON).logsumexp(-1))
        g = EPSILON * (b.log() - ((f.unsqueeze(-1) - cost) / EPSILON).logsumexp(-2))
    return (((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / EPSILON).exp() * cost).sum((-2, -1))


def plain_root(A):
    A = (A + A.mT) / 2
    norm = A.square().sum((-2, -1), keepdim=True).sqrt()
    Y, Z = A / norm, torch.eye(A.shape[-1], dtype=A.dtype).expand_as(A)
    for _ in range(8 if A.dtype != torch.float64 else 30):
        T = (3 * torch.eye(A.shape[-1], dtype=A.dtype) - Z @ Y) / 2
        Y, Z = Y @ T, T @ Z
    return Y * norm.sqrt()


def plain_polar(K):
    X = K / K.square().sum((-2, -1), keepdim=True).sqrt()
    for _ in range(10 if K.dtype != torch.float64 else 40):
        X = 1.5 * X - 0.5 * X @ (X.mT @ X)
    return X


def plain_samples(x, y):
    """Squared W2 of two Gaussians from samples, by the roots of the centred rows' Gram matrices."""
    means, scale = [z.mean(-2) for z in (x, y)], x.shape[-2] ** -0.5
    X, Y = ((z - mean.unsqueeze(-2)) * scale for z, mean in zip((x, y), means, strict=True))
    K = X @ Y.mT
    nuclear = (K * plain_polar(K).detach()).sum((-2, -1))  # P is its gradient
    return (means[0] - means[1]).square().sum(-1) + X.square().sum((-2, -1)) + Y.square().sum((-2, -1)) - 2 * nuclear


def plain_bures(A, B):
    """tr A + tr B - 2 tr (A^(1/2) B A^(1/2))^(1/2)."""
    root = plain_root(A)
    trace = [X.diagonal(dim1=-2, dim2=-1).sum(-1) for X in (A, B, plain_root(root @ B @ root))]
    return trace[0] + trace[1] - 2 * trace[2]


def rows(*shape):
    return lambda generator: torch.randn(shape, generator=generator, dtype=torch.float64)


def masses(*shape):
    return lambda generator: torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1)


def plain_packed(cost):
    return torch.stack([plain_transport(cost[:8].view(2, 4)), plain_transport(cost[8:].view(4, 2))])


SOLVE = {"epsilon": EPSILON, "num_iters": ITERATIONS, "backend": "triton"}


def shared(cost, a):
    return otkd_fast.sinkhorn(cost, a, **SOLVE).transport_cost


CASES = {  # name: kernels', PyTorch's, operands
    **{
        metric: (
            lambda x, y, metric=metric: otkd_fast.cost_matrix(x, y, metric=metric, backend="triton"),
            lambda x, y, metric=metric: plain_cost(x, y, metric), (rows(3, 20), rows(4, 20)),
        ) for metric in ("l1", "l2", "sqeuclidean", "cosine")
    },
    "sinkhorn": (lambda c: otkd_fast.sinkhorn(c.square(), **SOLVE).transport_cost,
                 lambda c: plain_transport(c.square()), (rows(3, 4, 5),)),
    "shared": (lambda c, a: shared(c.square(), a),
               lambda c, a: plain_transport(c.square().expand(3, 4, 5), a), (rows(4, 5), masses(3, 4))),
    "points": (lambda x, y: otkd_fast.sinkhorn_points(x, y, metric="l1", **SOLVE).transport_cost,
               lambda x, y: plain_transport(plain_cost(x, y, "l1")), (rows(2, 4, 3), rows(2, 5, 3))),
    "packed": (lambda c: otkd_fast.sinkhorn_ragged(c.square(), **OFFSETS, **SOLVE).transport_cost,
               lambda c: plain_packed(c.square()), (rows(16),)),
    "sinkd": (lambda s, t: losses.sinkd(s, t, temperature=2.0, epsilon=EPSILON, num_iters=ITERATIONS),
              lambda s, t: 5 * plain_transport(plain_cost((s / 2).softmax(-1), (t / 2).softmax(-1), "l1")),
              (rows(5, 7), rows(5, 7))),
    "polar": (lambda K: otkd_fast.polar(K, backend="triton")[0], plain_polar, (rows(2, 4, 4),)),
    "sqrtm": (lambda A: otkd_fast.sqrtm(A, backend="triton"), plain_root, ("covariance",)),
    "bures": (lambda A, B: otkd_fast.bures_distance(A, B, backend="triton"), plain_bures, ("covariance", "covariance")),
    "samples": (lambda x, y: otkd_fast.gaussian_wasserstein_from_samples(x, y, backend="triton"),
                plain_samples, (rows(3, 4, 9), rows(3, 4, 9))),
    "moments": (lambda x: torch.stack(otkd_fast.feature_moments(x, dim=-1, backend="triton")),
                lambda x: torch.stack((x.mean(-1), x.std(-1, unbiased=False))), (rows(3, 40),)),
}  # fmt: skip


def result(function, operands, weights):
    leaves = [x.clone().requires_grad_() for x in operands]
    value = function(*leaves)
    return value, *torch.autograd.grad((value * weights.to(value.dtype)).sum(), leaves)


def pairs():
    """float16 by default only where a kernel reads half precision itself; the others are given float32."""
    read = "l1", "l2", "sqeuclidean", "cosine", "sinkd"
    for name in CASES:
        yield pytest.param(name, torch.bfloat16, id=f"{name}-bfloat16")
        yield pytest.param(name, torch.float16, id=f"{name}-float16", marks=() if name in read else pytest.mark.slow)


@pytest.mark.parametrize("name, dtype", pairs())
def test_twice_the_error_of_pytorch(name, dtype, generator):
    ours, plain, makers = CASES[name]
    matrices = lambda generator: covariance("geometric 1e2", 5, generator=generator, batch=(2,))  # noqa: E731
    operands = [(matrices if make == "covariance" else make)(generator).to(dtype) for make in makers]
    if name == "polar":  # its gradient is refused
        plain, ours = (lambda K, f=f: f(K.detach()) + 0 * K for f in (plain, ours))
    weights = torch.randn(ours(*operands).shape, generator=generator, dtype=torch.float64)
    exact = result(plain, [x.double() for x in operands], weights)
    half = result(plain, operands, weights)
    with guarded() as guards, otkd_fast.backend("triton"):
        found = result(ours, operands, weights)
    assert guards.launches
    assert all(grad.dtype == dtype for grad in found[1:])
    for value, theirs, want in zip(found, half, exact, strict=True):
        error, allowed = (float((x.detach().double() - want.detach()).norm()) for x in (value, theirs))
        assert error <= 2 * allowed, f"PyTorch {allowed:.2e}"

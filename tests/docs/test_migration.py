"""docs/migration.md, row by row: what stands on the left and on the right is the same number."""

import re
import warnings
from pathlib import Path

import pytest
import torch

import otkd_fast

ot = pytest.importorskip("ot")
geomloss = pytest.importorskip("geomloss")

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text()
EPS, T = 0.2, 500
generator = torch.Generator().manual_seed(0)
x, y = (torch.rand(n, 3, generator=generator, dtype=torch.float64) for n in (6, 8))
a, b = (torch.softmax(torch.randn(n, generator=generator, dtype=torch.float64), 0) for n in (6, 8))
C = torch.cdist(x, y).square()


def ours(**options):
    return otkd_fast.sinkhorn(C, a, b, **{"epsilon": EPS, "num_iters": T, **options})


def pot_plan(iterations=T, **options):
    return ot.sinkhorn(a, b, C, EPS, numItermax=iterations, stopThr=0, **options)


def cost(metric):
    return ot.dist(x, y, metric=metric)


def warm_start():
    first = otkd_fast.sinkhorn(C, a, b, epsilon=EPS, num_iters=5, update_first="b")
    logs = first.f / EPS, first.g / EPS
    return (
        pot_plan(7, warmstart=logs),
        ours(num_iters=7, update_first="b", initial_potentials=tuple(EPS * z for z in logs)).plan(),
    )


def gradient(theirs, mode):
    grads = []
    for function in (theirs, lambda c: otkd_fast.sinkhorn(c, a, b, epsilon=EPS, num_iters=T, gradient=mode)):
        leaf = C.clone().requires_grad_()
        result = function(leaf)
        if mode == "envelope":
            value = result if isinstance(result, torch.Tensor) else result.regularized_cost
        else:
            value = result if isinstance(result, torch.Tensor) else result.transport_cost
        grads.append(torch.autograd.grad(value, leaf)[0])
    return tuple(grads)


def solve(grad, attribute):
    return lambda c: getattr(ot.solve(c, a, b, reg=EPS, reg_type="KL", max_iter=T, tol=1e-13, grad=grad), attribute)


def batch():
    import ot.batch

    costs, first, second = C.expand(2, 6, 8), a.expand(2, 6), b.expand(2, 8)
    theirs = ot.batch.solve_batch(costs, EPS, first, second, max_iter=T, tol=1e-12).value_linear
    return theirs, otkd_fast.sinkhorn(costs, first, second, epsilon=EPS, num_iters=T).transport_cost


def loop():
    costs = torch.stack((C, C.flip(0)))
    theirs = torch.stack([(ot.sinkhorn(a, b, c, EPS, numItermax=T, stopThr=0) * c).sum() for c in costs])
    return theirs, otkd_fast.sinkhorn(costs, a, b, epsilon=EPS, num_iters=T, update_first="b").transport_cost


def gaussians():
    features, others = (torch.rand(n, 3, generator=generator, dtype=torch.float64) for n in (20, 30))
    means, covariances = (features.mean(0), others.mean(0)), (torch.cov(features.mT), torch.cov(others.mT))
    return features, others, means, covariances


def bures():
    _, _, (ms, mt), (cs, ct) = gaussians()
    theirs = ot.gaussian.bures_wasserstein_distance(ms, mt, cs, ct) ** 2
    return theirs.squeeze(), otkd_fast.gaussian_wasserstein(ms, cs, mt, ct)


def empirical():
    features, others, *_ = gaussians()
    theirs = torch.as_tensor(ot.gaussian.empirical_bures_wasserstein_distance(features, others, reg=0)) ** 2
    return theirs.squeeze(), otkd_fast.gaussian_wasserstein_from_samples(features, others)


def root():
    matrix = torch.cov(gaussians()[0].mT)
    return ot.backend.get_backend(matrix).sqrtm(matrix), otkd_fast.sqrtm(matrix)


def line():
    values, others = x[:, :2].contiguous(), y[:, :2].contiguous()
    return ot.wasserstein_1d(values, others, a, b, p=2), otkd_fast.wasserstein_1d(values.mT, others.mT, a, b, p=2)


def unbalanced():
    theirs = ot.unbalanced.sinkhorn_unbalanced(a, b, C, EPS, 0.7, reg_type="kl", numItermax=5000, stopThr=1e-14)
    return theirs, ours(marginal_penalty=0.7, num_iters=2000).plan()


ROWS = {
    'ot.dist(x, y, metric="cityblock")': lambda: (cost("cityblock"), otkd_fast.cost_matrix(x, y, metric="l1")),
    'ot.dist(x, y, metric="sqeuclidean")': lambda: (
        cost("sqeuclidean"), otkd_fast.cost_matrix(x, y, metric="sqeuclidean")),
    'ot.dist(x, y, metric="euclidean")': lambda: (cost("euclidean"), otkd_fast.cost_matrix(x, y, metric="l2")),
    'ot.dist(x, y, metric="cosine")': lambda: (cost("cosine"), otkd_fast.cost_matrix(x, y, metric="cosine")),
    "P = ot.sinkhorn(": lambda: (pot_plan(9), ours(num_iters=9, update_first="b").plan()),
    "(P * C).sum()": lambda: ((pot_plan(9) * C).sum(), ours(num_iters=9, update_first="b").transport_cost),
    "ot.sinkhorn2(": lambda: (
        ot.sinkhorn2(a, b, C, EPS, numItermax=9, stopThr=0), ours(num_iters=9, update_first="b").transport_cost),
    "ot.bregman.sinkhorn_log(": lambda: (
        ot.bregman.sinkhorn_log(a, b, C, EPS, numItermax=9, stopThr=0),
        ours(num_iters=9, update_first="b").plan()),
    "warmstart=(u, v)": warm_start,
    "ot.unbalanced.sinkhorn_unbalanced(": unbalanced,
    "ot.solve_batch(": batch,
    "ot.solve(..., grad=": lambda: gradient(solve("envelope", "value"), "envelope"),
    "ot.wasserstein_1d(": line,
    "a Python loop": loop,
    "ot.gaussian.bures_wasserstein_distance(": bures,
    "ot.gaussian.empirical_bures_wasserstein_distance(": empirical,
    "ot.backend.get_backend(A).sqrtm(A)": root,
}  # fmt: skip
NAMES_ONLY = ("reg`", "stopThr`")  # options, not calls


def rows_of(title):
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [line.split("|")[1].strip() for line in section.splitlines() if re.match(r"\| `|\| a Python", line)]


@pytest.mark.parametrize("row", ROWS)
def test_both_sides_of_the_row_agree(row):
    with warnings.catch_warnings():  # of iterations that have not converged
        warnings.simplefilter("ignore")
        theirs, mine = ROWS[row]()
    torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), rtol=1e-6, atol=1e-9)


def test_every_row_is_tested():
    cells = [cell.lstrip("`(").replace("`(P", "(P") for cell in rows_of("POT")]
    untested = [c for c in cells if not c.startswith(NAMES_ONLY) and not any(r.lstrip("(") in c for r in ROWS)]
    assert not untested and len(cells) >= len(ROWS)


@pytest.mark.parametrize("p", [1, 2])
def test_geomloss_without_debiasing(p):
    blur = EPS ** (1 / p)
    options = {"p": p, "blur": blur, "debias": False, "scaling": 0.99, "backend": "tensorized"}
    theirs = geomloss.SamplesLoss("sinkhorn", **options)(x, y)
    metric = (
        otkd_fast.cost_matrix(x, y, metric="sqeuclidean") / 2 if p == 2 else otkd_fast.cost_matrix(x, y, metric="l2")
    )
    mine = otkd_fast.sinkhorn(metric, epsilon=blur**p, num_iters=T, gradient="envelope").regularized_cost
    torch.testing.assert_close(mine, theirs.squeeze(), rtol=1e-3, atol=0)


def test_geomloss_debiased_and_with_reach():
    options = {"p": 2, "blur": EPS**0.5, "scaling": 0.99, "backend": "tensorized"}
    theirs = geomloss.SamplesLoss("sinkhorn", **options)(x, y)
    half = 2**-0.5
    mine = otkd_fast.sinkhorn_divergence(half * x, half * y, metric="sqeuclidean", epsilon=EPS, num_iters=T)
    torch.testing.assert_close(mine, theirs.squeeze(), rtol=1e-2, atol=1e-6)
    theirs = geomloss.SamplesLoss("sinkhorn", reach=0.9, debias=False, **options)(x, y)
    metric = otkd_fast.cost_matrix(x, y, metric="sqeuclidean") / 2
    mine = otkd_fast.sinkhorn(metric, epsilon=EPS, num_iters=T, marginal_penalty=0.9**2).regularized_cost
    torch.testing.assert_close(mine, theirs.squeeze(), rtol=1e-3, atol=1e-6)

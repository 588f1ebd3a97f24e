"""The functions of POT's signatures against POT itself: values, logs, gradients, warnings."""

import inspect
import warnings

import numpy as np
import pytest
import torch

from otkd_fast.compat import pot

ot = pytest.importorskip("ot")

SHAPES = [(6, 6), (9, 5)]
FUNCTIONS = {
    "sinkhorn": (pot.sinkhorn, ot.sinkhorn),
    "sinkhorn2": (pot.sinkhorn2, ot.sinkhorn2),
    "empirical_sinkhorn2": (pot.bregman.empirical_sinkhorn2, ot.bregman.empirical_sinkhorn2),
    "bures_wasserstein_distance": (pot.gaussian.bures_wasserstein_distance, ot.gaussian.bures_wasserstein_distance),
}


def problem(n, m, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n + m)
    cost = torch.rand(n, m, generator=generator, dtype=torch.float64)
    a, b = (torch.softmax(torch.randn(k, generator=generator, dtype=torch.float64), 0) for k in (n, m))
    return [x.to(dtype) for x in (a, b, cost)]


def same(actual, expected, rtol=1e-9):
    if isinstance(expected, dict):
        for name in expected:
            same(actual[name], expected[name], 1e-8)
        return
    if isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            # errors near the stopping threshold are differences of nearly equal numbers
            torch.testing.assert_close(*(torch.as_tensor(x, dtype=torch.float64) for x in pair), rtol=1e-4, atol=1e-13)
        return
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-13)


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_same_signature(name):
    ours, theirs = (inspect.signature(f).parameters for f in FUNCTIONS[name])
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


@pytest.mark.parametrize("options", [{}, {"numItermax": 7, "stopThr": 0.0}, {"stopThr": 1e-3}, {"numItermax": 25}])
@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn2"])
def test_value_log_and_gradient(name, shape, method, options):
    ours, theirs = FUNCTIONS[name]
    operands = problem(*shape)
    answers = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in operands]
        value, log = function(*leaves, 0.1, method=method, log=True, warn=False, **options)
        weights = torch.arange(value.numel(), dtype=torch.float64).reshape(value.shape).square().sin()
        answers.append((value, log, torch.autograd.grad((value * weights).sum() if value.dim() else value, leaves)))
    (value, log, gradients), (expected, expected_log, expected_gradients) = answers
    same(value.detach(), expected.detach())
    assert log["niter"] == expected_log["niter"]
    for field in ("u", "v", *(("log_u", "log_v") if method == "sinkhorn_log" else ())):
        same(log[field].detach(), expected_log[field].detach(), 1e-8)
    same(log["err"], [e.detach() for e in expected_log["err"]])
    # those of a and b are defined up to a constant: the totals are equal
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        if wanted.dim() == 1:
            got, wanted = got - got.mean(), wanted - wanted.mean()
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9 * wanted.abs().max().item())


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log"])
@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn2"])
def test_several_histograms(name, method):
    ours, theirs = FUNCTIONS[name]
    a, _, cost = (x.numpy() for x in problem(6, 5))
    b = torch.softmax(torch.randn(5, 3, dtype=torch.float64), 0).numpy()
    value, log = ours(a, b, cost, 0.1, method=method, log=True)
    expected, expected_log = theirs(a, b, cost, 0.1, method=method, log=True)
    assert isinstance(value, np.ndarray) and value.shape == (3,)
    same(value, expected)
    for field in ("u", "v"):
        same(log[field], expected_log[field], 1e-7)


@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn2"])
def test_numpy_lists_and_empty_marginals(name):
    ours, theirs = FUNCTIONS[name]
    a, b, cost = (x.numpy() for x in problem(6, 5))
    value = ours(a, b, cost, 0.1)
    same(value, theirs(a, b, cost, 0.1))
    assert isinstance(value, (np.ndarray, np.floating))
    same(ours([], [], cost, 0.1), theirs([], [], cost, 0.1))
    same(ours(list(a), list(b), cost.tolist(), 0.1), theirs(list(a), list(b), cost.tolist(), 0.1))


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log"])
def test_warm_start(method):
    operands = [x.numpy() for x in problem(6, 5)]
    _, log = ot.sinkhorn(*operands, 0.1, method="sinkhorn_log", log=True, numItermax=3, warn=False)
    start = log["log_u"], log["log_v"]
    value, log = pot.sinkhorn(*operands, 0.1, method=method, log=True, warmstart=start)
    expected, expected_log = ot.sinkhorn(*operands, 0.1, method=method, log=True, warmstart=start)
    same(value, expected)
    assert log["niter"] == expected_log["niter"]
    same(log["u"], expected_log["u"], 1e-8)


def test_float32():
    operands = problem(9, 5, torch.float32)
    value = pot.sinkhorn2(*operands, 0.1, numItermax=50, stopThr=0.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, ot.sinkhorn2(*operands, 0.1, numItermax=50, stopThr=0.0), rtol=1e-5, atol=0.0)


def test_warning_and_verbose(capsys):
    operands = problem(6, 5)
    with pytest.warns(UserWarning, match="numItermax=2"):
        pot.sinkhorn(*operands, 0.01, numItermax=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pot.sinkhorn(*operands, 0.01, numItermax=2, warn=False)
        pot.sinkhorn2(*operands, 0.01, numItermax=2)
        pot.sinkhorn(*operands, 0.1, verbose=True)
    assert "1|" in capsys.readouterr().out


def test_small_regularisation_where_scalings_underflow():
    operands = problem(6, 5)
    value = pot.sinkhorn2(*operands, 1e-3, numItermax=50, stopThr=0)
    expected = ot.sinkhorn2(*operands, 1e-3, numItermax=50, stopThr=0, method="sinkhorn_log")
    same(value, expected, 1e-7)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cityblock", "cosine"])
@pytest.mark.parametrize("masses", [False, True])
def test_empirical(metric, masses):
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64) + 1
    a, b, _ = problem(6, 5)
    given = {"a": a, "b": b} if masses else {}
    ours, theirs = FUNCTIONS["empirical_sinkhorn2"]
    answers = []
    for function in (ours, theirs):
        leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
        value = function(*leaves, 0.5, metric=metric, **given)
        answers.append((value.detach(), torch.autograd.grad(value, leaves)))
    same(answers[0][0], answers[1][0])
    for got, wanted in zip(answers[0][1], answers[1][1], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)
    value, log = ours(x.numpy(), y.numpy(), 0.5, metric=metric, log=True, isLazy=True, stopThr=1e-6)
    expected, expected_log = theirs(x.numpy(), y.numpy(), 0.5, metric=metric, log=True, isLazy=True, stopThr=1e-6)
    same(value, expected)
    assert log["niter"] == expected_log["niter"]
    same(log["u"], expected_log["u"], 1e-7)


def test_lazy_with_a_gradient_and_masses():
    x, y = torch.randn(6, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 3, dtype=torch.float64)
    a, b, _ = problem(6, 5)
    lazy = pot.empirical_sinkhorn2(x, y, 0.5, a, b, isLazy=True)
    dense = pot.empirical_sinkhorn2(x, y, 0.5, a, b)
    torch.testing.assert_close(lazy, dense, rtol=1e-6, atol=0.0)
    gradients = [torch.autograd.grad(value, x)[0] for value in (lazy, dense)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def gaussians(*batch, d=4):
    factor = torch.randn(*batch, d, 2 * d, dtype=torch.float64)
    return torch.randn(*batch, d, dtype=torch.float64), factor @ factor.mT / (2 * d)


@pytest.mark.parametrize(("batch", "other", "paired"), [((), (), False), ((3,), (2,), False), ((3,), (3,), True)])
def test_bures_wasserstein(batch, other, paired):
    (ms, Cs), (mt, Ct) = gaussians(*batch), gaussians(*other)
    ours, theirs = FUNCTIONS["bures_wasserstein_distance"]
    value, log = ours(ms, mt, Cs, Ct, paired=paired, log=True)
    expected, expected_log = theirs(ms, mt, Cs, Ct, paired=paired, log=True)
    # for one pair of torch tensors POT gives shape (1,), and for arrays a number, as its documentation says
    assert value.shape == (expected.shape if batch else ())
    expected = expected.reshape(value.shape)
    same(value, expected, 1e-8)
    same(log["Cs12"], expected_log["Cs12"], 1e-8)
    numpy = ours(*(x.numpy() for x in (ms, mt, Cs, Ct)), paired=paired)
    assert isinstance(numpy, (np.ndarray, np.floating))
    same(numpy, expected, 1e-8)


def test_bures_wasserstein_gradient():
    (ms, Cs), (mt, Ct) = gaussians(), gaussians()
    answers = []
    for function in FUNCTIONS["bures_wasserstein_distance"]:
        leaves = [x.clone().requires_grad_() for x in (ms, mt, Cs, Ct)]
        answers.append(torch.autograd.grad(function(*leaves), leaves))
    for got, wanted in zip(*answers, strict=True):
        wanted = (wanted + wanted.mT) / 2 if wanted.dim() == 2 else wanted
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)
    ms.requires_grad_()
    (gradient,) = torch.autograd.grad(pot.bures_wasserstein_distance(ms, ms.detach(), Cs, Cs), ms)
    assert gradient.isfinite().all()


A, B, M = problem(6, 5)
WRONG = {
    "method": (lambda: pot.sinkhorn(A, B, M, 0.1, method="greenkhorn"), ValueError, "method"),
    "reg": (lambda: pot.sinkhorn2(A, B, M, 0.0), ValueError, "reg"),
    "iterations": (lambda: pot.sinkhorn2(A, B, M, 0.1, numItermax=0), ValueError, "numItermax"),
    "option": (lambda: pot.sinkhorn(A, B, M, 0.1, tau=3), TypeError, "tau"),
    "metric": (lambda: pot.empirical_sinkhorn2(M, M, 0.1, metric="jaccard"), ValueError, "metric"),
    "shape": (lambda: pot.sinkhorn(A[:2], B, M, 0.1), ValueError, "a"),
    "means": (lambda: pot.bures_wasserstein_distance(A, B, M, M), ValueError, "ms"),
    "dimensions": (
        lambda: pot.bures_wasserstein_distance(A, B, torch.eye(6).double(), torch.eye(5).double()), ValueError, "mt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_arguments(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()

"""wasserstein_1d against closed forms, SciPy, POT, the linear program and finite differences."""

import pytest
import torch

import otkd_fast
from otkd_fast import wasserstein_1d

F64 = torch.float64
NAN, INF = float("nan"), float("inf")


def points(*shape, generator):
    return torch.randn(shape, generator=generator, dtype=F64)


def masses(*shape, generator, zeros=False):
    weights = torch.rand(shape, generator=generator, dtype=F64) + 0.1
    if zeros:
        weights[..., ::3] = 0
    return weights / weights.sum(-1, keepdim=True)


def by_linear_program(x, y, a, b, p):
    """The definition: the least cost over plans."""
    linprog = pytest.importorskip("scipy.optimize").linprog
    n, m = len(x), len(y)
    cost = (x[:, None] - y).abs() ** p
    rows, columns = torch.kron(torch.eye(n), torch.ones(m)), torch.kron(torch.ones(n), torch.eye(m))
    constraints, totals = torch.cat([rows, columns]).numpy(), torch.cat([a, b]).detach().numpy()
    return linprog(cost.detach().flatten().numpy(), A_eq=constraints, b_eq=totals, bounds=(0, None)).fun


@pytest.mark.parametrize("p", [1, 2])
def test_closed_forms(p):
    """One point each; a shift; masses that stay and masses that move."""
    one = torch.tensor([2.0], dtype=F64), torch.tensor([5.0], dtype=F64)
    assert wasserstein_1d(*one, p=p) == 3.0**p
    x = torch.tensor([0.3, -1.0, 4.0], dtype=F64)
    torch.testing.assert_close(wasserstein_1d(x, x.flip(0) + 0.5, p=p), torch.tensor(0.5**p, dtype=F64))
    a, b = torch.tensor([0.7, 0.3], dtype=F64), torch.tensor([0.2, 0.8], dtype=F64)
    ends = torch.tensor([0.0, 2.0], dtype=F64)
    torch.testing.assert_close(wasserstein_1d(ends, ends, a, b, p=p), torch.tensor(0.5 * 2.0**p, dtype=F64))
    torch.testing.assert_close(wasserstein_1d(ends, ends, 4 * a, 4 * b, p=p), torch.tensor(2 * 2.0**p, dtype=F64))


@pytest.mark.parametrize("given", ["none", "a", "b", "both", "zeros"])
@pytest.mark.parametrize("n, m", [(6, 6), (5, 7), (1, 4)])
@pytest.mark.parametrize("p", [1, 2])
def test_is_the_optimum(p, n, m, given, generator):
    x, y = points(n, generator=generator), points(m, generator=generator)
    a = masses(n, generator=generator, zeros=given == "zeros" and n > 1) if given in ("a", "both", "zeros") else None
    b = masses(m, generator=generator, zeros=given == "zeros") if given in ("b", "both", "zeros") else None
    full = [torch.full((k,), 1 / k, dtype=F64) if w is None else w for k, w in ((n, a), (m, b))]
    expected = torch.tensor(by_linear_program(x, y, *full, p), dtype=F64)
    torch.testing.assert_close(wasserstein_1d(x, y, a, b, p=p), expected, rtol=1e-9, atol=1e-12)


def test_against_scipy(generator):
    stats = pytest.importorskip("scipy.stats")
    x, y = points(200, generator=generator), points(333, generator=generator)
    a, b = masses(200, generator=generator), masses(333, generator=generator)
    for weights in ((None, None), (a, b)):
        expected = stats.wasserstein_distance(x.numpy(), y.numpy(), *(w if w is None else w.numpy() for w in weights))
        torch.testing.assert_close(wasserstein_1d(x, y, *weights), torch.tensor(expected, dtype=F64))


@pytest.mark.parametrize("p", [1, 2])
def test_against_pot(p, generator):
    ot = pytest.importorskip("ot")
    x, y = points(30, 3, generator=generator), points(45, 3, generator=generator)
    a, b = masses(3, 30, generator=generator).mT, masses(3, 45, generator=generator).mT
    expected = ot.wasserstein_1d(x, y, a, b, p=p)
    torch.testing.assert_close(wasserstein_1d(x.mT, y.mT, a.mT, b.mT, p=p), expected)
    expected = ot.wasserstein_1d(x, y, p=p)
    torch.testing.assert_close(wasserstein_1d(x.mT, y.mT, p=p), expected)


@pytest.mark.parametrize("p", [1, 2])
def test_is_the_limit_of_sinkhorn(p, generator):
    """Values, and gradients by the points, as epsilon goes to 0."""
    x, y = points(6, generator=generator).requires_grad_(), points(5, generator=generator)
    a, b = masses(6, generator=generator), masses(5, generator=generator)
    cost = (x[:, None] - y).abs() ** p
    options = {"epsilon": 5e-3, "num_iters": 3000, "tol": 1e-9, "epsilon_schedule": [1.0, 0.1, 0.03, 0.01]}
    result = otkd_fast.sinkhorn(cost, a, b, gradient="envelope", **options)
    exact = wasserstein_1d(x, y, a, b, p=p)
    torch.testing.assert_close(result.transport_cost.detach(), exact.detach(), rtol=0, atol=5e-3)
    (expected,) = torch.autograd.grad(result.regularized_cost, x)
    torch.testing.assert_close(torch.autograd.grad(exact, x)[0], expected, rtol=0, atol=3e-2)


@pytest.mark.parametrize("sizes", [(6, 6), (4, 7)])
@pytest.mark.parametrize("p", [1, 2])
def test_gradients_against_finite_differences(p, sizes, generator):
    x, y = (points(2, size, generator=generator).requires_grad_() for size in sizes)
    logits = [points(2, size, generator=generator).requires_grad_() for size in sizes]
    assert torch.autograd.gradcheck(lambda x, y: wasserstein_1d(x, y, p=p), (x, y))

    def weighted(x, y, u, v):  # a softmax keeps the total
        return wasserstein_1d(x, y, u.softmax(-1), v.softmax(-1), p=p)

    assert torch.autograd.gradcheck(weighted, (x, y, *logits))
    assert torch.autograd.gradcheck(lambda x, u: wasserstein_1d(x, y.detach(), u.softmax(-1), p=p), (x, logits[0]))
    assert torch.autograd.gradgradcheck(weighted, (x, y, *logits), fast_mode=True)


@pytest.mark.parametrize("p", [1, 2])
def test_gradient_by_masses_where_quantiles_meet(p):
    """Equal masses: every quantile of x is one of y. The gradient is a pair of potentials: feasible, and optimal."""
    x, y = torch.tensor([0.0, 1.0, 3.0], dtype=F64), torch.tensor([5.0, 6.0, 6.5], dtype=F64)
    a, b = (torch.full((3,), 1 / 3, dtype=F64, requires_grad=True) for _ in range(2))
    value = wasserstein_1d(x, y, a, b, p=p)
    phi, psi = torch.autograd.grad(value, (a, b))
    assert (phi[:, None] + psi <= (x[:, None] - y).abs() ** p + 1e-12).all()
    torch.testing.assert_close((phi * a + psi * b).sum(), value)


@pytest.mark.parametrize("p", [1, 2])
def test_what_has_no_mass_takes_no_part(p):
    """Wherever it is: value and gradients are those without it."""
    x = torch.tensor([0.0, INF, 1.0, NAN, 2.0, -INF], dtype=F64, requires_grad=True)
    a = torch.tensor([0.3, 0.0, 0.5, 0.0, 0.2, 0.0], dtype=F64)
    y = torch.tensor([0.5, 1.5], dtype=F64, requires_grad=True)
    kept = x.detach()[::2].requires_grad_()
    value, expected = wasserstein_1d(x, y, a, p=p), wasserstein_1d(kept, y, a[::2], p=p)
    torch.testing.assert_close(value, expected)
    grads = torch.autograd.grad(value, (x, y)), torch.autograd.grad(expected, (kept, y))
    torch.testing.assert_close(grads[0][0][::2], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1])
    assert (grads[0][0][1::2] == 0).all()


@pytest.mark.parametrize("p", [1, 2])
def test_nan_passes_through(p):
    x, y = torch.tensor([[0.0, NAN], [0.0, 1.0]]), torch.tensor([0.0, 2.0])
    assert wasserstein_1d(x, y, p=p).isnan().tolist() == [True, False]
    a = torch.tensor([0.5, 0.5])
    assert wasserstein_1d(x, y, a, p=p).isnan().tolist() == [True, False]


def test_coincident_points_have_gradient_0():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (grad,) = torch.autograd.grad(wasserstein_1d(x, torch.tensor([2.0, 1.0])), x)
    assert (grad == 0).all()


@pytest.mark.parametrize("shape", ["x", "y", "a", "b"])
@pytest.mark.parametrize("p", [1, 2])
def test_batch(p, shape, generator):
    """Two batch axes; an argument without them is shared."""
    x, y = points(2, 3, 5, generator=generator), points(2, 3, 4, generator=generator)
    a, b = masses(2, 3, 5, generator=generator), masses(2, 3, 4, generator=generator)
    arguments = {"x": x, "y": y, "a": a, "b": b}
    arguments = {name: value if name != shape else value[0, 0] for name, value in arguments.items()}
    actual = wasserstein_1d(*arguments.values(), p=p)
    assert actual.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = [value[i, j] if value.dim() > 1 else value for value in arguments.values()]
            torch.testing.assert_close(actual[i, j], wasserstein_1d(*one, p=p))
    shared = wasserstein_1d(x[0, 0], y[0, 0], a, p=p)  # histograms on the same bins
    torch.testing.assert_close(shared[1, 2], wasserstein_1d(x[0, 0], y[0, 0], a[1, 2], p=p))


def test_no_problems():
    x = torch.ones(0, 3, requires_grad=True)
    for y in (torch.ones(0, 3), torch.ones(0, 4), torch.ones(4)):
        value = wasserstein_1d(x, y)
        assert value.shape == (0,)
        value.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, generator):
    x, y, a = points(50, generator=generator), points(50, generator=generator), masses(50, generator=generator)
    x, y, a, b = (tensor.to(dtype) for tensor in (x, y, a, a.flip(0)))
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for weights in ((), (a, b)):
            value = wasserstein_1d(leaf, y, *weights)
            assert value.dtype == torch.float32
            exact = wasserstein_1d(*(tensor.double() for tensor in (x, y, *weights)))
            torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
            assert torch.autograd.grad(value, leaf)[0].dtype == dtype


def test_transforms(generator):
    x, y = points(3, 5, generator=generator), points(3, 4, generator=generator)
    a = masses(3, 5, generator=generator)

    def loss(x, y, a):
        return wasserstein_1d(x, y, a, p=2).sum()

    leaves = [tensor.clone().requires_grad_() for tensor in (x, y, a)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss, (0, 1, 2)))(x, y, a), expected)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


WRONG = [
    ({"x": [1.0]}, TypeError, ("x:", "tensor", "list")),
    ({"x": torch.tensor(1.0)}, ValueError, ("x:", "(..., n)", "()")),
    ({"x": torch.ones(3).long()}, TypeError, ("x:", "float32", "int64")),
    ({"x": torch.ones(2, 0)}, ValueError, ("x:", "at least one point", "(2, 0)")),
    ({"y": torch.ones(0)}, ValueError, ("y:", "at least one point", "(0,)")),
    ({"y": torch.ones(4).double()}, ValueError, ("y:", "float32", "float64")),
    ({"x": torch.ones(2, 3), "y": torch.ones(3, 4)}, ValueError, ("y:", "(2,) or none", "(3, 4)")),
    ({"a": torch.ones(4) / 4}, ValueError, ("a:", "3 masses", "x", "(4,)")),
    ({"b": torch.ones(3) / 3}, ValueError, ("b:", "4 masses", "y", "(3,)")),
    ({"x": torch.ones(2, 3), "a": torch.ones(5, 3) / 3}, ValueError, ("a:", "(2,) or none", "(5, 3)")),
    ({"a": torch.ones(3)}, ValueError, ("a:", "total mass 1", "got 3")),
    ({"a": torch.ones(3), "b": torch.ones(4) / 2}, ValueError, ("b:", "total mass 3", "got 2")),
    ({"a": torch.tensor([0.5, 1.0, -0.5])}, ValueError, ("a:", ">= 0", "-0.5")),
    ({"a": torch.tensor([0.5, NAN, 0.5])}, ValueError, ("a:", ">= 0", "nan")),
    ({"p": 3}, ValueError, ("p:", "1 or 2", "3")),
    ({"p": "2"}, TypeError, ("p:", "1 or 2", "str")),
    ({"p": True}, TypeError, ("p:", "1 or 2", "bool")),
]


@pytest.mark.parametrize(("changes", "error", "words"), WRONG)
def test_wrong_argument(changes, error, words):
    arguments = {"x": torch.ones(3), "y": torch.ones(4), "a": None, "b": None} | changes
    with pytest.raises(error) as caught:
        wasserstein_1d(**arguments)
    for word in words:
        assert word in str(caught.value)

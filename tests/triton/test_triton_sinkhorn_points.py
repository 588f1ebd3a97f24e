"""The Triton kernels of Sinkhorn between points under the interpreter, against the float64 reference. Tiny problems."""

import pytest
import torch

pytest.importorskip("triton")

import otkd_fast  # noqa: E402
from otkd_fast import reference  # noqa: E402
from otkd_fast.ops import _library  # noqa: E402
from otkd_fast.testing import assert_close, near_coincident_rows, random_problem, random_rows  # noqa: E402
from otkd_fast.testing.guarded import guarded  # noqa: E402

METRICS = ("l1", "l2", "sqeuclidean", "cosine")
OUTPUTS = ("transport_cost", "regularized_cost", "f", "g")
QUANTITIES = dict(zip(OUTPUTS, ("transport_cost", "regularized_cost", "potential", "potential"), strict=True))
COVERED = {"envelope": ("regularized_cost",), "detach": ("transport_cost",)}


@pytest.fixture(autouse=True)
def tiny_blocks(monkeypatch):
    """Several blocks and a tail in a small problem."""
    from otkd_fast.triton_kernels import _sinkhorn_large

    monkeypatch.setattr(_sinkhorn_large, "block_of", lambda *_: (2, 4))


def points_of(n, m, d, generator, batch=(), zeros=True):
    x, y = random_rows(*batch, n, d, generator=generator), 0.7 * random_rows(*batch, m, d, generator=generator) + 0.3
    _, a, b = random_problem(n, m, batch=batch, zeros=zeros, generator=generator)
    return x, y, a, b


def solved(points, weights, solve, gradient, **options):
    leaves = [tensor.clone().requires_grad_() for tensor in points]
    if gradient == "detach":
        leaves[2:] = [leaf.detach() for leaf in leaves[2:]]
    outputs = solve(*leaves, gradient=gradient, **options)
    total = 0
    for name in COVERED.get(gradient, OUTPUTS):
        value = getattr(outputs, name)
        total = total + (weights[name].to(value.dtype) * torch.where(value.isfinite(), value, 0)).sum()
    return outputs, torch.autograd.grad(total, [leaf for leaf in leaves if leaf.requires_grad])


def check(points, dtype, gradient, generator, ratio, **options):
    """epsilon is `ratio` times the largest cost."""
    points = [tensor.to(dtype) for tensor in points]
    wide = [tensor.double() for tensor in points]
    largest = float(reference.cost_matrix(*wide[:2], metric=options["metric"]).max())
    options["epsilon"] = ratio * largest
    shapes = points[2].shape[:-1], points[2].shape[:-1], points[2].shape, points[3].shape
    weights = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in zip(OUTPUTS, shapes, strict=True)
    }
    expected, wanted = solved(wide, weights, reference.sinkhorn_points, gradient, stored=True, **options)
    with guarded():
        actual, found = solved(points, weights, otkd_fast.sinkhorn_points, gradient, backend="triton", **options)
    context = f"{dtype} {gradient} {options}"
    for name, quantity in QUANTITIES.items():
        scale = max(largest, options["epsilon"]) if quantity == "potential" else None
        pair = getattr(actual, name), getattr(expected, name)
        assert_close(*pair, "sinkhorn", quantity, scale=scale, context=f"{context} {name}")
    assert torch.equal(actual.num_iters, expected.num_iters)
    for value, want, least in zip(found, wanted, (1e-3, 1e-3, largest, largest), strict=False):
        assert_close(value, want, "sinkhorn", "gradient", scale=max(float(want.abs().max()), least), context=context)


@pytest.mark.parametrize("ratio", [0.1, 0.001], ids=["moderate", "extreme"])
@pytest.mark.parametrize("metric", METRICS)
def test_metrics(metric, ratio, generator):
    """float32, compared in float32 and, where the exponents are large, in float64."""
    points = points_of(3, 5, 3, generator)
    check(points, torch.float32, "unroll", generator, ratio, metric=metric, num_iters=2, update_first="b")


@pytest.mark.parametrize("gradient", ["envelope", "detach", "last_step"])
def test_modes(gradient, generator):
    points = points_of(2, 5, 2, generator, batch=(2,) if gradient == "last_step" else ())
    check(points, torch.float64, gradient, generator, 0.1, metric="sqeuclidean", num_iters=2)


def test_implicit(generator):
    points = points_of(3, 4, 2, generator, zeros=False)
    check(points, torch.float64, "implicit", generator, 0.5, metric="sqeuclidean", num_iters=3)


@pytest.mark.parametrize("n, m, d", [(1, 1, 1), (4, 2, 1), (2, 9, 5)])
def test_sizes(n, m, d, generator):
    points = points_of(n, m, d, generator)
    check(points, torch.float32, "detach", generator, 0.1, metric="l1", num_iters=2)


def test_rows_of_zeros(generator):
    """At cosine distance 1 from everything, without a gradient of their own."""
    x, y, a, b = points_of(3, 4, 2, generator, zeros=False)
    x[1], y[0] = 0, 0
    check((x, y, a, b), torch.float64, "detach", generator, 0.3, metric="cosine", num_iters=2)


@pytest.mark.parametrize("metric", METRICS)
def test_near_coincident(metric, generator):
    """The transport cost of the identity plan is the sum of small distances: all digits of them count."""
    x, y = near_coincident_rows(3, 8, generator=generator, dtype=torch.float32)
    wide = reference.cost_matrix(x.double(), y.double(), metric=metric)
    options = {"metric": metric, "epsilon": float(wide.max()) / 200, "num_iters": 2}
    actual = otkd_fast.sinkhorn_points(x, y, backend="triton", **options).transport_cost
    expected = reference.sinkhorn_points(x.double(), y.double(), stored=True, **options).transport_cost
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("transpose", [False, True])
def test_plan_apply(transpose, generator):
    points = points_of(3, 5, 2, generator)
    v = torch.randn(3 if transpose else 5, 3, generator=generator, dtype=torch.float64)
    found = []
    for backend in ("triton", "reference"):
        x, y, w = (tensor.clone().requires_grad_() for tensor in (*points[:2], v))
        result = otkd_fast.sinkhorn_points(
            x, y, *points[2:], metric="sqeuclidean", epsilon=1.0, num_iters=2, backend=backend
        )
        applied = result.plan_apply(w, transpose=transpose)
        found.append((applied, *torch.autograd.grad(applied.square().sum(), (x, y, w))))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, "sinkhorn_points", "plan_apply")


def test_registration(generator):
    x, y, a, b = (tensor.float() for tensor in points_of(3, 4, 2, generator, batch=(2,)))
    options = ("l1", 1.0, 2, 0.0, 1.0, torch.inf, torch.inf, True)
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    forward = _library.operators("sinkhorn_points_fwd")["triton"]
    torch.library.opcheck(forward, (x, y, a, b, None, None, *options, 1, False), test_utils=utilities)
    f, g = forward(x, y, a, b, None, None, *options, 1, False)[2:4]
    apply = _library.operators("sinkhorn_points_apply")["triton"]
    torch.library.opcheck(apply, (x, y, f, g, y, "l1", 1.0, False), test_utils=utilities)

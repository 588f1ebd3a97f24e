"""The fused op below SinKD: registration, its gradient against finite differences and against the two separate ops."""

import pytest
import torch

import otkd_fast
from otkd_fast.functional.sinkd import sinkd_transport_cost
from otkd_fast.losses import SinKD
from otkd_fast.testing import backends, tolerance

COMPILED = backends("sinkd", compiled_only=True)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
OPTIONS = {"temperature_rows": 2.0, "temperature_columns": 0.5, "epsilon": 0.3, "num_iters": 4}


def masses(*shape):
    weights = torch.rand(*shape, dtype=torch.float64)
    weights[..., 1] = 0
    return weights / weights.sum(-1, keepdim=True)


def layouts():
    """(rows, columns, weights of rows, weights of columns): contiguous, transposed, sliced, batched."""
    yield torch.randn(5, 4).double(), torch.randn(3, 4).double(), None, None
    yield torch.randn(4, 5).double().mT, torch.randn(4, 3).double().mT, masses(5), None
    yield torch.randn(9, 8)[::2, 1:6], torch.randn(3, 5), masses(5).float(), masses(3).float()
    columns = torch.randn(4, 2, 3).double().movedim(0, 2)
    yield torch.randn(2, 5, 4).double(), columns, masses(2, 5), masses(3).expand(2, 3)


@pytest.mark.skipif(not COMPILED, reason="no compiled backend")
@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("epsilon", [0.3, 0.001])  # computed in float32, and in float64 inside
def test_opcheck(needs, epsilon):
    for operands in layouts():
        arguments = (*operands, 2.0, 0.0, epsilon, 3, 1.5, *needs)
        torch.library.opcheck(torch.ops.otkd_fast.sinkd_value_and_grad.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("backend", COMPILED)
def test_gradcheck(backend):
    for rows, columns, weights_rows, weights_columns in layouts():
        leaves = [x.detach().double().requires_grad_() for x in (rows, columns)]
        weights = [None if w is None else w.double() for w in (weights_rows, weights_columns)]

        def loss(x, y, weights=weights):
            return sinkd_transport_cost(x, y, *weights, scale=3.0, backend=backend, **OPTIONS)

        assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", COMPILED)
def test_equals_the_two_separate_ops(backend, dtype):
    rows, columns = torch.randn(33, 21, dtype=dtype), torch.randn(17, 21, dtype=dtype)
    weights = masses(33).to(dtype), masses(17).to(dtype)
    answers = []
    for fused in (True, False):
        leaves = [x.clone().requires_grad_() for x in (rows, columns)]
        if fused:
            options = OPTIONS | {"temperature_columns": 2.0}
            value = sinkd_transport_cost(*leaves, *weights, scale=2.0, backend=backend, **options)
        else:
            cost = otkd_fast.cost_matrix(*leaves, metric="l1", softmax_temperature=2.0, backend=backend)
            value = 2 * otkd_fast.sinkhorn(cost, *weights, epsilon=0.3, num_iters=4, backend=backend).transport_cost
        answers.append((value, *torch.autograd.grad(value, leaves)))
    rtol, atol = tolerance("sinkhorn", "gradient", dtype)
    for actual, expected in zip(*answers, strict=True):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol * expected.abs().max().item())


@pytest.mark.parametrize("backend", COMPILED)
def test_incoming_gradients_scale_each_problem(backend):
    rows, columns = torch.randn(3, 6, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    rows.requires_grad_()
    value = sinkd_transport_cost(rows, columns, backend=backend, **OPTIONS)
    (each,) = torch.autograd.grad(value.sum(), rows, retain_graph=True)
    factors = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64)
    (scaled,) = torch.autograd.grad(value, rows, factors)
    torch.testing.assert_close(scaled, each * factors[:, None, None])


@pytest.mark.parametrize("backend", COMPILED)
def test_vocabulary_sized_rows(backend):
    """A workspace beyond what is kept from call to call: rows of 150 000 logits, bfloat16 in."""
    student = torch.randn(61, 150_000).bfloat16().requires_grad_()
    teacher = torch.randn(61, 150_000).bfloat16()
    loss = SinKD(backend=backend, num_iters=5)(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    rows, columns = (torch.softmax(x.detach().double() / 2, -1) for x in (teacher, student))
    cost = torch.cdist(rows, columns, p=1)
    expected = 61 * otkd_fast.sinkhorn(cost, epsilon=0.1, num_iters=5, backend="reference").transport_cost
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)
    assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all() and gradient.abs().sum() > 0

"""The global batch and the sharded problem on several processes (gloo) against one process, values and gradients."""

import pickle

import distributed_cases as cases
import pytest
import torch
import torch.multiprocessing

import otkd_fast
from otkd_fast.distributed import GlobalBatch, all_gather_rows, sinkhorn_sharded
from otkd_fast.losses import SinKD


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    """(world, answers of each rank): all cases in one start of the processes, which takes seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(cases.run_rank, args=(request.param, str(folder)), nprocs=request.param)
    return request.param, [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("name", list(cases.LOSSES))
@pytest.mark.parametrize("way", ["ddp", "sum"])
def test_global_batch(ranks, way, name):
    """The parameters' gradients after DDP's mean, or after a sum, are those of one process with the whole batch."""
    world, answers = ranks
    expected = cases.gradients_of_losses(0, 1, "mean", lambda network: network)[name]
    for rank in range(world):
        for actual, wanted in zip(answers[rank][way][name], expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", list(cases.SHARDED))
@pytest.mark.parametrize("reduced_by", ["mean", "sum"])
def test_sharded_sinkhorn(ranks, reduced_by, name):
    world, answers = ranks
    single = cases.gradients_of_sharded(0, 1, "mean")
    rows_factor = world if reduced_by == "mean" else 1
    columns_factor = 1 if reduced_by == "mean" else 1 / world
    outputs = [output for case, output in single if case == name]
    assert len(outputs) == (1 if name == "detach" else 4)
    for output in outputs:
        value, error, plan, *gradients = single[name, output]
        factors = [rows_factor, rows_factor, columns_factor]
        for rank in range(world):
            own = cases.own_rows(rank, world)
            actual = answers[rank][f"sharded {reduced_by}"][name, output]
            torch.testing.assert_close(actual[0], value, rtol=1e-9, atol=1e-14)
            torch.testing.assert_close(actual[1], error, rtol=1e-8, atol=1e-13)
            torch.testing.assert_close(actual[2], plan[own], rtol=1e-8, atol=1e-14)
            for which, (got, wanted) in enumerate(zip(actual[3:], gradients, strict=True)):
                wanted = (wanted if which == 2 else wanted[own]) * factors[which]
                scale = gradients[which].abs().max().item() * factors[which]
                torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10 * scale)


@pytest.mark.parametrize("way", ["both ddp", "both sum"])
def test_sharded_sinkhorn_of_two_trained_models(ranks, way):
    world, answers = ranks
    expected = cases.gradients_of_both_models(0, 1, "mean", lambda network: network)
    for rank in range(world):
        for actual, wanted in zip(answers[rank][way], expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)


def test_gathers(ranks):
    world, answers = ranks
    _, teacher, labels, mask = cases.data()
    weights = torch.arange(cases.ROWS * cases.CLASSES, dtype=torch.float64).reshape(cases.ROWS, cases.CLASSES)
    for rank in range(world):
        gathered, own = answers[rank]["gathers"], cases.own_rows(rank, world)
        assert torch.equal(gathered["labels"], labels) and torch.equal(gathered["mask"], mask)
        assert torch.equal(gathered["half"], teacher.bfloat16())
        assert torch.equal(gathered["equal sizes"], teacher[: 2 * world])
        torch.testing.assert_close(gathered["own loss"], weights[own] * sum(range(1, world + 1)))


@pytest.mark.parametrize("name", list(cases.SHARDED))
def test_one_process_without_a_group(name):
    """The loop and its hand-written adjoint, without communication."""
    cost, a, b = cases.problem(name)
    options = cases.SHARDED[name]
    expected = otkd_fast.sinkhorn(cost, a, b, backend="reference", **options)
    actual = sinkhorn_sharded(cost, a, b, **options)
    for field in ("transport_cost", "regularized_cost", "f", "g", "marginal_error"):
        torch.testing.assert_close(getattr(actual, field), getattr(expected, field), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(actual.plan(), expected.plan())


def test_gradcheck():
    cost = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    a, b = (torch.softmax(torch.randn(n, dtype=torch.float64), 0).requires_grad_() for n in (4, 3))
    for first in ("a", "b"):

        def outputs(cost, a, b, first=first):
            result = sinkhorn_sharded(cost, a, b, epsilon=0.3, num_iters=3, update_first=first)
            return result.transport_cost, result.regularized_cost, result.f, result.g

        assert torch.autograd.gradcheck(outputs, (cost, a, b))


def test_a_gradient_that_is_not_computed_is_an_error():
    cost = torch.rand(4, 3, requires_grad=True)
    result = sinkhorn_sharded(cost, epsilon=0.3, num_iters=3, gradient="detach")
    assert not result.f.requires_grad
    with pytest.raises(RuntimeError, match="transport_cost only"):
        result.regularized_cost.backward()
    (gradient,) = torch.autograd.grad(
        sinkhorn_sharded(cost, epsilon=0.3, num_iters=3).transport_cost, cost, create_graph=True
    )
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_half_precision_is_computed_in_float32():
    cost = torch.rand(4, 3).half().requires_grad_()
    result = sinkhorn_sharded(cost, epsilon=0.3, num_iters=3)
    assert result.transport_cost.dtype == torch.float32
    result.transport_cost.backward()
    assert cost.grad.dtype == torch.float16 and cost.grad.abs().max() > 0


def test_global_batch_is_a_module():
    loss = GlobalBatch(SinKD())
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    assert torch.equal(pickle.loads(pickle.dumps(loss))(student, teacher), SinKD()(student, teacher))
    assert "reduced_by='mean'" in repr(loss)


WRONG = {
    "no tensor": (lambda: all_gather_rows([1]), TypeError, "x"),
    "no axis": (lambda: all_gather_rows(torch.tensor(1.0)), ValueError, "x"),
    "word": (lambda: all_gather_rows(torch.ones(2), reduced_by="max"), ValueError, "reduced_by"),
    "loss": (lambda: GlobalBatch(3), TypeError, "loss"),
    "batch of costs": (lambda: sinkhorn_sharded(torch.rand(2, 3, 3), epsilon=1, num_iters=1), ValueError, "cost"),
    "masses": (lambda: sinkhorn_sharded(torch.rand(3, 3), torch.ones(2), epsilon=1, num_iters=1), ValueError, "a"),
    "mode": (lambda: sinkhorn_sharded(torch.rand(3, 3), epsilon=1, num_iters=1, gradient="x"), ValueError, "gradient"),
    "epsilon": (lambda: sinkhorn_sharded(torch.rand(3, 3), epsilon=0, num_iters=1), ValueError, "epsilon"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_arguments(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()

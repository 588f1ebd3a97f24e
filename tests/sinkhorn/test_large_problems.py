"""One problem that is large enough for the threads to share it: the same answer as from one thread, every time."""

import pytest
import torch

import otkd_fast
from otkd_fast.losses import SinKD
from otkd_fast.testing import backends, random_problem, tolerance

COMPILED = backends("sinkhorn", compiled_only=True)
SIZE = (520, 517)  # beyond the size from which threads share a problem
LEVELS = {"float scalings": 0.1, "double scalings": 0.01, "log domain": 0.0005}


def solve(problem, backend, threads, **options):
    torch.set_num_threads(threads)
    leaves = [tensor.clone().requires_grad_() for tensor in problem]
    result = otkd_fast.sinkhorn(*leaves, num_iters=4, backend=backend, **options)
    loss = result.transport_cost + 0.5 * result.regularized_cost + result.f[:-1:7].sum() + result.g[1::5].sum()
    return (*(x.detach() for x in (result.transport_cost, result.f, result.g)), *torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", COMPILED)
def test_threads_share_a_problem(backend, level, generator):
    problem = random_problem(*SIZE, generator=generator).to(torch.float32)
    alone = solve(problem, backend, 1, epsilon=LEVELS[level])
    for threads in (2, 3):
        together = solve(problem, backend, threads, epsilon=LEVELS[level])
        for actual, expected in zip(together, alone, strict=True):
            rtol, atol = tolerance("sinkhorn", "gradient", torch.float32)
            torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol * expected.abs().max().item())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", COMPILED)
def test_same_bits_every_time(backend, level, generator):
    problem = random_problem(*SIZE, generator=generator).to(torch.float32)
    first = solve(problem, backend, 2, epsilon=LEVELS[level])
    for _ in range(10):
        again = solve(problem, backend, 2, epsilon=LEVELS[level])
        assert all(torch.equal(actual, expected) for actual, expected in zip(again, first, strict=True))


@pytest.mark.parametrize("backend", COMPILED)
def test_sinkd_has_the_same_bits_every_time(backend, generator):
    torch.set_num_threads(2)
    student = torch.randn(520, 30, generator=generator, requires_grad=True)
    teacher = torch.randn(520, 30, generator=generator)
    loss = SinKD(backend=backend)

    def run():
        value = loss(student, teacher)
        return value.detach(), *torch.autograd.grad(value, student)

    first = run()
    for _ in range(20):
        assert all(torch.equal(actual, expected) for actual, expected in zip(run(), first, strict=True))

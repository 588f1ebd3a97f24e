"""Compiled kernels against the float64 reference."""

import pytest
import torch

import otkd_fast
from otkd_fast import reference
from otkd_fast.testing import (
    assert_close,
    backends,
    instruction_sets,
    near_coincident_rows,
    random_rows,
    use_instruction_set,
)

METRICS = ("l1", "l2", "sqeuclidean", "cosine")
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 100, 129)
# every size as n, as m and as d
SHAPES = [(n, SIZES[-1 - i], SIZES[(5 * i + 3) % len(SIZES)]) for i, n in enumerate(SIZES)]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COMPILED = backends("cost_matrix", compiled_only=True)
ALL = backends("cost_matrix")


def check(x, y, metric, backend, temperature=None):
    actual = otkd_fast.cost_matrix(x, y, metric=metric, softmax_temperature=temperature, backend=backend)
    expected = reference.cost_matrix(x.double(), y.double(), metric=metric, softmax_temperature=temperature)
    assert actual.dtype == x.dtype
    assert_close(actual, expected, "cost_matrix", "value", context=f"{backend} {tuple(x.shape)} {tuple(y.shape)}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
def test_every_tail(backend, metric, dtype, generator):
    for n, m, d in SHAPES:
        x, y = random_rows(n, d, generator=generator), random_rows(m, d, generator=generator)
        check(x.to(dtype), y.to(dtype), metric, backend)
        check(x.to(dtype), y.to(dtype), metric, backend, temperature=2.0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
def test_batch_axes(backend, metric, generator):
    x, y = random_rows(2, 3, 6, 17, generator=generator), random_rows(2, 3, 5, 17, generator=generator)
    for dtype in (torch.float64, torch.float32):
        check(x.to(dtype), y.to(dtype), metric, backend)
        check(x[0, 0].to(dtype), y.to(dtype), metric, backend)
        check(x[0].to(dtype), y[0, 0].to(dtype), metric, backend, temperature=0.5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("backend", COMPILED)
def test_instruction_sets_and_threads(backend, instruction_set, threads, generator):
    torch.set_num_threads(threads)
    with use_instruction_set(instruction_set):
        for metric in METRICS:
            for n, m, d in ((3, 5, 2), (17, 9, 33), (64, 70, 100)):
                x, y = random_rows(2, n, d, generator=generator), random_rows(2, m, d, generator=generator)
                for dtype in (torch.float64, torch.float32):
                    check(x.to(dtype), y.to(dtype), metric, backend)
                    check(x.to(dtype), y.to(dtype), metric, backend, temperature=1.5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ALL)
def test_near_coincident_rows_keep_their_digits(backend, metric, generator):
    """Late in distillation, student and teacher rows nearly agree; every small distance keeps 1e-5."""
    x, y = near_coincident_rows(48, 512, generator=generator, dtype=torch.float32)
    actual = otkd_fast.cost_matrix(x, y, metric=metric, backend=backend)
    expected = reference.cost_matrix(x.double(), y.double(), metric=metric)
    assert expected.diagonal().max() < expected.mean() / 20
    assert_close(actual, expected, "cost_matrix", "near_coincident")
    if metric == "l2":
        by_product = torch.cdist(x, y).diagonal().double()
        assert ((by_product - expected.diagonal()) / expected.diagonal()).abs().max() > 1e-3


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", COMPILED)
def test_near_coincident_rows_of_every_instruction_set(backend, metric, generator):
    x, y = near_coincident_rows(33, 77, generator=generator, dtype=torch.float32)
    expected = reference.cost_matrix(x.double(), y.double(), metric=metric)
    for name in instruction_sets():
        with use_instruction_set(name):
            actual = otkd_fast.cost_matrix(x, y, metric=metric, backend=backend)
        assert_close(actual, expected, "cost_matrix", "near_coincident", context=name)

"""The emulator finds the faults that it is there for."""

import math

import pytest

import otkd_fast
from otkd_fast.testing import random_problem

SUM, NO_BARRIER, OVERRUN, UNWRITTEN, LONELY_BARRIER, LONELY_SHUFFLE, ODD_BLOCK = range(7)


def results(core, kind):
    found = []
    for order in range(5):
        core.set_order(order)
        found.append(core.faulty(kind))
    core.set_order(0)
    return found


def test_a_race_depends_on_the_order_of_threads(emulated_core):
    assert all(result == [64.0] * 64 for result in results(emulated_core, SUM))
    assert len({tuple(result) for result in results(emulated_core, NO_BARRIER)}) > 1


def test_shared_memory_starts_as_not_a_number(emulated_core):
    assert all(math.isnan(value) for value in emulated_core.faulty(UNWRITTEN))


@pytest.mark.parametrize(
    "kind, message",
    [
        (OVERRUN, "kernel beyond_shared_memory: wrote beside its shared memory"),
        (LONELY_BARRIER, "kernel barrier_of_some: .* wait for ever"),
        (LONELY_SHUFFLE, "kernel shuffle_of_some: .*(some lanes have left|wait for ever)"),
        (ODD_BLOCK, "kernel sum_of_all: 63 threads"),
    ],
)
def test_misuse_is_an_error(kind, message, emulated_core):
    for order in range(3):
        emulated_core.set_order(order)
        with pytest.raises(RuntimeError, match=message):
            emulated_core.faulty(kind)
    emulated_core.set_order(0)


def test_a_launch_that_fails_names_op_shape_and_device(emulated, generator):
    problem = random_problem(6, 7, generator=generator, batch=(2,))
    emulated.set_shared_limit(1024)
    with pytest.raises(RuntimeError, match=r"sinkhorn on \(2, 6, 7\) float64 on cpu: .*solve_tile: .* shared memory"):
        otkd_fast.sinkhorn(*problem, epsilon=0.1, num_iters=2, backend="cpu")

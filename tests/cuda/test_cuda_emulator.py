"""The emulator finds the faults that it is there for."""

import math
from types import SimpleNamespace

import pytest
import torch

import otkd_fast
from otkd_fast.ops import _library, cost_matrix
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


def test_an_architecture_that_was_not_built_names_the_command(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    native = SimpleNamespace(build_info=lambda: {"cuda_architectures": "80 90 90+PTX"})
    monkeypatch.setattr(_library, "native", native)
    cost = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1), shape=(2, 3), dtype=torch.float32)
    text = _library._failure("sinkhorn", cost, "kernel x: no kernel image is available for execution on the device")
    assert text.startswith(
        "sinkhorn on (2, 3) float32 on cuda:1 (some GPU, architecture 99): kernel x: no kernel image"
    )
    assert "has kernels for 80 90 90+PTX" in text
    assert "OTKD_FAST_CUDA_ARCHS=99 pip install" in text
    assert "OTKD_FAST_CUDA_ARCHS" not in _library._failure("sinkhorn", cost, "kernel x: out of memory")


@pytest.mark.skipif(
    torch.cuda.is_available() or getattr(_library.native, "cuda", None) is None, reason="needs a CUDA build, and no GPU"
)
def test_the_cuda_build_says_that_there_is_no_device():
    """The runtime in the module answers, and its error comes out as an exception that names the call."""
    assert _library.native.cuda_info()["devices"] == []
    with pytest.raises(RuntimeError, match=r"cost_matrix on \(2, 2\) float32 on cpu: .*cudaErrorInsufficientDriver"):
        cost_matrix._fwd_cuda(torch.ones(2, 3), torch.ones(2, 3), "l1", 0.0, 0.0)

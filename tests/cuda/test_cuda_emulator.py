"""The emulator finds the faults that it is there for."""

import math
import re
from types import SimpleNamespace

import pytest
import torch

import otkd_fast
from otkd_fast.ops import _library, cost_matrix
from otkd_fast.testing import random_problem

SUM, NO_BARRIER, OVERRUN, UNWRITTEN, LONELY_BARRIER, LONELY_SHUFFLE, ODD_BLOCK = range(7)
SOUND, NOT_BEFORE, NOT_AFTER, NOT_AT_ALL, EARLY, BEYOND, SOME_ARRIVE = range(7)  # of a cluster


def results(core, kind):
    return in_orders(core, lambda: core.faulty(kind))


def in_orders(core, call):
    found = []
    for order in range(5):
        core.set_order(order)
        found.append(call())
    core.set_order(0)
    return found


@pytest.fixture
def clusters(emulated_core):
    emulated_core.set_clusters(4, 0)
    yield emulated_core
    emulated_core.set_order(0)
    emulated_core.set_clusters(0, 0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_blocks_of_a_cluster_reach_into_one_another(size, clusters):
    expected = []
    for block in range(4):
        following = (block + 1) % size if size > 1 else 0
        expected += [100.0 * following + (thread ^ 32) for thread in range(64)]
    assert all(result == expected for result in in_orders(clusters, lambda: clusters.faulty_cluster(SOUND, size)))


@pytest.mark.parametrize("fault", [NOT_BEFORE, NOT_AFTER])
def test_a_missing_barrier_of_the_cluster_shows(fault, clusters):
    """A block that does not wait reads what is not there yet, or what has been left: NaN, here -2."""
    sound = clusters.faulty_cluster(SOUND, 4)
    found = set()
    for order in range(5):
        clusters.set_order(order)
        found.add(tuple(clusters.faulty_cluster(fault, 4)))
    assert len(found) > 1
    wrong = [value for result in found for value, right in zip(result, sound, strict=True) if value != right]
    assert wrong and set(wrong) == {-2.0}


@pytest.mark.parametrize(
    "fault, message",
    [
        (NOT_AT_ALL, "asks for shared memory of a block that has (not begun|ended)"),
        (EARLY, "asks for shared memory of a block that has not begun"),
        (BEYOND, "asks for block 4 of its cluster"),
        (SOME_ARRIVE, "wait for ever"),
    ],
)
def test_misuse_of_a_cluster_is_an_error(fault, message, clusters):
    said = []
    for order in (0, 1, 2):
        clusters.set_order(order)
        try:
            clusters.faulty_cluster(fault, 4)
        except RuntimeError as error:
            said.append(str(error))
    assert said and all(re.search(f"kernel ring: .*{message}", text) for text in said)


def test_clusters_are_as_large_as_the_device_has_them(clusters):
    with pytest.raises(RuntimeError, match="kernel ring: 4 blocks in clusters of 8"):
        clusters.faulty_cluster(SOUND, 8)
    with pytest.raises(RuntimeError, match="kernel ring: 4 blocks in clusters of 3"):
        clusters.faulty_cluster(SOUND, 3)
    clusters.set_clusters(0, 0)
    with pytest.raises(RuntimeError, match="kernel ring: 4 blocks in clusters of 2"):
        clusters.faulty_cluster(SOUND, 2)


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

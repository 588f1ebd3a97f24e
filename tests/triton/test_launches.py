"""What holds around the kernels: nothing waits for the device, no autotuner chooses, one graph for a compiler; errors.

The launches are left out here, and the tensors have no values (device 'meta'): reading one is an error.
"""

import importlib
import math
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")

import otkd_fast  # noqa: E402
from otkd_fast import _triton, losses  # noqa: E402
from otkd_fast.testing import aot  # noqa: E402

INF = math.inf


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that would have been launched."""
    from triton.runtime.interpreter import InterpretedFunction

    names = []
    monkeypatch.setattr(
        InterpretedFunction, "__getitem__", lambda self, grid: lambda *_, **__: names.append(self.fn.__name__)
    )
    return names


class _NoCopies(TorchDispatchMode):
    """A copy between devices waits, or needs memory that a graph would read again."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        operands = [x for x in arguments if isinstance(x, torch.Tensor) and x.dim()]  # a number is an argument
        if isinstance(result, torch.Tensor) and any(x.device != result.device for x in operands):
            raise AssertionError(f"{function} from {operands[0].device} to {result.device}")
        return result


SOLVE = (0.1, 3, 0.0, 1.0, INF, INF)
BACK = (0.1, 3, INF, INF, True, "unroll", True, True, True)


def solve_and_back(module, *tensors, with_stop=True):
    """Forward and backward of ops that share their tail of arguments."""
    forward, backward = getattr(module, f"{module.NAME}_fwd"), getattr(module, f"{module.NAME}_bwd")
    for tol in (0.0, 1e-3):
        out = forward(*tensors, 0.1, 3, tol, 1.0, INF, INF, True, 2)
        grads = (torch.ones_like(out[0]), torch.ones_like(out[1]), torch.ones_like(out[2]), torch.ones_like(out[3]))
        backward(*tensors, out[6], *grads, *BACK)


def module_of(name):
    module = importlib.import_module(f"otkd_fast.triton_kernels.{name}")
    module.NAME = name
    return module


def dense(n):
    return solve_and_back(module_of("sinkhorn"), torch.rand(2, n, n), torch.rand(2, n), None, None, None)


def shared(n):
    return solve_and_back(
        module_of("sinkhorn_shared"), torch.rand(n, n), torch.rand(2, n), torch.rand(2, n), None, None
    )


def ragged():
    offsets = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    solve_and_back(module_of("sinkhorn_ragged"), torch.rand(90), torch.rand(40), torch.rand(40), None, None, *offsets)
    costs = module_of("cost_matrix_ragged")
    for metric in ("l1", "cosine"):
        x = torch.rand(40, 3)
        cost = costs.cost_matrix_ragged_fwd(x, x, *offsets, 90, metric)
        costs.cost_matrix_ragged_bwd(x, x, *offsets, cost, cost, metric, True, True)


def points():
    module, x, y = module_of("sinkhorn_points"), torch.rand(2, 5, 3), torch.rand(2, 4, 3)
    for metric in ("sqeuclidean", "cosine"):
        out = module.sinkhorn_points_fwd(x, y, None, None, None, None, metric, *SOLVE, True, 2, False)
        grads = (torch.ones_like(out[0]), None, None, None)
        module.sinkhorn_points_bwd(
            x, y, None, None, None, None, out[6], *grads, metric, 0.1, 3, INF, INF, True, "unroll", False, *[True] * 4
        )
        v = torch.rand(2, 4, 6)
        applied = module.sinkhorn_points_apply(x, y, out[2], out[3], v, metric, 0.1, False)
        module.sinkhorn_points_apply_bwd(x, y, out[2], out[3], v, applied, metric, 0.1, False, True, True)


def costs():
    module, x = module_of("cost_matrix"), torch.rand(2, 5, 3)
    for metric, temperature in (("l1", 2.0), ("cosine", 0.0)):
        cost = module.cost_matrix_fwd(x, x, metric, temperature, temperature)
        module.cost_matrix_bwd(x, x, cost, cost, metric, temperature, temperature, True, True)


def roots():
    module, A = module_of("sqrtm"), torch.rand(2, 20, 20)
    S, aux = module.sqrtm_fwd(A, False, "auto")
    module.sqrtm_bwd(A, S, aux, S, False, "auto")


def factors():
    for n in (20, 70):
        module_of("polar").polar_fwd(torch.rand(2, n, n), 0)
        module_of("gaussian_wasserstein").from_samples(torch.rand(2, n, 80), torch.rand(2, n, 80), False, True, True)
    module_of("bures").bures(torch.rand(2, 20, 20), torch.rand(2, 20, 20), True, True)


def moments():
    module, x = module_of("moments"), torch.rand(2, 6, 5)
    out = module.feature_moments_fwd(x, [1], [2], True, 1e-5)
    module.feature_moments_bwd(x, torch.ones_like(out[0]), torch.ones_like(out[1]), [1], [2], True, 1e-5)


CALLS = {
    "dense": lambda: dense(20), "dense in tiles": lambda: dense(300), "shared": lambda: shared(20),
    "shared in tiles": lambda: shared(300), "ragged": ragged, "points": points, "cost matrix": costs, "roots": roots,
    "polar, Gaussian": factors, "moments": moments,
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(name, launches):
    """So that a call can be captured into a CUDA graph; the first one may copy constants to the device."""
    from otkd_fast.triton_kernels import _matrix

    try:
        with torch.device("meta"):
            CALLS[name]()
            with _NoCopies():
                CALLS[name]()
    finally:
        _matrix.schedule.cache_clear()  # its tensors have no values in here
    assert launches


def test_the_guard_sees_what_waits():
    with torch.device("meta"):
        for read in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.nonzero, bool):
            with pytest.raises((RuntimeError, NotImplementedError)):
                read(torch.ones(1))
    with pytest.raises(AssertionError, match=r"from cpu to meta"), _NoCopies():
        torch.ones(3).to("meta")


def test_no_autotuner():
    """Nothing is chosen by timing: the same kernels in each process, deterministic algorithms asked for or not."""
    from triton.runtime import Autotuner

    found = [case.kernel for _, case in aot.cases()]
    for name in aot.modules():
        module = importlib.import_module(f"otkd_fast.triton_kernels.{name}")
        found += [value for value in vars(module).values() if hasattr(value, "arg_names")]
    assert len(found) > 50 and not any(isinstance(kernel, Autotuner) for kernel in found)


OFFSETS = {"row_offsets": torch.tensor([0, 2, 5]), "column_offsets": torch.tensor([0, 3, 4])}
COMPILED = {
    "cost_matrix": (lambda x, y: otkd_fast.cost_matrix(x, y, metric="cosine"), ((4, 3), (5, 3))),
    "shared": (lambda c, z: otkd_fast.sinkhorn(c, z.softmax(-1), epsilon=0.1, num_iters=2), ((4, 3), (5, 4))),
    "points": (lambda x, y: otkd_fast.sinkhorn_points(
        x, y, metric="l1", epsilon=0.1, num_iters=2).transport_cost, ((4, 3), (5, 3))),
    "sinkd": (lambda s, t: losses.sinkd(s, t), ((4, 3), (4, 3))),
    "polar": (lambda k: otkd_fast.polar(k)[1], ((2, 4, 3),)),
    "bures": (lambda x, y: otkd_fast.bures_distance(x, y), ((2, 3, 3), (2, 3, 3))),
    "gaussian": (lambda x, y: otkd_fast.gaussian_wasserstein_from_samples(x, y), ((2, 4, 3), (2, 4, 3))),
    "moments": (lambda x: otkd_fast.feature_moments(x, dim=-1, eps=1e-5)[1], ((2, 4, 3),)),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_one_graph(name, launches):
    """torch.compile(fullgraph=True) raises where the graph breaks. The others are compiled in their own tests."""
    function, shapes = COMPILED[name]

    def loss(*operands):
        value = function(*operands)
        return (value.transport_cost if hasattr(value, "transport_cost") else value).sum()

    leaves = [torch.rand(shape, requires_grad=True) for shape in shapes]
    with otkd_fast.backend("triton"):
        torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="eager")(*leaves), leaves)
    assert launches


def test_sentences_for_what_is_missing(monkeypatch):
    code = """
import torch, otkd_fast
for device in ("cpu", "meta"):
    try:
        otkd_fast.sqrtm(torch.eye(2, device=device), backend="triton")
    except RuntimeError as error:
        print(error)
"""
    environment = {"PATH": "", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == [
        f"backend 'triton' is not available for sqrtm: it runs on cuda tensors, got tensors on {device}"
        for device in ("cpu", "meta")
    ], done.stderr
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.5.1")
    assert _triton._reason() == "Triton 3.5.1 is too old: 3.6 or newer is needed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert _triton._reason() == "Triton is not installed: pip install 'otkd_fast[triton]'"


def test_operands_on_two_devices():
    with pytest.raises(ValueError, match="y: expected"):
        otkd_fast.cost_matrix(torch.ones(2, 3), torch.ones(2, 3, device="meta"), metric="l1", backend="triton")

"""Which backend runs: who names it, what is refused, what is said about it."""

import asyncio
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import otkd_fast
from otkd_fast import _dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NATIVE = _dispatch.availability()["sinkhorn"]["cpu"] is None
AUTO = "cpu" if NATIVE else "reference"


@pytest.fixture
def ran(monkeypatch):
    """Backends that ran, in order, whoever called them."""
    import otkd_fast.functional.cost_matrix as module

    names = []
    reference, native = module.reference.cost_matrix, module._FORWARD["cpu"]
    slow = lambda *a, **k: names.append("reference") or reference(*a, **k)  # noqa: E731
    monkeypatch.setattr(module.reference, "cost_matrix", slow)
    monkeypatch.setitem(module._FORWARD, "cpu", lambda *a: names.append("cpu") or native(*a))
    return names


def call(backend=None):
    return otkd_fast.cost_matrix(torch.ones(2, 3), torch.zeros(1, 3), metric="l1", backend=backend)


def python(code, **environment):
    """Run `code` in a fresh interpreter that sees the same otkd_fast."""
    path = os.pathsep.join([os.path.dirname(os.path.dirname(otkd_fast.__file__)), *sys.path[1:]])
    settings = {k: v for k, v in os.environ.items() if k != "OTKD_FAST_BACKEND"} | {"PYTHONPATH": path} | environment
    return subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=120)


def test_the_call_wins_over_the_context_and_the_context_over_the_default(ran):
    call()
    with otkd_fast.backend("reference"):
        call()
        call("auto")
        with otkd_fast.backend("auto"):
            call()
        call()
    call("reference")
    assert ran == [AUTO, "reference", AUTO, AUTO, "reference", "reference"]


def test_context_ends_with_an_exception(ran):
    manager = otkd_fast.backend("reference")
    with pytest.raises(KeyError), manager:
        raise KeyError
    call()
    with manager:
        with manager:
            call()
        call()
    call()
    assert ran == [AUTO, "reference", "reference", AUTO]


def test_other_threads_and_tasks_are_not_touched():
    seen = {}

    def resolve(key):
        seen[key] = _dispatch.resolve("sinkhorn", CPU)

    with otkd_fast.backend("reference"):
        thread = threading.Thread(target=resolve, args=("thread",))
        thread.start()
        thread.join()
        resolve("here")

    async def inside():
        with otkd_fast.backend("reference"):
            await asyncio.sleep(0.02)
            resolve("inside")

    async def beside():
        await asyncio.sleep(0.01)
        resolve("beside")

    async def both():
        await asyncio.gather(inside(), beside())

    asyncio.run(both())
    assert seen == {"thread": AUTO, "here": "reference", "inside": "reference", "beside": AUTO}


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_resolve(op):
    compiled = NATIVE and op in _dispatch.KERNELS["cpu"]
    assert _dispatch.resolve(op, CPU) == ("cpu" if compiled else "reference")
    assert _dispatch.resolve(op, CPU, "reference") == "reference"
    gpu = [name for name in ("cuda", "triton") if _dispatch.availability()[op][name] is None]
    assert _dispatch.resolve(op, CUDA) == (*gpu, "reference")[0]
    assert _dispatch.resolve(op, torch.device("meta")) == "reference"
    for name in ("cuda", "triton"):
        if op not in _dispatch.KERNELS[name]:
            with pytest.raises(RuntimeError, match=f"'{name}' is not available for {op}: .*not written"):
                _dispatch.resolve(op, CPU, name)
    reason = ".*cpu tensors.*cuda" if compiled else ""
    with pytest.raises(RuntimeError, match=f"'cpu' is not available for {op}: {reason}"):
        _dispatch.resolve(op, CUDA, "cpu")
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'reference', .* got 'pot'"):
        _dispatch.resolve(op, CPU, "pot")


def test_context_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="backend: expected one of 'auto', .* got 'gpu'"):
        otkd_fast.backend("gpu")


def test_availability_has_a_reason_for_each_backend_that_is_missing():
    table = _dispatch.availability()
    assert set(table) == set(_dispatch.OPS)
    for row in table.values():
        assert list(row) == ["reference", "cpu", "cuda", "triton"]
        assert row["reference"] is None
        assert all(reason is None or len(reason.split()) > 3 for reason in row.values())
    table["sinkhorn"]["reference"] = "changed"
    assert _dispatch.availability()["sinkhorn"]["reference"] is None


def test_explain():
    text = otkd_fast.explain("sinkhorn", torch.ones(2))
    assert text.startswith(f"sinkhorn on cpu tensors: '{AUTO}' runs, because it is the fastest")
    assert "cuda: " in text and "triton: " in text
    with otkd_fast.backend("reference"):
        assert "'reference' runs, because it was named" in otkd_fast.explain("cost_matrix", torch.ones(2))
    with otkd_fast.backend("cuda"):
        assert "the call fails, because backend 'cuda' is not available" in otkd_fast.explain("cost_matrix")
    with pytest.raises(ValueError, match="op: expected one of 'cost_matrix', .* got 'sqrt'"):
        otkd_fast.explain("sqrt")
    with pytest.raises(ValueError, match="tensors: expected one device, got cpu, meta"):
        otkd_fast.explain("sinkhorn", torch.ones(2), torch.ones(2, device="meta"))


def test_resolve_is_cheap():
    """Problems are small, so a call may not spend its time on being dispatched."""
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(1000):
            _dispatch.resolve("sinkhorn", CPU)
        best = min(best, time.perf_counter() - start)
    assert best < 3e-3  # 3 us each on a slow and busy machine; 0.5 us on an idle one


def test_compiled_code_follows_the_context():
    """The name is a guard: another name compiles again, the same one does not."""
    torch._dynamo.reset()
    traced = []

    def function(x):
        name = _dispatch.resolve("sinkhorn", x.device)
        return x + (1 if name == "reference" else 2)

    def backend(graph, _):
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected = 1.0 if AUTO == "reference" else 2.0
    x = torch.zeros(())
    assert compiled(x) == expected
    with otkd_fast.backend("reference"):
        assert compiled(x) == 1
    assert compiled(x) == expected
    with otkd_fast.backend("reference"):
        assert compiled(x) == 1
    assert len(traced) == 2


def test_context_inside_compiled_code():
    torch._dynamo.reset()

    def function(x):
        with otkd_fast.backend("reference"):
            inner = _dispatch.resolve("sinkhorn", x.device)
        outer = _dispatch.resolve("sinkhorn", x.device)
        return x + (1 if inner == "reference" else 2), x + (1 if outer == "reference" else 2)

    inner, outer = torch.compile(function, fullgraph=True, backend="eager")(torch.zeros(()))
    assert inner == 1 and outer == (1 if AUTO == "reference" else 2)
    assert _dispatch.resolve("sinkhorn", CPU) == AUTO


def test_environment_variable():
    code = """
import torch
from otkd_fast import _dispatch
fastest = "reference" if _dispatch.availability()["sinkhorn"]["cpu"] else "cpu"
name = _dispatch.resolve("sinkhorn", torch.device("cpu"))
print(name, name == fastest)
"""
    assert python(code, OTKD_FAST_BACKEND="reference").stdout.split()[0] == "reference"
    assert python(code, OTKD_FAST_BACKEND="").stdout.split()[1] == "True"
    wrong = python("import otkd_fast; print('imported')\n" + code, OTKD_FAST_BACKEND="fast")
    assert wrong.stdout.strip() == "imported"
    assert "ValueError" in wrong.stderr and "got 'fast' (from OTKD_FAST_BACKEND)" in wrong.stderr


def test_without_the_native_module():
    code = """
import sys
sys.modules["otkd_fast._C"] = None  # an import of it fails
import torch, otkd_fast
cost = otkd_fast.cost_matrix(torch.zeros(1, 2), torch.ones(1, 2), metric="l1")
print(otkd_fast.sinkhorn(cost, epsilon=0.1, num_iters=2).transport_cost.item())
try:
    otkd_fast.sinkhorn(cost, epsilon=0.1, num_iters=2, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    done = python(code)
    lines = done.stdout.splitlines()
    assert lines[0] == "2.0", done.stderr
    assert lines[1].startswith("backend 'cpu' is not available for sinkhorn: ")
    assert len(lines[1]) > len("backend 'cpu' is not available for sinkhorn: ")


def test_import_is_light():
    heavy = ("triton", "torch._dynamo", "torch._inductor", "scipy", "sklearn", "ot", "geomloss", "matplotlib")
    code = f"""
import sys, torch
before = set(sys.modules)
import otkd_fast
print([name for name in {heavy!r} if name in set(sys.modules) - before])
"""
    assert python(code).stdout.strip() == "[]"


def test_every_public_name_is_there():
    assert sorted(otkd_fast.__all__, key=str.lower) == sorted(set(otkd_fast.__all__), key=str.lower)
    for name in otkd_fast.__all__:
        assert getattr(otkd_fast, name) is not None
        assert name == "__version__" or getattr(otkd_fast, name).__doc__

"""The CUDA kernels on the host: `emulated` makes them the implementation of backend 'cpu' in a test."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from otkd_fast.functional import _sinkhorn_function, cost_matrix, sinkd
from otkd_fast.ops import _library, sinkhorn_shared, sinkhorn
from otkd_fast.ops import cost_matrix as cost_matrix_op
from otkd_fast.ops import sinkd as sinkd_op

sys.path.insert(0, str(Path(__file__).parent))
import build_emulated  # noqa: E402

GUARD = 64  # elements before and after each tensor that an op makes


@pytest.fixture(scope="session")
def emulated_core(request):
    """The module built from csrc/cuda on the emulator."""
    if build_emulated.COMPILER is None:
        pytest.skip("no C++ compiler")
    return build_emulated.emulated_module(Path(request.config.cache.mkdir("cuda_emulator")))


class GuardBands(TorchDispatchMode):
    """Tensors that ops allocate get guard bands; `check` says whether any was written to."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function.overloadpacket._qualified_op_name.rpartition("::")[2] not in ("new_empty", "empty", "empty_like"):
            return made
        if not made.is_contiguous() or made.numel() == 0:
            return made
        whole = torch.ops.aten.full.default([made.numel() + 2 * GUARD], 77, dtype=made.dtype)
        inside = torch.ops.aten.as_strided.default(whole, made.shape, made.stride(), GUARD)
        inside.copy_(made)
        self.made.append(whole)
        return inside

    def check(self):
        for whole in self.made:
            bands = torch.cat([whole[:GUARD], whole[-GUARD:]])
            assert (bands == 77).all(), f"a kernel wrote beside a tensor of {whole.numel() - 2 * GUARD} elements"


@pytest.fixture
def emulated(emulated_core, monkeypatch):
    """backend='cpu' runs the CUDA implementations on the emulator; the fixture is the emulated module."""
    monkeypatch.setattr(_library, "cuda", emulated_core)
    for direction, table in (("fwd", _sinkhorn_function._FORWARD), ("bwd", _sinkhorn_function._BACKWARD)):
        monkeypatch.setitem(table["dense"], "cpu", getattr(sinkhorn, f"_{direction}_cuda"))
        monkeypatch.setitem(table["shared"], "cpu", getattr(sinkhorn_shared, f"_{direction}_cuda"))
    monkeypatch.setitem(cost_matrix._FORWARD, "cpu", cost_matrix_op._fwd_cuda)
    monkeypatch.setitem(cost_matrix._BACKWARD, "cpu", cost_matrix_op._bwd_cuda)
    monkeypatch.setitem(sinkd._VALUE_AND_GRAD, "cpu", sinkd_op._cuda)
    yield emulated_core
    emulated_core.set_order(0)
    emulated_core.set_shared_limit(99 * 1024)


@pytest.fixture
def guarded(emulated):
    """Guard bands around every tensor that is allocated inside `with guarded:`; checked at the end."""
    bands = GuardBands()
    yield bands
    bands.check()
    assert bands.made

"""The CUDA kernels on the host: `emulated` makes them the implementation of backend 'cpu' in a test."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
import emulated_backend  # noqa: E402

GUARD = 64  # elements before and after each tensor that an op makes


@pytest.fixture(scope="session")
def emulated_core(request):
    """The module built from csrc/cuda on the emulator."""
    return emulated_backend.core(request.config)


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
    emulated_backend.replace(emulated_core, monkeypatch)
    yield emulated_core
    emulated_core.set_order(0)
    emulated_core.set_shared_limit(99 * 1024)
    emulated_core.set_clusters(0, 0)


@pytest.fixture
def guarded(emulated):
    """Guard bands around every tensor that is allocated inside `with guarded:`; checked at the end."""
    bands = GuardBands()
    yield bands
    bands.check()
    assert bands.made

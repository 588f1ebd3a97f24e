"""Makes the CUDA implementations, on the emulator, those of backend 'cpu'. As a plugin, for every test of a run:

PYTHONPATH=tests/cuda pytest -p emulated_backend tests/sinkhorn/test_options.py
"""

from pathlib import Path

import build_emulated
import pytest

from otkd_fast.functional import (
    _sinkhorn_function,
    _sinkhorn_points_function,
    _sinkhorn_ragged_function,
    cost_matrix,
    gaussian,
    moments,
    polar,
    sinkd,
    sqrtm,
)
from otkd_fast.ops import _library, sinkhorn, sinkhorn_points, sinkhorn_ragged, sinkhorn_shared
from otkd_fast.ops import cost_matrix as cost_matrix_op
from otkd_fast.ops import gaussian as gaussian_op
from otkd_fast.ops import moments as moments_op
from otkd_fast.ops import polar as polar_op
from otkd_fast.ops import sinkd as sinkd_op
from otkd_fast.ops import sqrtm as sqrtm_op


def core(config):
    """The emulated module, built once for the files as they are."""
    if build_emulated.COMPILER is None:
        pytest.skip("no C++ compiler")
    return build_emulated.emulated_module(Path(config.cache.mkdir("cuda_emulator")))


def replace(emulated, monkeypatch):
    """Backend 'cpu' calls the CUDA implementations until monkeypatch is undone."""
    monkeypatch.setattr(_library, "cuda", emulated)
    for direction, table in (("fwd", _sinkhorn_function._FORWARD), ("bwd", _sinkhorn_function._BACKWARD)):
        monkeypatch.setitem(table["dense"], "cpu", getattr(sinkhorn, f"_{direction}_cuda"))
        monkeypatch.setitem(table["shared"], "cpu", getattr(sinkhorn_shared, f"_{direction}_cuda"))
    for name in ("_FORWARD", "_BACKWARD", "_COSTS", "_COSTS_BACKWARD"):
        function = {"_FORWARD": "_fwd", "_BACKWARD": "_bwd", "_COSTS": "_cost_fwd", "_COSTS_BACKWARD": "_cost_bwd"}[
            name
        ]
        table = getattr(_sinkhorn_ragged_function, name)
        monkeypatch.setitem(table, "cpu", getattr(sinkhorn_ragged, f"{function}_cuda"))
    for name, function in (
        ("_FORWARD", "_fwd"), ("_BACKWARD", "_bwd"), ("_APPLY", "_apply"), ("_APPLY_BACKWARD", "_apply_bwd"),
    ):  # fmt: skip
        table = getattr(_sinkhorn_points_function, name)
        monkeypatch.setitem(table, "cpu", getattr(sinkhorn_points, f"{function}_cuda"))
    monkeypatch.setitem(cost_matrix._FORWARD, "cpu", cost_matrix_op._fwd_cuda)
    monkeypatch.setitem(cost_matrix._BACKWARD, "cpu", cost_matrix_op._bwd_cuda)
    monkeypatch.setitem(sinkd._VALUE_AND_GRAD, "cpu", sinkd_op._cuda)
    monkeypatch.setitem(sqrtm._FORWARD, "cpu", sqrtm_op._fwd_cuda)
    monkeypatch.setitem(sqrtm._BACKWARD, "cpu", sqrtm_op._bwd_cuda)
    monkeypatch.setitem(polar._FORWARD, "cpu", polar_op._cuda)
    monkeypatch.setitem(gaussian._FROM_SAMPLES, "cpu", gaussian_op._cuda)
    monkeypatch.setitem(gaussian._BURES, "cpu", gaussian_op._bures_cuda)
    monkeypatch.setitem(moments._FWD, "cpu", moments_op._fwd_cuda)
    monkeypatch.setitem(moments._BWD, "cpu", moments_op._bwd_cuda)


@pytest.fixture(autouse=True)
def everywhere(request, monkeypatch):
    """Not in use where this file is imported, only where it is a plugin."""
    replace(core(request.config), monkeypatch)

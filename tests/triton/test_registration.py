"""What holds without a kernel being run: imports without Triton, the fakes of the twins, scalars in float64."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import otkd_fast  # noqa: E402, F401
from otkd_fast.testing import aot  # noqa: E402

ops = torch.ops.otkd_fast


def test_every_module_imports_without_triton_and_says_what_is_missing():
    code = """
import importlib, sys
sys.modules["triton"] = None
import torch, otkd_fast
from otkd_fast import _triton
from otkd_fast.testing import aot
_triton.reason = "Triton is not installed"
for name in aot.modules():
    importlib.import_module(f"otkd_fast.triton_kernels.{name}")
from otkd_fast.triton_kernels import cost_matrix
try:
    cost_matrix.cost_matrix_fwd(torch.ones(2, 3), torch.ones(2, 3), "l1", 0.0, 0.0)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "the Triton kernel forward_kernel cannot run: Triton is not installed", done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_fakes_allocate_as_the_kernels_do(dtype):
    x, y = torch.randn(2, 3, 5).to(dtype), torch.randn(4, 5).to(dtype)
    cost = ops.cost_matrix_fwd_triton(x, y, "l2", 2.0, 0.0)
    calls = [
        (ops.cost_matrix_fwd_triton, (x, y, "l2", 2.0, 0.0)),
        (ops.cost_matrix_bwd_triton, (x, y, cost, torch.ones_like(cost), "l2", 2.0, 0.0, True, False)),
    ]
    if dtype != torch.bfloat16:
        rows = x.mT.contiguous()
        calls += [
            (ops.polar_fwd_triton, (x, 0)),
            (ops.gaussian_wasserstein_from_samples_triton, (x, x + 1, False, True, False)),
            (ops.feature_moments_fwd_triton, (rows, [1], [2], False, 1e-5)),
            (ops.feature_moments_bwd_triton, (rows, None, torch.ones(2, 2, 3).to(dtype), [1], [2], False, 1e-5)),
            (ops.sinkd_value_and_grad_triton, (x, x, None, None, 2.0, 2.0, 0.1, 2, 1.0, True, False)),
        ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_every_module_declares_cases_with_names_of_their_own():
    names = [name for name, _ in aot.cases()]
    assert len(names) == len(set(names)) > 50
    assert set(aot.modules()) >= {"cost_matrix", "gaussian_wasserstein", "moments", "polar", "sinkd", "sinkhorn"}
    assert any(case.quick for _, case in aot.cases())


def test_no_atomics():
    """So that the order of a sum does not depend on which program is the first."""
    from otkd_fast import triton_kernels

    sources = sorted(Path(triton_kernels.__path__[0]).glob("*.py"))
    assert len(sources) > 20
    assert [path.name for path in sources if "atomic" in path.read_text()] == []

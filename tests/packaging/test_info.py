"""``python -m otkd_fast``, with a right kernel, a wrong one, and none."""

import ctypes
import json

import pytest
import torch

from otkd_fast import _dispatch, _info, _native
from otkd_fast.__main__ import main

native = pytest.mark.skipif(_native.module is None, reason=f"no compiled module: {_native.reason}")

BLOCKED = "import sys, runpy; sys.modules['otkd_fast._C'] = None; sys.argv = ['otkd_fast']; "


def test_json(python, installed):
    run = python("-m", "otkd_fast", "--json")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert report["ok"] is True
    assert report["version"] == installed
    assert report["torch"]["version"] == torch.__version__
    assert set(report["availability"]) == set(_dispatch.OPS)
    assert all(set(row) == {"reference", "cpu", "cuda", "triton"} for row in report["availability"].values())


@native
def test_every_case_runs_on_the_compiled_backend(python, installed):
    rows = json.loads(python("-m", "otkd_fast", "--json").stdout)["self_test"]
    cases = {(row["op"], row["case"], row["dtype"]) for row in rows if row["backend"] == "cpu"}
    metrics = ("l1", "l2", "sqeuclidean", "cosine", "l1 of softmax")
    expected = {("cost_matrix", m) for m in metrics} | {("sinkd", "SinKD")}
    expected |= {(op, "unroll") for op in ("sinkhorn", "sinkhorn_shared", "sinkhorn_ragged", "sinkhorn_points")}
    expected |= {("polar", "nuclear norm"), ("sqrtm", "d = 8"), ("sqrtm", "d = 40")}
    expected |= {("gaussian_wasserstein", "few samples"), ("gaussian_wasserstein", "many samples")}
    expected |= {("feature_moments", "2 x 2 windows")}
    assert cases == {(*case, dtype) for case in expected for dtype in ("float32", "float64")}
    assert all(row["error"] is None and row["forward"] < 1e-5 and row["gradient"] < 1e-5 for row in rows)


def test_without_the_compiled_module_it_says_so_and_succeeds(python, installed):
    run = python("-c", BLOCKED + "runpy.run_module('otkd_fast', run_name='__main__')")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "none, everything runs on the reference backend: the import of otkd_fast._C is blocked" in run.stdout
    assert "nothing to test" in run.stdout


def test_without_the_compiled_module_everything_still_computes(python, installed):
    code = (
        "import sys; sys.modules['otkd_fast._C'] = None\n"
        "import torch, otkd_fast\n"
        "x = torch.randn(4, 3, requires_grad=True)\n"
        "otkd_fast.losses.sinkd(x, torch.randn(4, 3)).backward()\n"
        "assert x.grad.isfinite().all() and x.grad.abs().sum() > 0\n"
        "print(otkd_fast.explain('sinkd', x))\n"
    )
    run = python("-c", code)
    assert run.returncode == 0, run.stderr
    assert "'reference' runs" in run.stdout and "is blocked" in run.stdout


def corrupting(kernel, value):
    """The kernel, after which one entry of its result is `value` times what it was."""

    def broken(dtype, x, y, cost, *rest):
        kernel(dtype, x, y, cost, *rest)
        entry = (ctypes.c_float, ctypes.c_double)[dtype].from_address(cost)
        entry.value *= value

    return broken


@native
@pytest.mark.parametrize("value", [1.001, float("nan")])
def test_a_wrong_kernel_fails(monkeypatch, capsys, value):
    monkeypatch.setattr(_native.module, "cost_matrix_fwd", corrupting(_native.module.cost_matrix_fwd, value))
    assert main([]) == 1
    shown = capsys.readouterr().out
    assert shown.count("FAIL: cost_matrix value") == 10
    right = shown.count(" ok\n")
    assert f"self-test FAILED: 10 of {10 + right}" in shown
    assert main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["ok"] is False


@native
def test_a_kernel_that_raises_fails(monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("out of order")

    monkeypatch.setattr(_native.module, "sinkhorn_bwd", broken)
    assert main([]) == 1
    assert "FAIL: RuntimeError: out of order" in capsys.readouterr().out


def test_the_report_needs_no_triton(monkeypatch):
    def missing(name):
        raise _info.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_info.importlib.metadata, "version", missing)
    report = _info.report()
    assert report["triton"] is None
    assert "Triton         not installed" in _info.text(report)


def test_an_unknown_command_is_named(capsys):
    with pytest.raises(SystemExit) as error:
        main(["cost"])
    assert error.value.code == 2 and "expected the command cost-matrix, or none, got 'cost'" in capsys.readouterr().err

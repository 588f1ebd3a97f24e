"""setup.py's decisions: compiler, CUDA toolkit, version."""

import re

import pytest

from otkd_fast import _version


def fake_nvcc(folder, says, status=0):
    """A program named nvcc in `folder`/bin that prints `says`; returns its path."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    nvcc.chmod(0o755)
    return str(nvcc)


def test_no_compiler_is_a_reference_build_that_says_why(setup_py, without_compiler):
    assert setup_py.find_compiler() is None
    version, cuda, reason = setup_py.plan()
    assert version == f"{_version.base}+reference"
    assert cuda is None
    assert "no C++ compiler was found" in reason


def test_a_compiler_that_cxx_names_is_never_replaced(setup_py, without_compiler, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++ -m64")
    monkeypatch.setenv("OTKD_FAST_CUDA", "off")
    assert setup_py.find_compiler() == "/nowhere/g++"
    assert setup_py.plan() == (f"{_version.base}+cpu", None, None)


def test_cuda_asked_for_without_a_compiler_is_an_error(setup_py, without_compiler, monkeypatch):
    monkeypatch.setenv("OTKD_FAST_CUDA", "13.0")
    with pytest.raises(SystemExit, match=r"OTKD_FAST_CUDA=13\.0: no C\+\+ compiler"):
        setup_py.plan()


@pytest.mark.parametrize("wanted", ["on", "13", "cu130", "13.0.1"])
def test_unknown_word_for_cuda(setup_py, wanted):
    with pytest.raises(SystemExit, match=f"OTKD_FAST_CUDA must be 'auto', 'off' or a .*, not '{re.escape(wanted)}'"):
        setup_py.find_cuda(wanted)


def test_cuda_off(setup_py, monkeypatch, tmp_path):
    fake_nvcc(tmp_path, "Cuda compilation tools, release 98.7, V98.7.1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py.find_cuda("off") is None


def test_cuda_version_is_found_in_cuda_home(setup_py, monkeypatch, tmp_path):
    nvcc = fake_nvcc(tmp_path, "Cuda compilation tools, release 98.7, V98.7.1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_py.find_cuda("98.7") == (nvcc, "98.7")


def test_cuda_version_that_is_not_there_names_those_that_are(setup_py, monkeypatch, tmp_path):
    nvcc = fake_nvcc(tmp_path, "Cuda compilation tools, release 98.7, V98.7.1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=rf"OTKD_FAST_CUDA=12\.8: no such CUDA toolkit .*{re.escape(nvcc)} \(98\.7\)"):
        setup_py.find_cuda("12.8")


def test_a_toolkit_that_packages_hold_is_fetched(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(setup_py.sys, "path", [])
    assert setup_py.find_cuda("98.7") == (None, "98.7")
    monkeypatch.setenv("OTKD_FAST_CUDA", "98.7")
    assert setup_py.plan() == (f"{_version.base}+cu987", (None, "98.7"), None)
    assert setup_py.compiler_packages("98.7") == (
        "nvidia-cuda-nvcc==98.7.*", "nvidia-cuda-crt==98.7.*", "nvidia-nvvm==98.7.*", "nvidia-cuda-runtime==98.7.*",
        "nvidia-cuda-cccl==98.*",
    )  # fmt: skip


def test_a_fetched_toolkit_is_found_by_its_version(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    nvcc = fake_nvcc(tmp_path / "nvidia" / "cu98", "Cuda compilation tools, release 98.7, V98.7.1")
    monkeypatch.setattr(setup_py.sys, "path", ["", "/nowhere", str(tmp_path)])
    assert setup_py.find_cuda("98.7") == (nvcc, "98.7")
    assert setup_py.find_cuda("98.6") == (None, "98.6")


def test_auto_takes_nvcc_on_path(setup_py, monkeypatch, tmp_path):
    nvcc = fake_nvcc(tmp_path, "Cuda compilation tools, release 98.7, V98.7.1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    assert setup_py.find_cuda("auto") == (nvcc, "98.7")


def test_nvcc_that_does_not_run_has_no_version(setup_py, tmp_path):
    assert setup_py.toolkit_version(fake_nvcc(tmp_path, "release 98.7", status=1)) is None


def test_version_carries_the_build(python, installed):
    base, _, suffix = installed.partition("+")
    assert base == _version.base
    assert re.fullmatch(r"cpu|cu\d{3}|reference", suffix)
    native = "otkd_fast._native.module.build_info()['version']" if suffix != "reference" else repr(installed)
    run = python("-c", f"import otkd_fast; print(otkd_fast.__version__, {native})")
    assert run.stdout.split() == [installed, installed], run.stderr

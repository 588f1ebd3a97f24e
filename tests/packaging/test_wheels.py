"""``make wheel``: its name, what is in it, what it needs, and that it works in a fresh environment."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from otkd_fast import _version

pytestmark = pytest.mark.slow

# of the system; all else is inside
LIBRARIES = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")  # of nvcc 12.8 and newer
LOADER = re.compile(r"ld-linux.*\.so\.\d")


def make_wheel(clone, root, *arguments):
    shutil.copy(root / "Makefile", clone)
    command = ["make", "-s", "wheel", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=clone, capture_output=True, text=True)


def needed(module: Path) -> set[str]:
    listed = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", listed))


def extract(wheel: Path, target: Path) -> Path:
    """The compiled module of the wheel, unpacked."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
        assert not [name for name in archive.namelist() if ".libs/" in name]  # auditwheel had nothing to add
    (module,) = target.glob("otkd_fast/_C.*.so")
    return module


def test_cpu_wheel(clone, root, tmp_path):
    made = make_wheel(clone, root, "CUDA=cpu")
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = (clone / "dist").glob("*.whl")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(rf"otkd_fast-{_version.base}\+cpu-{python}-{python}-manylinux_2_\d+_x86_64\.whl", wheel.name)
    module = extract(wheel, tmp_path / "unpacked")
    assert not {name for name in needed(module) - LIBRARIES if not LOADER.fullmatch(name)}
    symbols = subprocess.run(["nm", "-D", "--defined-only", module], capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in symbols.splitlines()] == ["PyInit__C"]

    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    packages = {str(Path(module.__file__).parents[1]) for module in (torch, pytest)}
    (site / "others.pth").write_text("\n".join(sorted(packages)))
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--target", site, wheel]
    assert subprocess.run(pip, capture_output=True).returncode == 0
    run = subprocess.run(
        [environment / "bin" / "python", "-m", "otkd_fast"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert str(site) in run.stdout and f"{_version.base}+cpu" in run.stdout and "self-test passed" in run.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_wheel_holds_the_architectures(clone, root, tmp_path):
    version = re.search(r"release (\d+\.\d+)", subprocess.check_output(["nvcc", "--version"], text=True))[1]
    made = make_wheel(clone, root, f"CUDA={version}")
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = (clone / "dist").glob("*.whl")
    assert f"+cu{version.replace('.', '')}-" in wheel.name
    assert wheel.stat().st_size < 15e6
    module = extract(wheel, tmp_path / "unpacked")
    assert not {name for name in needed(module) - LIBRARIES if not LOADER.fullmatch(name)}  # no libcudart, no driver
    said = subprocess.run(
        [sys.executable, "-c", "import _C; print(_C.build_info()['cuda_architectures']); _C.cuda_info()"],
        env={**os.environ, "PYTHONPATH": str(module.parent)}, cwd=module.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert said.stdout.split() == [*ARCHITECTURES, ARCHITECTURES[-1] + "+PTX"]
    triton = importlib.util.find_spec("triton")  # brings one
    places = [os.environ["PATH"], "/usr/local/cuda/bin"]
    places += [str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")] if triton else []
    cuobjdump = shutil.which("cuobjdump", path=os.pathsep.join(places))
    if cuobjdump is None:
        pytest.skip("no cuobjdump")
    code = subprocess.check_output([cuobjdump, "--list-elf", module], text=True)
    assert set(re.findall(r"sm_(\d+)", code)) == set(ARCHITECTURES)
    portable = subprocess.check_output([cuobjdump, "--list-ptx", module], text=True)
    assert set(re.findall(r"sm_(\d+)", portable)) == {ARCHITECTURES[-1]}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["CUDA=cu130"], "CUDA: expected cpu or a CUDA version such as 13.0, got 'cu130'"),
        ([], "CUDA: expected cpu or a CUDA version such as 13.0, got ''"),
        (["CUDA=12.99"], "OTKD_FAST_CUDA=12.99: no such CUDA toolkit"),
        (["CUDA=99.9"], "there is no compiler package for 99.9"),
        (["CUDA=cpu", "PYTHON=no-python"], "PYTHON: there is no interpreter no-python"),
    ],
)
def test_bad_arguments_end_with_2_and_a_sentence(clone, root, arguments, expected):
    made = make_wheel(clone, root, *arguments)
    assert made.returncode == 2
    assert expected in made.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_an_unknown_architecture_ends_with_2_and_those_that_the_compiler_knows(clone, root):
    version = re.search(r"release (\d+\.\d+)", subprocess.check_output(["nvcc", "--version"], text=True))[1]
    made = make_wheel(clone, root, f"CUDA={version}", "ARCHS=77")
    assert made.returncode == 2
    assert re.search(r"77.*\n?.*which knows: .*80 86", made.stderr), made.stderr

"""What gets installed: every module of the package and of triton_kernels, and nothing else."""

import os
import subprocess
import sys
import zipfile

import pytest

from otkd_fast import _version


def modules(root):
    """Paths, relative to site-packages, of the Python files that an installation must have."""
    files = {str(p.relative_to(root)) for p in (root / "otkd_fast").rglob("*.py")}
    files |= {f"otkd_fast/{p.relative_to(root)}" for p in (root / "triton_kernels").rglob("*.py")}
    return files | {"otkd_fast/_build_info.py"}


def pip(*arguments, **environment):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_every_module_is_packaged(clone, root, tmp_path, without_compiler):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = {str(p.relative_to(tmp_path / "lib")) for p in (tmp_path / "lib").rglob("*") if p.is_file()}
    assert built == modules(root)
    assert "no C++ compiler was found" in done.stderr


@pytest.mark.slow
def test_wheel(clone, root, tmp_path):
    done = pip("wheel", "--no-deps", "--wheel-dir", tmp_path, clone, OTKD_FAST_CUDA="off")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"otkd_fast-{_version.base}+cpu-cp3")
    names = zipfile.ZipFile(wheel).namelist()
    package = {name for name in names if ".dist-info/" not in name}
    (native,) = (name for name in package if name.startswith("otkd_fast/_C."))
    assert package - {native} == modules(root)
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_sdist_builds(clone, tmp_path):
    done = pip("install", "build", "--target", tmp_path / "tools")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(clone)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "tools"), "OTKD_FAST_CUDA": "off"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "dist").iterdir())) == 2  # the source archive, and the wheel built from it


@pytest.mark.slow
def test_install_without_a_compiler(clone, tmp_path, without_compiler, python):
    target = tmp_path / "site"
    done = pip("install", "-v", "--no-deps", "--target", target, clone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING: otkd_fast: installed without the compiled kernels" in done.stdout + done.stderr
    assert not list(target.glob("otkd_fast/_C*"))
    run = python("-m", "otkd_fast", PYTHONPATH=str(target))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "everything runs on the reference backend: no C++ compiler was found" in run.stdout


@pytest.mark.slow
def test_a_compile_error_is_an_error(clone, tmp_path):
    (clone / "csrc" / "cpu" / "threads.cpp").write_text("#error broken\n")
    done = pip("install", "--no-deps", "--target", tmp_path / "site", clone, OTKD_FAST_CUDA="off")
    assert done.returncode != 0
    assert "the native build failed" in done.stdout + done.stderr
    assert not (tmp_path / "site" / "otkd_fast").exists()

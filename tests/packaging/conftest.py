"""What the packaging tests share: setup.py as a module, a PATH without a compiler, a Python outside the repository."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py, loaded without running setup(), with no build variable set."""
    for name in ("CXX", "CUDA_HOME", "OTKD_FAST_CUDA", "OTKD_FAST_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("otkd_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def without_compiler(tmp_path, monkeypatch) -> str:
    """A PATH, set and returned, on which there is a shell and no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "env", "uname"):
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return str(folder)


@pytest.fixture
def installed() -> str:
    """Version of the installed package; skips where the tests run on a source folder that was not installed."""
    try:
        return importlib.metadata.version("otkd_fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("otkd_fast is not installed in this environment")


@pytest.fixture
def python(tmp_path):
    """Runs this Python with arguments, away from the repository: `python("-c", "...", NAME="value")`."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def clone(tmp_path) -> Path:
    """A copy of what the package is built from, to build in."""
    target = tmp_path / "clone"
    target.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "_C.*", "_build_info.py")
    for name in ("csrc", "otkd_fast", "triton_kernels"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, target)
    return target

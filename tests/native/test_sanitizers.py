"""The CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer, without Python in the process."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
MARCH = {"baseline": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}


def run(*command):
    return subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags below are those of x86-64")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_kernels_are_clean(sanitizer, tmp_path):
    flags = ["-std=c++17", "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread"]
    flags += ["-Wno-psabi", f"-I{ROOT / 'csrc' / 'include'}"]
    objects = []
    for name in (
        "cost_matrix",
        "gaussian",
        "moments",
        "polar",
        "sinkhorn",
        "sinkhorn_points",
        "sinkhorn_ragged",
        "sinkhorn_shared",
        "sqrtm",
    ):
        for isa, march in MARCH.items():
            objects.append(tmp_path / f"{name}_{isa}.o")
            source = ROOT / "csrc" / "cpu" / f"{name}.cpp"
            built = run(COMPILER, *flags, f"-march={march}", f"-DOTKD_ISA={isa}", "-c", source, "-o", objects[-1])
            assert built.returncode == 0, built.stderr
    program = tmp_path / "exercise_kernels"
    sources = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in ("threads", "dispatch", "masses", "ragged", "sinkd")]
    sources.append(Path(__file__).with_name("exercise_kernels.cpp"))
    built = run(COMPILER, *flags, *sources, *objects, "-ldl", "-o", program)
    assert built.returncode == 0, built.stderr
    result = run(program)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "baseline ok" in result.stdout

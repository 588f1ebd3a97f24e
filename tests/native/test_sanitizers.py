"""The CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer, without Python in the process.

A test a family of kernels, for every instruction set: the compiler takes most of the time, so that what a family does
not call is left out of its program, and an object that two families need is compiled once.
"""

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CORE = HERE.parents[1] / "csrc"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
MARCH = {"baseline": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
ALWAYS = ("threads", "dispatch")
# program exercise_<family>.cpp -> kernels (compiled for each instruction set), other sources
FAMILIES = {
    "costs": (("cost_matrix", "moments"), ()),
    "sinkhorn": (("sinkhorn", "sinkhorn_ragged"), ()),
    "ragged": (("cost_matrix", "masses", "sinkhorn", "sinkhorn_ragged"), ("ragged", "sinkd")),
    "points": (("sinkhorn_points",), ()),
    "shared": (("sinkhorn_shared",), ()),
    "matrices": (("polar", "gaussian", "sqrtm"), ()),
}
SANITIZERS = {
    # what the address sanitizer finds itself is not looked for twice: that halves the time of the compiler
    "address": ("-fsanitize=address,undefined", "-fno-sanitize=null,object-size,vptr"),
    "thread": ("-fsanitize=thread",),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags below are those of x86-64"),
]


def run(*command, timeout=None):
    return subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """sanitizer, source, instruction set -> object, compiled at its first use."""
    folder = tmp_path_factory.mktemp("sanitizers")
    done = {}

    def compile_one(sanitizer, source, isa):
        flags = ["-std=c++17", "-O1", "-g1", "-fno-sanitize-recover=all", "-fno-pie", "-pthread", "-Wno-psabi"]
        flags += [*SANITIZERS[sanitizer], f"-march={MARCH[isa]}", f"-DOTKD_ISA={isa}", f"-I{CORE / 'include'}"]
        target = folder / f"{sanitizer}_{source.stem}_{isa}.o"
        built = run(COMPILER, *flags, "-c", source, "-o", target)
        assert built.returncode == 0, built.stderr
        return target

    def get(wanted):
        missing = [key for key in wanted if key not in done]
        with ThreadPoolExecutor(2) as pool:
            done.update(zip(missing, pool.map(lambda key: compile_one(*key), missing), strict=True))
        return [done[key] for key in wanted]

    return get


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_are_clean(family, sanitizer, objects, tmp_path):
    kernels, others = FAMILIES[family]
    wanted = [(sanitizer, CORE / "cpu" / f"{name}.cpp", isa) for name in kernels for isa in MARCH]
    wanted += [(sanitizer, CORE / "cpu" / f"{name}.cpp", "baseline") for name in (*ALWAYS, *others)]
    wanted.append((sanitizer, HERE / f"exercise_{family}.cpp", "baseline"))
    program = tmp_path / "program"
    # the kernels of other families are in the tables of csrc/cpu/dispatch.cpp, and never called
    link = ["-no-pie", "-pthread", "-Wl,--unresolved-symbols=ignore-all", SANITIZERS[sanitizer][0]]
    built = run(COMPILER, *link, *objects(wanted), "-ldl", "-o", program)
    assert built.returncode == 0, built.stderr
    result = run(program, *MARCH, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "baseline ok" in result.stdout

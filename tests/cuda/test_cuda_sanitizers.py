"""The CUDA kernels on the emulator under AddressSanitizer and UBSan, without Python in the process."""

import build_emulated
import pytest


@pytest.mark.slow
@pytest.mark.skipif(build_emulated.COMPILER is None, reason="no C++ compiler")
def test_kernels_are_clean(tmp_path):
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [*build_emulated.SOURCES, build_emulated.HERE / "exercise_cuda.cpp"]
    objects = build_emulated.compile_objects(sources, tmp_path, flags)
    build_emulated.run(build_emulated.COMPILER, *flags, *objects, "-o", tmp_path / "exercise_cuda")
    assert build_emulated.run(tmp_path / "exercise_cuda").endswith("ok\n")

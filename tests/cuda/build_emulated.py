"""Builds the CUDA half of the core for the host: csrc/cuda/*.cu as C++ on tests/cuda/emulator.h, cached by content."""

import fcntl
import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
NAME = "otkd_fast_emulated"
KERNELS = sorted(path for path in (ROOT / "csrc" / "cuda").glob("*.cu") if path.name != "device_info.cu")
SOURCES = [*KERNELS, HERE / "emulator_settings.cpp", HERE / "faulty.cpp"]
MODULE = [*(ROOT / "csrc" / "bindings" / name for name in ("cuda.cpp", "cuda_sinkhorn.cpp")), HERE / "module.cpp"]
FLAGS = [
    "-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fPIC", "-fvisibility=hidden",
    f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{HERE}", '-DOTKD_FAST_EMULATOR="emulator.h"',
]  # fmt: skip


def compile_objects(sources, folder, flags):
    """Object files of `sources` in `folder`, two compilers at a time; warnings count as errors."""

    def one(source):
        out = folder / f"{source.name}.o"
        run(COMPILER, *FLAGS, "-Werror", *flags, "-x", "c++", "-c", source, "-o", out)
        return out

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sources))


def run(*command):
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def content():
    """A hash of everything that goes into the build."""
    folders = (*(ROOT / "csrc" / name for name in ("cuda", "include", "bindings")), HERE)
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in (".h", ".cu", ".cpp"))
    text = hashlib.sha256(torch.__version__.encode())
    for path in [*files, Path(__file__)]:
        text.update(path.read_bytes())
    return text.hexdigest()[:16]


def emulated_module(cache: Path):
    """The module, built into `cache` unless it is there; several test processes build it once."""
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = _built(cache)
    spec = importlib.util.spec_from_file_location(NAME, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _built(cache: Path) -> Path:
    library = cache / (content() + sysconfig.get_config_var("EXT_SUFFIX"))
    if not library.exists():
        old = list(cache.glob("*" + sysconfig.get_config_var("EXT_SUFFIX")))
        # PyTorch brings the headers of pybind11; its own library is not linked
        python = [f"-isystem{Path(torch.__file__).parent / 'include'}", f"-I{sysconfig.get_paths()['include']}"]
        with TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / NAME
            objects = compile_objects([*MODULE, *SOURCES], Path(folder), ["-O1", *python])
            run(COMPILER, "-shared", *objects, "-o", built)
            built.replace(library)
        for path in old:
            path.unlink(missing_ok=True)
    return library

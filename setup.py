"""Bridge from pip to CMake: which build it is, its version suffix, and the call. CMakeLists.txt says how it is built.

Environment: OTKD_FAST_CUDA = auto | off | <toolkit version, as 13.0>, OTKD_FAST_CUDA_ARCHS = "80;90" (docs/install.md).
A toolkit 13.0 or newer that is named and not installed comes from PyPI into the build environment (compiler_packages).
"""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NO_COMPILER = (
    "no C++ compiler was found when the package was installed (searched: CXX, then c++, g++ and clang++ on PATH); "
    "install one, for example g++, and install otkd_fast again"
)


def find_compiler():
    """The C++ compiler, or None. One that CXX names counts as found: if it is not there, CMake says so and fails."""
    named = shlex.split(os.environ.get("CXX", ""))
    return named[0] if named else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def toolkit_version(nvcc):
    """'13.0' for an nvcc of CUDA 13.0, None if it does not run."""
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+\.\d+)", said)
    return found and found[1]


def compiler_packages(version):
    """Requirements that hold nvcc of CUDA `version` and what it needs: () before 13.0, whose packages lack parts."""
    if tuple(map(int, version.split("."))) < (13, 0):
        return ()
    names = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime")
    # the headers of CCCL have versions of their own within a major one
    return *(f"{name}=={version}.*" for name in names), f"nvidia-cuda-cccl=={version.partition('.')[0]}.*"


def packaged_nvcc(version):
    """nvcc of those packages, where they are installed for this interpreter, else None."""
    folder = os.path.join("nvidia", "cu" + version.partition(".")[0], "bin")
    found = (shutil.which("nvcc", path=os.path.join(place, folder)) for place in sys.path if place)
    return next((nvcc for nvcc in found if nvcc and toolkit_version(nvcc) == version), None)


def find_cuda(wanted):
    """(path of nvcc, its version) for OTKD_FAST_CUDA=`wanted`, or None for a build without CUDA.

    The path is None for a version that is not installed and that packages hold: pip installs them before the build.
    """
    if wanted not in ("auto", "off") and not re.fullmatch(r"\d+\.\d+", wanted):
        raise SystemExit(f"OTKD_FAST_CUDA must be 'auto', 'off' or a toolkit version such as '13.0', not {wanted!r}")
    if wanted == "off":
        return None
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", f"/usr/local/cuda-{wanted}"]
    places = [shutil.which("nvcc"), *(os.path.join(home, "bin", "nvcc") for home in homes if home)]
    found = {nvcc: toolkit_version(nvcc) for nvcc in places if nvcc and os.access(nvcc, os.X_OK)}
    for nvcc, version in found.items():
        if version and wanted in ("auto", version):
            return nvcc, version
    if wanted == "auto":
        return None
    if compiler_packages(wanted):
        return packaged_nvcc(wanted), wanted
    seen = ", ".join(f"{nvcc} ({version or 'does not run'})" for nvcc, version in found.items()) or "none"
    raise SystemExit(
        f"OTKD_FAST_CUDA={wanted}: no such CUDA toolkit on PATH, in CUDA_HOME, /usr/local; found: {seen}. "
        "Install that toolkit and set CUDA_HOME; from 13.0 on, the build fetches the compiler by itself"
    )


@functools.cache
def plan():
    """(version with its suffix, (nvcc, its version) or None, why no native module is built or None)."""
    base = re.search(r'^base = "(.+)"$', (ROOT / "otkd_fast/_version.py").read_text(), re.MULTILINE)[1]
    wanted = os.environ.get("OTKD_FAST_CUDA", "").strip() or "auto"
    if find_compiler():
        cuda = find_cuda(wanted)
        return base + ("+cu" + cuda[1].replace(".", "") if cuda else "+cpu"), cuda, None
    if wanted not in ("auto", "off"):
        raise SystemExit(f"OTKD_FAST_CUDA={wanted}: {NO_COMPILER}")
    return base + "+reference", None, NO_COMPILER


def warn(text):
    """On stderr, which pip shows with -v only or on failure, and on the terminal, if there is one."""
    text = f"\nWARNING: otkd_fast: {text}\n"
    print(text, file=sys.stderr, flush=True)
    try:
        with open("/dev/tty", "w") as terminal:
            terminal.write(text)
    except OSError:
        pass


class Python(build_py):
    """The Python files, and _build_info.py beside them."""

    def run(self):
        version, _, missing = plan()
        if not self.editable_mode:  # a build folder left from last time must not add deleted files to the wheel
            shutil.rmtree(Path(self.build_lib, "otkd_fast"), ignore_errors=True)
        super().run()
        package = ROOT / "otkd_fast" if self.editable_mode else Path(self.build_lib, "otkd_fast")
        text = f"# written by setup.py\nversion = {version!r}\nno_native_module = {missing!r}\n"
        (package / "_build_info.py").write_text(text)
        if missing:
            warn(f"installed without the compiled kernels, everything runs on the reference backend: {missing}")


class CMake(build_ext):
    """Builds in build/<interpreter>-<suffix>, which stays, so that a second build compiles only what changed."""

    def build_extension(self, ext):
        import pybind11

        version, cuda, _ = plan()
        if cuda and not cuda[0]:
            wanted = " ".join(compiler_packages(cuda[1]))
            raise SystemExit(f"OTKD_FAST_CUDA={cuda[1]}: no nvcc; without build isolation first: pip install {wanted}")
        folder = ROOT / "build" / f"{sysconfig.get_config_var('SOABI')}-{version.partition('+')[2]}"
        # pip's build environment, and with it cmake, ninja and pybind11, lies elsewhere each time; object files stay
        for stale in (folder / "CMakeCache.txt", *folder.glob("CMakeFiles/[0-9]*")):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
        arguments = {"CMAKE_CUDA_COMPILER": cuda[0]} if cuda else {}
        arguments |= {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "OTKD_FAST_VERSION": version,
            "OTKD_FAST_CUDA": "ON" if cuda else "OFF",
            "OTKD_FAST_CUDA_ARCHS": os.environ.get("OTKD_FAST_CUDA_ARCHS", ""),
        }
        options = [f"-D{name}={value}" for name, value in arguments.items()]
        try:
            subprocess.run([tool("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", *options], check=True)
            subprocess.run([tool("cmake"), "--build", folder], check=True)
            # loads it: an undefined symbol is an error now, not a missing module later
            subprocess.run([sys.executable, "-c", "import sys; sys.path[:0] = '.'; import _C"], cwd=folder, check=True)
        except subprocess.CalledProcessError as error:
            hint = f"; OTKD_FAST_CUDA=off builds without CUDA ({cuda[0]}, {cuda[1]})" if cuda else ""
            raise SystemExit(f"otkd_fast: the native build failed, see the messages above{hint}") from error
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / target.name, target)


def tool(name):
    """cmake or ninja: on PATH (pip's build environment puts them there), else beside this interpreter."""
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if not found:
        raise SystemExit(f"otkd_fast: {name} was not found; pip install {name}, or leave out --no-build-isolation")
    return found


if __name__ == "__main__":
    folders = find_packages(include=["otkd_fast", "otkd_fast.*", "triton_kernels", "triton_kernels.*"])
    version, cuda, no_module = plan()
    setup(
        version=version,
        # what pip puts into the build environment beside pyproject.toml's requirements
        setup_requires=compiler_packages(cuda[1]) if cuda and not cuda[0] else (),
        packages=[re.sub(r"^triton_kernels", "otkd_fast.triton_kernels", folder) for folder in folders],
        package_dir={"otkd_fast.triton_kernels": "triton_kernels"},
        ext_modules=[] if no_module else [Extension("otkd_fast._C", sources=[])],
        cmdclass={"build_py": Python, "build_ext": CMake},
    )

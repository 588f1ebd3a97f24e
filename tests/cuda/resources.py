"""Registers, spills and shared memory of every CUDA kernel and architecture, as ptxas tells them.

    python tests/cuda/resources.py           compile, and compare with csrc/cuda/resources.json
    python tests/cuda/resources.py --write   compile, and write it, architecture by architecture

Entries are [registers, bytes of stack, bytes of spill stores, bytes of spill loads, bytes of static shared memory].
Dynamic shared memory depends on the call: the launches in csrc/cuda compute it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "csrc" / "cuda" / "resources.json"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
FILES = (
    "bures", "cost_matrix", "cost_matrix_ragged", "gaussian", "matrix_product", "moments", "plan_apply", "polar",
    "sinkd", "sinkhorn", "sinkhorn_cluster", "sinkhorn_points", "sinkhorn_ragged", "sinkhorn_shared", "sqrtm",
    "sqrtm_large",
)  # fmt: skip
NVCC = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def toolkit():
    """'13.0': another nvcc may allocate other registers."""
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def measure(architectures=ARCHITECTURES):
    """{architecture: {kernel: entry}}; every file is compiled for one architecture at a time, two at once."""
    jobs = [(file, arch) for arch in architectures for file in FILES]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda job: _compile(*job), jobs)
        table = {}
        for (_, arch), kernels in zip(jobs, found, strict=True):
            table.setdefault(str(arch), {}).update(kernels)
    return {arch: dict(sorted(kernels.items())) for arch, kernels in table.items()}


def _compile(file, arch):
    with TemporaryDirectory() as folder:
        command = [
            NVCC, "-std=c++17", "-O3", "-DNDEBUG", f"-I{ROOT / 'csrc' / 'include'}", "-Xptxas", "-v",
            "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", f"{folder}/out.cubin",
            str(ROOT / "csrc" / "cuda" / f"{file}.cu"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return _parse(done.stderr + done.stdout)


def _parse(text):
    """ptxas describes a kernel in three lines: its name, stack and spills, registers; functions it calls come after."""
    kernels, name, memory = {}, None, None
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)'", line):
            name, memory = _readable(entry[1]), None
        elif spills := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            memory = memory or [int(number) for number in spills.groups()]
        elif name and (used := re.search(r"Used (\d+) registers", line)):
            static = re.search(r"(\d+) bytes smem", line)
            kernels[name] = [int(used[1]), *memory, int(static[1]) if static else 0]
            name = memory = None
    return kernels


def _readable(mangled):
    full = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    short = re.sub(r"\(anonymous namespace\)::|otkd_fast::|cuda::|^void ", "", full)
    return re.sub(r">\(.*$", ">", short).replace("> >", ">>")


def write(architectures=ARCHITECTURES):
    """Measure and put into the table one architecture after the other: what is there stays, if this is interrupted."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if table.get("nvcc") != toolkit():
        table = {}
    for arch in architectures:
        table |= measure((arch,))
        table = {"nvcc": toolkit(), **{str(key): table[str(key)] for key in ARCHITECTURES if str(key) in table}}
        text = json.dumps(table, indent=1)
        TABLE.write_text(re.sub(r"\[[^\]]*\]", lambda entry: re.sub(r"\s+", " ", entry[0]), text) + "\n")


def calls_device_code(file):
    """Whether host code of this file calls a function of the device: nvcc makes that an exit(1), without a warning."""
    with TemporaryDirectory() as folder:
        command = [
            NVCC, "-std=c++17", "-O1", f"-I{ROOT / 'csrc' / 'include'}", "-gencode", "arch=compute_90,code=compute_90",
            "-c", "-o", f"{folder}/out.o", str(ROOT / "csrc" / "cuda" / f"{file}.cu"),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        undefined = subprocess.run(["nm", "-u", f"{folder}/out.o"], check=True, capture_output=True, text=True).stdout
    return "exit" in undefined.split()


def worse(measured, table):
    """Sentences on what takes more than the table says, is not in it, or is there no more."""
    found = []
    for arch, kernels in measured.items():
        if arch not in table:
            found.append(f"sm_{arch} is not in the table")
            continue
        for name in sorted(kernels.keys() | table[arch].keys()):
            new, old = kernels.get(name), table[arch].get(name)
            if new is None or old is None:
                found.append(f"sm_{arch} {name}: {'not in the table' if old is None else 'in the table only'}")
            elif any(one > other for one, other in zip(new, old, strict=True)):
                found.append(f"sm_{arch} {name}: {new}, the table has {old}")
    return found


if __name__ == "__main__":
    if NVCC is None:
        raise SystemExit("nvcc was not found on PATH or in /usr/local/cuda/bin")
    if "--write" in sys.argv[1:]:
        write()
    else:
        problems = worse(measure(), json.loads(TABLE.read_text()))
        print("\n".join(problems) or f"as in {TABLE.relative_to(ROOT)}")
        sys.exit(bool(problems))

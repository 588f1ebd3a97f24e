"""Every Triton kernel compiled ahead of time: registers, spills and shared memory, without a GPU.

    python -m otkd_fast.testing.aot --arch 80 90 --quick     # JSON on stdout
    python -m otkd_fast.testing.aot --update tests/triton/resources --modules cost_matrix

A process of its own, because Triton's interpreter cannot be switched off once it was on. Triton keeps the
compiled kernels in its cache, so that a second run takes a moment.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def modules() -> list[str]:
    """Names of the modules of otkd_fast.triton_kernels that declare cases."""
    package = importlib.import_module("otkd_fast.triton_kernels")
    names = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]
    return sorted(names)


def cases(
    names: Sequence[str] | None = None, *, quick: bool = False, pattern: str = ""
) -> Iterator[tuple[str, object]]:
    """("module: case", AotCase) of the named modules (None: all) whose names the pattern is found in."""
    for name in names or modules():
        module = importlib.import_module(f"otkd_fast.triton_kernels.{name}")
        for case in module.aot_cases():
            if (case.quick or not quick) and re.search(pattern, case.name):
                yield f"{name}: {case.name}", case


def measure(case, architecture: int) -> dict[str, float]:
    """Compile a case; registers a thread, bytes of spills (local memory) a thread, bytes of shared memory a block."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = case.kernel.arg_names
    signature, attributes = {}, {}
    for index, name in enumerate(arguments):
        kind, _, multiple = case.signature.get(name, "constexpr").partition(":")
        signature[name] = kind
        if multiple:
            attributes[(index,)] = [["tt.divisibility", int(multiple)]]
    unknown = (set(case.signature) | set(case.constexprs)) - set(arguments)
    missing = set(arguments) - set(case.signature) - set(case.constexprs)
    if unknown or missing:
        raise ValueError(f"{case.name}: not arguments of {case.kernel.__name__}: {unknown}; without a type: {missing}")
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=dict(case.constexprs), attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": case.fp_fusion}
    start = sum(os.times()[:4])
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    seconds = sum(os.times()[:4]) - start  # of this process and ptxas
    registers, stack = _resources(compiled.asm["cubin"])
    found = {"registers": registers, "spills": stack, "shared": int(compiled.metadata.shared)}
    return found | {"seconds": round(seconds, 2)}


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread, from the cubin."""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", text.stdout)[1]) for word in ("REG", "STACK", "LOCAL"))
    return registers, max(stack, local)


def run(arguments: Sequence[str]) -> dict:
    """The report of ``python -m otkd_fast.testing.aot`` with these arguments, from a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "otkd_fast.testing.aot", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument("--modules", nargs="*", help="default: all")
    parser.add_argument("--cases", default="", metavar="REGEX", help="found in the names of the cases; default: all")
    parser.add_argument("--quick", action="store_true", help="the cases of the default tests only")
    parser.add_argument("--update", type=Path, metavar="FOLDER", help="put the figures into its tables")
    options = parser.parse_args()
    import triton

    report = {"triton": triton.__version__, "kernels": {}}
    for module in options.modules or modules():
        kernels: dict[str, dict[str, dict]] = {}
        for name, case in cases([module], quick=options.quick, pattern=options.cases):
            for architecture in options.arch:
                kernels.setdefault(name, {})[str(architecture)] = found = measure(case, architecture)
                print(name, architecture, found, file=sys.stderr, flush=True)
        report["kernels"] |= kernels
        if options.update is not None:  # a module at a time: what is measured is kept
            _update(options.update, report | {"kernels": kernels})
    if options.update is None:
        print(json.dumps(report, indent=1))


def _update(folder: Path, report: dict) -> None:
    """Merge the figures into the tables, a file a module; what is no longer declared goes."""
    folder.mkdir(exist_ok=True)
    modules_of = {name: name.split(": ")[0] for name, _ in cases()}
    for module in sorted(set(modules_of[name] for name in report["kernels"])):
        path = folder / f"{module}.json"
        table = json.loads(path.read_text())["kernels"] if path.exists() else {}
        for name, row in report["kernels"].items():
            if modules_of[name] == module:
                figures = {arch: [f["registers"], f["spills"], f["shared"]] for arch, f in row.items()}
                merged = table.get(name, {}) | figures
                table[name] = dict(sorted(merged.items(), key=lambda item: int(item[0])))
        rows = [f" {json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table) if name in modules_of]
        header = f'{{"triton": "{report["triton"]}",\n"figures": ["registers", "spills", "shared"],\n"kernels": {{\n'
        path.write_text(header + ",\n".join(rows) + "\n}}\n")


if __name__ == "__main__":
    main()

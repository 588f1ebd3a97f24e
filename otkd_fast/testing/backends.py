"""The backends and instruction sets that tests run here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .. import _dispatch, _native

_TESTED = ["reference", "cpu"]  # pytest --triton appends "triton", under Triton's interpreter


def backends(op: str, *, compiled_only: bool = False) -> list[str]:
    """Names of the backends of `op` that run on CPU tensors in this installation; Triton's where the tests ask for it.

    >>> "reference" in backends("sinkhorn")
    True
    """
    names = [name for name in _TESTED if _dispatch.availability()[op][name] is None]
    return [name for name in names if name != "reference"] if compiled_only else names


def instruction_sets() -> list[str]:
    """Instruction sets of the native module that this processor can run; empty without the module."""
    return [] if _native.module is None else list(_native.module.instruction_sets())


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """The CPU kernels of this instruction set, for the whole process, until the block ends."""
    before = _native.module.instruction_set()
    _native.module.set_instruction_set(name)
    try:
        yield
    finally:
        _native.module.set_instruction_set(before)

"""Whether Triton is there, without importing it (which takes a second), and whether its interpreter is on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re

OLDEST = (3, 6)
# Triton reads the same variable when a kernel is decorated; with it, kernels run on CPU tensors, slowly, for tests
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'otkd_fast[triton]'"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build of one's own
        return None
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        return f"Triton {version} is too old: {'.'.join(map(str, OLDEST))} or newer is needed"
    return None


reason = _reason()

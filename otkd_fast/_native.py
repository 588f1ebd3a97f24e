"""The compiled module ``otkd_fast._C`` as `module`, or None and the `reason`.

Importing otkd_fast never fails for want of it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from types import ModuleType

from otkd_fast._version import base

NAME = "otkd_fast._C"
SOURCE_TREE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(NAME), None
    except ModuleNotFoundError as error:
        if NAME in sys.modules:  # None there blocks an import
            return None, f"the import of {NAME} is blocked: {error}"
        if not os.path.exists(os.path.join(SOURCE_TREE, "setup.py")):
            return None, _not_built()
        return _load_installed()
    except ImportError as error:
        return None, f"the compiled module does not load: {error}"


def _load_installed() -> tuple[ModuleType | None, str | None]:
    """The module of an installed otkd_fast, where an interpreter started in a clone sees the clone's folder first."""
    spec = importlib.machinery.PathFinder.find_spec(NAME, [os.path.join(p, "otkd_fast") for p in sys.path])
    if spec is None or spec.loader is None:
        return None, _not_built()
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, f"the compiled module does not load: {error}"
    version = module.build_info()["version"]
    if version.partition("+")[0] != base:
        return None, f"the installed compiled module is version {version}, {SOURCE_TREE} is {base}: install again"
    sys.modules[NAME] = module
    return module, None


def _not_built() -> str:
    try:
        from otkd_fast._build_info import no_native_module
    except ImportError:
        no_native_module = None
    return no_native_module or (
        f"the compiled module was not built: {SOURCE_TREE} holds no {NAME} for Python "
        f"{sys.version_info.major}.{sys.version_info.minor}; run 'pip install .' (or 'pip install -e .') there"
    )


module, reason = _load()

"""The version. `base` is the one place where it is written; a build adds its suffix (+cpu, +cu130, +reference)."""

base = "0.1.0"

try:
    from otkd_fast._build_info import version as __version__  # written by setup.py
except ImportError:  # a source tree that was never installed
    __version__ = base

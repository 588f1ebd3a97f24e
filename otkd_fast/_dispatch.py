"""Which backend runs an op: one table, one rule.

A backend is named, from strongest to weakest, by `backend=` in the call, by the innermost
``with otkd_fast.backend(name)``, by the environment variable OTKD_FAST_BACKEND (read at import). 'auto' takes the
fastest one that is available for the device of the tensors; a name that is not available there is an error, never a
silent replacement.
"""

from __future__ import annotations

import contextvars
import os
import threading

import torch

from . import _native, _triton

NAMES = ("auto", "reference", "cpu", "cuda", "triton")
OPS = (
    "cost_matrix",
    "sinkhorn",
    "sinkhorn_shared",
    "sinkhorn_ragged",
    "sinkhorn_points",
    "sinkd",
    "polar",
    "sqrtm",
    "gaussian_wasserstein",
    "feature_moments",
)

# ops that have kernels and a public function that uses them, by backend; the reference has all
KERNELS = {
    "cpu": (
        "cost_matrix",
        "sinkhorn",
        "sinkhorn_shared",
        "sinkhorn_ragged",
        "sinkhorn_points",
        "sinkd",
        "polar",
        "sqrtm",
        "gaussian_wasserstein",
        "feature_moments",
    ),
    "cuda": (
        "cost_matrix",
        "sinkhorn",
        "sinkhorn_shared",
        "sinkhorn_ragged",
        "sinkhorn_points",
        "sinkd",
        "polar",
        "sqrtm",
        "gaussian_wasserstein",
        "feature_moments",
    ),
    "triton": (
        "cost_matrix",
        "sinkhorn",
        "sinkhorn_shared",
        "sinkhorn_ragged",
        "sinkhorn_points",
        "sinkd",
        "polar",
        "sqrtm",
        "gaussian_wasserstein",
        "feature_moments",
    ),
}

# (op, what a call asks of it) -> backends whose kernels do not have it: the reference runs in place of them, also where
# they are named
WITHOUT = {
    ("sinkhorn", "gradient='implicit'"): ("cuda",),
    ("sinkhorn_shared", "gradient='implicit'"): ("cuda",),
    ("sinkhorn_shared", "guards"): ("cuda", "triton"),
    ("sinkhorn_ragged", "gradient='implicit'"): ("cuda",),
    ("sinkhorn_points", "gradient='implicit'"): ("cuda",),
}

# where the kernels of a backend leave a part of a case to the reference, for `explain`
_LEFT_TO_REFERENCE = {
    ("sqrtm", "triton"): (
        "beyond 1024 x 1024, and beyond 64 x 64 indefinite matrices and, in the inverse and in the backward, singular "
        "ones: eigenvalues by PyTorch, as the reference"
    ),
    ("gaussian_wasserstein", "triton"): (
        "bures_distance beyond 1024 x 1024, and beyond 64 x 64 that of indefinite matrices and, with a gradient, of "
        "singular ones: eigenvalues by PyTorch, as the reference"
    ),
    ("sinkhorn_ragged", "triton"): "gradient='implicit': its linear solve is the reference's, problem by problem",
    ("sinkhorn", "triton"): "gradient='implicit': its linear solve is the reference's",
    ("sinkhorn_shared", "triton"): "gradient='implicit': products of matrices by PyTorch, two a step for all problems",
    ("sinkhorn_points", "triton"): "gradient='implicit': its linear solve is the reference's, on a plan in memory",
    ("sqrtm", "cuda"): "matrices beyond 2048 x 2048, 'eigh' and 'newton_schulz': as the reference",
    ("gaussian_wasserstein", "cuda"): "more than 2048 features and even more rows: as the reference",
}

# up to which size one launch solves a problem, for `explain`
_ONE_LAUNCH = {
    ("sinkhorn", "cuda"): "192 x 192 (float64: 128 x 128) in a block, and up to about 1000 x 1000 in a cluster of "
    "blocks on architectures 9.0 and later; beyond, each half-iteration is a launch",
    ("sinkhorn_shared", "cuda"): "192 x 192 (float64: 128 x 128); beyond, each half-iteration is a launch, or two by "
    "products of matrices where there are 64 problems or more",
    ("sinkhorn_ragged", "cuda"): "128 x 128 (float64: 64 x 32) with the kernel in registers, beyond in the log "
    "domain, a block a problem",
    ("sinkhorn_points", "cuda"): "64 x 64, many problems up to 256 x 256; beyond, each half-iteration is two launches",
    ("sinkd", "cuda"): "128 x 128 of rows of 1024; beyond, and in float64 (with float32 logits below epsilon "
    "1/30, too), cost, iterations and gradient are launches of their own",
    ("sqrtm", "cuda"): "32 x 32; beyond, it is products: 5 launches up to 160 x 160",
    ("polar", "cuda"): "160 x 160 (float64: 112 x 112) where shared memory holds it; beyond, three launches a step",
}

_VARIABLE = "OTKD_FAST_BACKEND"
_DEFAULT = os.environ.get(_VARIABLE) or "auto"
_current = contextvars.ContextVar("otkd_fast_backend", default=_DEFAULT)


class _Mirror(threading.local):
    """The same name once more for torch.compile, which cannot read a ContextVar but guards on this attribute."""

    def __init__(self) -> None:  # once a thread: torch 2.11 guards on attributes of the instance only
        self.name = _DEFAULT


_mirror = _Mirror()

# order of preference of 'auto', by device type; other devices have the reference only
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_DEVICES_OF = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda", "cpu") if _triton.INTERPRETED else ("cuda",)}


def _installed(op: str, name: str) -> str | None:
    """None if backend `name` has a kernel of `op` in this installation, else why not."""
    if name == "reference":
        return None
    if op not in KERNELS[name]:
        return f"its {op} kernels are not written yet"
    if name == "triton":
        return _triton.reason
    if _native.module is None:
        return _native.reason or "the native module is not there"
    if name == "cuda" and not _native.module.build_info()["cuda"]:
        return "the native module was built without CUDA"
    return None


_INSTALLED = {op: {name: _installed(op, name) for name in NAMES[1:]} for op in OPS}


def _reason(op: str, name: str, device_type: str) -> str | None:
    """None if backend `name` runs `op` on tensors of this device type, else why not."""
    wanted = _DEVICES_OF.get(name, (device_type,))
    if _INSTALLED[op][name] is not None or device_type in wanted:
        return _INSTALLED[op][name]
    return f"it runs on {wanted[0]} tensors, got tensors on {device_type}"


def _choices() -> dict[tuple[str, str, str], str]:
    """(op, device type, name) -> backend, for every combination that works on cpu and cuda tensors."""
    table = {}
    for op in OPS:
        for device_type, order in _PREFERENCE.items():
            working = [name for name in order if _reason(op, name, device_type) is None]
            table[op, device_type, "auto"] = working[0]
            named = [name for name in NAMES[1:] if _reason(op, name, device_type) is None]
            table.update({(op, device_type, name): name for name in named})
    return table


_CHOICES = _choices()


def resolve(op: str, device: torch.device, backend: str | None = None, asks: str | None = None) -> str:
    """Name of the backend that runs `op` on tensors on `device`; `asks`: what of WITHOUT the call asks for.

    Raises:
        ValueError: unknown backend name.
        RuntimeError: the named backend is not available for this op and device; the message says why.
    """
    if backend is None:
        backend = _mirror.name if torch.compiler.is_compiling() else _current.get()
    choice = _CHOICES.get((op, device.type, backend))
    if choice is None:
        choice = _resolve_rarely(op, device.type, backend)
    return choice if asks is None or choice not in WITHOUT.get((op, asks), ()) else "reference"


def _resolve_rarely(op: str, device_type: str, backend: str) -> str:
    check_name(backend)
    if backend in ("auto", "reference"):
        return "reference"
    raise RuntimeError(f"backend '{backend}' is not available for {op}: {_reason(op, backend, device_type)}")


def check_name(name: str) -> None:
    """ValueError unless `name` is the name of a backend."""
    if name not in NAMES:
        origin = f" (from {_VARIABLE})" if name == _DEFAULT else ""
        raise ValueError(f"backend: expected one of {', '.join(map(repr, NAMES))}, got {name!r}{origin}")


class backend:  # noqa: N801  a context manager, used like a function
    """Context manager that names the backend for the calls inside it, in this thread and this asynchronous task.

    Args:
        name: 'auto', 'reference', 'cpu', 'cuda' or 'triton'.

    Raises:
        ValueError: unknown name. (Whether the backend is available is known, and said, when an op is called.)

    >>> import torch, otkd_fast
    >>> with otkd_fast.backend("reference"):
    ...     otkd_fast.cost_matrix(torch.zeros(1, 2), torch.ones(1, 2), metric="l1")
    tensor([[2.]])
    """

    def __init__(self, name: str) -> None:
        check_name(name)
        self.name = name
        self._outer: list = []

    def __enter__(self) -> None:
        if not torch.compiler.is_compiling():
            self._outer.append((_current.set(self.name), _mirror.name))
        else:
            self._outer.append((None, _mirror.name))
        _mirror.name = self.name

    def __exit__(self, *exception) -> None:
        token, _mirror.name = self._outer.pop()
        if token is not None:
            _current.reset(token)


def availability() -> dict[str, dict[str, str | None]]:
    """op -> backend -> None if it is in this installation, else the reason why it is not."""
    return {op: dict(row) for op, row in _INSTALLED.items()}


def explain(op: str, *tensors: torch.Tensor) -> str:
    """Which backend would run `op` on these tensors, and why the others would not.

    Args:
        op: 'cost_matrix', 'sinkhorn', 'sinkhorn_shared', 'sinkhorn_ragged', 'sinkhorn_points', 'sinkd', 'polar',
            'sqrtm', 'gaussian_wasserstein' (also of bures_distance) or 'feature_moments'.
        *tensors: the tensors of the call; only their device is looked at. None: CPU tensors.

    Raises:
        ValueError: unknown op, or tensors on different devices.

    >>> import torch, otkd_fast
    >>> with otkd_fast.backend("reference"):
    ...     print(otkd_fast.explain("sinkhorn", torch.zeros(2, 2)).splitlines()[0])
    sinkhorn on cpu tensors: 'reference' runs, because it was named
    """
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(map(repr, OPS))}, got {op!r}")
    devices = {tensor.device.type for tensor in tensors} or {"cpu"}
    if len(devices) > 1:
        raise ValueError(f"tensors: expected one device, got {', '.join(sorted(devices))}")
    device_type = devices.pop()
    name = _current.get()
    try:
        choice = resolve(op, torch.device(device_type), name)
        why = "it was named" if name != "auto" else "it is the fastest one available for this device"
        lines = [f"{op} on {device_type} tensors: '{choice}' runs, because {why}"]
    except RuntimeError as error:
        choice = None
        lines = [f"{op} on {device_type} tensors: the call fails, because {error}"]
    if (op, choice) in _LEFT_TO_REFERENCE:
        lines.append(f"  but {_LEFT_TO_REFERENCE[op, choice]}")
    if (op, choice) in _ONE_LAUNCH:
        lines.append(f"  in one launch up to {_ONE_LAUNCH[op, choice]}")
    for other in NAMES[1:]:
        if other != choice:
            reason = _reason(op, other, device_type)
            lines.append(f"  {other}: {'available' if reason is None else reason}")
    for (of, asks), without in WITHOUT.items():
        if of == op and choice in without:
            lines.append(f"  with {asks}: 'reference' runs, because the {choice} kernels do not have it")
    return "\n".join(lines)

"""Cases for ahead-of-time compilation of the Sinkhorn kernels, as the host functions launch them."""

from __future__ import annotations

from typing import Any

import torch

from . import _sinkhorn_large as large
from ._runtime import SIGNATURE_DTYPES, TL_DTYPES, AotCase

_SIZES = (
    "n", "m", "d", "width", "num_iters", "step", "problems", "together", "packed_n", "packed_m", "entries", "slots",
    "num_steps", "height",
)  # fmt: skip
_DOUBLES = (
    "history", "scratch", "adjoint_f", "adjoint_g", "own", "other", "kept", "kept_before", "omega_at", "previous_at",
    "phi",
    "gamma", "rows", "columns", "mass", "spent", "potentials_n", "potentials_m", "f_bar", "g_bar", "transport_at",
    "value_at",
    "adjoint", "start", "work", "base", "first_adjoint", "collected", "by_cost", "by_plan", "states",
)  # fmt: skip
_FLOATS = ("epsilon", "tol", "omega", "lambda_a", "lambda_b", "drop_a", "drop_b", "factor", "exponent")
_DOUBLE_OUT = ("back_half", "point_gradient", "applied_gradient")


def _type(kernel: str, name: str, dtype: torch.dtype, metric: int) -> str:
    if name in _FLOATS:
        return "fp64"
    if name in _SIZES or "stride" in name or name in ("out_p", "out_i", "out_j"):
        return "i32"
    if name in ("running", "steps", "flag"):
        return "*i32:16"
    if name in ("count", "starts", "row_offsets", "column_offsets"):
        return "*i64:16"
    if name == "wide_at" and metric >= 0:
        return "*i32:16" if dtype == torch.float32 else "*i64:16"
    if name in _DOUBLES or name == "out" and kernel in _DOUBLE_OUT:
        return "*fp64:16"
    return f"*{SIGNATURE_DTYPES[dtype]}:16"


def case(
    name: str, kernel: Any, dtype: torch.dtype, constants: dict[str, Any], launch: dict[str, Any], absent: tuple[str,
    ...] = (),
    **keywords: bool | str,
) -> AotCase:  # fmt: skip
    """`absent`: the arguments that are None."""
    launch = dict(launch)
    warps, stages, fusion = (launch.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion"))
    constants = constants | launch | dict.fromkeys(absent)
    unit = [key for key in ("stride_j", "out_j") if key in kernel.arg_names and constants.get("METRIC", -1) < 0]
    if "stride_i" in constants:  # columns side by side in memory
        unit.remove("stride_j")
    constants |= dict.fromkeys(unit, 1)
    signature = {
        key: _type(kernel.__name__, key, dtype, constants.get("METRIC", -1))
        for key in kernel.arg_names
        if key not in constants
    }
    return AotCase(name, kernel, signature, constants, warps, stages, fusion, **keywords)


def tiles(
    kernel_name: str, kernel: Any, dtype: torch.dtype, metric: int, constants: dict[str, Any], absent=()
) -> AotCase:
    """A kernel of ``_sinkhorn_tiles`` for 1024 x 1024 problems."""
    rows, columns = large.block_of(1024, 1024, dtype)
    if "gradient" in kernel_name:
        columns //= 2
    sizes = {"METRIC": metric, "BN": rows, "BM": columns} if metric != NO_METRIC else {"BN": rows, "BM": columns}
    kind = {-1: "", 0: " l1", 1: " l2", 2: " square"}[metric if metric != NO_METRIC else -1]
    what = f"{kernel_name}{kind} {SIGNATURE_DTYPES[dtype]}"
    launch = large.GRADIENT_LAUNCH if "gradient" in kernel_name else large.LAUNCH
    constants = {"DATA": TL_DTYPES[dtype]} | constants | sizes
    return case(what, kernel, dtype, constants, launch, absent)


def products(
    name: str, kernel: Any, dtype: torch.dtype, constants: dict[str, Any], launch: dict[str, Any],
    **keywords: bool | str,
) -> AotCase:  # fmt: skip
    """A kernel of ``_sinkhorn_products_kernels``."""
    absent = tuple(key for key, flag in (("mass", "MASS"), ("first_adjoint", "STARTS")) if constants.get(flag) is False)
    return case(name, kernel, dtype, constants, launch, absent, **keywords)


NO_METRIC = -2

"""What ``python -m otkd_fast`` tells: versions, build, devices, availability, a self-test of the compiled backends."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import otkd_fast
from otkd_fast import _dispatch, _native
from otkd_fast.testing import assert_close, assert_norm_close, covariance, tolerance

BACKENDS = _dispatch.NAMES[1:]

DTYPES = (torch.float32, torch.float64)

# the rows of the table of tolerances by which the value of an op below is judged
JUDGED_AS = {
    "cost_matrix": ("cost_matrix", "value"),
    "sinkhorn": ("sinkhorn", "regularized_cost"),
    "sinkhorn_shared": ("sinkhorn", "regularized_cost"),
    "sinkhorn_ragged": ("sinkhorn", "regularized_cost"),
    "sinkhorn_points": ("sinkhorn", "regularized_cost"),
    "sinkd": ("sinkhorn", "transport_cost"),
    "polar": ("polar", "nuclear_norm"),
    "sqrtm": ("sqrtm", "residual"),
    "gaussian_wasserstein": ("gaussian_wasserstein", "gradient"),
    "feature_moments": ("feature_moments", "std"),
}
# and its gradient, where that is not (op, "gradient")
GRADIENTS_JUDGED_AS = {"polar": "factor"}
# judged by norms: a small entry of a matrix is as uncertain as a large one
BY_NORM = ("polar", "sqrtm", "gaussian_wasserstein")


def report() -> dict:
    """Everything, ready for JSON; "ok" is False if a compiled backend is wrong or fails."""
    tests = self_test()
    return {
        "version": otkd_fast.__version__,
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
        },
        "triton": _triton(),
        "native_module": _native_module(),
        "gpu": _gpu(),
        "availability": _dispatch.availability(),
        "self_test": tests,
        "ok": all(test["ok"] for test in tests),
    }


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _native_module() -> dict:
    if _native.module is None:
        return {"path": None, "reason": _native.reason}
    build = dict(_native.module.build_info())
    build["thread_source"] = _native.module.thread_source()
    return {"path": _native.module.__file__, "instruction_set": _native.module.instruction_set(), **build}


def _gpu() -> dict:
    """{"driver": newest CUDA that it serves, None if unknown, "devices": [name, ...], "reason": why there is none}."""
    if hasattr(_native.module, "cuda_info"):
        found = _native.module.cuda_info()
        driver = found["driver_version"]  # 13000 is 13.0
        names = [f"{d['name']}, compute capability {'.'.join(map(str, d['capability']))}" for d in found["devices"]]
        reason = (found["error"] or None) if driver else "no NVIDIA driver"
        newest = f"{driver // 1000}.{driver % 1000 // 10}" if driver else None
        return {"driver": newest, "devices": names, "reason": reason}
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    reason = None if names else "torch sees none, and this otkd_fast has no CUDA part to ask"
    return {"driver": None, "devices": names, "reason": reason}


def self_test() -> list[dict]:
    """One entry for each operator case, dtype and compiled backend: its errors, and whether they are small."""
    rows = []
    for op, case, call, make in _cases():
        for backend, reason in _dispatch.availability()[op].items():
            if backend == "reference" or reason is not None:
                continue
            device = "cpu" if backend == "cpu" else "cuda"
            if device == "cuda" and not torch.cuda.is_available():
                continue
            for dtype in DTYPES:
                row = {"op": op, "case": case, "backend": backend, "dtype": str(dtype).removeprefix("torch.")}
                rows.append(row | _compare(op, call, [tensor.to(dtype) for tensor in make()], backend, device))
    return rows


def _compare(op: str, call: Callable, inputs: list[Tensor], backend: str, device: str) -> dict:
    """`inputs` have the dtype to test; the reference gets the same numbers in float64."""
    table_op, quantity = JUDGED_AS[op]
    try:
        actual = _value_and_gradients(call, inputs, backend, device)
        expected = _value_and_gradients(call, [tensor.double() for tensor in inputs], "reference", "cpu")
    except Exception as error:  # whatever it is, the report must say it
        return {"forward": None, "gradient": None, "ok": False, "error": f"{type(error).__name__}: {error}"}
    errors = [_relative_error(a, e) for a, e in zip(actual, expected, strict=True)]
    row = {"forward": errors[0], "gradient": max(errors[1:]), "ok": True, "error": None}
    try:
        _assert_close(actual[0], expected[0], table_op, quantity)
        for a, e in zip(actual[1:], expected[1:], strict=True):
            _assert_close(a, e, table_op, GRADIENTS_JUDGED_AS.get(table_op, "gradient"))
    except AssertionError as error:
        row |= {"ok": False, "error": str(error).strip()}
    return row


def _assert_close(actual: Tensor, expected: Tensor, op: str, quantity: str) -> None:
    if op in BY_NORM:
        lines = [tensor.reshape(len(tensor), 1, -1) for tensor in (actual, expected)]
        assert_norm_close(*lines, max(tolerance(op, quantity, actual.dtype)), context=f"{op} {quantity}")
    else:
        assert_close(actual, expected, op, quantity)


def _value_and_gradients(call: Callable, inputs: list[Tensor], backend: str, device: str) -> list[Tensor]:
    leaves = [tensor.to(device).requires_grad_() for tensor in inputs]
    value = call(*leaves, backend)
    direction = torch.cos(torch.arange(value.numel(), dtype=torch.float64)).reshape(value.shape).to(value)
    return [value.detach(), *torch.autograd.grad(value, leaves, direction)]


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """In the maximum norm, to be shown; 1e300 stands for NaN and infinity, which JSON cannot write."""
    error = ((actual.double().cpu() - expected).abs().max() / expected.abs().max()).item()
    return error if error < 1e300 else 1e300


def _cases() -> Iterator[tuple[str, str, Callable, Callable]]:
    """(op, case, function of inputs and backend, function that makes the float64 inputs)."""

    def points() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(2, n, 37, generator=generator, dtype=torch.float64) for n in (33, 21)]

    def problem() -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        cost = 2 * torch.rand(3, 24, 19, generator=generator, dtype=torch.float64)
        return [cost, *(torch.randn(3, n, generator=generator, dtype=torch.float64) for n in (24, 19))]

    def shared_problem() -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        cost = 2 * torch.rand(24, 19, generator=generator, dtype=torch.float64)
        return [cost, *(torch.randn(33, n, generator=generator, dtype=torch.float64) for n in (24, 19))]

    def logits() -> list[Tensor]:
        generator = torch.Generator().manual_seed(2)
        return [3 * torch.randn(48, 35, generator=generator, dtype=torch.float64) for _ in range(2)]

    def cost_matrix(metric: str, temperature: float | None) -> Callable:
        return lambda x, y, backend: otkd_fast.cost_matrix(
            x, y, metric=metric, softmax_temperature=temperature, backend=backend
        )

    def sinkhorn(cost: Tensor, a: Tensor, b: Tensor, backend: str) -> Tensor:
        result = otkd_fast.sinkhorn(cost, a.softmax(-1), b.softmax(-1), epsilon=0.1, num_iters=20, backend=backend)
        return result.transport_cost + result.regularized_cost

    def streamed(x: Tensor, y: Tensor, backend: str) -> Tensor:
        options = {"metric": "sqeuclidean", "epsilon": 20.0, "num_iters": 20, "storage": "streamed", "backend": backend}
        result = otkd_fast.sinkhorn_points(x, y, **options)
        return result.transport_cost + result.regularized_cost

    def matrices(d: int) -> Callable:
        return lambda: [covariance("geometric 1e2", d, generator=torch.Generator().manual_seed(4), batch=(3,))]

    def root(A: Tensor, backend: str) -> Tensor:
        return otkd_fast.sqrtm(A, backend=backend)

    def samples(n: int, m: int, d: int) -> Callable:
        generator = torch.Generator().manual_seed(5)
        sides = [torch.randn(3, rows, d, generator=generator, dtype=torch.float64) for rows in (n, m)]
        return lambda: [sides[0], 2 * sides[1]]

    def distance(x: Tensor, y: Tensor, backend: str) -> Tensor:
        return otkd_fast.gaussian_wasserstein_from_samples(x, y, backend=backend)

    def moments(x: Tensor, backend: str) -> Tensor:
        return torch.stack(otkd_fast.feature_moments(x, dim=(1, 2), grid=2, unbiased=True, eps=1e-3, backend=backend))

    def ragged(x: Tensor, y: Tensor, backend: str) -> Tensor:
        rows, columns = (
            torch.tensor(offsets, device=x.device) for offsets in ([0, 3, 7, 11, 14, 66], [0, 4, 6, 9, 12, 42])
        )
        options = {"metric": "sqeuclidean", "epsilon": 20.0, "num_iters": 20, "backend": backend}
        points = x.flatten(0, 1), y.flatten(0, 1)
        result = otkd_fast.sinkhorn_ragged(points, row_offsets=rows, column_offsets=columns, **options)
        return result.transport_cost + result.regularized_cost

    for metric in ("l1", "l2", "sqeuclidean", "cosine"):
        yield "cost_matrix", metric, cost_matrix(metric, None), points
    yield "cost_matrix", "l1 of softmax", cost_matrix("l1", 2.0), points
    yield "sinkhorn", "unroll", sinkhorn, problem
    yield "sinkhorn_shared", "unroll", sinkhorn, shared_problem
    yield "sinkhorn_ragged", "unroll", ragged, points
    yield "sinkhorn_points", "unroll", streamed, points
    yield "sinkd", "SinKD", lambda s, t, backend: otkd_fast.losses.sinkd(s, t, backend=backend), logits
    yield "polar", "nuclear norm", lambda K, backend: otkd_fast.polar(K, backend=backend)[1], matrices(40)
    yield "sqrtm", "d = 8", root, matrices(8)
    yield "sqrtm", "d = 40", root, matrices(40)
    yield "gaussian_wasserstein", "few samples", distance, samples(9, 12, 20)
    yield "gaussian_wasserstein", "many samples", distance, samples(50, 40, 7)
    yield "feature_moments", "2 x 2 windows", moments, lambda: [points()[0].reshape(2, 33, 37)]


def text(report: dict) -> str:
    """The report for people."""
    native, gpu = report["native_module"], report["gpu"]
    facts = [
        ("otkd_fast", report["version"]),
        ("Python", report["python"]),
        ("torch", f"{report['torch']['version']}, CUDA {report['torch']['cuda'] or 'none'}, "
                  f"{report['torch']['threads']} threads"),
        ("Triton", report["triton"] or "not installed"),
    ]  # fmt: skip
    if native["path"] is None:
        facts += [("native module", f"none, everything runs on the reference backend: {native['reason']}")]
    else:
        cuda = f"CUDA {native['cuda']} for {native['cuda_architectures']}" if native["cuda"] else "without CUDA"
        facts += [
            ("native module", native["path"]),
            ("  built", f"{native['version']} by {native['compiler']}, {cuda}"),
            ("  CPU kernels", f"{', '.join(native['instruction_sets'])}; in use: {native['instruction_set']}"),
            ("  threads", native["thread_source"]),
        ]
    facts += [("GPU", "; ".join(gpu["devices"]) or f"none: {gpu['reason']}")]
    if gpu["driver"]:
        facts += [("driver", f"for CUDA {gpu['driver']} and older")]
    lines = [f"{name:14} {value}" for name, value in facts]
    return "\n".join([*lines, "", *_availability_lines(report["availability"]), "", *_self_test_lines(report)])


def _availability_lines(availability: dict[str, dict[str, str | None]]) -> list[str]:
    notes: dict[str, int] = {}
    wide = max(map(len, availability))
    lines = [f"{'op':{wide}}" + "".join(f" {backend:13}" for backend in BACKENDS)]
    for op, row in availability.items():
        name = "sinkd (fused)" if op == "sinkd" else op
        reasons = [row[backend] for backend in BACKENDS]
        cells = ["available" if r is None else f"no ({notes.setdefault(r, len(notes) + 1)})" for r in reasons]
        lines.append(f"{name:{wide}}" + "".join(f" {cell:13}" for cell in cells))
    return [line.rstrip() for line in lines] + [f"  ({number}) {reason}" for reason, number in notes.items()]


def _self_test_lines(report: dict) -> list[str]:
    if not report["self_test"]:
        return ["self-test      nothing to test: no compiled backend is available, the reference backend works"]
    heading = f"{'self-test':20} {'case':14} {'backend':8} {'dtype':8} {'forward':>9} {'gradient':>9}"
    lines = [f"{heading}   (max relative error)"]
    for row in report["self_test"]:
        start = f"{row['op']:20} {row['case']:14} {row['backend']:8} {row['dtype']:8}"
        if row["forward"] is not None:
            start += f" {row['forward']:9.1e} {row['gradient']:9.1e}  "
        lines.append(f"{start} {'ok' if row['ok'] else 'FAIL: ' + row['error']}")
    failed = sum(not row["ok"] for row in report["self_test"])
    lines.append(f"self-test FAILED: {failed} of {len(report['self_test'])}" if failed else "self-test passed")
    return lines

"""Packed problems of different sizes (kernels: ``csrc/cpu/sinkhorn_ragged.cpp``, ``csrc/cpu/ragged.cpp``,
``csrc/cuda/sinkhorn_ragged.cu``).

``sinkhorn_ragged_fwd`` and ``_bwd`` solve them, ``cost_matrix_ragged_fwd`` and ``_bwd`` take the costs between points.
Columns first is the transposed problem, as in ``ops/sinkhorn.py``. Offsets are int64. On CUDA tensors (Triton) their
values are not read on the host: a problem whose offsets do not fit the tensors gets NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from ._library import address, contiguous, native
from .cost_matrix import METRICS
from .sinkhorn import _FORWARD, GRADIENTS, KEEP, history_size


def _history_size(rows: int, columns: int, problems: int, num_iters: int, keep: int) -> int:
    """Doubles of history of all problems."""
    header = history_size(0, 0, num_iters, keep)
    return problems * header + history_size(rows, columns, num_iters, keep) - header


def _fwd_fake(
    cost: Tensor, a: Tensor, b: Tensor, initial_f: Tensor | None, initial_g: Tensor | None,
    row_offsets: Tensor, column_offsets: Tensor,
    epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    problems, n, m = row_offsets.shape[0] - 1, a.shape[0], b.shape[0]
    transport_cost, regularized_cost, marginal_error = (cost.new_empty(problems) for _ in range(3))
    history = cost.new_empty(_history_size(n, m, problems, num_iters, keep), dtype=torch.float64)
    iterations = cost.new_empty(problems, dtype=torch.int64)
    return transport_cost, regularized_cost, cost.new_empty(n), cost.new_empty(m), marginal_error, iterations, history


class _Call:
    """The problems as the native module takes them: contiguous, rows first. Its tensors have to outlive the call."""

    def __init__(
        self, cost, a, b, initial_f, initial_g, row_offsets, column_offsets, history, options, num_iters, keep,
        update_a_first, gradient,
    ) -> None:  # fmt: skip
        epsilon, tol, relaxation, penalty_a, penalty_b = options
        self.offsets = tuple(offsets.contiguous() for offsets in (row_offsets, column_offsets))
        self.count = row_offsets.shape[0] - 1
        self.code = _library.dtype_code(cost)
        sizes = a.shape[0], b.shape[0]
        self._check(*sizes, cost.shape[0])
        self.flipped = not update_a_first
        cost = self.rows_first(cost)
        if self.flipped:
            a, b, initial_f, initial_g, penalty_a, penalty_b = b, a, initial_g, initial_f, penalty_b, penalty_a
            self.offsets, sizes = self.offsets[::-1], sizes[::-1]
        self.operands = tuple(contiguous(tensor) for tensor in (cost, a, b, initial_f, initial_g))
        arguments = (
            self.code, *(address(tensor) for tensor in self.operands), address(history), 0, self.count, *sizes,
            num_iters, keep, epsilon, tol, relaxation, penalty_a, penalty_b, torch.get_num_threads(),
        )  # fmt: skip
        self.scratch = self._workspace(arguments, gradient)
        self.problems = (*arguments[:7], self.scratch.data_ptr(), *arguments[8:])

    def _check(self, *sizes: int) -> None:
        native.ragged_check(self._addresses(), self.count, *sizes)

    def _workspace(self, arguments: tuple, gradient: int) -> Tensor:
        return _library.workspace(native.sinkhorn_ragged_workspace(arguments, self._addresses(), gradient))

    def _run(self, function: str, *arguments) -> None:
        getattr(native, function)(*arguments)

    def _addresses(self) -> tuple[int, ...]:
        return self.offsets[0].data_ptr(), self.offsets[1].data_ptr()

    def rows_first(self, cost: Tensor) -> Tensor:
        """Packed matrices, transposed where columns are updated first; the offsets are still those of the caller."""
        return self._transposed(cost) if self.flipped else cost.contiguous()

    def given_back(self, grad_cost: Tensor) -> Tensor:
        """The same for what the kernel returns, whose offsets are those of `self`."""
        return self._transposed(grad_cost) if self.flipped and grad_cost.numel() else grad_cost

    def _transposed(self, packed: Tensor) -> Tensor:
        packed = packed.contiguous()
        out = torch.empty_like(packed)
        self._run("ragged_transpose", self.code, address(packed), address(out), self._addresses(), self.count)
        return out

    def forward(self, outputs: tuple[Tensor, ...]) -> None:
        self._run("sinkhorn_ragged_fwd", self.problems, self._addresses(), tuple(map(address, outputs)))

    def backward(self, gradient: int, tensors: tuple[Tensor | None, ...]) -> None:
        self._run("sinkhorn_ragged_bwd", self.problems, self._addresses(), gradient, tuple(map(address, tensors)))


class _DeviceCall(_Call):
    """The same for the CUDA half. Offsets lie on the device: a problem whose offsets do not fit gets NaN as values."""

    def __init__(self, cost, *rest) -> None:
        self.like = cost
        super().__init__(cost, *rest)

    def _addresses(self) -> tuple[int, ...]:
        return *super()._addresses(), self.like.shape[0]

    def _check(self, *sizes: int) -> None:
        pass

    def _workspace(self, arguments: tuple, gradient: int) -> Tensor:
        return _library.cuda_workspace(self.like, _library.cuda.sinkhorn_ragged_workspace(arguments, gradient))

    def _run(self, function: str, *arguments) -> None:
        _library.launch("sinkhorn_ragged", self.like, function, *arguments)


def _fwd(
    call_type: type[_Call],
    cost: Tensor, a: Tensor, b: Tensor, initial_f: Tensor | None, initial_g: Tensor | None,
    row_offsets: Tensor, column_offsets: Tensor,
    epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    options = (epsilon, tol, relaxation, penalty_a, penalty_b)
    tensors = (cost, a, b, initial_f, initial_g, row_offsets, column_offsets)
    outputs = _fwd_fake(*tensors, epsilon, num_iters, *options[1:], update_a_first, keep)
    transport_cost, regularized_cost, f, g, marginal_error, iterations, history = outputs
    call = call_type(*tensors, history, options, num_iters, keep, update_a_first, _FORWARD)
    if not update_a_first:
        f, g = g, f
    call.forward((transport_cost, regularized_cost, f, g, marginal_error, iterations))
    return outputs


def _fwd_cpu(*arguments) -> tuple[Tensor, ...]:
    return _fwd(_Call, *arguments)


def _fwd_cuda(*arguments) -> tuple[Tensor, ...]:
    return _fwd(_DeviceCall, *arguments)


def _bwd_fake(
    cost: Tensor, a: Tensor, b: Tensor, initial_f: Tensor | None, initial_g: Tensor | None,
    row_offsets: Tensor, column_offsets: Tensor,
    history: Tensor, grad_transport_cost: Tensor | None, grad_regularized_cost: Tensor | None, grad_f: Tensor | None,
    grad_g: Tensor | None, epsilon: float, num_iters: int, penalty_a: float, penalty_b: float, update_a_first: bool,
    gradient: str, need_cost: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    needs = ((cost, need_cost), (a, need_a), (b, need_b))
    return tuple(operand.new_empty(operand.shape if need else (0,)) for operand, need in needs)


def _bwd(
    call_type: type[_Call],
    cost: Tensor, a: Tensor, b: Tensor, initial_f: Tensor | None, initial_g: Tensor | None,
    row_offsets: Tensor, column_offsets: Tensor,
    history: Tensor, grad_transport_cost: Tensor | None, grad_regularized_cost: Tensor | None, grad_f: Tensor | None,
    grad_g: Tensor | None, epsilon: float, num_iters: int, penalty_a: float, penalty_b: float, update_a_first: bool,
    gradient: str, need_cost: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    keep, mode = KEEP[gradient], GRADIENTS[gradient]
    if history.shape[0] != _history_size(a.shape[0], b.shape[0], row_offsets.shape[0] - 1, num_iters, keep):
        raise ValueError(f"history: expected that of a forward with keep={keep}, got {tuple(history.shape)}")
    needs = ((cost, need_cost), (a, need_a), (b, need_b))
    grads = tuple(operand.new_empty(operand.shape if need else (0,)) for operand, need in needs)
    history = history.contiguous()
    incoming = tuple(map(contiguous, (grad_transport_cost, grad_regularized_cost, grad_f, grad_g)))
    options = (epsilon, 0.0, 1.0, penalty_a, penalty_b)
    call = call_type(
        cost, a, b, initial_f, initial_g, row_offsets, column_offsets, history, options, num_iters, keep,
        update_a_first, mode,
    )  # fmt: skip
    grad_cost, grad_a, grad_b = grads
    if update_a_first:
        call.backward(mode, (*incoming, grad_cost, grad_a, grad_b))
    else:
        call.backward(mode, (*incoming[:2], incoming[3], incoming[2], grad_cost, grad_b, grad_a))
    return call.given_back(grad_cost), grad_a, grad_b


def _bwd_cpu(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return _bwd(_Call, *arguments)


def _bwd_cuda(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    if arguments[-4] == "implicit":
        raise NotImplementedError("sinkhorn_ragged_bwd: no implicit gradient on CUDA; the reference computes it")
    return _bwd(_DeviceCall, *arguments)


def _points(x, y, cost, offsets, metric: str, backward: bool) -> tuple[int, tuple, tuple[int, int], Tensor]:
    """What the native module is told of packed points, and the workspace, which has to outlive the call."""
    code, addresses = _library.dtype_code(x), (offsets[0].data_ptr(), offsets[1].data_ptr())
    problems = offsets[0].shape[0] - 1
    native.ragged_check(addresses, problems, x.shape[0], y.shape[0], cost.shape[0])
    points = (
        address(x), address(y), address(cost), 0, problems, x.shape[1], METRICS[metric], torch.get_num_threads(),
    )  # fmt: skip
    elements = native.cost_matrix_ragged_workspace(code, points, addresses, backward)
    scratch = _library.workspace(elements * x.element_size())
    return code, (*points[:3], scratch.data_ptr(), *points[4:]), addresses, scratch


def _cost_fwd_fake(
    x: Tensor, y: Tensor, row_offsets: Tensor, column_offsets: Tensor, entries: int, metric: str
) -> Tensor:
    return x.new_empty(entries)


def _cost_fwd_cpu(
    x: Tensor, y: Tensor, row_offsets: Tensor, column_offsets: Tensor, entries: int, metric: str
) -> Tensor:
    x, y, *offsets = (tensor.contiguous() for tensor in (x, y, row_offsets, column_offsets))
    cost = x.new_empty(entries)
    code, points, addresses, scratch = _points(x, y, cost, offsets, metric, False)
    if entries == 0 or x.shape[1] == 0:
        return cost.zero_()  # the sum over no features
    native.cost_matrix_ragged_fwd(code, points, addresses)
    return cost


def _cost_fwd_cuda(
    x: Tensor, y: Tensor, row_offsets: Tensor, column_offsets: Tensor, entries: int, metric: str
) -> Tensor:
    x, y, *offsets = (tensor.contiguous() for tensor in (x, y, row_offsets, column_offsets))
    cost = x.new_empty(entries)
    if entries == 0 or x.shape[1] == 0:
        return cost.zero_()  # the sum over no features
    _on_device("cost_matrix_ragged_fwd", x, y, cost, offsets, metric)
    return cost


def _on_device(function: str, x: Tensor, y: Tensor, cost: Tensor, offsets: list[Tensor], metric: str, *grads: Tensor):
    """Call the CUDA half on packed points; `grads` are the gradients of cost, x and y, which may be empty."""
    code, addresses = _library.dtype_code(x), (*map(address, offsets), cost.shape[0])
    sizes = (offsets[0].shape[0] - 1, x.shape[0], y.shape[0], x.shape[1], METRICS[metric])
    needed = _library.cuda.cost_matrix_ragged_workspace(code, (0, 0, 0, 0, *sizes), cost.shape[0])
    scratch = _library.cuda_workspace(x, needed)
    points = (address(x), address(y), address(cost), address(scratch), *sizes)
    given = (tuple(map(address, grads)),) if grads else ()
    _library.launch("cost_matrix_ragged", x, function, code, points, addresses, *given)


def _cost_bwd_fake(
    x: Tensor, y: Tensor, row_offsets: Tensor, column_offsets: Tensor, cost: Tensor, grad_cost: Tensor, metric: str,
    need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape if need_x else (0,)), y.new_empty(y.shape if need_y else (0,))


def _cost_bwd_cpu(
    x: Tensor, y: Tensor, row_offsets: Tensor, column_offsets: Tensor, cost: Tensor, grad_cost: Tensor, metric: str,
    need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, y, *offsets = (tensor.contiguous() for tensor in (x, y, row_offsets, column_offsets))
    cost, grad_cost = cost.contiguous(), grad_cost.contiguous()
    grads = _cost_bwd_fake(x, y, row_offsets, column_offsets, cost, grad_cost, metric, need_x, need_y)
    if x.shape[1] and any(grad.numel() for grad in grads):
        code, points, addresses, scratch = _points(x, y, cost, offsets, metric, True)
        native.cost_matrix_ragged_bwd(code, points, addresses, tuple(map(address, (grad_cost, *grads))))
    return grads


def _cost_bwd_cuda(
    x: Tensor, y: Tensor, row_offsets: Tensor, column_offsets: Tensor, cost: Tensor, grad_cost: Tensor, metric: str,
    need_x: bool, need_y: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, y, *offsets = (tensor.contiguous() for tensor in (x, y, row_offsets, column_offsets))
    cost, grad_cost = cost.contiguous(), grad_cost.contiguous()
    grads = _cost_bwd_fake(x, y, *offsets, cost, grad_cost, metric, need_x, need_y)
    if x.shape[1] and any(grad.numel() for grad in grads):
        _on_device("cost_matrix_ragged_bwd", x, y, cost, offsets, metric, grad_cost, *grads)
    return grads


_library.register(
    "sinkhorn_ragged_fwd(Tensor cost, Tensor a, Tensor b, Tensor? initial_f, Tensor? initial_g, Tensor row_offsets, "
    "Tensor column_offsets, float epsilon, int num_iters, float tol, float relaxation, float penalty_a, "
    "float penalty_b, bool update_a_first, int keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    _fwd_cpu,
    cuda=_fwd_cuda,
    triton="sinkhorn_ragged:sinkhorn_ragged_fwd",
)
_library.register(
    "sinkhorn_ragged_bwd(Tensor cost, Tensor a, Tensor b, Tensor? initial_f, Tensor? initial_g, Tensor row_offsets, "
    "Tensor column_offsets, Tensor history, Tensor? grad_transport_cost, Tensor? grad_regularized_cost, "
    "Tensor? grad_f, Tensor? grad_g, float epsilon, int num_iters, float penalty_a, float penalty_b, "
    "bool update_a_first, str gradient, bool need_cost, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    _bwd_cpu,
    cuda=_bwd_cuda,
    triton="sinkhorn_ragged:sinkhorn_ragged_bwd",
)
_library.register(
    "cost_matrix_ragged_fwd(Tensor x, Tensor y, Tensor row_offsets, Tensor column_offsets, int entries, str metric) "
    "-> Tensor",
    _cost_fwd_fake,
    _cost_fwd_cpu,
    cuda=_cost_fwd_cuda,
    triton="cost_matrix_ragged:cost_matrix_ragged_fwd",
)
_library.register(
    "cost_matrix_ragged_bwd(Tensor x, Tensor y, Tensor row_offsets, Tensor column_offsets, Tensor cost, "
    "Tensor grad_cost, str metric, bool need_x, bool need_y) -> (Tensor, Tensor)",
    _cost_bwd_fake,
    _cost_bwd_cpu,
    cuda=_cost_bwd_cuda,
    triton="cost_matrix_ragged:cost_matrix_ragged_bwd",
)

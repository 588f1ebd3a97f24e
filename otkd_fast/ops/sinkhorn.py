"""``sinkhorn_fwd`` and ``sinkhorn_bwd``: Sinkhorn on a dense cost (kernels: ``csrc/cpu/sinkhorn.cpp``,
``csrc/cuda/sinkhorn.cu``).

The kernels update rows first. Columns first is the transposed problem: cost, marginals and potentials change places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library
from ._library import address, contiguous, native

GRADIENTS = {"unroll": 0, "envelope": 1, "detach": 2, "last_step": 3, "implicit": 4}
KEEP_NOTHING, KEEP_LAST, KEEP_ALL, KEEP_LAST_STEP = 0, 1, 2, 3
# what the history has to hold for a gradient
KEEP = {
    "unroll": KEEP_ALL, "envelope": KEEP_LAST, "detach": KEEP_LAST, "last_step": KEEP_LAST_STEP, "implicit": KEEP_LAST,
}  # fmt: skip
_HEADER = 2
_FORWARD = -1
_SMALL_SIDE, _FEW_PROBLEMS = 32, 4
_TOGETHER = 8  # set in what the native module is told to keep, where it solves many problems at a time


def history_size(n: int, m: int, num_iters: int, keep: int, together: bool = False) -> int:
    """Doubles of history a problem: how it was solved and how many iterations ran, then the scalings that are kept.

    together: of a problem that shares vectors with others; its backward runs the loop again rather than to read it.
    """
    if keep == KEEP_NOTHING:
        return 0
    slots = {KEEP_LAST: 1, KEEP_ALL: 0 if together else num_iters, KEEP_LAST_STEP: 2}[keep]
    return _HEADER + slots * (n + m)


def many_small(batch: Sequence[int], n: int, m: int, penalty_a: float, penalty_b: float) -> bool:
    """Whether a batch is solved many problems at a time, one in each lane: the rule of csrc/include/.../sinkhorn.h."""
    if n > _SMALL_SIDE or m > _SMALL_SIDE or penalty_a != math.inf or penalty_b != math.inf:
        return False
    return _library.product(batch) >= _FEW_PROBLEMS


def _problems(
    operands: tuple[Tensor | None, ...], history: Tensor, num_iters: int, keep: int, options: tuple[float, ...]
) -> tuple:
    """What the native module is told of the problems, but for the workspace.

    operands: cost, a, b, initial_f, initial_g, all contiguous; options: epsilon, tol, relaxation, penalty_a, penalty_b.
    """
    cost = operands[0]
    *batch, n, m = cost.shape
    return (
        _library.dtype_code(cost), *(address(tensor) for tensor in operands), address(history), 0,
        _library.product(batch), n, m, num_iters, keep, *options, torch.get_num_threads(),
    )  # fmt: skip


def _with_workspace(problems: tuple, gradient: int) -> tuple[tuple, Tensor]:
    """The same with a workspace, and that, which has to outlive the call."""
    scratch = _library.workspace(native.sinkhorn_workspace(problems, gradient))
    return (*problems[:7], scratch.data_ptr(), *problems[8:]), scratch


def _in_rows(masses: Tensor | None, together: bool) -> tuple[Tensor | None, int]:
    """The masses, and the elements from those of one problem to the next; 0: there is nothing between them.

    Many small problems at a time (`together`) are read where they are, others copied.
    """
    if masses is None or masses.is_contiguous():
        return masses, 0
    if together and masses.dim() == 2 and masses.stride(1) == 1 and masses.stride(0) > 0:
        return masses, masses.stride(0)
    return masses.contiguous(), 0


def _fwd_fake(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    *batch, n, m = cost.shape
    together = cost.device.type == "cpu" and many_small(batch, n, m, penalty_a, penalty_b)
    return _outputs(cost, num_iters, keep, together)


def _fwd_fake_apart(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What kernels allocate that keep every iteration of every problem: those of a GPU."""
    return _outputs(cost, num_iters, keep, together=False)


def _outputs(cost: Tensor, num_iters: int, keep: int, together: bool) -> tuple[Tensor, ...]:
    *batch, n, m = cost.shape
    transport_cost, regularized_cost, marginal_error = (cost.new_empty(batch) for _ in range(3))
    size = history_size(n, m, num_iters, keep, together)
    history = cost.new_empty((*batch, size), dtype=torch.float64)
    return (
        transport_cost, regularized_cost, cost.new_empty((*batch, n)), cost.new_empty((*batch, m)), marginal_error,
        cost.new_empty(batch, dtype=torch.int64), history,
    )  # fmt: skip


def _fwd_cpu(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int, together: bool | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`together`: whether many problems are solved at a time; None: by their sizes."""
    if together is None:
        together = many_small(cost.shape[:-2], *cost.shape[-2:], penalty_a, penalty_b)
    outputs = _outputs(cost, num_iters, keep, together)
    transport_cost, regularized_cost, f, g, marginal_error, iterations, history = outputs
    if not update_a_first:
        cost, a, b, initial_f, initial_g, f, g = cost.mT, b, a, initial_g, initial_f, g, f
        penalty_a, penalty_b = penalty_b, penalty_a
    if marginal_error.numel():
        (a, a_stride), (b, b_stride) = _in_rows(a, together), _in_rows(b, together)
        operands = (contiguous(cost), a, b, contiguous(initial_f), contiguous(initial_g))
        options = (epsilon, tol, relaxation, penalty_a, penalty_b)
        told = keep | (_TOGETHER if together else 0)
        problems, scratch = _with_workspace(_problems(operands, history, num_iters, told, options), _FORWARD)
        results = (transport_cost, regularized_cost, f, g, marginal_error, iterations)
        native.sinkhorn_fwd(problems, tuple(address(tensor) for tensor in results), a_stride, b_stride)
    return outputs


def _bwd_fake(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    history: Tensor, grad_transport_cost: Tensor | None, grad_regularized_cost: Tensor | None, grad_f: Tensor | None,
    grad_g: Tensor | None, epsilon: float, num_iters: int, penalty_a: float, penalty_b: float, update_a_first: bool,
    gradient: str, need_cost: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *batch, n, m = cost.shape
    return (
        cost.new_empty(cost.shape if need_cost else (0,)),
        cost.new_empty((*batch, n) if need_a else (0,)),
        cost.new_empty((*batch, m) if need_b else (0,)),
    )


def _bwd_cpu(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    history: Tensor, grad_transport_cost: Tensor | None, grad_regularized_cost: Tensor | None, grad_f: Tensor | None,
    grad_g: Tensor | None, epsilon: float, num_iters: int, penalty_a: float, penalty_b: float, update_a_first: bool,
    gradient: str, need_cost: bool, need_a: bool, need_b: bool, together: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not update_a_first:
        cost, a, b, initial_f, initial_g, grad_f, grad_g = cost.mT, b, a, initial_g, initial_f, grad_g, grad_f
        penalty_a, penalty_b, need_a, need_b = penalty_b, penalty_a, need_b, need_a
    *batch, n, m = cost.shape
    keep = KEEP[gradient]
    sizes = {t: history_size(n, m, num_iters, keep, t) for t in (False, True)}
    if history.shape[-1] not in sizes.values():
        raise ValueError(f"history: expected that of a forward with keep={keep}, got {tuple(history.shape)}")
    # vmap may have changed the number of problems since the forward: the history tells how they were solved
    if together is None:
        together = many_small(batch, n, m, penalty_a, penalty_b)
    if keep == KEEP_ALL:
        together = history.shape[-1] == sizes[True]
    grads = (
        cost.new_empty(cost.shape if need_cost else (0,)),
        cost.new_empty((*batch, n) if need_a else (0,)),
        cost.new_empty((*batch, m) if need_b else (0,)),
    )
    if _library.product(batch):
        history = history.contiguous()
        (a, a_stride), (b, b_stride) = _in_rows(a, together), _in_rows(b, together)
        operands = (contiguous(cost), a, b, contiguous(initial_f), contiguous(initial_g))
        incoming = [contiguous(grad) for grad in (grad_transport_cost, grad_regularized_cost, grad_f, grad_g)]
        options = (epsilon, 0.0, 1.0, penalty_a, penalty_b)
        mode = GRADIENTS[gradient]
        told = keep | (_TOGETHER if together else 0)
        problems, scratch = _with_workspace(_problems(operands, history, num_iters, told, options), mode)
        addresses = tuple(address(tensor) for tensor in (*incoming, *grads))
        native.sinkhorn_bwd(problems, mode, addresses, a_stride, b_stride)
    if update_a_first:
        return grads
    grad_cost, grad_b, grad_a = grads
    return grad_cost.mT.contiguous() if need_cost else grad_cost, grad_a, grad_b


def _fwd_cuda(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    options = (epsilon, num_iters, tol, relaxation, penalty_a, penalty_b, update_a_first, keep)
    outputs = _outputs(cost, num_iters, keep, together=False)
    forward_on_device(outputs, cost, a, b, initial_f, initial_g, *options)
    return outputs


def forward_on_device(
    outputs: tuple[Tensor, ...], cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None,
    initial_g: Tensor | None, epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float,
    penalty_b: float, update_a_first: bool, keep: int,
) -> None:  # fmt: skip
    """Fill the outputs; a cost (n, m) may be shared by the batch of the outputs."""
    transport_cost, regularized_cost, f, g, marginal_error, iterations, history = outputs
    if not marginal_error.numel():
        return
    if not update_a_first:
        cost, a, b, initial_f, initial_g, f, g = cost.mT, b, a, initial_g, initial_f, g, f
        penalty_a, penalty_b = penalty_b, penalty_a
    operands = tuple(contiguous(tensor) for tensor in (cost, a, b, initial_f, initial_g))
    options = (epsilon, tol, relaxation, penalty_a, penalty_b)
    problems, scratch = _on_device(_problems(operands, history, num_iters, keep, options), outputs[0], _FORWARD)
    results = (transport_cost, regularized_cost, f, g, marginal_error, iterations)
    shared = cost.dim() == 2 and marginal_error.dim() > 0
    _library.launch("sinkhorn", cost, "sinkhorn_fwd", problems, shared, tuple(address(tensor) for tensor in results))


def _on_device(problems: tuple, per_problem: Tensor, gradient: int) -> tuple[tuple, Tensor]:
    """The same for as many problems as `per_problem` has, with a workspace, and that, which has to outlive the call."""
    problems = (*problems[:8], per_problem.numel(), *problems[9:])
    scratch = _library.cuda_workspace(per_problem, _library.cuda.sinkhorn_workspace(problems, gradient))
    return (*problems[:7], address(scratch), *problems[8:]), scratch


def _bwd_cuda(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    history: Tensor, grad_transport_cost: Tensor | None, grad_regularized_cost: Tensor | None, grad_f: Tensor | None,
    grad_g: Tensor | None, epsilon: float, num_iters: int, penalty_a: float, penalty_b: float, update_a_first: bool,
    gradient: str, need_cost: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *batch, n, m = cost.shape
    if not update_a_first:
        n, m = m, n
    grads = (
        cost.new_empty((*batch, n, m) if need_cost else (0,)),
        cost.new_empty((*batch, cost.shape[-2]) if need_a else (0,)),
        cost.new_empty((*batch, cost.shape[-1]) if need_b else (0,)),
    )
    backward_on_device(
        grads, cost, a, b, initial_f, initial_g, history, grad_transport_cost, grad_regularized_cost, grad_f, grad_g,
        epsilon, num_iters, penalty_a, penalty_b, update_a_first, gradient,
    )  # fmt: skip
    if need_cost and not update_a_first:
        return grads[0].mT.contiguous(), grads[1], grads[2]
    return grads


def backward_on_device(
    grads: tuple[Tensor, Tensor, Tensor], cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None,
    initial_g: Tensor | None, history: Tensor, grad_transport_cost: Tensor | None,
    grad_regularized_cost: Tensor | None, grad_f: Tensor | None, grad_g: Tensor | None, epsilon: float,
    num_iters: int, penalty_a: float, penalty_b: float, update_a_first: bool, gradient: str,
) -> None:  # fmt: skip
    """Fill the gradients of cost, a, b that are not empty; that of the cost is transposed where columns come first.

    A cost (n, m) may be shared by the batch of `history`; its gradient is per problem all the same.
    """
    if gradient == "implicit":
        raise NotImplementedError("sinkhorn_bwd: no implicit gradient on CUDA; the reference computes it")
    grad_cost, grad_a, grad_b = grads
    if not update_a_first:
        cost, a, b, initial_f, initial_g, grad_f, grad_g = cost.mT, b, a, initial_g, initial_f, grad_g, grad_f
        penalty_a, penalty_b, grad_a, grad_b = penalty_b, penalty_a, grad_b, grad_a
    n, m = cost.shape[-2:]
    if history.shape[-1] != history_size(n, m, num_iters, KEEP[gradient]):
        raise ValueError(f"history: expected that of a forward with keep={KEEP[gradient]}, got {tuple(history.shape)}")
    history = history.contiguous()
    per_problem = history[..., 0]
    if not per_problem.numel():
        return
    operands = tuple(contiguous(tensor) for tensor in (cost, a, b, initial_f, initial_g))
    incoming = [contiguous(grad) for grad in (grad_transport_cost, grad_regularized_cost, grad_f, grad_g)]
    mode, options = GRADIENTS[gradient], (epsilon, 0.0, 1.0, penalty_a, penalty_b)
    problems = _problems(operands, history, num_iters, KEEP[gradient], options)
    problems, scratch = _on_device(problems, per_problem, mode)
    results = (address(grad) if grad.numel() else 0 for grad in (grad_cost, grad_a, grad_b))
    shared = cost.dim() == 2 and history.dim() > 1
    _library.launch("sinkhorn", cost, "sinkhorn_bwd", problems, shared, mode, (*map(address, incoming), *results))


_library.register(
    "sinkhorn_fwd(Tensor cost, Tensor? a, Tensor? b, Tensor? initial_f, Tensor? initial_g, float epsilon, "
    "int num_iters, float tol, float relaxation, float penalty_a, float penalty_b, bool update_a_first, int keep) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    _fwd_cpu,
    cuda=_fwd_cuda,
    triton="sinkhorn:sinkhorn_fwd",
    triton_fake=_fwd_fake_apart,
)
_library.register(
    "sinkhorn_bwd(Tensor cost, Tensor? a, Tensor? b, Tensor? initial_f, Tensor? initial_g, Tensor history, "
    "Tensor? grad_transport_cost, Tensor? grad_regularized_cost, Tensor? grad_f, Tensor? grad_g, float epsilon, "
    "int num_iters, float penalty_a, float penalty_b, bool update_a_first, str gradient, bool need_cost, bool need_a, "
    "bool need_b) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    _bwd_cpu,
    cuda=_bwd_cuda,
    triton="sinkhorn:sinkhorn_bwd",
)

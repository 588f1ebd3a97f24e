"""``sinkhorn_shared_fwd`` and ``_bwd``: one cost (n, m) for a batch of marginals (``csrc/cpu/sinkhorn_shared.cpp``).

The kernels update rows first; columns first is the transposed problem. They solve in float32 as far as the range of the
exponents permits, then in float64; the problems that even that does not suffice for go to ``sinkhorn_fwd`` and
``sinkhorn_bwd``, as do batches of a few problems: a few at a time, so that no tensor of the size of all the expanded
costs exists.

Guards (0: none) are constants in the denominators of the scalings, u = a / (K v + guard_a), v = b / (K^T u + guard_b),
K = exp(-C / epsilon), from scalings that are 1 on the support: for plain iterations of a fixed number. They are no part
of a fixed point, so 'implicit' is refused. Only the CPU's kernels have them. With guards float64 serves every range.

History, one float64 tensor: how each problem was solved (B,) and its iterations (B,), as the bits of int64; then the
scalings of the blocks of problems that were solved together in the input's type; then, problem by problem, those of the
others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library, sinkhorn
from ._library import address, contiguous, native
from ._sinkhorn_shared_implicit import implicit_gradients, unpacked_scalings

FEW = 4  # problems up to which the dense solver is quicker
LANES = 16  # a multiple of the problems that any instruction set puts side by side
CHUNK_ENTRIES = 1 << 22  # of expanded costs handed to the dense solver at a time

FLOAT, DOUBLE, DENSE = 0, 1, 2  # how a problem was solved; the first two are the native module's Method


def _kept(num_iters: int, keep: int) -> int:
    """Iterations of which the scalings are kept: none, the last, all, the last two."""
    return (0, 1, num_iters, 2)[keep]


def _history_parts(cost: Tensor, batch: int, num_iters: int, keep: int) -> tuple[int, int]:
    """Doubles of the blocks solved together, and of one problem solved apart."""
    n, m = cost.shape
    scalings = _kept(num_iters, keep) * (n + m)
    together = (batch + LANES - 1) // LANES * LANES * scalings
    return together * cost.element_size() // 8, max(scalings, sinkhorn.history_size(n, m, num_iters, keep))


def _batch(a: Tensor | None, b: Tensor | None) -> int:
    return a.shape[0] if a is not None else b.shape[0]


def _fwd_fake(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int, guard_a: float = 0.0, guard_b: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, (n, m) = _batch(a, b), cost.shape
    empty = cost.new_empty
    transport_cost, regularized_cost, marginal_error = empty(batch), empty(batch), empty(batch)
    count = empty(batch, dtype=torch.int64)
    size = 0
    if keep:
        together, apart = _history_parts(cost, batch, num_iters, keep)
        size = 2 * batch + together + batch * apart
    history = empty(size, dtype=torch.float64)
    f, g = empty(batch, n), empty(batch, m)
    return transport_cost, regularized_cost, f, g, marginal_error, count, history


def _triton_fwd_fake(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int, guard_a: float = 0.0, guard_b: float = 0.0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The Triton kernels keep a history for each problem, flat."""
    from ..triton_kernels.sinkhorn_shared import history_doubles

    per_problem = cost.expand(_batch(a, b), *cost.shape), a, b, initial_f, initial_g
    options = epsilon, num_iters, tol, relaxation, penalty_a, penalty_b, update_a_first, keep
    *outputs, history = sinkhorn._fwd_fake_apart(*per_problem, *options)
    size, _ = history_doubles(cost, num_iters, tol, relaxation, penalty_a, penalty_b, keep)
    return *outputs, history.new_empty((history.shape[0], size))


class _History:
    """Where the parts of a contiguous history tensor begin, and views of two of them."""

    def __init__(self, history: Tensor, cost: Tensor, batch: int, num_iters: int, keep: int) -> None:
        together, apart = _history_parts(cost, batch, num_iters, keep)
        self._history, self._batch, self._rest = history, batch, 2 * batch + together
        self.methods = history.data_ptr()
        self.iterations, self.together = self.methods + 8 * batch, self.methods + 16 * batch
        self.apart, self.apart_stride = self.methods + 8 * self._rest, apart

    def method_of(self) -> Tensor:
        """How each problem was solved, (B,)."""
        return self._history[: self._batch]

    def scalings_apart(self) -> Tensor:
        """(B, doubles of a problem solved apart)"""
        return self._history[self._rest :].view(self._batch, self.apart_stride)

    def last_scalings(self, solved: Tensor, cost: Tensor, rows_first: bool) -> tuple[Tensor, Tensor]:
        """x and y of the problems `solved`, of which one iteration is kept, in float64; P = diag(a x) K diag(b y)."""
        first, second = cost.shape if rows_first else cost.shape[::-1]
        blocks = self._history[2 * self._batch : self._rest].view(cost.dtype)
        scalings = unpacked_scalings(blocks, self._batch, first + second).double()
        if cost.dtype is not torch.float64:
            apart = (self.method_of() == DOUBLE).unsqueeze(1)
            scalings = torch.where(apart, self.scalings_apart()[:, : first + second], scalings)
        x, y = scalings[solved].split((first, second), 1)
        return (x, y) if rows_first else (y, x)

    def place(self, call) -> None:
        """Tells a native call where everything is."""
        call.methods, call.kept_iterations = self.methods, self.iterations
        call.blocks, call.apart, call.apart_stride = self.together, self.apart, self.apart_stride


def _readable(cost: Tensor, rows_first: bool) -> tuple[Tensor, bool]:
    """The cost in memory as the kernel can read it, and whether it finds it transposed; its rows are updated first."""
    if cost.is_contiguous():
        return cost, not rows_first
    if cost.mT.is_contiguous():
        return cost, rows_first
    return cost.contiguous(), not rows_first


def _check_guards(guard_a: float, guard_b: float, plain: bool) -> bool:
    """Whether there are guards; ValueError where they are not served."""
    guarded = guard_a != 0 or guard_b != 0
    if guarded and not (plain and guard_a >= 0 and guard_b >= 0):
        raise ValueError("guard_a, guard_b: expected numbers >= 0, not 0 in plain iterations of a fixed number only")
    return guarded


def _call(cost, turned, rows_first, a, b, initial_f, initial_g, epsilon, num_iters, keep, penalty_a, penalty_b,
          guard_a, guard_b):  # fmt: skip
    """A native call with what forward and backward have in common; what :func:`_readable` gave, all else contiguous.

    a, initial_f, penalty_a, guard_a are those of the rows, which are updated first.
    """
    n, m = cost.shape if rows_first else cost.shape[::-1]
    return native.SinkhornSharedCall(
        _library.dtype_code(cost), torch.get_num_threads(), keep, _batch(a, b), n, m, num_iters, turned, epsilon,
        penalty_a, penalty_b, guard_a, guard_b, cost.data_ptr(), address(a), address(b), address(initial_f),
        address(initial_g),
    )  # fmt: skip


def _fwd_cpu(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int, guard_a: float = 0.0, guard_b: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    options = (epsilon, num_iters, tol, relaxation, penalty_a, penalty_b, update_a_first, keep)
    guarded = _check_guards(guard_a, guard_b, tol == 0 and relaxation == 1 and penalty_a == penalty_b == torch.inf)
    outputs = _fwd_fake(cost, a, b, initial_f, initial_g, *options)
    *_, count, history = outputs
    batch = _batch(a, b)
    if batch == 0:
        return outputs
    left = None  # all of them
    parts = _History(history, cost, batch, num_iters, keep) if keep else None
    if batch > FEW or guarded:
        left = _solve(outputs, parts, cost, a, b, initial_f, initial_g, *options, guard_a, guard_b)
    else:
        left = torch.arange(batch)
    for chunk in () if left is None else left.split(max(1, CHUNK_ENTRIES // cost.numel())):
        _solve_dense(outputs, parts, chunk, (cost, a, b, initial_f, initial_g), options)
    return outputs


def _solve(
    outputs, parts, cost, a, b, initial_f, initial_g, epsilon, num_iters, tol, relaxation, penalty_a, penalty_b,
    update_a_first, keep, guard_a, guard_b,
) -> Tensor | None:  # fmt: skip
    """Solves what scalings can; the indices of the problems that are left, None where there are none."""
    transport_cost, regularized_cost, f, g, marginal_error, count, _ = outputs
    if not update_a_first:
        a, b, initial_f, initial_g, f, g = b, a, initial_g, initial_f, g, f
        penalty_a, penalty_b, guard_a, guard_b = penalty_b, penalty_a, guard_b, guard_a
    cost, turned = _readable(cost, update_a_first)
    operands = [contiguous(tensor) for tensor in (a, b, initial_f, initial_g)]
    common = (epsilon, num_iters, keep, penalty_a, penalty_b, guard_a, guard_b)
    call = _call(cost, turned, update_a_first, *operands, *common)
    call.set_outputs(
        tol, relaxation, transport_cost.data_ptr(), regularized_cost.data_ptr(), f.data_ptr(), g.data_ptr(),
        marginal_error.data_ptr(), count.data_ptr(),
    )  # fmt: skip
    if keep:
        parts.place(call)
    problems, call.count = None, call.batch
    for method in (FLOAT, DOUBLE)[cost.dtype is torch.float64 :]:
        call.method, call.problems = method, address(problems)
        size = call.workspace_bytes(False)
        size = (size + 7) // 8 * 8  # behind it the problems that are left
        scratch = _library.workspace(size + 8 * call.count)
        call.workspace, call.left = scratch.data_ptr(), scratch.data_ptr() + size
        call.count = call.forward()
        if call.count == 0:
            return None
        problems = scratch[size : size + 8 * call.count].view(torch.int64).clone()
    return problems


def _solve_dense(outputs, parts, chunk, operands, options) -> None:
    """The problems `chunk` by the solver of :mod:`.sinkhorn`, results and history put into place."""
    cost, *per_problem = operands
    costs = cost.expand(len(chunk), *cost.shape)
    found = sinkhorn._fwd_cpu(costs, *(None if t is None else t[chunk] for t in per_problem), *options, together=False)
    for output, value in zip(outputs[:6], found[:6], strict=True):
        output[chunk] = value
    if parts is not None:
        parts.method_of()[chunk] = DENSE
        parts.scalings_apart()[chunk, : found[6].shape[-1]] = found[6]


def _bwd_fake(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    history: Tensor, grad_transport_cost: Tensor | None, grad_regularized_cost: Tensor | None, grad_f: Tensor | None,
    grad_g: Tensor | None, epsilon: float, num_iters: int, penalty_a: float, penalty_b: float, update_a_first: bool,
    gradient: str, need_cost: bool, need_a: bool, need_b: bool, guard_a: float = 0.0, guard_b: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, (n, m) = _batch(a, b), cost.shape
    return (
        cost.new_empty((n, m) if need_cost else (0,)),
        cost.new_empty((batch, n) if need_a else (0,)),
        cost.new_empty((batch, m) if need_b else (0,)),
    )


def _bwd_cpu(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    history: Tensor, grad_transport_cost: Tensor | None, grad_regularized_cost: Tensor | None, grad_f: Tensor | None,
    grad_g: Tensor | None, epsilon: float, num_iters: int, penalty_a: float, penalty_b: float, update_a_first: bool,
    gradient: str, need_cost: bool, need_a: bool, need_b: bool, guard_a: float = 0.0, guard_b: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    options = (epsilon, num_iters, penalty_a, penalty_b, update_a_first, gradient, need_cost, need_a, need_b)
    per_problem = (a, b, initial_f, initial_g)
    incoming = (grad_transport_cost, grad_regularized_cost, grad_f, grad_g)
    grads = _bwd_fake(cost, *per_problem, history, *incoming, *options)
    if need_cost:
        grads[0].zero_()
    batch = _batch(a, b)
    if batch == 0:
        return grads
    parts = _History(history.contiguous(), cost, batch, num_iters, sinkhorn.KEEP[gradient])
    if gradient == "implicit":
        if guard_a != 0 or guard_b != 0:
            raise ValueError("gradient: expected another than 'implicit' with guards, which no fixed point has")
        _differentiate_implicitly(grads, parts, cost, per_problem, incoming, options)
        return grads
    counts = native.sinkhorn_shared_methods(parts.methods, batch)
    for method in (FLOAT, DOUBLE):
        if counts[method]:
            _differentiate(method, grads, parts, cost, *per_problem, *incoming, *options, guard_a, guard_b)
    left = (parts.method_of() == DENSE).nonzero().squeeze(1) if counts[DENSE] else None
    for chunk in () if left is None else left.split(max(1, CHUNK_ENTRIES // cost.numel())):
        _differentiate_dense(grads, parts, chunk, cost, (*per_problem, *incoming), options)
    return grads


def _differentiate(
    method, grads, parts, cost, a, b, initial_f, initial_g, grad_transport_cost, grad_regularized_cost, grad_f, grad_g,
    epsilon, num_iters, penalty_a, penalty_b, update_a_first, gradient, need_cost, need_a, need_b, guard_a, guard_b,
) -> None:  # fmt: skip
    """The problems that were solved by this method on scalings."""
    grad_cost, grad_a, grad_b = grads
    if not update_a_first:
        a, b, initial_f, initial_g, grad_f, grad_g = b, a, initial_g, initial_f, grad_g, grad_f
        penalty_a, penalty_b, guard_a, guard_b = penalty_b, penalty_a, guard_b, guard_a
        grad_a, grad_b = grad_b, grad_a
        grad_cost = torch.zeros_like(cost.mT, memory_format=torch.contiguous_format) if need_cost else grad_cost
    if need_cost:  # its gradient is made in the order of the kernel's rows
        rows_cost = (cost if update_a_first else cost.mT).contiguous()
        cost, turned = (rows_cost if update_a_first else rows_cost.mT), False
    else:
        cost, turned = _readable(cost, update_a_first)
    operands = [contiguous(tensor) for tensor in (a, b, initial_f, initial_g)]
    incoming = [contiguous(grad) for grad in (grad_transport_cost, grad_regularized_cost, grad_f, grad_g)]
    common = (epsilon, num_iters, sinkhorn.KEEP[gradient], penalty_a, penalty_b, guard_a, guard_b)
    call = _call(cost, turned, update_a_first, *operands, *common)
    call.method, call.gradient, call.count = method, sinkhorn.GRADIENTS[gradient], call.batch
    if method == DOUBLE and cost.dtype is not torch.float64:
        problems = (parts.method_of() == method).nonzero().squeeze(1)
        call.problems, call.count = address(problems), len(problems)
    parts.place(call)
    call.iterations = parts.iterations
    call.grad_transport_cost, call.grad_regularized_cost = address(incoming[0]), address(incoming[1])
    call.grad_f, call.grad_g = address(incoming[2]), address(incoming[3])
    call.grad_cost, call.grad_a, call.grad_b = (
        address(grad) if grad.numel() else 0 for grad in (grad_cost, grad_a, grad_b)
    )
    scratch = _library.workspace(call.workspace_bytes(True))
    call.workspace = address(scratch)
    call.backward()
    if need_cost and not update_a_first:
        grads[0].add_(grad_cost.mT)


def _differentiate_implicitly(grads, parts, cost, per_problem, incoming, options) -> None:
    """All of them: those solved on scalings together, the rest by the solver of :mod:`.sinkhorn`.

    The dual value does not change with potentials that have converged: its gradient is the envelope's.
    """
    a, b, *_ = per_problem
    epsilon, _, penalty_a, penalty_b, update_a_first, _, *needs = options
    for grad in grads:
        grad.zero_()
    methods = parts.method_of()
    solved = (methods != DENSE).nonzero().squeeze(1)
    if incoming[1] is not None:
        envelope = (*options[:5], "envelope", *needs, 0.0, 0.0)
        for method in sorted({*methods[solved].tolist()}):
            _differentiate(int(method), grads, parts, cost, *per_problem, None, incoming[1], None, None, *envelope)
    left = (methods == DENSE).nonzero().squeeze(1)
    for chunk in left.split(max(1, CHUNK_ENTRIES // cost.numel())) if len(left) else ():
        _differentiate_dense(grads, parts, chunk, cost, (*per_problem, *incoming), options)
    if len(solved) == 0 or all(incoming[k] is None for k in (0, 2, 3)):
        return
    x, y = parts.last_scalings(solved, cost, update_a_first)
    a, b = (
        cost.new_full((len(solved), size), 1 / size) if weights is None else weights[solved]
        for weights, size in zip((a, b), cost.shape, strict=True)
    )
    of_transport, _, of_f, of_g = (None if grad is None else grad[solved] for grad in incoming)
    if update_a_first:
        sides = (cost, a, b, x, y, of_transport, of_f, of_g, epsilon, penalty_a, penalty_b)
    else:
        sides = (cost.mT, b, a, y, x, of_transport, of_g, of_f, epsilon, penalty_b, penalty_a)
    grad_cost, *of_masses = implicit_gradients(*sides, needs[0])
    if needs[0]:
        grads[0].add_(grad_cost if update_a_first else grad_cost.mT)
    for grad, value in zip(grads[1:], of_masses if update_a_first else of_masses[::-1], strict=True):
        if grad.numel():
            grad[solved] += value.to(grad.dtype)


def _differentiate_dense(grads, parts, chunk, cost, per_problem, options) -> None:
    """The problems `chunk`, which the solver of :mod:`.sinkhorn` solved."""
    costs = cost.expand(len(chunk), *cost.shape)
    a, b, initial_f, initial_g, *incoming = (None if t is None else t[chunk] for t in per_problem)
    _, num_iters, *_, gradient, _, _, _ = options
    size = sinkhorn.history_size(*cost.shape, num_iters, sinkhorn.KEEP[gradient])
    history = parts.scalings_apart()[chunk, :size]
    found = sinkhorn._bwd_cpu(costs, a, b, initial_f, initial_g, history, *incoming, *options, together=False)
    if grads[0].numel():
        grads[0].add_(found[0].sum(0))
    for grad, value in zip(grads[1:], found[1:], strict=True):
        if grad.numel():
            grad[chunk] = value


def _fwd_cuda(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """By products of matrices where those kernels serve, else the kernels of the dense op, each problem reading the one
    cost. The history is that of the dense op, in the part of the problems solved apart.
    """
    options = (epsilon, num_iters, tol, relaxation, penalty_a, penalty_b, update_a_first, keep)
    outputs = _fwd_fake(cost, a, b, initial_f, initial_g, *options)
    *results, history = outputs
    batch = _batch(a, b)
    if keep:
        history = _History(history, cost, batch, num_iters, keep).scalings_apart()
    if not _together_on_device((*results, history), cost, a, b, initial_f, initial_g, *options):
        sinkhorn.forward_on_device((*results, history), cost, a, b, initial_f, initial_g, *options)
    return outputs


def _together_on_device(
    outputs: tuple[Tensor, ...], cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None,
    initial_g: Tensor | None, epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float,
    penalty_b: float, update_a_first: bool, keep: int,
) -> bool:  # fmt: skip
    """Fill the outputs by products of matrices; False: those kernels do not serve these problems."""
    transport_cost, regularized_cost, f, g, marginal_error, iterations, history = outputs
    if not update_a_first:
        cost, a, b, initial_f, initial_g, f, g = cost.mT, b, a, initial_g, initial_f, g, f
        penalty_a, penalty_b = penalty_b, penalty_a
    operands = [contiguous(tensor) for tensor in (cost, a, b, initial_f, initial_g)]
    options = (epsilon, tol, relaxation, penalty_a, penalty_b)
    problems = _problems_on_device(operands, history, len(f), num_iters, keep, options)
    problems, scratch = _with_workspace_on_device(problems, cost, -1)
    if problems is None:
        return False
    results = (transport_cost, regularized_cost, f, g, marginal_error, iterations)
    results = tuple(address(tensor) for tensor in results)
    _library.launch("sinkhorn_shared", cost, "sinkhorn_shared_fwd", problems, results)
    return True


def _problems_on_device(operands, history: Tensor, batch: int, num_iters: int, keep: int, options) -> tuple:
    """As in ``ops/sinkhorn.py``, of `batch` problems with one cost."""
    n, m = operands[0].shape
    return (
        _library.dtype_code(operands[0]), *map(address, operands), address(history), 0, batch, n, m, num_iters, keep,
        *options, 1,
    )  # fmt: skip


def _with_workspace_on_device(problems: tuple, like: Tensor, gradient: int) -> tuple[tuple | None, Tensor | None]:
    """The problems with a workspace, and that, which has to outlive the call; None: not by products of matrices."""
    num_bytes = _library.cuda.sinkhorn_shared_workspace(problems, gradient)
    if num_bytes < 0:
        return None, None
    scratch = _library.cuda_workspace(like, num_bytes)
    return (*problems[:7], address(scratch), *problems[8:]), scratch


def _bwd_cuda(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    history: Tensor, grad_transport_cost: Tensor | None, grad_regularized_cost: Tensor | None, grad_f: Tensor | None,
    grad_g: Tensor | None, epsilon: float, num_iters: int, penalty_a: float, penalty_b: float, update_a_first: bool,
    gradient: str, need_cost: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the forward; by the dense op's kernels the gradient of the cost is made a few problems at a time and added up
    in their order.
    """
    options = (epsilon, num_iters, penalty_a, penalty_b, update_a_first, gradient)
    tensors = (a, b, initial_f, initial_g, grad_transport_cost, grad_regularized_cost, grad_f, grad_g)
    batch, (n, m) = _batch(a, b), cost.shape
    grad_cost = cost.new_zeros((n, m) if need_cost else (0,))
    grad_a, grad_b = cost.new_empty((batch, n) if need_a else (0,)), cost.new_empty((batch, m) if need_b else (0,))
    history = _History(history.contiguous(), cost, batch, num_iters, sinkhorn.KEEP[gradient]).scalings_apart()
    if _differentiated_on_device((grad_cost, grad_a, grad_b), cost, history, tensors, options):
        return grad_cost, grad_a, grad_b
    chunk = max(1, 4 * CHUNK_ENTRIES // cost.numel()) if need_cost else max(batch, 1)
    for begin in range(0, batch, chunk):
        part = slice(begin, min(begin + chunk, batch))
        a, b, initial_f, initial_g, *incoming = (None if t is None else t[part] for t in tensors)
        shape = (part.stop - begin, n, m) if update_a_first else (part.stop - begin, m, n)
        apart = cost.new_empty(shape if need_cost else (0,))
        grads = (apart, grad_a[part], grad_b[part])
        sinkhorn.backward_on_device(grads, cost, a, b, initial_f, initial_g, history[part], *incoming, *options)
        if need_cost:
            grad_cost += apart.sum(0) if update_a_first else apart.sum(0).mT
    return grad_cost, grad_a, grad_b


def _differentiated_on_device(grads, cost: Tensor, history: Tensor, tensors: tuple, options: tuple) -> bool:
    """Fill the gradients that are not empty by products of matrices; False: those kernels do not serve."""
    a, b, initial_f, initial_g, of_transport, of_dual, of_f, of_g = tensors
    epsilon, num_iters, penalty_a, penalty_b, update_a_first, gradient = options
    if gradient == "implicit":
        return False
    grad_cost, grad_a, grad_b = grads
    if not update_a_first:
        cost, a, b, initial_f, initial_g, of_f, of_g = cost.mT, b, a, initial_g, initial_f, of_g, of_f
        penalty_a, penalty_b, grad_a, grad_b = penalty_b, penalty_a, grad_b, grad_a
    operands = [contiguous(tensor) for tensor in (cost, a, b, initial_f, initial_g)]
    numbers = (epsilon, 0.0, 1.0, penalty_a, penalty_b)
    mode, keep = sinkhorn.GRADIENTS[gradient], sinkhorn.KEEP[gradient]
    problems = _problems_on_device(operands, history, len(history), num_iters, keep, numbers)
    problems, scratch = _with_workspace_on_device(problems, cost, mode)
    if problems is None:
        return False
    incoming = [contiguous(grad) for grad in (of_transport, of_dual, of_f, of_g)]
    turned = grad_cost if update_a_first else grad_cost.new_empty(operands[0].shape if grad_cost.numel() else (0,))
    results = (address(grad) if grad.numel() else 0 for grad in (turned, grad_a, grad_b))
    _library.launch("sinkhorn_shared", cost, "sinkhorn_shared_bwd", problems, mode, (*map(address, incoming), *results))
    if turned is not grad_cost and grad_cost.numel():
        grad_cost.copy_(turned.mT)
    return True


_library.register(
    "sinkhorn_shared_fwd(Tensor cost, Tensor? a, Tensor? b, Tensor? initial_f, Tensor? initial_g, float epsilon, "
    "int num_iters, float tol, float relaxation, float penalty_a, float penalty_b, bool update_a_first, int keep, "
    "float guard_a=0., float guard_b=0.) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
    _fwd_cpu,
    cuda=_fwd_cuda,
    triton="sinkhorn_shared:sinkhorn_shared_fwd",
    triton_fake=_triton_fwd_fake,
)
_library.register(
    "sinkhorn_shared_bwd(Tensor cost, Tensor? a, Tensor? b, Tensor? initial_f, Tensor? initial_g, Tensor history, "
    "Tensor? grad_transport_cost, Tensor? grad_regularized_cost, Tensor? grad_f, Tensor? grad_g, float epsilon, "
    "int num_iters, float penalty_a, float penalty_b, bool update_a_first, str gradient, bool need_cost, bool need_a, "
    "bool need_b, float guard_a=0., float guard_b=0.) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    _bwd_cpu,
    cuda=_bwd_cuda,
    triton="sinkhorn_shared:sinkhorn_shared_bwd",
)

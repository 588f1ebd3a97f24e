"""``sinkhorn_shared_fwd`` and ``_bwd`` by Triton (see ``ops/sinkhorn_shared.py``): one cost for a batch of marginals.

Larger problems, a plain loop of a fixed number of iterations: products of matrices, see ``_sinkhorn_products``. Others
by the kernels of ``sinkhorn``, with a batch stride of 0: a problem that fits in one program is solved by it, its cost
coming from the cache; with `tol`, penalties or over-relaxation each half-iteration of larger ones is a launch for the
batch, in the log domain. The gradient of the cost is then added up over the problems in their order. History: one row a
problem, flat, of a size that tells which of the two it was. 'implicit' is that of ``ops/_sinkhorn_shared_implicit``,
products of matrices for all problems; where not even float64 holds the exponents, for which the host looks at one
number, and while a graph is captured, as ``sinkhorn``, a few at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import _sinkhorn_shared_implicit as implicit
from ..ops.sinkhorn import KEEP, history_size
from . import _runtime
from . import _sinkhorn_large as large
from . import _sinkhorn_products as products
from .sinkhorn import Problems, differentiate, is_small, problems, solve

CHUNK_ENTRIES = 1 << 24  # of gradients of single problems in memory at a time
WITHOUT_TENSOR_CORES = "48 bytes on 120, where two products in float64 a step are made without tensor cores"


def _expanded(cost: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    return cost.expand((b if a is None else a).shape[0], *cost.shape)


def history_doubles(
    cost: Tensor, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float, keep: int
) -> tuple[int, bool]:
    """Doubles of a problem's history, and whether products of matrices solve it."""
    n, m = cost.shape[-2:]
    by_products = products.serves(num_iters, tol, relaxation, penalty_a, penalty_b) and not is_small(n, m, cost.dtype)
    return (products if by_products else _DENSE).history_size(n, m, num_iters, keep), by_products


class _DENSE:  # noqa: N801
    history_size = staticmethod(history_size)


def sinkhorn_shared_fwd(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    epsilon: float, num_iters: int, tol: float, relaxation: float, penalty_a: float, penalty_b: float,
    update_a_first: bool, keep: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    size, by_products = history_doubles(cost, num_iters, tol, relaxation, penalty_a, penalty_b, keep)
    cost = _expanded(cost, a, b)
    batch, n, m = cost.shape
    values = [_runtime.empty((batch,), cost) for _ in range(2)]
    f, g = _runtime.empty((batch, n), cost), _runtime.empty((batch, m), cost)
    error, count = _runtime.empty((batch,), cost), _runtime.empty((batch,), cost, torch.int64)
    history = _runtime.empty((batch, size), cost, torch.float64)
    if batch:
        given = problems(cost, a, b, initial_f, initial_g, epsilon, penalty_a, penalty_b, update_a_first)
        outputs = (*values, *((f, g) if update_a_first else (g, f)), error, count, history)
        with _runtime.on_device(cost):
            if by_products:
                products.solve(given.cost[0], given.sides, given.initial_g, outputs, num_iters, keep)
            else:
                solve(given, outputs, num_iters, tol, relaxation, keep)
    return *values, f, g, error, count, history


def sinkhorn_shared_bwd(
    cost: Tensor, a: Tensor | None, b: Tensor | None, initial_f: Tensor | None, initial_g: Tensor | None,
    history: Tensor, grad_transport_cost: Tensor | None, grad_regularized_cost: Tensor | None, grad_f: Tensor | None,
    grad_g: Tensor | None, epsilon: float, num_iters: int, penalty_a: float, penalty_b: float, update_a_first: bool,
    gradient: str, need_cost: bool, need_a: bool, need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    cost = _expanded(cost, a, b)
    batch, n, m = cost.shape
    by_products = history.shape[-1] == products.history_size(n, m, num_iters, KEEP[gradient])
    if not by_products and history.shape[-1] != history_size(n, m, num_iters, KEEP[gradient]):
        raise ValueError(f"history: expected that of a forward with keep={KEEP[gradient]}, got {tuple(history.shape)}")
    grads = (
        _runtime.empty((n, m) if need_cost else (0,), cost),
        _runtime.empty((batch, n) if need_a else (0,), cost),
        _runtime.empty((batch, m) if need_b else (0,), cost),
    )
    if batch == 0:
        grads[0].zero_()
        return grads
    incoming = [None if grad is None else grad.contiguous() for grad in (
        grad_transport_cost, grad_regularized_cost, grad_f, grad_g
    )]  # fmt: skip
    given = problems(cost, a, b, initial_f, initial_g, epsilon, penalty_a, penalty_b, update_a_first)
    rows_first = grads
    if given.flipped:
        incoming = [*incoming[:2], incoming[3], incoming[2]]
        rows_first = (_runtime.empty(given.cost[0].shape, cost) if need_cost else grads[0], grads[2], grads[1])
    history = history.contiguous()
    with _runtime.on_device(cost):
        if gradient != "implicit":
            _differentiate(given, history, incoming, rows_first, num_iters, gradient, by_products)
        else:
            _implicitly(given, history, incoming, rows_first, num_iters, by_products)
    if given.flipped and need_cost:
        grads[0].copy_(rows_first[0].mT)
    return grads


def _differentiate(batch: Problems, history, incoming, grads, num_iters, gradient: str, by_products: bool) -> None:
    """Fills the gradients of the cost, (n, m), and of the masses; rows first."""
    if by_products:
        given = batch.cost[0], batch.sides, batch.initial_g, history, products.Incoming(*incoming)
        products.differentiate(*given, grads, num_iters, gradient)
        return
    count, n, m = batch.sizes
    need_cost = bool(grads[0].numel())
    grads[0].zero_()
    chunk = count
    if need_cost and is_small(n, m, batch.cost.dtype):
        chunk = max(1, CHUNK_ENTRIES // (n * m))
    for first in range(0, count, chunk):
        some = slice(first, first + chunk)
        part = _part(batch, some)
        by_cost = grads[0]
        if need_cost:
            each = part.sizes[0] if is_small(n, m, batch.cost.dtype) else 1  # the kernel for tiles adds them up
            by_cost = _runtime.empty((each, n, m), grads[0])
        sides = [grad[some] if grad.numel() else grad for grad in grads[1:]]
        given = [None if grad is None else grad[some] for grad in incoming]
        differentiate(part._replace(flipped=False), history[some], tuple(given), (by_cost, *sides), num_iters, gradient)
        if need_cost:
            grads[0].add_(by_cost.sum(0))


def _part(batch: Problems, some: slice) -> Problems:
    """Some of the problems."""
    each = ("cost", "a", "b", "initial_f", "initial_g")
    tensors = {name: getattr(batch, name) for name in each}
    return batch._replace(**{name: None if tensor is None else tensor[some] for name, tensor in tensors.items()})


def _implicitly(batch: Problems, history, incoming, grads, num_iters: int, by_products: bool) -> None:
    """The dual value does not change with potentials that have converged: its gradient is the envelope's."""
    _, value, *_ = incoming
    for grad in grads:
        grad.zero_()
    if value is not None:
        _differentiate(batch, history, (None, value, None, None), grads, num_iters, "envelope", by_products)
    others = (incoming[0], *incoming[2:])
    if all(grad is None for grad in others):
        return
    phi, gamma = _potentials(batch, history, by_products)
    cost = batch.cost[0]
    bits = math.log2(math.e) / batch.epsilon
    span = (cost.where(cost < torch.inf, -torch.inf).amax() - cost.amin()).double() * bits
    if not _may_wait(span) or not bool(span <= products.RANGE[torch.float64]):
        _implicitly_apart(batch, phi, gamma, others, grads)
        return
    a, b = large.masses(batch.a, phi), large.masses(batch.b, gamma)
    least = cost.amin(1).double()
    shift = torch.where(least < torch.inf, least, 0) * bits
    x, y = _over((phi - shift).exp2(), a), _over(gamma.exp2(), b)
    found = implicit.implicit_gradients(
        cost, a, b, x, y, *others, batch.epsilon, batch.penalty_a, batch.penalty_b, bool(grads[0].numel())
    )
    for grad, through in zip(grads, found, strict=True):
        if grad.numel():
            grad.add_(through)


def _may_wait(number: Tensor) -> bool:
    """Whether the host may read it: not while a graph is captured."""
    return number.device.type == "cpu" or (number.is_cuda and not torch.cuda.is_current_stream_capturing())


def _over(scaling: Tensor, mass: Tensor) -> Tensor:
    return torch.where(mass > 0, scaling / torch.where(mass > 0, mass, 1), 0)


def _potentials(batch: Problems, history: Tensor, by_products: bool) -> tuple[Tensor, Tensor]:
    """phi (B, n) and gamma (B, m) after the last iteration, of which alone a slot is kept."""
    _, n, _ = batch.sizes
    if not by_products:
        return history[:, 2 : 2 + n], history[:, 2 + n :]
    start = products.start_of(batch.sides, batch.initial_g, *batch.sizes[::2], history)
    shared = products.prepare(batch.cost[0], batch.sides, start, history[0, 0] != 0)
    state = history[:, products.HEADER :]
    return products.potentials(shared, state[:, :n], state[:, n:])


def _implicitly_apart(batch: Problems, phi, gamma, others, grads) -> None:
    """The system of each problem on its own plan, a few at a time, as the dense op."""
    count, n, m = batch.sizes
    history = torch.cat([phi.new_zeros(count, 2), phi, gamma], 1)
    chunk = max(1, CHUNK_ENTRIES // (n * m))
    for first in range(0, count, chunk):
        some = slice(first, first + chunk)
        part = _part(batch, some)._replace(flipped=False)
        transport, f, g = (None if grad is None else grad[some] for grad in others)
        need = [bool(grad.numel()) for grad in grads]
        shapes = (part.sizes, (part.sizes[0], n), (part.sizes[0], m))
        shapes = [shape if wanted else (0,) for shape, wanted in zip(shapes, need, strict=True)]
        found = [_runtime.empty(shape, batch.cost) for shape in shapes]
        differentiate(part, history[some], (transport, None, f, g), found, 1, "implicit")
        if need[0]:
            grads[0].add_(found[0].sum(0))
        for grad, through in zip(grads[1:], found[1:], strict=True):
            if grad.numel():
                grad[some] += through


def aot_cases() -> list[_runtime.AotCase]:
    """The products of both half-iterations, forward and backward; the other kernels are those of ``sinkhorn``."""
    from . import _sinkhorn_aot as aot

    cases = []
    for dtype, problems_of in ((torch.float32, 64), (torch.float32, 256), (torch.float64, 64)):
        tiles = products.tiles_of(problems_of, dtype)
        name = f"{tiles['BP']} problems {_runtime.SIGNATURE_DTYPES[dtype]}"
        for side, strides in (("rows", {"stride_j": 1}), ("columns", {"stride_i": 1})):
            given = strides | {"GIVEN": True}
            quick = (side, problems_of, dtype) == ("rows", 64, torch.float32)
            cases.append(aot.products(f"update {side} {name}", products.update, dtype, given, tiles, quick=quick))
            if problems_of == 64:
                what = f"{side} {name}", dtype
                sums = strides | {"MASS": side == "rows"}
                why = WITHOUT_TENSOR_CORES if (side, dtype) == ("rows", torch.float64) else ""
                cases.append(aot.products(f"sums {what[0]}", products.sums_of_plans, dtype, sums, tiles, may_spill=why))
                adjoint = given | {"STARTS": side == "rows"}
                cases.append(aot.products(f"adjoint {what[0]}", products.adjoint_update, dtype, adjoint, tiles))
        if problems_of == 64:
            kind = _runtime.SIGNATURE_DTYPES[dtype]
            tiles = products.gradient_tiles(dtype)
            cases.append(
                aot.products(f"cost gradient {kind}", products.gradient_of_cost, dtype, {"CONSTANT": False}, tiles)
            )
            block = {"BLOCK": products.BLOCK, **products.EXPONENTIATE}
            cases.append(aot.products(f"kernel {kind}", products.exponentiate, dtype, {}, block))
    return cases

"""sinkhorn: entropic optimal transport between discrete measures, for a dense cost matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops as _ops  # noqa: F401  registers torch.ops.otkd_fast.*
from .. import reference
from .._dispatch import resolve
from .._guards import refuse_gradient, uncovered_message
from .._values import values_readable
from ._autograd import distinct, keep_signature, mapped, needs_function, no_second_derivative, transformed
from ._validate import (
    HALF_DTYPES,
    check_choice,
    check_masses,
    check_same_kind,
    check_tensor,
    positive_float,
    positive_int,
)
from .sinkhorn_result import SinkhornResult

_GRADIENTS = ("unroll", "envelope", "detach")
_LATER_GRADIENTS = ("implicit", "last_step")
_COVERED = {"envelope": "regularized_cost", "detach": "transport_cost"}
_DIFFERENTIABLE = ("transport_cost", "regularized_cost", "f", "g")

# what the op keeps for its backward: nothing, the last potentials, or those of every iteration
_KEEP = {"unroll": 2, "envelope": 1, "detach": 1}

_forward = torch.ops.otkd_fast.sinkhorn_fwd.default
_backward = torch.ops.otkd_fast.sinkhorn_bwd.default


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float,
    num_iters: int,
    tol: float | None = None,
    update_first: str = "a",
    gradient: str = "unroll",
    backend: str | None = None,
) -> SinkhornResult:
    r"""Entropic optimal transport by a fixed number of Sinkhorn iterations, with the accuracy of the log domain.

    Approaches the plan P that minimises ``<P, C> + epsilon KL(P | a b^T)`` among those with row sums `a` and column
    sums `b`. From potentials that are 0 where their marginal has mass and -inf elsewhere, each iteration sets
    (``update_first='a'``)

        f_i = epsilon log a_i - epsilon log sum_j exp((g_j - C_ij) / epsilon)
        g_j = epsilon log b_j - epsilon log sum_i exp((f_i - C_ij) / epsilon)

    and the plan is ``P_ij = exp((f_i + g_j - C_ij) / epsilon)``. 'b' updates g first. Exactly `num_iters` iterations
    run. `cost` entries may be +inf (a forbidden pair). Entries of `a` and `b` may be 0: that row or column takes no
    mass. A row with mass but without any column that it may go to gets f = -inf and no mass; `marginal_error` shows it.

    Gradients, chosen by `gradient` (docs/numerics.md compares them; backward through another output raises):

        'unroll'    the exact derivative of the loop above, of every output but `marginal_error`
        'envelope'  of `regularized_cost` at fixed potentials: P for the cost, f - epsilon log a + constant for a
        'detach'    of `transport_cost` for a constant plan: P for the cost, nothing for a and b

    Args:
        cost: (..., n, m), n, m >= 1, float16, bfloat16, float32 or float64.
        a: (..., n) masses >= 0, or (n,) shared by the batch; None: 1/n each. Same dtype and device as `cost`.
        b: (..., m) masses >= 0, or (m,) shared by the batch; None: 1/m each. The totals of `a` and `b` are equal.
        epsilon: > 0, in units of the cost.
        num_iters: >= 1.
        tol: None; stopping on the marginal error is not implemented yet.
        update_first: 'a' or 'b': the marginal whose potential each iteration updates first.
        gradient: 'unroll', 'envelope' or 'detach'.
        backend: 'auto', 'reference', 'cpu', 'cuda' or 'triton'; None: see :func:`otkd_fast.backend`.

    Returns:
        SinkhornResult in the dtype of `cost`; float32 for half-precision inputs, which are computed in float32.

    Raises:
        TypeError: an argument of the wrong type, an integer or complex tensor.
        ValueError: wrong rank, sizes, dtypes or devices that do not match, epsilon not > 0 or not finite, num_iters
            < 1, an unknown word, `a` or `b` that requires a gradient with 'detach'. On CPU tensors, outside
            torch.compile and torch.func, also masses that are negative or not finite, and totals that are 0 or differ.
        NotImplementedError: tol, gradient 'implicit' or 'last_step', a cost (n, m) shared by a batch of marginals.
        RuntimeError: the named backend is not available. In the backward pass: an output that the mode does not
            differentiate, or a second derivative that is not available.

    Sources: Cuturi, Sinkhorn Distances (NeurIPS 2013); Peyre and Cuturi, Computational Optimal Transport (2019),
    section 4.

    >>> import torch, otkd_fast
    >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> result = otkd_fast.sinkhorn(cost, epsilon=0.1, num_iters=20)
    >>> result.plan()
    tensor([[4.9998e-01, 2.2699e-05],
            [2.2699e-05, 4.9998e-01]])
    >>> print(f"{result.transport_cost:.4e}")
    4.5398e-05
    """
    epsilon, num_iters = _check_options(epsilon, num_iters, tol, update_first, gradient)
    a, b = _check_problem(cost, a, b, gradient)
    if cost.dtype in HALF_DTYPES:
        cost = cost.float()
        a, b = None if a is None else a.float(), None if b is None else b.float()
    if resolve("sinkhorn", cost.device, backend) == "reference":
        outputs = reference.sinkhorn(
            cost, a, b, epsilon=epsilon, num_iters=num_iters, update_first=update_first, gradient=gradient
        )
    elif needs_function(cost, a, b):
        outputs = _Sinkhorn.apply(*distinct(cost, a, b), epsilon, num_iters, update_first == "a", gradient)
    else:
        outputs = _forward(cost, a, b, epsilon, num_iters, update_first == "a", 0)
    return SinkhornResult(*outputs[:5], cost, epsilon, num_iters)


def _check_options(epsilon, num_iters, tol, update_first, gradient) -> tuple[float, int]:
    epsilon = positive_float("epsilon", epsilon)
    num_iters = positive_int("num_iters", num_iters)
    if tol is not None:
        positive_float("tol", tol)
        raise NotImplementedError("tol: stopping on the marginal error is not implemented yet; expected None")
    check_choice("update_first", update_first, ("a", "b"))
    if gradient not in _GRADIENTS:
        check_choice("gradient", gradient, _GRADIENTS + _LATER_GRADIENTS)
        raise NotImplementedError(
            f"gradient: '{gradient}' is not implemented yet; expected one of {', '.join(map(repr, _GRADIENTS))}"
        )
    return epsilon, num_iters


def _check_problem(cost, a, b, gradient) -> tuple[Tensor | None, Tensor | None]:
    """Raise for problems that cannot be solved; the marginals, expanded to the batch of `cost`."""
    check_tensor("cost", cost, 2, "(..., n, m)")
    n, m = cost.shape[-2:]
    if n == 0 or m == 0:
        raise ValueError(f"cost: expected at least one row and one column, got shape {tuple(cost.shape)}")
    if a is None and b is None:
        return None, None
    given_a, given_b = a, b
    a = None if a is None else _check_marginal("a", a, "n", n, cost, gradient)
    b = None if b is None else _check_marginal("b", b, "m", m, cost, gradient)
    if values_readable(given_a, given_b):
        check_masses(given_a, given_b)
    return a, b


def _check_marginal(name: str, weights: Tensor, letter: str, size: int, cost: Tensor, gradient: str) -> Tensor:
    check_tensor(name, weights, 1, f"(..., {letter})")
    check_same_kind(name, weights, "cost", cost)
    batch = cost.shape[:-2]
    if weights.shape[-1] != size:
        axis = "rows" if name == "a" else "columns"
        raise ValueError(
            f"{name}: expected {size} masses, one for each of cost's {axis}, got shape {tuple(weights.shape)}"
        )
    if gradient == "detach" and weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected marginals without a gradient, because gradient='detach' takes the plan as a constant; "
            f"got requires_grad=True (use {name}.detach(), or gradient='unroll' or 'envelope')"
        )
    if weights.dim() == 1:
        return weights if len(batch) == 0 else weights.expand(*batch, size)
    if len(batch) == 0:
        raise NotImplementedError(
            "cost: a cost (n, m) shared by a batch of marginals is not implemented yet; "
            f"expand cost to {tuple(weights.shape[:-1]) + tuple(cost.shape)}"
        )
    if weights.shape[:-1] != batch:
        raise ValueError(f"{name}: expected shape {tuple(batch) + (size,)} or ({size},), got {tuple(weights.shape)}")
    return weights


@keep_signature
class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(cost, a, b, epsilon, num_iters, update_a_first, gradient):
        return _forward(cost, a, b, epsilon, num_iters, update_a_first, _KEEP[gradient])

    @staticmethod
    def setup_context(ctx, inputs, output):
        cost, a, b, *ctx.options = inputs
        *_, marginal_error, history = output
        ctx.mark_non_differentiable(marginal_error, history)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cost, a, b, history)

    @staticmethod
    def backward(ctx, *grads):
        epsilon, num_iters, update_a_first, gradient = ctx.options
        needs = ctx.needs_input_grad[:3]
        grads = _covered_only(grads[:4], gradient)
        if all(grad is None for grad in grads):
            return (None,) * 7
        arguments = (*ctx.saved_tensors, *grads, epsilon, num_iters, update_a_first, gradient, *needs)
        results = _SinkhornBackward.apply(*arguments) if transformed() else _backward(*arguments)
        return *(result if need else None for result, need in zip(results, needs, strict=True)), None, None, None, None

    @staticmethod
    def vmap(info, in_dims, cost, a, b, *options):
        tensors = (mapped(tensor, dim, info.batch_size) for tensor, dim in zip((cost, a, b), in_dims[:3], strict=True))
        return _Sinkhorn.apply(*tensors, *options), (0,) * 6


def _covered_only(grads, gradient: str):
    """`grads` of the outputs that the mode differentiates; RuntimeError if another one has a gradient."""
    if gradient == "unroll":
        return grads
    covered = _COVERED[gradient]
    for output, grad in zip(_DIFFERENTIABLE, grads, strict=True):
        if output != covered and grad is not None:
            refuse_gradient(grad, uncovered_message(output, gradient, covered))
    return tuple(grad if output == covered else None for output, grad in zip(_DIFFERENTIABLE, grads, strict=True))


@keep_signature
class _SinkhornBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        cost, a, b, history, grad_transport_cost, grad_regularized_cost, grad_f, grad_g,
        epsilon, num_iters, update_a_first, gradient, need_cost, need_a, need_b,
    ):  # fmt: skip
        return _backward(
            cost, a, b, history, grad_transport_cost, grad_regularized_cost, grad_f, grad_g,
            epsilon, num_iters, update_a_first, gradient, need_cost, need_a, need_b,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise no_second_derivative("sinkhorn")

    @staticmethod
    def vmap(info, in_dims, *arguments):
        tensors = [mapped(tensor, dim, info.batch_size) for tensor, dim in zip(arguments[:8], in_dims[:8], strict=True)]
        needs = arguments[-3:]
        return _SinkhornBackward.apply(*tensors, *arguments[8:]), tuple(0 if need else None for need in needs)

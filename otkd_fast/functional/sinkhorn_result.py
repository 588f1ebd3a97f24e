"""What a Sinkhorn solve returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SinkhornResult:
    """Result of :func:`otkd_fast.sinkhorn`; tensors only, so that reading a field is the only synchronisation.

    A torch pytree: it can be returned from functions under torch.vmap, torch.func and torch.compile.

    Attributes:
        transport_cost: (...) ``<P, C>``; a pair with P = 0 counts 0, also where C = +inf.
        regularized_cost: (...) the dual value, at convergence ``<P, C> + epsilon KL(P | a b^T)``:
            ``<f, a> + <g, b> - epsilon (<a, log a> + <b, log b> + sum(P) - sum(a) sum(b))``, where rows and columns
            that take no mass contribute 0 to the scalar products.
        f: (..., n) row potentials in cost units, -inf for a row that takes no mass.
        g: (..., m) column potentials in cost units, -inf for a column that takes no mass.
        marginal_error: (...) ``sum_i |(P 1)_i - a_i| + sum_j |(P^T 1)_j - b_j|``, without gradient.
    """

    transport_cost: Tensor
    regularized_cost: Tensor
    f: Tensor
    g: Tensor
    marginal_error: Tensor
    _cost: Tensor
    _epsilon: float
    _num_iters: int

    @property
    def num_iters(self) -> Tensor:
        """(...) int64: iterations that each problem ran."""
        return torch.full_like(self.marginal_error, self._num_iters, dtype=torch.int64)

    def plan(self) -> Tensor:
        """The dense plan ``P_ij = exp((f_i + g_j - C_ij) / epsilon)``, (..., n, m), differentiable where f and g are.

        >>> import torch, otkd_fast
        >>> otkd_fast.sinkhorn(torch.zeros(1, 2), epsilon=1.0, num_iters=1).plan()
        tensor([[0.5000, 0.5000]])
        """
        return ((self.f.unsqueeze(-1) + self.g.unsqueeze(-2) - self._cost) / self._epsilon).exp()

    def __repr__(self) -> str:
        n, m = self._cost.shape[-2:]
        return (
            f"SinkhornResult(batch={tuple(self.transport_cost.shape)}, n={n}, m={m}, dtype={self.f.dtype}, "
            f"epsilon={self._epsilon}, transport_cost={self.transport_cost}, regularized_cost={self.regularized_cost}, "
            f"marginal_error={self.marginal_error})"
        )


def _flatten(result: SinkhornResult):
    tensors = [result.transport_cost, result.regularized_cost, result.f, result.g, result.marginal_error, result._cost]
    return tensors, (result._epsilon, result._num_iters)


def _unflatten(tensors, context) -> SinkhornResult:
    return SinkhornResult(*tensors, *context)


pytree.register_pytree_node(SinkhornResult, _flatten, _unflatten, serialized_type_name="otkd_fast.SinkhornResult")

"""What a Sinkhorn solve returns."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch.utils._pytree as pytree
from torch import Tensor

from .._autocast import without_autocast
from ._validate import check_tensor


@dataclass(frozen=True, slots=True, eq=False)
class SinkhornResult:
    """Result of :func:`otkd_fast.sinkhorn`; tensors only, so that reading a field is the only synchronisation.

    A torch pytree: it can be returned from functions under torch.vmap, torch.func and torch.compile.

    Attributes:
        transport_cost: (...) ``<P, C>``; a pair with P = 0 counts 0, also where C = +inf.
        regularized_cost: (...) the dual value, at convergence the minimum of the regularised problem:
            ``<f', a> + <g', b> - epsilon (sum(P) - sum(a) sum(b))`` with ``f' = f - epsilon log a`` and g' likewise,
            where rows and columns that take no mass contribute 0 to the scalar products. Under a marginal penalty rho
            the scalar product is ``rho <a, 1 - exp(-f' / rho)>``.
        f: (..., n) row potentials in cost units, -inf for a row that takes no mass.
        g: (..., m) column potentials in cost units, -inf for a column that takes no mass.
        marginal_error: (...) ``sum_i |(P 1)_i - a_i| + sum_j |(P^T 1)_j - b_j|``, under a marginal penalty against
            ``a exp(-f' / rho)``; without gradient.
        num_iters: (...) int64, the iterations that each problem ran.
    """

    transport_cost: Tensor
    regularized_cost: Tensor
    f: Tensor
    g: Tensor
    marginal_error: Tensor
    num_iters: Tensor
    _operands: tuple[Tensor, ...]  # what the plan is made of besides the potentials
    _epsilon: float

    def plan(self) -> Tensor:
        """The dense plan ``P_ij = exp((f_i + g_j - C_ij) / epsilon)``, (..., n, m), differentiable where f and g are.

        >>> import torch, otkd_fast
        >>> otkd_fast.sinkhorn(torch.zeros(1, 2), epsilon=1.0, num_iters=1).plan()
        tensor([[0.5000, 0.5000]])
        """
        (cost,) = self._operands
        return ((self.f.unsqueeze(-1) + self.g.unsqueeze(-2) - cost) / self._epsilon).exp()

    def plan_apply(self, v: Tensor, transpose: bool = False) -> Tensor:
        """The plan applied to `v`: ``P v``, or ``P^T v``; differentiable by `v` and where f and g are.

        Args:
            v: (..., m) or (..., m, k) with the batch axes of the result; with `transpose` (..., n) or (..., n, k).
            transpose: apply ``P^T``.

        Returns:
            (..., n) or (..., n, k), with `transpose` (..., m) or (..., m, k), in the dtype of the potentials.

        Raises:
            TypeError: `v` is no floating-point tensor.
            ValueError: its shape does not fit.

        >>> import torch, otkd_fast
        >>> result = otkd_fast.sinkhorn(torch.zeros(1, 2), epsilon=1.0, num_iters=1)
        >>> result.plan_apply(torch.tensor([2.0, 4.0]))
        tensor([3.])
        """
        v, vector = self._applied(v, transpose)
        plan = self.plan()
        with without_autocast(v.device):
            applied = (plan.mT if transpose else plan) @ v
        return applied.squeeze(-1) if vector else applied

    def _batch(self) -> tuple[int, ...]:
        return tuple(self.transport_cost.shape)

    def _applied(self, v: Tensor, transpose: bool) -> tuple[Tensor, bool]:
        """`v` as (..., m, k), or (..., n, k), in the dtype of the potentials, and whether it came without k."""
        letter, size = ("n", self.f.shape[-1]) if transpose else ("m", self.g.shape[-1])
        check_tensor("v", v, 1, f"(..., {letter}) or (..., {letter}, k)")
        axes = (*self._batch(), size)
        if v.shape == axes:
            return v.to(self.f.dtype).unsqueeze(-1), True
        if v.shape[:-1] == axes:
            return v.to(self.f.dtype), False
        raise ValueError(f"v: expected shape {axes} or {axes} + (k,), got {tuple(v.shape)}")

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch={tuple(self.transport_cost.shape)}, n={self.f.shape[-1]}, "
            f"m={self.g.shape[-1]}, dtype={self.f.dtype}, epsilon={self._epsilon}, "
            f"transport_cost={self.transport_cost}, regularized_cost={self.regularized_cost}, "
            f"marginal_error={self.marginal_error}, num_iters={self.num_iters})"
        )


def register_result(cls: type[SinkhornResult]) -> type[SinkhornResult]:
    """Make `cls` a torch pytree: its tensors (and tuples of them) are the leaves, numbers and words the context."""
    names = [field.name for field in fields(cls)]
    constants = [field.name for field in fields(cls) if field.type in ("float", "str", "int")]
    leaves = [name for name in names if name not in constants]

    def flatten(result: SinkhornResult):
        return [getattr(result, name) for name in leaves], tuple(getattr(result, name) for name in constants)

    def unflatten(tensors, context) -> SinkhornResult:
        return cls(**dict(zip(leaves, tensors, strict=True)), **dict(zip(constants, context, strict=True)))

    pytree.register_pytree_node(cls, flatten, unflatten, serialized_type_name=f"otkd_fast.{cls.__name__}")
    return cls


register_result(SinkhornResult)

"""The implicit gradient of problems that share a cost, without a tensor of the size of the expanded costs.

The system and its solution are those of :mod:`..reference._sinkhorn_implicit`, for P = diag(u) K diag(v) with one K: a
step of the conjugate gradients takes two products (B, n) x (n, m) for all problems, in float64. Memory: K, and a few
vectors a problem; where pairs are forbidden, the plan's support of a few problems at a time while the gauges are found.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference._sinkhorn_implicit import RELATIVE_RESIDUAL, Gauge, components, solve
from ..reference._sinkhorn_loop import damping
from ._library import native

VECTOR_BYTES = {"baseline": 16, "avx2": 32, "avx512": 64}
CHUNK_ENTRIES = 1 << 22  # of the supports that are looked at together


def unpacked_scalings(blocks: Tensor, batch: int, atoms: int) -> Tensor:
    """(B, atoms) of the last scalings, which lie in blocks of one or two vectors of problems, (atoms, lanes) each."""
    width = VECTOR_BYTES[native.instruction_set()] // blocks.element_size()
    most = 2 * width
    whole = batch // most
    begin = whole * most * atoms
    parts = [blocks[:begin].view(whole, atoms, most).movedim(1, 2).reshape(-1, atoms)]
    rest = batch - whole * most
    if rest:
        lanes = -(-rest // width) * width
        parts.append(blocks[begin : begin + lanes * atoms].view(atoms, lanes)[:, :rest].T)
    return torch.cat(parts)


def implicit_gradients(
    cost: Tensor, a: Tensor, b: Tensor, x: Tensor, y: Tensor,
    grad_transport_cost: Tensor | None, grad_f: Tensor | None, grad_g: Tensor | None,
    epsilon: float, penalty_a: float, penalty_b: float, need_cost: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients of cost (n, m), a (B, n) and b (B, m), in float64, of <P, C>, f and g.

    x (B, n), y (B, m): the last scalings, P = diag(a x) K diag(b y), K_ij = exp((min_j C_ij - C_ij) / epsilon).
    """
    precision = RELATIVE_RESIDUAL[cost.dtype]
    cost, a, b, x, y = (tensor.double() for tensor in (cost, a, b, x, y))
    finite = torch.where(cost == torch.inf, 0, cost)
    least = cost.amin(1, keepdim=True)
    kernel = torch.exp((torch.where(least == torch.inf, 0, least) - cost) / epsilon)  # (n, m)
    u, v = a * x, b * y

    def down(w: Tensor) -> Tensor:
        return (u * w) @ kernel * v  # P^T w, (B, m)

    def across(z: Tensor) -> Tensor:
        return (v * z) @ kernel.mT * u  # P z, (B, n)

    rows, columns = across(torch.ones_like(v)), down(torch.ones_like(u))
    has_row, has_column = rows > 0, columns > 0
    diagonal_a = torch.where(has_row, rows / damping(penalty_a, epsilon), 1)
    diagonal_b = torch.where(has_column, columns / damping(penalty_b, epsilon), 1)
    of_cost = 0.0 if grad_transport_cost is None else grad_transport_cost.double().unsqueeze(-1)  # (B, 1)
    w = u.new_zeros(u.shape) if grad_f is None else grad_f.double()
    z = v.new_zeros(v.shape) if grad_g is None else grad_g.double()
    if grad_transport_cost is not None:
        weighted = kernel * finite / epsilon
        w, z = w + of_cost * (v @ weighted.mT) * u, z + of_cost * (u @ weighted) * v
    w, z = torch.where(has_row, w, 0), torch.where(has_column, z, 0)
    gauge = None
    if penalty_a == penalty_b == torch.inf:
        gauge = Gauge(*_labels(kernel, has_row, has_column), has_row, has_column)
        w, z = gauge.project(w, z)
    w, z = solve(down, across, diagonal_a, diagonal_b, w, z, precision)
    if gauge:
        w, z = gauge.project(w, z)
    grad_a = torch.where(has_row, epsilon * diagonal_a / torch.where(has_row, a, 1) * w, 0)
    grad_b = torch.where(has_column, epsilon * diagonal_b / torch.where(has_column, b, 1) * z, 0)
    if not need_cost:
        return None, grad_a, grad_b
    # sum over the problems of P_ij (w_i + z_j + (1 - C_ij / epsilon) of_cost)
    grad_cost = (u * (w + of_cost)).mT @ v + u.mT @ (v * z)
    if grad_transport_cost is not None:
        grad_cost = grad_cost - finite / epsilon * ((u * of_cost).mT @ v)
    return kernel * grad_cost, grad_a, grad_b


def _labels(kernel: Tensor, has_row: Tensor, has_column: Tensor) -> tuple[Tensor, Tensor]:
    """The connected component of the plan's support that each row (B, n) and each column (B, m) lies in."""
    if (kernel > 0).all():
        return torch.zeros_like(has_row, dtype=torch.int64), torch.zeros_like(has_column, dtype=torch.int64)
    size = max(1, CHUNK_ENTRIES // kernel.numel())
    linked = (
        (kernel > 0) & row.unsqueeze(-1) & column.unsqueeze(-2)
        for row, column in zip(has_row.split(size), has_column.split(size), strict=True)
    )
    labels = zip(*(components(part) for part in linked), strict=True)
    return tuple(torch.cat(side) for side in labels)

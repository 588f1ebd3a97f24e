"""Test problems, from the ordinary to the awkward. Everything is drawn in float64 from a given generator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class OTProblem(NamedTuple):
    """A (batch of) discrete optimal-transport problem(s)."""

    cost: Tensor  # (..., n, m)
    a: Tensor | None  # (..., n)
    b: Tensor | None  # (..., m)

    def to(self, dtype: torch.dtype) -> OTProblem:
        """The same problem, rounded to `dtype`."""
        return OTProblem(*(None if tensor is None else tensor.to(dtype) for tensor in self))


def random_rows(*shape: int, generator: torch.Generator, zero_rows: int = 0) -> Tensor:
    """Standard normal rows (..., n, d); the first `zero_rows` of each batch entry are zero."""
    rows = torch.randn(*shape, generator=generator, dtype=torch.float64)
    rows[..., :zero_rows, :] = 0
    return rows


def near_coincident_rows(
    n: int, d: int, *, generator: torch.Generator, noise: float = 1e-3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """x (n, d) standard normal and y = x + noise * standard normal, both rounded to `dtype`."""
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = x + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def random_problem(
    n: int,
    m: int,
    *,
    generator: torch.Generator,
    batch: tuple[int, ...] = (),
    marginals: bool = True,
    zeros: bool = False,
    infinite: bool = False,
    scale: float = 1.0,
) -> OTProblem:
    """Uniform costs in [0, scale], marginals as softmax of normal logits.

    Args:
        n, m: sizes.
        generator: of the random numbers.
        batch: leading axes.
        marginals: False: None for both (uniform).
        zeros: about a quarter of the masses are 0, another pattern for each problem; at least one is not.
        infinite: about a fifth of the costs are +inf; the pairs (i, i mod m) and (j mod n, j) stay finite.
        scale: largest cost.
    """
    cost = scale * torch.rand(*batch, n, m, generator=generator, dtype=torch.float64)
    if infinite:
        forbidden = torch.rand(*batch, n, m, generator=generator) < 0.2
        forbidden[..., torch.arange(n), torch.arange(n) % m] = False
        forbidden[..., torch.arange(m) % n, torch.arange(m)] = False
        cost = torch.where(forbidden, torch.inf, cost)
    if not marginals:
        return OTProblem(cost, None, None)
    a, b = (_masses(*batch, size, generator=generator, zeros=zeros) for size in (n, m))
    return OTProblem(cost, a, b)


def _masses(*shape: int, generator: torch.Generator, zeros: bool) -> Tensor:
    weights = torch.randn(*shape, generator=generator, dtype=torch.float64).exp()
    if zeros:
        kept = torch.rand(*shape, generator=generator) > 0.25
        kept[..., 0] |= ~kept.any(-1)
        weights = weights * kept
    return weights / weights.sum(-1, keepdim=True)


def block_diagonal_problem(
    sizes: list[tuple[int, int]], *, generator: torch.Generator
) -> tuple[OTProblem, list[OTProblem]]:
    """One problem whose cost is +inf off the blocks, and the blocks as problems of their own.

    Args:
        sizes: (n, m) of each block. Masses of a block sum to its share of 1; shares differ.
        generator: of the random numbers.
    """
    shares = torch.rand(len(sizes), generator=generator, dtype=torch.float64) + 0.5
    shares = shares / shares.sum()
    blocks = []
    for share, (n, m) in zip(shares, sizes, strict=True):
        cost, a, b = random_problem(n, m, generator=generator)
        blocks.append(OTProblem(cost, a * share, b * share))
    whole = torch.full([sum(size) for size in zip(*sizes, strict=True)], torch.inf, dtype=torch.float64)
    row = column = 0
    for block, (n, m) in zip(blocks, sizes, strict=True):
        whole[row : row + n, column : column + m] = block.cost
        row, column = row + n, column + m
    problem = OTProblem(whole, torch.cat([block.a for block in blocks]), torch.cat([block.b for block in blocks]))
    return problem, blocks


SPECTRA = (
    "identity",
    "rank one",
    "rank d - 1",
    "power law",
    "two clusters",
    *(f"geometric 1e{exponent}" for exponent in (2, 4, 6, 7, 8, 10, 12)),
)


def spectrum(name: str, d: int) -> Tensor:
    """Eigenvalues (d,) in descending order, the largest 1, for a name in SPECTRA; 'geometric 1e4' has condition 1e4."""
    index = torch.arange(d, dtype=torch.float64)
    if name.startswith("geometric"):
        return float(name.split()[1]) ** (-index / max(d - 1, 1))
    return {
        "identity": torch.ones_like(index),
        "rank one": (index == 0).double(),
        "rank d - 1": torch.where(index < d - 1, 1 / (1 + index / d), 0),
        "power law": (1 + index) ** -2,
        "two clusters": torch.where(index < d / 2, 1.0, 1e-4),
    }[name]


def covariance(
    name: str, d: int, *, generator: torch.Generator, batch: tuple[int, ...] = (), scale: float = 1.0
) -> Tensor:
    """Exactly symmetric matrices (*batch, d, d) with ``scale * spectrum(name, d)`` and random eigenvectors."""
    basis, _ = torch.linalg.qr(torch.randn(*batch, d, d, generator=generator, dtype=torch.float64))
    matrix = (basis * (scale * spectrum(name, d))) @ basis.mT
    return (matrix + matrix.mT) / 2


def equicorrelated(rho: float, d: int) -> tuple[Tensor, Tensor, float]:
    """I + rho 1 1^T (d, d) in float32; of its entries as rounded, the root in float64 and the condition number."""
    A = torch.eye(d) + torch.tensor(rho)
    own, shared = float(A[0, 0]) - float(A[0, 1]), float(A[0, 1])
    low, high = own**0.5, (own + d * shared) ** 0.5
    root = low * torch.eye(d, dtype=torch.float64) + (high - low) / d
    return A, root, 1 + d * shared / own


def feature_rows(*shape: int, generator: torch.Generator, mixing: Tensor | None = None) -> Tensor:
    """Rows (..., n, d) like those of a network's layer: rectified, correlated, spectrum of a power law.

    `mixing` (d, d) makes several calls describe the same features; None: a new one.
    """
    d = shape[-1]
    if mixing is None:
        mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    decay = torch.arange(1, d + 1, dtype=torch.float64) ** -0.7
    return torch.relu((torch.randn(*shape, generator=generator, dtype=torch.float64) * decay) @ mixing)

"""Sinkhorn between two sets of points, from the points to <P, C> or the regularised value, with the gradient of x.

`python -m bench.sinkhorn_points` compares an iteration on the stored kernel with the machine's memory bandwidth.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

import otkd_fast

from . import peers
from .family import Family, Function, Peer, Problem
from .measure import forward_backward, interleaved_medians

RELATIVE_EPSILON, NUM_ITERS, FEATURES = 0.05, 50, 64
SIZES = ("512", "4096")


def points(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, FEATURES, generator=generator), torch.randn(n, FEATURES, generator=generator) + 0.3


def epsilon(n: int) -> float:
    """0.05 of the mean cost."""
    x, y = (z.double() for z in points(n))
    mean = (x.square().sum(1).mean() + y.square().sum(1).mean() - 2 * x.mean(0) @ y.mean(0)).item()
    return RELATIVE_EPSILON * mean


def _ours(gradient: str) -> object:
    def build(size: str) -> Function:
        options = {"metric": "sqeuclidean", "epsilon": epsilon(int(size)), "num_iters": NUM_ITERS, "gradient": gradient}

        def value(x: Tensor, y: Tensor) -> Tensor:
            result = otkd_fast.sinkhorn_points(x, y, **options)
            return result.regularized_cost if gradient == "envelope" else result.transport_cost

        return value

    return build


def scaling_loop(size: str) -> Function:
    """The textbook iteration on scalings with the kernel in memory, rows first; unrolled gradient."""
    eps = epsilon(int(size))

    def value(x: Tensor, y: Tensor) -> Tensor:
        cost = torch.cdist(x, y).square()
        kernel = torch.exp(-cost / eps)
        v = torch.ones_like(y[:, 0])
        for _ in range(NUM_ITERS):
            u = 1 / len(x) / (kernel @ v)
            v = 1 / len(y) / (kernel.mT @ u)
        return u @ ((kernel * cost) @ v)

    return value


def log_loop(size: str) -> Function:
    """The iteration in the log domain, the value by potentials that are constants for the gradient."""
    eps = epsilon(int(size))

    def value(x: Tensor, y: Tensor) -> Tensor:
        cost = torch.cdist(x, y).square()
        log_n, log_m = (torch.log(torch.tensor(float(len(z)), dtype=z.dtype)) for z in (x, y))
        g = torch.zeros_like(y[:, 0])
        scaled = cost.detach() / eps
        for _ in range(NUM_ITERS):
            f = -log_n - torch.logsumexp(g - scaled, dim=1)
            g = -log_m - torch.logsumexp(f.unsqueeze(1) - scaled, dim=0)
        plan = torch.exp(f.unsqueeze(1) + g - scaled)
        dual = eps * ((f + log_n).mean() + (g + log_m).mean() + 1 - plan.sum())
        through_cost = (plan * cost).sum()
        return dual + through_cost - through_cost.detach()

    return value


def _log_compiled(size: str) -> Function:
    torch._dynamo.reset()
    return torch.compile(log_loop(size), dynamic=False)


def _pot(size: str) -> Function:
    import ot

    eps = epsilon(int(size))

    def value(x: Tensor, y: Tensor) -> Tensor:
        cost = torch.cdist(x, y).square()
        a, b = torch.full_like(x[:, 0], 1 / len(x)), torch.full_like(y[:, 0], 1 / len(y))
        # transposed, so that its order of the updates is ours
        plan = ot.sinkhorn(b, a, cost.mT, eps, numItermax=NUM_ITERS, stopThr=0.0, warn=False)
        return (plan * cost.mT).sum()

    return value


def _pot_solve_sample(size: str) -> Function:
    import ot

    options = {"reg": epsilon(int(size)), "max_iter": NUM_ITERS, "tol": 0.0, "grad": "autodiff"}

    def value(x: Tensor, y: Tensor) -> Tensor:
        with warnings.catch_warnings():  # of iterations that have not converged
            warnings.simplefilter("ignore")
            return ot.solve_sample(y, x, **options).value_linear

    return value


def _ott(size: str) -> Function:
    import jax.numpy as jnp

    plan = peers.ott_plan(epsilon(int(size)), NUM_ITERS)

    def value(x, y):
        cost = jnp.maximum((y * y).sum(1)[:, None] + (x * x).sum(1) - 2 * y @ x.T, 0)
        a, b = (jnp.full(len(z), 1 / len(z), z.dtype) for z in (y, x))
        return (plan(cost, a, b) * cost).sum()

    return peers.through_jax(value)


ENVELOPE_NOTE = "The envelope rows are the regularised value with its gradient at fixed potentials: another vector."
PEERS = (
    Peer("otkd_fast", "otkd_fast", _ours("unroll")),
    Peer("otkd_fast-envelope", "otkd_fast, envelope", _ours("envelope"), False, note=ENVELOPE_NOTE),
    Peer("log-envelope", "log domain, envelope, torch.compile", _log_compiled, False, oracle=_ours("envelope"),
         sizes=SIZES[1:]),
    Peer("scaling", "scaling loop on the stored kernel, PyTorch", scaling_loop),
    Peer("pot", "POT ot.sinkhorn", _pot),
    Peer("pot-sample", "POT ot.solve_sample", _pot_solve_sample, sizes=SIZES[:1]),
    Peer("ott", "OTT-JAX", _ott, note=peers.OTT_NOTE, sizes=SIZES[:1]),
    Peer("keops", "KeOps, log domain, envelope", lambda size: peers.keops_log(epsilon(int(size)), NUM_ITERS), False,
         oracle=_ours("envelope"), sizes=SIZES[:1]),
    Peer("flash-sinkhorn", "flash-sinkhorn", peers.flash_sinkhorn, False, sizes=SIZES[-1:]),
)  # fmt: skip


def problem(size: str) -> Problem:
    x, y = points(int(size))
    # the loop on scalings in float64, where its range is wide enough: the reference would keep 2 T matrices
    expected = forward_backward(scaling_loop(size), x.double().requires_grad_(), y.double())
    return Problem((x.requires_grad_(), y), expected)


_REQUIRED = {"4096": {"log-envelope": 3.0, "scaling": 3.0, "pot": 3.0}}
FAMILY = Family(
    op="sinkhorn_points",
    title=f"Sinkhorn between n and n points, d = {FEATURES}, squared Euclidean cost, epsilon {RELATIVE_EPSILON:g} of "
    f"the mean cost, {NUM_ITERS} iterations, gradient to x",
    sizes=SIZES,
    problem=problem,
    peers=PEERS,
    parameters={"features": FEATURES, "relative_epsilon": RELATIVE_EPSILON, "num_iters": NUM_ITERS},
    required=_REQUIRED,
    required_forward=_REQUIRED,
    notes=(ENVELOPE_NOTE,),
)


def floor(n: int = 4096) -> str:
    """How long an iteration on the stored kernel takes, and how long it takes to read as much memory once."""
    x, y = points(n)
    matrix = torch.rand(n, n)

    def solve(num_iters: int) -> object:
        options = {"metric": "sqeuclidean", "epsilon": epsilon(n), "storage": "stored"}
        return lambda: otkd_fast.sinkhorn_points(x, y, num_iters=num_iters, **options)

    with torch.no_grad():
        calls = {"few": solve(10), "many": solve(110), "read": lambda: matrix.sum()}
        times = interleaved_medians(calls, 5.0)
    gigabytes, iteration = 4e-9 * n * n, (times["many"] - times["few"]) / 100
    return (
        f"n = {n}: an iteration {iteration:.2f} ms, {1e3 * gigabytes / iteration:.0f} GB/s; one read of as much by "
        f"torch.sum {times['read']:.2f} ms, {1e3 * gigabytes / times['read']:.0f} GB/s"
    )


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(floor())

"""The cases that a GPU is measured on: published problems at their published sizes, each with its peers and its work.

A case builds its inputs on a device and gives, by name, ways to compute the same number from them; `work` counts the
bytes, multiply-adds and exponentials that no way of computing it can leave out, for the floor beside the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import otkd_fast
from otkd_fast import losses

from . import sinkd as sinkd_bench
from . import sinkhorn_shared as shared_bench

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Work:
    """Numbers that have to move and be computed, forward and backward together."""

    bytes: float
    multiply_adds: float = 0.0
    exponentials: float = 0.0


@dataclass(frozen=True)
class Case:
    """`inputs(device)`: the tensors, those that need a gradient first (`differentiated` of them).

    `ours(backend)`: the loss by that backend; `peers`: name -> function that builds the loss or raises ImportError.
    `same_answer` False for a peer: it solves a neighbouring problem and is timed without a comparison, marked so.
    """

    name: str
    inputs: Callable[[torch.device], tuple[Tensor, ...]]
    ours: Callable[[str], Loss]
    work: Work
    peers: dict[str, Callable[[], Loss]] = field(default_factory=dict)
    other_answer: frozenset[str] = frozenset()
    differentiated: int = 1
    tolerance: float = 1e-4
    gigabytes: float = 1.0


def normal(device: torch.device, *shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def sinkd_case(rows: int, width: int) -> Case:
    iterations = sinkd_bench.FAMILY.parameters["num_iters"]

    def ours(backend: str) -> Loss:
        return lambda s, t: losses.sinkd(s, t, reduction="sum", backend=backend)

    peers = {
        "released loop": lambda: sinkd_bench.released_loop,
        "released loop, torch.compile": lambda: torch.compile(sinkd_bench.released_loop, dynamic=False),
    }
    for name in ("pot", "geomloss"):
        peer = next(p for p in sinkd_bench.PEERS if p.name == name)
        peers[peer.label] = lambda peer=peer: peer.build(f"{rows}x{width}")
    neighbours = frozenset(p.label for p in sinkd_bench.PEERS if not p.same_answer)
    products = 6.0 * rows * rows * width + 6.0 * iterations * rows * rows
    work = Work(3 * 4 * rows * width, products, rows * (rows + 2.0 * width))
    return Case(
        f"SinKD {rows} x {width}, T = {iterations}",
        lambda device: (normal(device, rows, width, seed=0), normal(device, rows, width, seed=1)),
        ours, work, peers, neighbours,
    )  # fmt: skip


def sinkd_text_case(tokens: int, vocabulary: int) -> Case:
    def ours(backend: str) -> Loss:
        return lambda s, t: losses.sinkd(s, t, backend=backend)

    work = Work(3 * 2 * tokens * vocabulary, 6.0 * tokens * tokens * vocabulary, 2.0 * tokens * vocabulary)
    return Case(
        f"SinKD, {tokens} tokens x {vocabulary}, bfloat16",
        lambda device: tuple(3 * normal(device, tokens, vocabulary, seed=k, dtype=torch.bfloat16) for k in (0, 1)),
        ours, work, {"released loop": lambda: lambda s, t: sinkd_bench.released_loop(s.float(), t.float())},
        tolerance=2e-2, gigabytes=4.0,
    )  # fmt: skip


def wkd_case(batch: int, classes: int, iterations: int = 10) -> Case:
    cost = shared_bench.class_cost(classes)

    def on_device(build: Callable[[Tensor], Loss]) -> Loss:
        made: dict[torch.device, Loss] = {}

        def loss(student: Tensor, teacher: Tensor) -> Tensor:
            if student.device not in made:
                made[student.device] = build(cost.to(student.device))
            return made[student.device](student, teacher)

        return loss

    def ours(backend: str) -> Loss:
        return on_device(lambda c: shared_bench.mean_cost(otkd_fast.sinkhorn, c, iterations, backend=backend))

    peers = {
        "released form": lambda: on_device(lambda c: shared_bench.released(c, iterations)),
        "matrix products": lambda: on_device(lambda c: shared_bench.matrix_products(c, iterations)),
        "matrix products, torch.compile": lambda: torch.compile(
            on_device(lambda c: shared_bench.matrix_products(c, iterations)), dynamic=False
        ),
    }
    numbers = 4.0 * batch * classes
    products = 4.0 * iterations * batch * classes**2
    work = Work(4 * numbers + 4 * classes**2, products, classes**2 + 2.0 * batch * classes)
    return Case(
        f"WKD-L, B = {batch}, n = {classes}, T = {iterations}",
        lambda device: (3 * normal(device, batch, classes, seed=0), 3 * normal(device, batch, classes, seed=1)),
        ours, work, peers, gigabytes=8.0 if classes > 500 else 1.0,
    )  # fmt: skip


def tiny_case(problems: int, n: int, iterations: int = 20) -> Case:
    def ours(backend: str) -> Loss:
        options = {"epsilon": 0.1, "num_iters": iterations, "backend": backend}
        return lambda cost: otkd_fast.sinkhorn(cost, **options).transport_cost.sum()

    def loop(cost: Tensor) -> Tensor:
        kernel = torch.exp(-cost / 0.1)
        v = torch.ones_like(cost[..., 0])
        for _ in range(iterations):
            u = 1 / n / (kernel @ v.unsqueeze(-1)).squeeze(-1)
            v = 1 / n / (kernel.mT @ u.unsqueeze(-1)).squeeze(-1)
        return (u.unsqueeze(-1) * kernel * v.unsqueeze(-2) * cost).sum()

    work = Work(2 * 4.0 * problems * n * n, 6.0 * iterations * problems * n * n, problems * n * n)
    return Case(
        f"{problems} problems of {n} x {n}, T = {iterations}",
        lambda device: (torch.rand(problems, n, n, generator=torch.Generator().manual_seed(0)).to(device),),
        ours, work,
        {"batched loop": lambda: loop, "batched loop, torch.compile": lambda: torch.compile(loop, dynamic=False)},
    )  # fmt: skip


def ragged_case(problems: int, most: int, iterations: int = 20) -> Case:
    """Packed problems of 1 .. most rows and columns each."""
    rows, columns = (
        torch.randint(1, most + 1, (problems,), generator=torch.Generator().manual_seed(k)) for k in (0, 1)
    )
    offsets = [torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]) for sizes in (rows, columns)]
    entries = int((rows * columns).sum())
    kept: dict[torch.device, tuple[Tensor, ...]] = {}

    def operands(cost: Tensor) -> tuple[Tensor, ...]:
        if cost.device not in kept:
            uniform = [(1 / sizes).repeat_interleave(sizes) for sizes in (rows, columns)]
            kept[cost.device] = tuple(t.to(cost.device) for t in (*uniform, *offsets))
        return kept[cost.device]

    def ours(backend: str) -> Loss:
        def loss(cost: Tensor) -> Tensor:
            a, b, first, second = operands(cost)
            return otkd_fast.sinkhorn_ragged(
                cost, a.to(cost), b.to(cost), row_offsets=first, column_offsets=second, epsilon=0.1,
                num_iters=iterations, backend=backend,
            ).transport_cost.sum()  # fmt: skip

        return loss

    def padded(cost: Tensor) -> Tensor:
        a, b, first, second = operands(cost)
        n, m = first.diff(), second.diff()
        starts = (n * m).cumsum(0) - n * m
        i = torch.arange(most, device=cost.device)
        inside = (i < n[:, None])[:, :, None] & (i < m[:, None])[:, None, :]
        place = starts[:, None, None] + i[:, None] * m[:, None, None] + i
        full = torch.where(inside, cost[torch.where(inside, place, 0)], torch.inf)
        kernel, v = torch.exp(-full / 0.1), torch.ones_like(full[:, 0])
        for _ in range(iterations):
            u = 1 / (n[:, None] * (kernel @ v.unsqueeze(-1)).squeeze(-1).clamp(min=1e-30)) * (i < n[:, None])
            v = 1 / (m[:, None] * (kernel.mT @ u.unsqueeze(-1)).squeeze(-1).clamp(min=1e-30)) * (i < m[:, None])
        return (u.unsqueeze(-1) * kernel * v.unsqueeze(-2) * torch.where(inside, full, 0)).sum()

    work = Work(3 * 4.0 * entries, 6.0 * iterations * entries, float(entries))
    return Case(
        f"{problems} packed problems of 1 to {most} rows and columns, T = {iterations}",
        lambda device: (torch.rand(entries, generator=torch.Generator().manual_seed(2)).to(device),),
        ours, work, {"padded loop": lambda: padded},
    )  # fmt: skip


def points_case(n: int, d: int, iterations: int) -> Case:
    epsilon = 0.05 * 2 * d  # of the mean cost of normal points

    def ours(backend: str) -> Loss:
        options = {"metric": "sqeuclidean", "epsilon": epsilon, "num_iters": iterations, "gradient": "envelope"}
        return lambda x, y: otkd_fast.sinkhorn_points(x, y, backend=backend, **options).regularized_cost

    def geomloss() -> Loss:
        from geomloss import SamplesLoss

        return SamplesLoss("sinkhorn", p=2, blur=(epsilon / 2) ** 0.5, debias=False, backend="tensorized")

    def flash() -> Loss:
        import flash_sinkhorn

        return flash_sinkhorn.SamplesLoss("sinkhorn", blur=(epsilon / 2) ** 0.5, debias=False)

    peers = {"flash-sinkhorn": flash} | ({"geomloss": geomloss} if n <= 8192 else {})
    work = Work(2 * 4.0 * n * d, iterations * 2.0 * n * n * d, iterations * 1.0 * n * n)
    return Case(
        f"points {n} x {n}, d = {d}, T = {iterations}",
        lambda device: (normal(device, n, d, seed=0), normal(device, n, d, seed=1)),
        ours, work, peers, frozenset(peers), gigabytes=4.0,
    )  # fmt: skip


def gaussian_case(batch: int, n: int, d: int) -> Case:
    def ours(backend: str) -> Loss:
        return lambda x, y: otkd_fast.gaussian_wasserstein_from_samples(x, y, backend=backend).sum()

    def nuclear(x: Tensor, y: Tensor) -> Tensor:
        (mean_x, x), (mean_y, y) = ((z.mean(-2), z - z.mean(-2, keepdim=True)) for z in (x, y))
        cross = torch.linalg.svdvals(x @ y.mT).sum(-1) / n
        spread = (x.square().sum((-2, -1)) + y.square().sum((-2, -1))) / n
        return ((mean_x - mean_y).square().sum(-1) + spread - 2 * cross).sum()

    work = Work(4 * 4.0 * batch * n * d, batch * (3.0 * n * n * d + 33.0 * n**3))
    return Case(
        f"Gaussian W2 from features, {batch} x ({n}, {d})",
        lambda device: (normal(device, batch, n, d, seed=0).relu(), normal(device, batch, n, d, seed=1).relu()),
        ours, work, {"nuclear norm by svdvals": lambda: nuclear}, tolerance=1e-3,
    )  # fmt: skip


def sqrtm_case(batch: int, d: int) -> Case:
    def ours(backend: str) -> Loss:
        return lambda a: otkd_fast.sqrtm(a, backend=backend).diagonal(dim1=-2, dim2=-1).sum()

    def eigh(a: Tensor) -> Tensor:
        w, v = torch.linalg.eigh(a)
        return ((v * w.clamp(min=0).sqrt().unsqueeze(-2)) @ v.mT).diagonal(dim1=-2, dim2=-1).sum()

    def inputs(device: torch.device) -> tuple[Tensor]:
        q = torch.linalg.qr(torch.randn(batch, d, d, generator=torch.Generator().manual_seed(0)))[0]
        w = torch.logspace(-4, 0, d)
        return (((q * w) @ q.mT).to(device),)

    work = Work(4 * 4.0 * batch * d * d, batch * 40.0 * d**3)
    return Case(f"sqrtm {batch} x ({d}, {d})", inputs, ours, work, {"eigh": lambda: eigh}, tolerance=1e-2)


CASES = (
    sinkd_case(64, 100),
    sinkd_case(1024, 1000),
    sinkd_text_case(512, 128_256),
    wkd_case(64, 100),
    wkd_case(256, 1000),
    tiny_case(10_000, 16),
    ragged_case(1024, 48),
    gaussian_case(64, 49, 512),
    sqrtm_case(64, 64),
    sqrtm_case(64, 128),
    sqrtm_case(64, 512),
    points_case(8192, 64, 50),
    points_case(50_000, 512, 10),
)
# the same problems at sizes that a CPU or an interpreter runs in an instant: a test that everything works
SMALL_CASES = (
    sinkd_case(8, 5),
    sinkd_text_case(8, 40),
    wkd_case(4, 6, 3),
    tiny_case(5, 4, 3),
    ragged_case(5, 20, 3),
    gaussian_case(2, 5, 7),
    sqrtm_case(2, 4),
    points_case(9, 3, 3),
)

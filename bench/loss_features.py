"""KD2M and WCoRD: losses between batches of features, against their formulas in plain PyTorch and POT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from otkd_fast import losses

from .family import Family, Function, Peer, Problem
from .loss_wkd import compiled
from .measure import forward_backward
from .published import sizes_of

CLASSES, LOCAL_ITERS, LOCAL_EPSILON, IPOT_BETA, BANK = 10, 50, 0.1, 0.5, 20_000


def _shape(size: str) -> tuple[int, ...]:
    return tuple(map(int, size.split(",")[0].split()[0].split("x")))


def _metric(size: str) -> str:
    return size.split(",")[0].split()[1]


def _features(size: str) -> tuple[Tensor, Tensor]:
    """Rectified features, the student's row like the teacher's."""
    generator = torch.Generator().manual_seed(10)
    teacher = torch.relu(torch.randn(_shape(size)[0], _shape(size)[-1], generator=generator))
    student = torch.relu(teacher + 0.5 * torch.randn(teacher.shape, generator=generator))
    return student.requires_grad_(), teacher


def _labels(size: str) -> Tensor:
    classes = int(size.split(",")[1].split()[0]) if "," in size else CLASSES
    return torch.randint(classes, (_shape(size)[0],), generator=torch.Generator().manual_seed(11))


def _outputs(size: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(12)
    shape = (_shape(size)[0], CLASSES)
    return tuple((2 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2))


def _our_kd2m(size: str, **options) -> Function:
    labels, metric = _labels(size), _metric(size)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        if metric == "jw2":
            s, t = _outputs(size, student.dtype)
            return losses.kd2m(student, teacher, student_outputs=s, teacher_outputs=t, metric=metric, **options)
        more = {"labels": labels} if metric == "cw2" else {}
        return losses.kd2m(student, teacher, metric=metric, **more, **options)

    return loss


def _exact(cost: Tensor) -> Tensor:
    """<P, C> by POT's network simplex, the plan a constant."""
    import ot

    masses = [torch.full((n,), 1 / n, dtype=torch.float64).numpy() for n in cost.shape]
    return (torch.from_numpy(ot.emd(*masses, cost.detach().double().numpy())).to(cost.dtype) * cost).sum()


def plain_kd2m(size: str) -> Function:
    """The formulas of the paper, a class at a time, with POT's exact solver."""
    labels, metric = _labels(size), _metric(size)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        if metric == "w2_gaussian":
            (mean_s, std_s), (mean_t, std_t) = ((z.mean(0), z.std(0, correction=0)) for z in (student, teacher))
            return (mean_s - mean_t).square().sum() + (std_s - std_t).square().sum()
        if metric == "cw2":
            parts = [(student[labels == k], teacher[labels == k]) for k in labels.unique()]
            return torch.stack([_exact(torch.cdist(s, t).square()) for s, t in parts]).mean()
        cost = torch.cdist(student, teacher).square()
        if metric == "jw2":
            p, q = (torch.softmax(z, -1) for z in _outputs(size, student.dtype))
            cost = cost + torch.cdist(p, q)
        return _exact(cost)

    return loss


def _expected(size: str) -> tuple[Tensor, Tensor]:
    """Value and gradient of the formula in float64."""
    student, teacher = _features(size)
    return forward_backward(plain_kd2m(size), student.detach().double().requires_grad_(), teacher.double())


def plain_local(size: str) -> Function:
    """The two solvers as loops on scalings in PyTorch, the plan a constant."""

    def plan(cost: Tensor) -> Tensor:
        n = len(cost)
        if _metric(size) == "sinkhorn":
            kernel, v = torch.exp(-cost / LOCAL_EPSILON), torch.ones_like(cost[0])
            for _ in range(LOCAL_ITERS):
                u = 1 / n / (kernel @ v)
                v = 1 / n / (kernel.mT @ u)
            return u[:, None] * kernel * v
        kernel, result, v = torch.exp(-cost / IPOT_BETA), torch.ones_like(cost), torch.full_like(cost[0], 1 / n)
        for _ in range(LOCAL_ITERS):
            scaled = kernel * result
            u = 1 / n / (scaled @ v)
            v = 1 / n / (scaled.mT @ u)
            result = u[:, None] * scaled * v
        return result

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        cost = 1 - F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).mT
        with torch.no_grad():
            fixed = plan(cost)
        return (fixed * cost).sum()

    return loss


def _our_local(size: str) -> Function:
    options = {"solver": _metric(size), "epsilon": LOCAL_EPSILON, "beta": IPOT_BETA, "num_iters": LOCAL_ITERS}
    return lambda s, t: losses.wcord_local(s, t, **options)


def local_problem(size: str) -> Problem:
    student, teacher = _features(size)
    wide = student.detach().double().requires_grad_(), teacher.double()
    return Problem((student, teacher), forward_backward(plain_local(size), *wide))


def _global_module(size: str, dtype: torch.dtype) -> losses.WCoRD:
    """In eval(): the banks stand still, so that every call solves the same problem."""
    torch.manual_seed(13)
    _, negatives, width = _shape(size)
    options = {"num_samples": BANK, "embedding_dim": width, "num_negatives": negatives, "local_weight": 0.0}
    return losses.WCoRD(width, width, **options).eval().requires_grad_(False).to(dtype)


def _our_global(size: str) -> Function:
    modules = {dtype: _global_module(size, dtype) for dtype in (torch.float32, torch.float64)}
    index = torch.arange(_shape(size)[0])

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        torch.manual_seed(14)  # the same negatives for everybody
        return modules[student.dtype](student, teacher, index)

    return loss


def plain_global(size: str) -> Function:
    """The same scores of pairs written out: each pair is one row of 2 x width numbers."""
    modules = {dtype: _global_module(size, dtype) for dtype in (torch.float32, torch.float64)}
    rows, negatives, width = _shape(size)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        module = modules[student.dtype]
        critic = module.critic
        torch.manual_seed(14)

        def score(x: Tensor, y: Tensor) -> Tensor:
            hidden = F.linear(torch.cat((x, y), -1), critic.joint.normalised_weight(), critic.joint.bias)
            return F.linear(torch.relu(hidden), critic.score.normalised_weight(), critic.score.bias).squeeze(-1)

        def drawn(bank) -> Tensor:
            return bank.entries[torch.randint(BANK, (rows * negatives,))].view(rows, negatives, width)

        x, y = F.normalize(module.embed_student(student), dim=1), F.normalize(module.embed_teacher(teacher), dim=1)
        from_teachers = score(x.unsqueeze(1).expand(-1, negatives, -1), drawn(module.bank_teacher))
        from_students = score(drawn(module.bank_student), y.unsqueeze(1).expand(-1, negatives, -1))
        mean = (from_teachers.mean() + from_students.mean()) / 2
        return module.global_weight * (mean - score(x, y).mean())

    return loss


def global_problem(size: str) -> Problem:
    student, teacher = _features(size)
    wide = student.detach().double().requires_grad_(), teacher.double()
    return Problem((student, teacher), forward_backward(plain_global(size), *wide))


KD2M = Family(
    op="kd2m",
    title="KD2M (rows x features, metric): the whole loss, exact plans as constants",
    sizes=sizes_of("kd2m"),
    problem=lambda size: Problem(_features(size), _expected(size)),
    peers=(
        Peer("otkd_fast", "otkd_fast, exact", _our_kd2m),
        Peer("released", "the formula with POT's ot.emd", plain_kd2m),
        Peer("otkd_fast-sinkhorn", "otkd_fast, solver='sinkhorn'", lambda size: _our_kd2m(size, solver="sinkhorn"),
             False, note="Entropic plans, epsilon 0.02 of the mean cost, 100 iterations.", equal="neither",
             sizes=tuple(s for s in sizes_of("kd2m") if "gaussian" not in s)),
    ),
)  # fmt: skip
LOCAL = Family(
    op="wcord_local",
    title=f"WCoRD, local part (rows x features): cosine cost, {LOCAL_ITERS} iterations, the plan a constant",
    sizes=sizes_of("wcord_local"),
    problem=local_problem,
    peers=(
        Peer("otkd_fast", "otkd_fast", _our_local),
        Peer("plain", "scaling loop, PyTorch", plain_local),
        Peer("plain-compiled", "the same, torch.compile", compiled(plain_local)),
    ),
    parameters={"epsilon": LOCAL_EPSILON, "beta": IPOT_BETA, "num_iters": LOCAL_ITERS},
)
GLOBAL = Family(
    op="wcord_global",
    title="WCoRD, global part (rows x negatives x features): PyTorch on both sides, no kernel of its own",
    sizes=sizes_of("wcord_global"),
    problem=global_problem,
    peers=(
        Peer("otkd_fast", "otkd_fast", _our_global),
        Peer("plain", "a row a pair", plain_global),
    ),
)
FAMILIES = (KD2M, LOCAL, GLOBAL)

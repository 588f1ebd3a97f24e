"""WKD and WKL written down directly from the published formulas (a loop over samples, float64), and their inputs.

Nothing of the library is used here. What the released codes compute is in the functions' comments.
"""

import math

import torch

from otkd_fast import _native

BACKENDS = ["reference"] + (["cpu"] if _native.module is not None else [])

# rows, classes, range of the distances between categories, kappa, temperature: the four published settings; of the 256
# rows of a batch on ImageNet, which do not depend on each other, two
SETTINGS = {
    "C100 res32x4": (64, 100, (0.48, 0.88), 1.0, 8.0),
    "C100 wrn_40_2": (64, 100, (0.54, 0.84), 1.0, 6.0),
    "IN ResNet34": (2, 1000, (0.945, 0.988), 1.0, 2.0),
    "IN ResNet50": (2, 1000, (0.951, 0.991), 2.0, 2.0),
}


def distances(classes, limits=(0.48, 0.88), seed=0):
    """Distances between categories: symmetric, diagonal 0."""
    generator = torch.Generator().manual_seed(classes + seed)
    low, high = limits
    d = low + (high - low) * torch.rand(classes, classes, generator=generator, dtype=torch.float64)
    d = torch.triu(d, 1)
    return d + d.mT


def sample(rows, classes, seed=0, dtype=torch.float64):
    """Student logits, teacher logits (rows, classes) and labels, which the teacher mostly gets right."""
    generator = torch.Generator().manual_seed(7919 * rows + classes + seed)

    def normal():
        return torch.randn(rows, classes, generator=generator, dtype=torch.float64)

    teacher = 3 * normal()
    labels = (teacher + normal()).argmax(-1)
    return (0.5 * teacher + 1.5 * normal()).to(dtype), teacher.to(dtype), labels


def without(vector, index):
    return torch.cat([vector[:index], vector[index + 1 :]])


def sharpened(distance, kappa):
    return torch.relu(1 - torch.exp(-kappa * distance)) + 1e-8 if kappa else torch.relu(distance) + 1e-8


def transport(p, q, c, epsilon=0.05, num_iters=10, guard=1e-8):
    """Sinkhorn in the probability domain: v (teacher) first, u (student) last, sharp cost of the plan."""
    kernel = torch.exp(-c / epsilon)
    u = torch.full_like(p, 1 / len(p))
    for _ in range(num_iters):
        v = q / (kernel.mT @ u + guard)
        u = p / (kernel @ v + guard)
    plan = u[:, None] * kernel * v[None, :]
    return (plan * c).sum()


def target_term(student, teacher, label):
    return -torch.softmax(teacher, 0)[label] * torch.log_softmax(student, 0)[label]


def non_target_transport(student, teacher, label, c, temperature, **options):
    """The target's index is dropped from both logits and from the cost."""
    p = torch.softmax(without(student, label) / temperature, 0)
    q = torch.softmax(without(teacher, label) / temperature, 0)
    kept = without(torch.arange(len(student)), label)
    return transport(p, q, c[kept][:, kept], **options)


def wkd_logit(student, teacher, labels, distance, kappa=1.0, temperature=8.0, gamma=600.0, guard=1e-8, **options):
    """L_t + gamma mean W, a row at a time; (rows,)."""
    c = sharpened(distance, kappa)
    values = []
    for s, t, y in zip(student, teacher, labels.tolist(), strict=True):
        w = non_target_transport(s, t, y, c, temperature, guard=guard, **options)
        values.append(target_term(s, t, y) + gamma * w)
    return torch.stack(values)


GUARDS = {"released": 1e-8, "paper": 0.0}


def kl_rows(student, teacher, temperature):
    """KL of the softened distributions, no T^2; (rows,)."""
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    return (p * (p.log() - q.log())).sum(-1)


def dkd_rows(student, teacher, labels, temperature):
    """TCKD and NCKD of decoupled knowledge distillation, both times T^2; (rows,) each."""
    tckd, nckd = [], []
    for s, t, y in zip(student, teacher, labels.tolist(), strict=True):
        p, q = torch.softmax(t / temperature, 0), torch.softmax(s / temperature, 0)
        binary_p, binary_q = (torch.stack([x[y], without(x, y).sum()]) for x in (p, q))
        tckd.append(temperature**2 * (binary_p * (binary_p / binary_q).log()).sum())
        rest_p, rest_q = (torch.softmax(without(x, y) / temperature, 0) for x in (t, s))
        nckd.append(temperature**2 * (rest_p * (rest_p / rest_q).log()).sum())
    return torch.stack(tckd), torch.stack(nckd)


def stage(progress):
    return 0.5 * (1 + math.cos(math.pi * progress))


def wkl(student, teacher, labels, progress, distance, mode, *, kappa=1.0, temperature=8.0, gamma=600.0, kl_weight=0.5,
        decay_start=150 / 240, guard=1e-8):  # fmt: skip
    """The modes of the released WKL code without its cross-entropy; (rows,)."""
    c = sharpened(distance, kappa)
    late = 1 - stage(progress)
    decayed = gamma
    if progress > decay_start:
        decayed = gamma * 0.5 * (1 + math.cos(math.pi * (progress - decay_start) / (1 - decay_start)))
    rows = list(zip(student, teacher, labels.tolist(), strict=True))

    def full():
        pairs = ((torch.softmax(s / temperature, 0), torch.softmax(t / temperature, 0)) for s, t, _ in rows)
        return torch.stack([transport(p, q, c, guard=guard) for p, q in pairs])

    def separated():
        return torch.stack([
            target_term(s, t, y) + decayed * non_target_transport(s, t, y, c, temperature, guard=guard)
            for s, t, y in rows
        ])  # fmt: skip

    tckd, nckd = dkd_rows(student, teacher, labels, temperature)
    return {
        "kl": lambda: 10 * kl_rows(student, teacher, temperature),
        "dkd": lambda: tckd + 2 * nckd,
        "wkd": lambda: 10 * full(),
        "dwkd": separated,
        "wkd_kl": lambda: full() + kl_weight * late * kl_rows(student, teacher, temperature),
        "dwkd_dkd": lambda: separated() + kl_weight * late * (tckd + 2 * nckd),
    }[mode]()


def windows(size, grid):
    """Adaptive windows: floor(i size / grid) up to ceil((i + 1) size / grid)."""
    return [slice(math.floor(i * size / grid), math.ceil((i + 1) * size / grid)) for i in range(grid)]


def wkd_feature_rows(student, teacher, ratio=4.0, grid=1):
    """Means and standard deviations (unbiased variance + 1e-5) of each channel in each window; (rows,)."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        mean_loss = std_loss = 0.0
        for rows_s, rows_t in zip(windows(s.shape[1], grid), windows(t.shape[1], grid), strict=True):
            for columns_s, columns_t in zip(windows(s.shape[2], grid), windows(t.shape[2], grid), strict=True):
                cell_s, cell_t = s[:, rows_s, columns_s].flatten(1), t[:, rows_t, columns_t].flatten(1)
                mean_loss = mean_loss + (cell_s.mean(1) - cell_t.mean(1)).square().sum()
                std_s, std_t = ((x.var(1, correction=1) + 1e-5).sqrt() for x in (cell_s, cell_t))
                std_loss = std_loss + (std_s - std_t).square().sum()
        values.append((ratio * mean_loss + std_loss) / grid**2)
    return torch.stack(values)


def gaussian_kl_rows(student, teacher):
    """KL(teacher || student) of diagonal Gaussians over positions, sigma = sqrt(unbiased variance + 1); (rows,)."""
    values = []
    for s, t in zip(student.flatten(2), teacher.flatten(2), strict=True):
        mean_s, mean_t = s.mean(1), t.mean(1)
        std_s, std_t = ((x.var(1, correction=1) + 1.0).sqrt() for x in (s, t))
        terms = ((mean_t - mean_s) / std_s).square() + (std_t / std_s).square() - 2 * (std_t / std_s).log() - 1
        values.append(0.5 * terms.sum())
    return torch.stack(values)


def value_and_gradient(loss, student, *others, **options):
    """Value and gradient with respect to a fresh copy of student; a loss of rows is averaged."""
    student = student.detach().clone().requires_grad_()
    value = loss(student, *others, **options)
    value = value.mean() if value.dim() else value
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def relative_error(actual, expected):
    """Largest difference over the largest entry of what was expected."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()

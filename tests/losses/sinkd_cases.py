"""The paper's formulas written down directly (scaling domain, no library code), and the inputs of the SinKD tests."""

import itertools

import torch

from otkd_fast import _native

BACKENDS = ["reference"] + (["cpu"] if _native.module is not None else [])


def logits(b, d, seed=0, dtype=torch.float64):
    """Student and teacher logits (b, d): related, but far enough apart that the plan is no permutation."""
    generator = torch.Generator().manual_seed(1000 * b + d + seed)
    teacher = 3.0 * torch.randn(b, d, generator=generator, dtype=torch.float64)
    student = 0.5 * teacher + 1.5 * torch.randn(b, d, generator=generator, dtype=torch.float64)
    return student.to(dtype), teacher.to(dtype)


def algorithm_1(rows, columns, epsilon=0.1, num_iters=20):
    """Algorithm 1 of the paper on probability rows: L1 cost, kernel, rows and columns divided by their sums, <K, D>."""
    distance = torch.cdist(rows, columns, p=1)
    kernel = torch.exp(-distance / epsilon)
    for _ in range(num_iters):
        kernel = kernel / kernel.sum(dim=1, keepdim=True)
        kernel = kernel / kernel.sum(dim=0, keepdim=True)
    return (kernel * distance).sum()


def batch_paper(student, teacher, epsilon=0.1, num_iters=20, temperature=2.0):
    s, t = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
    return algorithm_1(t, s, epsilon, num_iters)


def batch_released(student, teacher, epsilon=0.1, num_iters=20, temperature=2.0):
    s, t = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
    return 0.001 * algorithm_1(s, t, epsilon, num_iters)


def sample_paper(student, teacher, epsilon=0.1, num_iters=20, temperature=2.0):
    """Eq. 5 to 12 with the updates of Eq. 14: rows of K get mass s_i, then columns mass t_i."""
    total = 0.0
    for s, t in zip(torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1), strict=True):
        distance = (s[:, None] - t[None, :]).abs()
        kernel = torch.exp(-distance / epsilon)
        for _ in range(num_iters):
            kernel = (s / kernel.sum(dim=1))[:, None] * kernel
            kernel = kernel * (t / kernel.sum(dim=0))[None, :]
        total = total + (kernel * distance).sum()
    return total


def flattened_paper(student, teacher, epsilon=0.1, num_iters=20, temperature=2.0):
    s, t = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
    return algorithm_1(t.reshape(-1, 1), s.reshape(-1, 1), epsilon, num_iters)


def regression_paper(student, teacher, epsilon=0.1, num_iters=20, temperature=2.0):
    return algorithm_1(teacher.reshape(-1, 1), student.reshape(-1, 1), epsilon, num_iters)


TRANSCRIPTIONS = {
    ("batch", "paper"): batch_paper,
    ("batch", "released"): batch_released,
    ("sample", "paper"): sample_paper,
    ("flattened", "paper"): flattened_paper,
    ("regression", "paper"): regression_paper,
}


def assignment_cost(distance):
    """Exact cost of the best one-to-one matching of an n x n cost matrix by trying all of them (n <= 7)."""
    n = distance.shape[0]
    return min(sum(distance[i, p[i]].item() for i in range(n)) for p in itertools.permutations(range(n)))


def value_and_gradient(loss, student, *others):
    """Value and gradient with respect to a fresh copy of student."""
    student = student.detach().clone().requires_grad_()
    value = loss(student, *others)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def relative_error(actual, expected):
    """Largest difference over the largest entry of what was expected."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()

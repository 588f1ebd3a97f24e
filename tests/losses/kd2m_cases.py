"""Formulas of KD2M, written from the paper and from the description of its code, one class and one pair at a time."""

import numpy as np
import ot
import torch


def features(n, m, d, seed=0, dtype=torch.float64):
    """Student and teacher features as after a ReLU and pooling: non-negative, correlated row by row where n = m."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.rand(m, d, generator=generator, dtype=torch.float64) * 2
    student = torch.rand(n, d, generator=generator, dtype=torch.float64)
    if n == m:
        student = student + 0.5 * teacher
    return student.to(dtype), teacher.to(dtype)


def squared_distances(x, y):
    return torch.stack([torch.stack([((p - q) ** 2).sum() for q in y]) for p in x])


def transport(cost):
    """<P, C> with the network simplex's plan as a constant."""
    n, m = cost.shape
    plan = ot.emd(np.full(n, 1 / n), np.full(m, 1 / m), cost.detach().double().numpy())
    return (torch.from_numpy(plan).to(cost.dtype) * cost).sum()


def w2(x, y):
    return transport(squared_distances(x, y))


def gaussian_w2(x, y):
    std_x, std_y = (((z - z.mean(0)) ** 2).mean(0).sqrt() for z in (x, y))
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + ((std_x - std_y) ** 2).sum()


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def gaussian_w2_full(x, y):
    """Eq. 5 with the roots as printed; for regular covariances."""
    cov_x, cov_y = (torch.cov(z.mT, correction=0) for z in (x, y))
    half = root(cov_x)
    bures = cov_x.trace() + cov_y.trace() - 2 * root(half @ cov_y @ half).trace()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + bures


def gaussian_w2_factors(x, y):
    """The same for covariances of any rank: tr (A^(1/2) B A^(1/2))^(1/2) of A = X^T X, B = Y^T Y is the sum of the
    singular values of X Y^T. Rows are taken in a basis of the vectors that sum to 0: no singular value is 0 by rule.
    """
    factors = []
    for z in (x, y):
        n = len(z)
        spanning = torch.cat([torch.ones(n, 1, dtype=z.dtype), torch.eye(n, dtype=z.dtype)[:, 1:]], 1)
        factors.append(torch.linalg.qr(spanning).Q[:, 1:].mT @ z / n**0.5)  # (n - 1, d)
    bures = sum(z.square().sum() for z in factors) - 2 * torch.linalg.svdvals(factors[0] @ factors[1].mT).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + bures


def by_class(distance, x, y, labels):
    return [distance(x[labels == k], y[labels == k]) for k in labels.unique()]


def gaussian_kl(x, y, guard=0.0):
    """The divergence with the factor 1/2 of Eq. 6; guard: what the code adds to the deviations that it divides by."""
    std_x, std_y = (((z - z.mean(0)) ** 2).mean(0).sqrt() for z in (x, y))
    ratio = (std_x / (std_y + guard)) ** 2
    shift = ((x.mean(0) - y.mean(0)) / (std_y + guard)) ** 2
    return (ratio.sum() + shift.sum() - x.shape[1] + 2 * torch.log(std_y / (std_x + guard)).sum()) / 2


def gaussian_kl_full(x, y, jitter):
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    normals = [
        torch.distributions.MultivariateNormal(z.mean(0), torch.cov(z.mT, correction=0) + jitter * eye) for z in (x, y)
    ]
    return torch.distributions.kl_divergence(*normals)


def mmd_linear(x, y):
    n, m = len(x), len(y)
    return (x @ x.mT).sum() / n**2 + (y @ y.mT).sum() / m**2 - 2 * (x @ y.mT).sum() / (n * m)


def mmd_rbf(x, y, bandwidth=None):
    n, m = len(x), len(y)
    xx, yy, xy = squared_distances(x, x), squared_distances(y, y), squared_distances(x, y)
    if bandwidth is None:
        bandwidth = torch.cat([d.detach().sqrt().flatten() for d in (xx, yy, xy)]).mean()
    k = [torch.exp(-d / (2 * bandwidth**2)) for d in (xx, yy, xy)]
    return k[0].sum() / n**2 + k[1].sum() / m**2 - 2 * k[2].sum() / (n * m)


def sinkhorn_detached(cost, epsilon, num_iters, unroll=False):
    """<P, C>, epsilon in units of the mean cost, a constant; scalings, rows first. The plan is a constant, or not."""
    n, m = cost.shape
    kernel = torch.exp(-(cost if unroll else cost.detach()) / (epsilon * cost.detach().mean()))
    v = torch.ones(m, dtype=cost.dtype)
    for _ in range(num_iters):
        u = (1 / n) / (kernel @ v)
        v = (1 / m) / (kernel.mT @ u)
    return (u[:, None] * kernel * v * cost).sum()


def joint_released(x, student_outputs, teacher_outputs, label_cost):
    """Feature cost between students, divided by its largest value, constant; label cost on raw outputs."""
    feature_cost = squared_distances(x, x).detach()
    cost = feature_cost / feature_cost.max()
    if label_cost == "kl":
        log_p, log_q = torch.log_softmax(student_outputs, -1), torch.log_softmax(teacher_outputs, -1)
        label = torch.stack([torch.stack([(p.exp() * (p - q)).sum() for q in log_q]) for p in log_p])
    else:
        label = squared_distances(student_outputs, teacher_outputs)
    return transport(cost + label)


def value_and_gradient(loss, *tensors):
    """Value and the gradient with respect to fresh copies of all tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves, allow_unused=True)

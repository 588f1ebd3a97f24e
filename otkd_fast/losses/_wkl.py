"""The Kullback-Leibler terms of WKL for rows of logits, without NaN at any temperature."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_term(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) (N,), without the factor T^2."""
    return _divergence(torch.log_softmax(teacher / temperature, -1), torch.log_softmax(student / temperature, -1))


def tckd_term(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 KL((p_y, 1 - p_y) of the teacher || of the student) (N,); target bool (N, C), True at the label.

    1 - p_y comes as a logsumexp of the other classes: its logarithm is finite where the probability is 0.
    """
    log_p, log_q = (_binary(logits / temperature, target) for logits in (teacher, student))
    return temperature**2 * _divergence(log_p, log_q)


def nckd_term(student: Tensor, teacher: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 KL of the distributions over the other classes, each normalised to 1 (N,)."""
    log_p, log_q = (
        torch.log_softmax(torch.where(target, -torch.inf, logits) / temperature, -1) for logits in (teacher, student)
    )
    return temperature**2 * _divergence(log_p, log_q)


def _binary(logits: Tensor, target: Tensor) -> Tensor:
    """(N, 2) log p_y and log (1 - p_y)."""
    total = logits.logsumexp(-1)
    own = torch.where(target, logits, 0).sum(-1)
    rest = torch.where(target, -torch.inf, logits).logsumexp(-1)
    return torch.stack([own - total, rest - total], -1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q) over the entries with p > 0; the others, whatever q is, count 0 and get gradient 0."""
    p = log_p.exp()
    counts = p > 0
    return (p * (torch.where(counts, log_p, 0) - torch.where(counts, log_q, 0))).sum(-1)

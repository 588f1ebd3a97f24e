"""Multi-level optimal transport: sorted probabilities token by token, and a Sinkhorn problem between the tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..functional._validate import not_negative_float, positive_float, positive_int
from ..functional.cost_matrix import cost_matrix
from ..functional.sinkhorn import sinkhorn
from ._common import (
    Loss,
    at_least_float32,
    check_backend,
    check_reduction,
    overwrite,
    reduce_rows,
    refuse_num_items,
    zero,
)
from .uld import check_tokens

__all__ = ["MultiLevelOT", "multi_level_ot"]

SCALE_OFFSET = 1e-4  # added to the standard deviation of the logits by the released code
SEQUENCE_TEMPERATURE = 2.0
SEQUENCE_FACTOR = 0.001  # of the released code


class _Options(NamedTuple):
    top_k: int
    temperature: float
    kl_weight: float
    sequence_weight: float
    epsilon: float
    num_iters: int
    reduction: str
    backend: str | None


def multi_level_ot(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    num_items_in_batch: None = None,
    *,
    top_k: int = 50,
    temperature: float = 1.0,
    kl_weight: float = 0.1,
    sequence_weight: float = 0.1,
    epsilon: float = 0.1,
    num_iters: int = 10,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""Multi-level optimal transport for answers of a language model, with vocabularies that may differ.

    Logits are divided by their standard deviation over the vocabulary (+ 1e-4) and softmaxed. On each side the `top_k`
    columns with the largest sum of probabilities over all tokens are kept, in descending order of that sum: s, t
    (B, L, k), zeros where a vocabulary is smaller. Then, for the answers b and their tokens l,

        token      mean_b mean_l |s_bl - t_bl|_1
        kl         - mean_bl <softmax(s_bl), log softmax(t_bl)>
        sequence   0.001 sum_b <P_b, D_b>,  D_b = L1 distances of softmax(t_b / 2) and softmax(s_b / 2) (L x L)

        loss = token + kl_weight kl + sequence_weight sequence

    with SinKD's plan of mass L for D_b (rows first, `num_iters` iterations). The softmaxes of probabilities, and the
    roles of s and t in `kl`, are those of the released code. It counts tokens of padding in `kl` and `sequence`; here
    tokens that the mask leaves out count nowhere, and without padding the numbers are the same. All answers are solved
    in one call.

    An answer's loss is what it adds to this, times the number of answers that count, so that the mean over them is the
    loss: with A answers of N tokens in all, ``mean_l |s_bl - t_bl|_1 + kl_weight (A / N) sum_l kl_bl + sequence_weight
    0.001 A <P_b, D_b>``.

    Args:
        student_logits: (B, L, V), float16, bfloat16, float32 or float64; finite (an infinite one has no standard
            deviation: NaN).
        teacher_logits: (B, L, W), same device: the answers' tokens, aligned from their first on.
        mask: bool (B, L), the tokens of the answers; None: all.
        num_items_in_batch: there for the losses' common signature; only None. The columns are those with the largest
            sums over the whole batch: the losses of its parts do not add up to that of the batch.
        top_k: >= 1.
        temperature: > 0, of the softmax of the scaled logits.
        kl_weight, sequence_weight: >= 0.
        epsilon, num_iters: of the Sinkhorn iterations.
        reduction: "mean" over the answers with tokens that count, as published; "none" (B,), "sum", or "batchmean":
            divided by B.
        backend: one of the package's backends, None chooses.

    Returns:
        Scalar (or (B,) for "none") in float32, or float64 if an input is float64. No token that counts: 0, gradient 0.
        The choice of the columns has no gradient.

    Raises:
        TypeError: a tensor argument of the wrong kind, a parameter of the wrong type.
        ValueError: a wrong shape or device, an unknown reduction, a parameter out of range, a `num_items_in_batch`.

    Source: Cui et al., Multi-Level Optimal Transport for Universal Cross-Tokenizer Knowledge Distillation on Language
    Models (2025), released code.

    >>> import torch
    >>> student, teacher = torch.randn(2, 5, 100), torch.randn(2, 5, 120)
    >>> multi_level_ot(student, teacher).shape
    torch.Size([])
    """
    options = _options(top_k, temperature, kl_weight, sequence_weight, epsilon, num_iters, reduction, backend)
    return _loss(student_logits, teacher_logits, mask, num_items_in_batch, options)


class MultiLevelOT(Loss):
    """Module form of :func:`multi_level_ot`: the parameters are given once,
    ``forward(student_logits, teacher_logits, mask=None, num_items_in_batch=None)`` gives the loss.

    Has no state. All parameters are keyword-only, checked here, and documented there.

    >>> import torch
    >>> MultiLevelOT(top_k=20)(torch.randn(2, 5, 100), torch.randn(2, 5, 120)).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        top_k: int = 50,
        temperature: float = 1.0,
        kl_weight: float = 0.1,
        sequence_weight: float = 0.1,
        epsilon: float = 0.1,
        num_iters: int = 10,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._options = _options(top_k, temperature, kl_weight, sequence_weight, epsilon, num_iters, reduction, backend)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        mask: Tensor | None = None,
        num_items_in_batch: None = None,
    ) -> Tensor:
        """The loss of logits (B, L, V) against (B, L, W); see :func:`multi_level_ot`."""
        return _loss(student_logits, teacher_logits, mask, num_items_in_batch, self._options)


def _options(top_k, temperature, kl_weight, sequence_weight, epsilon, num_iters, reduction, backend) -> _Options:
    """The checked parameters."""
    return _Options(
        positive_int("top_k", top_k), positive_float("temperature", temperature),
        not_negative_float("kl_weight", kl_weight), not_negative_float("sequence_weight", sequence_weight),
        positive_float("epsilon", epsilon), positive_int("num_iters", num_iters), check_reduction(reduction),
        check_backend(backend),
    )  # fmt: skip


def _loss(student, teacher, mask, num_items_in_batch, options: _Options) -> Tensor:
    check_tokens(student, teacher, mask, 3, "(B, L, V)")
    refuse_num_items(num_items_in_batch, "its columns are chosen by sums over the whole batch")
    if student.dim() != 3:
        raise ValueError(f"student_logits: expected shape (B, L, V), got {tuple(student.shape)}")
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if logits.shape[-1] < 2:
            raise ValueError(f"{name}: expected at least two logits a token, got shape {tuple(logits.shape)}")
    student, teacher = at_least_float32(*overwrite(mask, student, teacher))
    if 0 in student.shape[:2]:
        nothing = zero(student, teacher)
        return nothing.expand(student.shape[0]) if options.reduction == "none" else nothing
    s, t = (_columns(_scaled(x) / options.temperature, mask, options.top_k) for x in (student, teacher))
    k = max(s.shape[-1], t.shape[-1])
    s, t = (torch.nn.functional.pad(x, (0, k - x.shape[-1])) for x in (s, t))
    kept = torch.ones_like(s[..., 0], dtype=torch.bool) if mask is None else mask
    counts = kept.sum(1).to(s.dtype)  # (B,)
    counted = counts > 0
    answers, tokens = counted.sum().to(s.dtype), counts.sum().clamp(min=1)
    value = torch.where(kept, (s - t).abs().sum(-1), 0).sum(1) / counts.clamp(min=1)
    entropies = -(torch.softmax(s, -1) * torch.log_softmax(t, -1)).sum(-1)  # (B, L)
    value = value + options.kl_weight * (answers / tokens) * torch.where(kept, entropies, 0).sum(1)
    mass = options.sequence_weight * SEQUENCE_FACTOR * answers * counts
    value = value + mass * _sequence(s, t, mask, counts, options)
    return reduce_rows(value, None if mask is None else counted, options.reduction)


def _scaled(logits: Tensor) -> Tensor:
    """Logits in units of their standard deviation; its gradient is 0 where a row is constant."""
    variance = logits.var(-1, keepdim=True)
    constant = variance == 0
    return logits / (torch.where(constant, 0, torch.where(constant, 1, variance).sqrt()) + SCALE_OFFSET)


def _columns(logits: Tensor, mask: Tensor | None, top_k: int) -> Tensor:
    """Probabilities (B, L, k) of the columns with the largest sums, in their order."""
    p = torch.softmax(logits, -1)
    (p,) = overwrite(mask, p)
    with torch.no_grad():
        order = p.sum((0, 1)).topk(min(top_k, p.shape[-1])).indices
    return p.index_select(-1, order)


def _sequence(s: Tensor, t: Tensor, mask: Tensor | None, counts: Tensor, options: _Options) -> Tensor:
    """<P_b, D_b> (B,) of plans of mass 1."""
    rows, columns = (torch.softmax(x / SEQUENCE_TEMPERATURE, -1) for x in (t, s))
    cost = cost_matrix(rows, columns, metric="l1", backend=options.backend)  # (B, L, L)
    weights = None
    if mask is not None:
        # an answer without tokens needs some mass; its count of 0 takes its cost away
        kept = (mask | (counts == 0).unsqueeze(1)).to(cost.dtype)
        weights = kept / kept.sum(1, keepdim=True)
    return sinkhorn(
        cost, weights, weights, epsilon=options.epsilon, num_iters=options.num_iters, backend=options.backend
    ).transport_cost

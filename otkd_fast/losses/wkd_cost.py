"""wkd_cost: the cost between categories that WKD-L transports with, made once for each teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..functional._validate import check_choice, check_tensor, not_negative_float, positive_float, positive_int
from ._common import check_labels
from ._wkd import sharpened

__all__ = ["wkd_cost"]

METHODS = ("cka", "rbf_cka", "cosine")
_BLOCK = 1 << 26  # most entries of a block of Gram matrices: 256 MiB in float32

Progress = Callable[[int, int], None]


@torch.no_grad()
def wkd_cost(
    features: Tensor,
    labels: Tensor | None = None,
    *,
    method: str = "cka",
    kappa: float = 1.0,
    sigma: float = 1.0,
    classes: int | None = None,
    max_per_class: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    r"""Cost between categories ``c_ij = 1 - exp(-kappa d_ij)`` from a teacher's features or classifier weights.

    The distance is ``d_ij = 1 - similarity(X_i, X_j)``, where the rows of X_i are the features of class i:

        "cka"      linear CKA of the centred X, |X_j^T X_i|_F^2 / (|X_i^T X_i|_F |X_j^T X_j|_F)
        "rbf_cka"  the same of centred Gram matrices exp(-D^2 / (2 sigma^2 median(D^2))), D the distances within a class
        "cosine"   the cosine of classifier weights (no `labels`: row i is class i), or (with `labels`) of class means

    CKA pairs the k-th row of one class with the k-th row of another, so all classes are cut to the same number m of
    rows, the smallest class's: the first m in the order of `features`. (The pairing is arbitrary in the published
    method too; another order gives slightly different costs.) A class whose features do not vary has similarity 0 to
    the others. The result is exactly symmetric, its diagonal exactly 0.

    Published: "cka" of the training set's features (test transforms, teacher in eval mode): the last stage's maps with
    every position as a row for CIFAR-100, logits for ImageNet; kappa 1, or 2 for ResNet-50.

    Args:
        features: (N, d) floating point, or (N, d, *positions), in which case every position is a row. For "cosine"
            without labels: (C, d) weights.
        labels: (N,) integers, the classes 0 to C - 1.
        method: "cka", "rbf_cka" or "cosine".
        kappa: >= 0, sharpening; 0 returns the distances d (the content of the released files).
        sigma: > 0, bandwidth of "rbf_cka" in units of the root of the median squared distance.
        classes: C, None: the largest label + 1.
        max_per_class: use at most this many rows of each class (CKA only).
        progress: called as ``progress(done, total)`` while a CKA is computed.

    Returns:
        (C, C) in the dtype of `features`, float32 for half-precision ones; computed in that dtype with sums in float64.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not match, a label out of range, a class with fewer than two rows (CKA) or without
            any, features that are not finite, fewer than two classes, a parameter out of range.

    Source: WKD (arXiv 2412.08139), released code; Kornblith et al. (ICML 2019) for CKA. This function looks at values:
    it synchronises, and is not for a training step.

    >>> import torch
    >>> weights = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    >>> wkd_cost(weights, method="cosine", kappa=0.0)
    tensor([[0., 1., 0.],
            [1., 0., 1.],
            [0., 1., 0.]])
    """
    check_choice("method", method, METHODS)
    kappa, sigma = not_negative_float("kappa", kappa), positive_float("sigma", sigma)
    features = _checked(features, labels, method)
    if labels is None:
        distance = 1 - _cosine(features)
    else:
        groups = _by_class(features, labels, classes, 1 if method == "cosine" else 2)
        if method == "cosine":
            means = [_class_rows(features, index).mean(0, dtype=torch.float64) for index in groups]
            distance = 1 - _cosine(torch.stack(means))
        else:
            x = _aligned(features, groups, max_per_class)
            distance = 1 - _cka(x, sigma if method == "rbf_cka" else None, progress)
    if distance.shape[0] < 2:
        raise ValueError(f"features: expected at least two classes, got {distance.shape[0]}")
    distance = (distance + distance.mT) / 2
    return sharpened(distance.fill_diagonal_(0).clamp_(min=0), kappa).to(features.dtype)


def _checked(features: Tensor, labels: Tensor | None, method: str) -> Tensor:
    """Raise for what does not fit; the features in at least float32."""
    check_tensor("features", features, 2, "(N, d) or (N, d, *positions)")
    if 0 in features.shape:
        raise ValueError(f"features: expected at least one row and feature, got shape {tuple(features.shape)}")
    features = features.detach().to(torch.promote_types(features.dtype, torch.float32))
    if not features.isfinite().all():
        raise ValueError("features: expected finite values, got NaN or infinities")
    if labels is not None:
        check_labels(labels, features.shape[:1], features, other_name="features")
    elif method != "cosine":
        raise ValueError(f"labels: expected the class of each row of features for method {method!r}, got None")
    elif features.dim() != 2:
        raise ValueError(f"features: expected weights (C, d) without labels, got shape {tuple(features.shape)}")
    return features


def _by_class(features: Tensor, labels: Tensor, classes: int | None, least: int) -> list[Tensor]:
    """Where the features of each class are, in their order."""
    labels = labels.long()
    low, high = labels.min().item(), labels.max().item()
    classes = int(high) + 1 if classes is None else positive_int("classes", classes)
    if low < 0 or high >= classes:
        raise ValueError(f"labels: expected values in [0, {classes}), got values from {low} to {high}")
    counts = torch.bincount(labels, minlength=classes).tolist()
    small = min(range(classes), key=counts.__getitem__)
    rows = counts[small] * features.shape[2:].numel()
    if rows < least:
        raise ValueError(f"labels: expected at least {least} row(s) of each class, got {rows} of class {small}")
    return list(labels.argsort(stable=True).split(counts))


def _class_rows(features: Tensor, index: Tensor) -> Tensor:
    """The rows (n, d) of one class: those of the features, or every position of them."""
    rows = features.index_select(0, index)
    return rows if rows.dim() == 2 else rows.flatten(2).transpose(1, 2).reshape(-1, rows.shape[1])


def _aligned(features: Tensor, groups: list[Tensor], max_per_class: int | None) -> Tensor:
    """(C, m, d): the first m rows of each class, m the smallest count; the only copy of the features."""
    m = min(map(len, groups)) * features.shape[2:].numel()
    if max_per_class is not None:
        if positive_int("max_per_class", max_per_class) < 2:
            raise ValueError(f"max_per_class: expected at least 2, got {max_per_class}")
        m = min(m, max_per_class)
    x = features.new_empty(len(groups), m, features.shape[1])
    for own, index in zip(x, groups, strict=True):
        own.copy_(_class_rows(features, index)[:m])
    return x


def _cosine(rows: Tensor) -> Tensor:
    rows = rows.double()
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    if not (norms > 0).all():
        raise ValueError("features: expected rows (or class means) with a direction for the cosine, got zeros")
    rows = rows / norms
    return (rows @ rows.mT).clamp(-1, 1)


def _cka(x: Tensor, sigma: float | None, progress: Progress | None) -> Tensor:
    """Similarities (C, C), float64, of x (C, m, d), which is centred in place; linear, or RBF with bandwidth sigma."""
    x -= x.mean(1, keepdim=True)
    _, m, d = x.shape
    if sigma is not None:
        products = _rbf_products(x, sigma, progress)
    elif m <= d:
        products = _gram_products(x, progress)
    else:
        products = _feature_products(x, progress)
    norms = products.diagonal().sqrt()
    scale = norms.unsqueeze(0) * norms.unsqueeze(1)
    return torch.where(scale > 0, products / torch.where(scale > 0, scale, 1), 0).clamp(0, 1)


def _gram_products(x: Tensor, progress: Progress | None) -> Tensor:
    """<K_i, K_j> of Gram matrices K_i = X_i X_i^T (m, m): C^2 m^2 multiplications, a block of their rows at a time."""
    classes, m, _ = x.shape
    step = max(1, _BLOCK // (classes * m))
    products = x.new_zeros(classes, classes, dtype=torch.float64)
    for start in range(0, m, step):
        block = (x[:, start : start + step] @ x.mT).flatten(1)  # (C, step m)
        products += (block @ block.mT).double()
        _tell(progress, min(start + step, m), m)
    return products


def _feature_products(x: Tensor, progress: Progress | None) -> Tensor:
    """|X_j^T X_i|_F^2, the same numbers, without (m, m) matrices: C^2 m d^2 / 2 multiplications."""
    classes, _, d = x.shape
    step = max(1, _BLOCK // (d * d))
    products = x.new_zeros(classes, classes, dtype=torch.float64)
    done, total = 0, classes * (classes + 1) // 2
    for i in range(classes):
        for start in range(i, classes, step):
            others = x[start : start + step]  # (k, m, d)
            values = (others.mT @ x[i]).flatten(1).square().sum(1, dtype=torch.float64)
            products[i, start : start + step] = values
            products[start : start + step, i] = values
            done += len(others)
            _tell(progress, done, total)
    return products


def _rbf_products(x: Tensor, sigma: float, progress: Progress | None) -> Tensor:
    """<K_i, K_j> of centred RBF Gram matrices, a block of classes against another at a time."""
    classes, m, _ = x.shape
    step = max(1, _BLOCK // (m * m))
    products = x.new_zeros(classes, classes, dtype=torch.float64)
    starts = range(0, classes, step)
    done, total = 0, len(starts) * (len(starts) + 1) // 2
    for first in starts:
        own = _rbf_grams(x[first : first + step], sigma)
        for second in starts[first // step :]:
            other = own if second == first else _rbf_grams(x[second : second + step], sigma)
            values = (own @ other.mT).double()
            products[first : first + step, second : second + step] = values
            products[second : second + step, first : first + step] = values.mT
            done += 1
            _tell(progress, done, total)
    return products


def _rbf_grams(x: Tensor, sigma: float) -> Tensor:
    """Centred exp(-D^2 / (2 sigma^2 median(D^2))) of x (k, m, d), flattened (k, m^2)."""
    squares = torch.stack([torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") for rows in x]).square()
    median = squares.flatten(1).median(1).values[:, None, None]
    scale = 2 * sigma**2 * torch.where(median > 0, median, 1)
    gram = torch.exp(-squares / scale)
    gram = gram - gram.mean(1, keepdim=True)
    return (gram - gram.mean(2, keepdim=True)).flatten(1)


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)

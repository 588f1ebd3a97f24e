"""Functions of POT (``import ot``) under their signatures, computed by otkd_fast.

``import otkd_fast.compat.pot as ot`` serves ``ot.sinkhorn``, ``ot.sinkhorn2``, ``ot.bregman.empirical_sinkhorn2`` and
``ot.gaussian.bures_wasserstein_distance`` (under ``ot.bregman`` the first two as well). Order of updates, stopping rule
and what is returned are POT's; options that are not served raise an error that names them. POT is not needed.
docs/migration.md lists the differences.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..functional._validate import positive_float, positive_int
from ..functional.cost_matrix import cost_matrix
from ..functional.gaussian import gaussian_wasserstein
from ..functional.sinkhorn import sinkhorn as _sinkhorn
from ..functional.sinkhorn_points import sinkhorn_points
from ..functional.sinkhorn_result import SinkhornResult
from ..functional.sqrtm import sqrtm

__all__ = ["bregman", "bures_wasserstein_distance", "empirical_sinkhorn2", "gaussian", "sinkhorn", "sinkhorn2"]

METHODS = ("sinkhorn", "sinkhorn_log")
METRICS = {"sqeuclidean": "sqeuclidean", "euclidean": "l2", "cityblock": "l1", "cosine": "cosine"}
CHECK_EVERY = 10


def sinkhorn(
    a, b, M, reg, method="sinkhorn", numItermax=1000, stopThr=1e-9, verbose=False, log=False, warn=True,
    warmstart=None, **kwargs,
):  # fmt: skip
    """``ot.sinkhorn``: the plan (dim_a, dim_b), or for b (dim_b, n_hists) the losses (n_hists,).

    As there: columns first; after iterations 1, 11, 21, ... the 2-norm of the error of the columns' marginal is
    compared with `stopThr` (the host waits for the device there); numpy arrays and lists in, numpy arrays out;
    differentiable for torch tensors, through all iterations. The iterations are those of the log domain, for both
    methods: they do not end at a division by 0.

    Raises:
        ValueError: `method` that is not 'sinkhorn' or 'sinkhorn_log'; what :func:`otkd_fast.sinkhorn` raises.
        TypeError: an option that POT would ignore.

    >>> from otkd_fast.compat import pot as ot
    >>> ot.sinkhorn([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1)
    array([[0.36552929, 0.13447071],
           [0.13447071, 0.36552929]])
    """
    back, M, a, b, warmstart = _torch_operands(M, a, b, warmstart)
    a, b = _uniform_if_empty(M, a, b)
    _no_more_options("sinkhorn", kwargs)
    if b.dim() == 2:
        value, logged = _histograms(a, b, M, reg, method, numItermax, stopThr, verbose, warn, warmstart)
    else:
        result, logged = _solve_dense(a, b, M, reg, method, numItermax, stopThr, verbose, warn, warmstart)
        value = result.plan()
    return (back(value), _logged(logged, back)) if log else back(value)


def sinkhorn2(
    a, b, M, reg, method="sinkhorn", numItermax=1000, stopThr=1e-9, verbose=False, log=False, warn=False,
    warmstart=None, **kwargs,
):  # fmt: skip
    """``ot.sinkhorn2``: ``<P, M>`` for the plan of :func:`sinkhorn`.

    >>> from otkd_fast.compat import pot as ot
    >>> print(f"{ot.sinkhorn2([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1):.6f}")
    0.268941
    """
    back, M, a, b, warmstart = _torch_operands(M, a, b, warmstart)
    a, b = _uniform_if_empty(M, a, b)
    _no_more_options("sinkhorn2", kwargs)
    if b.dim() == 2:
        value, logged = _histograms(a, b, M, reg, method, numItermax, stopThr, verbose, warn, warmstart)
    else:
        result, logged = _solve_dense(a, b, M, reg, method, numItermax, stopThr, verbose, warn, warmstart)
        value = result.transport_cost
    return (back(value), _logged(logged, back)) if log else back(value)


def empirical_sinkhorn2(
    X_s, X_t, reg, a=None, b=None, metric="sqeuclidean", numIterMax=10000, stopThr=1e-9, isLazy=False, batchSize=100,
    verbose=False, log=False, warn=True, warmstart=None, **kwargs,
):  # fmt: skip
    """``ot.bregman.empirical_sinkhorn2``: ``<P, C>`` between samples X_s (n, d) and X_t (m, d).

    With `isLazy` no cost matrix is made, rows are updated first and the 1-norm of the rows' error is compared after
    iterations 10, 20, ..., as there; unlike there the result is differentiable, and the log has no ``lazy_plan``.
    `batchSize` is accepted and not used: blocks are chosen by the library.

    Raises:
        ValueError: `metric` that is not 'sqeuclidean', 'euclidean', 'cityblock' or 'cosine'.

    >>> import numpy as np
    >>> from otkd_fast.compat import pot as ot
    >>> points = np.array([[0.0], [1.0]])
    >>> print(f"{ot.bregman.empirical_sinkhorn2(points, points, reg=0.1):.6e}")
    4.539787e-05
    """
    back, X_s, X_t, a, b, warmstart = _torch_operands(X_s, X_t, a, b, warmstart)
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(map(repr, METRICS))}, got {metric!r}")
    if not isLazy:
        a = X_s.new_full(X_s.shape[:1], 1 / X_s.shape[0]) if a is None else a
        b = X_s.new_full(X_t.shape[:1], 1 / X_t.shape[0]) if b is None else b
        M = cost_matrix(X_s, X_t, metric=METRICS[metric])
        answer = sinkhorn2(
            a, b, M, reg, numItermax=numIterMax, stopThr=stopThr, verbose=verbose, log=log, warn=warn,
            warmstart=warmstart, **kwargs,
        )  # fmt: skip
        return (back(answer[0]), _logged(answer[1], back)) if log else back(answer)
    _no_more_options("empirical_sinkhorn2 with isLazy", kwargs)
    reg = positive_float("reg", reg)

    def solve(x, y, a, b, num_iters, initial):
        return sinkhorn_points(
            x, y, a, b, metric=METRICS[metric], epsilon=reg, num_iters=num_iters, initial_potentials=initial,
            storage="streamed",
        )  # fmt: skip

    result, errors, done = _until(
        solve, (X_s, X_t, a, b), _start(warmstart, reg), numIterMax, stopThr, verbose, warn, CHECK_EVERY,
        lambda result, y: result.marginal_error, lambda error: error <= stopThr,
    )  # fmt: skip
    logged = {"err": errors, "u": result.f / reg, "v": result.g / reg, "niter": done - 1}
    return (back(result.transport_cost), _logged(logged, back)) if log else back(result.transport_cost)


def bures_wasserstein_distance(ms, mt, Cs, Ct, paired=False, log=False):
    """``ot.gaussian.bures_wasserstein_distance``: the 2-Wasserstein distance (not squared) between Gaussians.

    For means (n, d) and (m, d), covariances (n, d, d) and (m, d, d): all pairs (n, m), or the n pairs with `paired` if
    n = m. For one pair a scalar, as POT's documentation says (for torch tensors POT itself gives shape (1,)).
    Where the distance is 0 its gradient is 0.

    >>> import numpy as np
    >>> from otkd_fast.compat import pot as ot
    >>> float(ot.gaussian.bures_wasserstein_distance(np.zeros(2), np.ones(2), np.eye(2), 4 * np.eye(2)))
    2.0
    """
    back, Cs, ms, mt, Ct = _torch_operands(Cs, ms, mt, Ct)
    for name, mean, cov in (("ms", ms, Cs), ("mt", mt, Ct)):
        if mean.dim() not in (1, 2) or cov.shape != (*mean.shape, mean.shape[-1]):
            raise ValueError(
                f"{name}: expected means (d,) or (n, d) and covariances of one more axis, got shapes "
                f"{tuple(mean.shape)} and {tuple(cov.shape)}"
            )
    if ms.dim() != mt.dim() or ms.shape[-1] != mt.shape[-1]:
        raise ValueError(f"mt: expected a shape like that of ms, {tuple(ms.shape)}, got {tuple(mt.shape)}")
    roots = sqrtm(Cs) if log else None
    if ms.dim() == 2 and not (paired and len(ms) == len(mt)):
        pairs = len(ms), len(mt)
        ms, Cs = ms[:, None].expand(*pairs, -1), Cs[:, None].expand(*pairs, -1, -1)
        mt, Ct = mt[None].expand(*pairs, -1), Ct[None].expand(*pairs, -1, -1)
    squared = gaussian_wasserstein(ms, Cs, mt, Ct)
    positive = squared > 0
    distance = torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)
    return (back(distance), {"Cs12": back(roots)}) if log else back(distance)


bregman = SimpleNamespace(sinkhorn=sinkhorn, sinkhorn2=sinkhorn2, empirical_sinkhorn2=empirical_sinkhorn2)
gaussian = SimpleNamespace(bures_wasserstein_distance=bures_wasserstein_distance)


def _solve_dense(a, b, M, reg, method, numItermax, stopThr, verbose, warn, warmstart):
    """SinkhornResult for a (n,), b (m,) or (h, m), and the log."""
    if method.lower() not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
    reg = positive_float("reg", reg)

    def solve(M, a, b, num_iters, initial):
        return _sinkhorn(
            M, a, b, epsilon=reg, num_iters=num_iters, update_first="b", initial_potentials=initial
        )  # fmt: skip

    def error(result, problem):
        ones = torch.ones_like(result.f)
        return (result.plan_apply(ones, transpose=True) - problem[2]).norm()

    result, errors, done = _until(
        solve, (M, a, b), _start(warmstart, reg), numItermax, stopThr, verbose, warn, 1, error, lambda e: e < stopThr
    )
    log_u, log_v = result.f / reg, result.g / reg
    logged = {"err": errors, "niter": done - 1}
    if method.lower() == "sinkhorn":
        # its scalings start at 1 / dim_a, the others at 1: a constant moves from one to the other
        shift = np.log(M.shape[0]) if warmstart is None else 0.0
        return result, logged | {"u": (log_u - shift).exp(), "v": (log_v + shift).exp()}
    return result, logged | {"log_u": log_u, "log_v": log_v, "u": log_u.exp(), "v": log_v.exp()}


def _histograms(a, b, M, reg, method, numItermax, stopThr, verbose, warn, warmstart):
    """Losses (n_hists,) of b (dim_b, n_hists): one stop for all with 'sinkhorn', one each with 'sinkhorn_log'."""
    if method.lower() == "sinkhorn":
        if warmstart is not None:
            warmstart = tuple(x.mT for x in warmstart)
        result, logged = _solve_dense(
            a.expand(b.shape[1], -1), b.mT, M, reg, method, numItermax, stopThr, verbose, warn, warmstart
        )
        return result.transport_cost, logged | {name: logged[name].mT for name in ("u", "v")}
    starts = [None] * b.shape[1] if warmstart is None else warmstart
    solved = [
        _solve_dense(a, column, M, reg, method, numItermax, stopThr, verbose, warn, start)
        for column, start in zip(b.unbind(1), starts, strict=True)
    ]
    names = "log_u", "log_v", "u", "v"
    logged = {name: torch.stack([log[name] for _, log in solved], 1) for name in names}
    return torch.stack([result.transport_cost for result, _ in solved]), logged


def _until(
    solve: Callable[..., SinkhornResult], problem: tuple, initial, most: int, threshold: float, verbose: bool,
    warn: bool, first_check: int, error: Callable, reached: Callable,
) -> tuple[SinkhornResult, list, int]:  # fmt: skip
    """Iterations until the error, looked at after `first_check` and then after every tenth, is small enough.

    Where a gradient is wanted the loop is run once more in one piece: its derivative is that of all iterations.

    Returns:
        the result, the errors, and the number of iterations.
    """
    most = positive_int("numItermax", most)
    wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in problem)
    errors, done, step, potentials = [], 0, first_check, initial
    with torch.no_grad():
        constants = tuple(None if x is None else x.detach() for x in problem)
        while True:
            step = min(step, most - done)
            result = solve(*constants, step, potentials)
            done, potentials = done + step, (result.f, result.g)
            if (done - first_check) % CHECK_EVERY == 0:
                errors.append(error(result, constants))
                if verbose:
                    print(f"{done:5d}|{float(errors[-1]):8e}|")
                if bool(reached(errors[-1])):
                    break
            if done == most:
                if warn:
                    warnings.warn(
                        f"Sinkhorn iterations: the error is above {threshold:g} after numItermax={most} of them",
                        stacklevel=4,
                    )
                break
            step = CHECK_EVERY
    if wants_gradient:
        result = solve(*problem, done, initial)
    return result, errors, done


def _start(warmstart, reg: float):
    """Potentials from logarithms of scalings."""
    return None if warmstart is None else tuple(reg * x.detach() for x in warmstart)


def _no_more_options(function: str, options: dict[str, Any]) -> None:
    if options:
        raise TypeError(f"{next(iter(options))}: not an option of otkd_fast.compat.pot.{function}")


def _torch_operands(like, *values) -> tuple:
    """A function that gives results the type of the arguments, then `like` and the values as tensors.

    Tensors stay what they are; arrays, lists and numbers get the dtype and device of the first tensor there is, else
    the dtype of `like` (float64 for integers). Without a tensor results become numpy arrays.
    """
    flat = [x for value in (like, *values) for x in (value if isinstance(value, tuple) else (value,))]
    tensors = [x for x in flat if isinstance(x, Tensor)]
    kind = tensors[0] if tensors else torch.from_numpy(np.asarray(like))
    if not kind.is_floating_point():
        kind = kind.double()
    back = (lambda x: x) if tensors else (lambda x: x.numpy() if isinstance(x, Tensor) else x)
    return back, *(_converted(value, kind) for value in (like, *values))


def _converted(value, kind: Tensor):
    if value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, tuple) or (isinstance(value, list) and value and isinstance(value[0], tuple)):
        return type(value)(_converted(x, kind) for x in value)
    return torch.from_numpy(np.ascontiguousarray(np.asarray(value))).to(kind)


def _uniform_if_empty(M: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(M.new_full((M.shape[axis],), 1 / M.shape[axis]) if len(x) == 0 else x for axis, x in enumerate((a, b)))


def _logged(logged: dict, back: Callable) -> dict:
    return {
        name: [back(x) for x in value] if isinstance(value, list) else back(value) for name, value in logged.items()
    }

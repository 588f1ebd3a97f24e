# ruff: noqa
"""Stand-ins over the reference for the Sinkhorn ops whose kernels are not merged yet; slow, and deleted with the merge."""

from __future__ import annotations

import torch

from . import _library

OPTIONS = "float epsilon, int num_iters, float tol, float relaxation, float penalty_a, float penalty_b, bool update_a_first"
SEVEN = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
GRADS = "Tensor? grad_transport_cost, Tensor? grad_regularized_cost, Tensor? grad_f, Tensor? grad_g"


def _reference(cost, a, b, offsets, f, g, gradient, epsilon, num_iters, tol, relaxation, pa, pb, order):
    from .. import reference

    options = {
        "epsilon": epsilon, "num_iters": num_iters, "tol": tol or None, "relaxation": relaxation or "auto",
        "marginal_penalty": (pa, pb), "update_first": "a" if order else "b", "gradient": gradient,
        "initial_potentials": (f, g),
    }  # fmt: skip
    if offsets:
        return reference.sinkhorn_ragged(cost, a, b, row_offsets=offsets[0], column_offsets=offsets[1], **options)
    return reference.sinkhorn(cost, a, b, **options)


def _forward(cost, a, b, offsets, f, g, *options):
    keep = options[-1]
    with torch.no_grad():
        out = _reference(cost, a, b, offsets, f, g, "envelope", *options[:-1])
    batch = () if offsets else out[0].shape
    history = torch.tensor([options[2], options[3]] if keep else [], dtype=torch.float64)
    return *(x.clone().contiguous() for x in out), history.expand(*batch, -1).clone()


def _backward(cost, a, b, offsets, f, g, history, g0, g1, g2, g3, epsilon, num_iters, pa, pb, order, mode, *needs):
    leaves = [None if t is None else t.detach().clone().requires_grad_(n) for t, n in zip((cost, a, b), needs)]
    tol, relaxation = history.reshape(-1, 2)[0].tolist() if history.numel() else (0.0, 1.0)
    with torch.enable_grad():
        out = _reference(*leaves, offsets, f, g, mode, epsilon, num_iters, tol, relaxation, pa, pb, order)
        pairs = [(o, grad) for o, grad in zip(out, (g0, g1, g2, g3)) if grad is not None and o.requires_grad]
    wanted = [t for t, n in zip(leaves, needs) if n]
    outs, grads = zip(*pairs)
    found = list(torch.autograd.grad(outs, wanted, grads, materialize_grads=True))
    return tuple(found.pop(0).contiguous() if n else cost.new_empty(0) for n in needs)


def _fake_forward(cost, a, b, offsets, f, g, *options):
    keep = 2 if options[-1] else 0
    if offsets:
        row_offsets, _, rows, columns = offsets
        batch, shapes, h = [row_offsets.shape[0] - 1], ([rows], [columns]), [keep]
    else:
        batch = list((cost if cost.dim() > 2 or a is None and b is None else b if a is None else a).shape)
        batch = batch[:-2] if cost.dim() > 2 or a is None and b is None else batch[:-1]
        n, m = cost.shape[-2:]
        shapes, h = ([*batch, n], [*batch, m]), [*batch, keep]
    x = [cost.new_empty(s) for s in (batch, batch, *shapes, batch)]
    return *x, cost.new_empty(batch, dtype=torch.int64), cost.new_empty(h, dtype=torch.float64)


def _register(name: str, ragged: bool, extra: str) -> None:
    def split(args):
        return (args[:3], args[3:7], args[7:]) if ragged else (args[:3], (), args[3:])

    def fwd(*args):
        head, offsets, rest = split(args)
        return _forward(*head, offsets, *rest)

    def bwd(*args):
        head, offsets, rest = split(args)
        return _backward(*head, offsets, *rest)

    def fake_fwd(*args):
        head, offsets, rest = split(args)
        return _fake_forward(*head, offsets, *rest)

    def fake_bwd(*args):
        (cost, a, b), offsets, rest = split(args)
        f, g, history, g0, g1, g2, g3 = rest[:7]
        given = g0 if g0 is not None else g1
        batch = given.shape if given is not None else (g2 if g2 is not None else g3).shape[:-1]
        shapes = ([offsets[2]], [offsets[3]]) if ragged else ([*batch, cost.shape[-2]], [*batch, cost.shape[-1]])
        need = rest[-3:]
        return tuple(cost.new_empty(s if n else (0,)) for s, n in zip((cost.shape, *shapes), need))

    head = f"Tensor cost, Tensor? a, Tensor? b, {extra}Tensor? initial_f, Tensor? initial_g"
    _library.register(f"{name}_fwd({head}, {OPTIONS}, int keep) -> {SEVEN}", fake_fwd, fwd)
    _library.register(
        f"{name}_bwd({head}, Tensor history, {GRADS}, float epsilon, int num_iters, float penalty_a, float penalty_b, "
        "bool update_a_first, str gradient, bool need_cost, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)",
        fake_bwd,
        bwd,
    )


def register(*names: str) -> None:
    for name in names:
        extra = "Tensor row_offsets, Tensor column_offsets, int rows, int columns, " if "ragged" in name else ""
        _register(name, "ragged" in name, extra)

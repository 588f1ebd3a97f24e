"""WKL and its diagnostics against the released formulas."""

import functools

import pytest
import torch
import wkd_cases as cases
from wkd_cases import BACKENDS, relative_error, value_and_gradient

from otkd_fast.losses import WKL, WKLDiagnostics, wkd_logit, wkl
from otkd_fast.testing import tolerance

MODES = ["dwkd_dkd", "kl", "dkd", "wkd", "dwkd", "wkd_kl"]
PROGRESS = [1 / 240, 0.5, 150 / 240, 200 / 240, 1.0]
ROWS, CLASSES = 8, 50
DISTANCE = cases.distances(CLASSES)
VARIANTS = [(variant, backend) for variant in ("released", "paper") for backend in BACKENDS]
every_variant = pytest.mark.parametrize(("variant", "backend"), VARIANTS)


@functools.cache
def expected(mode, progress, variant):
    student, teacher, labels = cases.sample(ROWS, CLASSES)
    return value_and_gradient(
        cases.wkl, student, teacher, labels, progress, DISTANCE, mode, guard=cases.GUARDS[variant]
    )


@every_variant
@pytest.mark.parametrize("progress", PROGRESS)
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_formula(mode, progress, variant, backend):
    student, teacher, labels = cases.sample(ROWS, CLASSES)
    loss = WKL(cost=DISTANCE, kappa=1.0, mode=mode, variant=variant, backend=backend)
    value, gradient = value_and_gradient(loss, student, teacher, labels, progress)
    expected_value, expected_gradient = expected(mode, progress, variant)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected_value, rtol=1e-9, atol=0.0)
    assert relative_error(gradient, expected_gradient) < 1e-9
    tensor = loss(student, teacher, labels, torch.tensor(progress, dtype=torch.float64))
    torch.testing.assert_close(tensor, expected_value, rtol=1e-9, atol=0.0)


@every_variant
@pytest.mark.parametrize("mode", MODES)
def test_float32_is_near_float64(mode, variant, backend):
    student, teacher, labels = cases.sample(ROWS, CLASSES, dtype=torch.float32)
    loss = WKL(cost=DISTANCE.float(), kappa=1.0, mode=mode, variant=variant, backend=backend)
    value, gradient = value_and_gradient(loss, student, teacher, labels, 0.7)
    exact = (student.double(), teacher.double(), labels, 0.7, DISTANCE.float().double(), mode)
    expected_value, expected_gradient = value_and_gradient(cases.wkl, *exact, guard=cases.GUARDS[variant])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-5, atol=1e-6)
    assert relative_error(gradient, expected_gradient) < tolerance("sinkhorn", "gradient", torch.float32).atol


def test_dwkd_is_wkd_logit():
    student, teacher, labels = cases.sample(ROWS, CLASSES)
    value = wkl(student, teacher, labels, 0.3, cost=DISTANCE, mode="dwkd")
    assert torch.equal(value, wkd_logit(student, teacher, labels, cost=DISTANCE))


def test_weights_and_temperature_of_the_divergences():
    student, teacher, labels = cases.sample(ROWS, CLASSES)
    options = {"cost": DISTANCE, "mode": "dkd", "tckd_weight": 0.5, "nckd_weight": 3.0, "kl_temperature": 4.0}
    tckd, nckd = cases.dkd_rows(student, teacher, labels, 4.0)
    expected = (0.5 * tckd + 3 * nckd).mean()
    torch.testing.assert_close(wkl(student, teacher, labels, 0.3, **options), expected)


@pytest.mark.parametrize("temperature", [1.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_nan_where_probabilities_vanish(temperature, dtype):
    """At these logits the target's probability is 1 or 0 to the last bit, and 0 log 0 must not be formed."""
    student = torch.tensor([[300.0, 0.0, -300.0], [-300.0, 0.0, 300.0]], dtype=dtype)
    teacher = torch.tensor([[400.0, 0.0, 100.0], [400.0, -400.0, 0.0]], dtype=dtype)
    labels = torch.tensor([0, 1])
    for mode in MODES:
        loss = WKL(cost=cases.distances(3).to(dtype), mode=mode, temperature=temperature)
        value, gradient = value_and_gradient(loss, student, teacher, labels, 0.9)
        assert value.isfinite() and gradient.isfinite().all(), mode


@pytest.mark.parametrize("mode", ["kl", "dkd"])
def test_identical_logits_give_zero(mode):
    _, teacher, labels = cases.sample(ROWS, CLASSES)
    value, gradient = value_and_gradient(WKL(cost=DISTANCE, mode=mode), teacher, teacher.clone(), labels, 0.5)
    assert abs(value.item()) < 1e-12 and gradient.abs().max() < 1e-12


def test_diagnostics():
    student, teacher, labels = cases.sample(ROWS, CLASSES)
    loss = WKL(cost=DISTANCE, kappa=1.0)
    log = WKLDiagnostics(loss)
    assert log.compute()["kl"].item() == 0.0
    log.update(student[:5], teacher[:5], labels[:5], 0.8)
    mask = torch.ones(ROWS - 5, dtype=torch.bool)
    mask[2] = False
    log.update(student[5:].requires_grad_(), teacher[5:], labels[5:], torch.tensor(0.8, dtype=torch.float64), mask)
    student.detach_()
    kept = torch.arange(ROWS) != 7
    s, t, y = student[kept], teacher[kept], labels[kept]
    tckd, nckd = (x.mean() for x in cases.dkd_rows(s, t, y, 8.0))
    target = torch.stack([cases.target_term(*row) for row in zip(s, t, y, strict=True)]).mean()
    separated = cases.wkl(s, t, y, 0.8, DISTANCE, "dwkd").mean()
    expected = {
        "kl": cases.wkl(s, t, y, 0.8, DISTANCE, "kl").mean() / 10,
        "dkd": tckd + 2 * nckd,
        "tckd": tckd,
        "nckd": 2 * nckd,
        "wkd": cases.wkl(s, t, y, 0.8, DISTANCE, "wkd").mean() / 10,
        "dwkd": separated,
        "twkd": target,
        "nwkd": separated - target,
    }
    actual = log.compute()
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert not actual[name].requires_grad
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=0.0)
    log.reset()
    log.update(student[:0], teacher[:0], labels[:0], 0.8)
    assert log.compute()["dwkd"].item() == 0.0
    with pytest.raises(TypeError, match="loss"):
        WKLDiagnostics(torch.nn.Identity())


def test_logged_gradients():
    """Of the logits of a model, at the teacher's first class and at its next five, by sorting row by row."""
    student, teacher, labels = cases.sample(ROWS, CLASSES)
    loss = WKL(cost=DISTANCE, kappa=1.0)
    log = WKLDiagnostics(loss)
    mask = torch.arange(ROWS - 5) != 1
    expected = []
    for part, kept in ((slice(0, 5), None), (slice(5, ROWS), mask)):
        logits = student[part].clone().requires_grad_()
        outputs = 1.5 * logits
        log.watch(outputs, teacher[part], kept)
        (outputs.sum() * 0 + loss(outputs, teacher[part], labels[part], 0.8, kept)).backward()
        for k, row in enumerate(teacher[part]):
            order = sorted(range(CLASSES), key=lambda c, row=row: -row[c].item())
            if kept is None or kept[k]:
                gradient = logits.grad[k] / 1.5
                expected.append((gradient[order[0]], gradient[order[1:6]].mean()))
    actual = log.compute()
    for name, values in zip(("gradient_top", "gradient_next"), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(actual[name], torch.stack(values).mean(), rtol=1e-9, atol=0.0)
        assert actual[name] != 0
    log.reset()
    assert "gradient_top" not in log.compute()
    three = student[:, :3].clone().requires_grad_()
    log.watch(three, teacher[:, :3])  # fewer than six classes
    three.sum().backward()
    assert log.compute()["gradient_next"].item() == 1.0
    for arguments, message in (
        ((student, teacher), "student_logits: expected a tensor that requires"),
        ((three, teacher), "teacher_logits"),
        ((three, teacher[:, :3], mask), "mask"),
        ((three[:, :1], teacher[:, :1]), "at least two classes"),
    ):
        with pytest.raises(ValueError, match=message):
            log.watch(*arguments)


S, T, Y = cases.sample(4, 3, dtype=torch.float32)
COST = torch.rand(3, 3)
WRONG = {
    "progress above 1": ((S, T, Y, 1.5), {}, ValueError, "progress"),
    "progress negative": ((S, T, Y, -0.1), {}, ValueError, "progress"),
    "progress str": ((S, T, Y, "0.5"), {}, TypeError, "progress"),
    "progress of rank 1": ((S, T, Y, torch.zeros(2)), {}, ValueError, "progress"),
    "mode": ((S, T, Y, 0.5), {"mode": "wkl"}, ValueError, "mode"),
    "kl_weight": ((S, T, Y, 0.5), {"kl_weight": -1.0}, ValueError, "kl_weight"),
    "tckd_weight": ((S, T, Y, 0.5), {"tckd_weight": "1"}, TypeError, "tckd_weight"),
    "gamma": ((S, T, Y, 0.5), {"gamma": float("inf")}, ValueError, "gamma"),
    "decay_start": ((S, T, Y, 0.5), {"decay_start": 150}, ValueError, "decay_start"),
    "kl_temperature": ((S, T, Y, 0.5), {"kl_temperature": 0.0}, ValueError, "kl_temperature"),
    "temperature": ((S, T, Y, 0.5), {"temperature": 0.0}, ValueError, "temperature"),
    "cost": ((S, T, Y, 0.5), {"cost": torch.rand(4, 4)}, ValueError, "cost"),
    "label": ((S, T, Y + 3, 0.5), {}, ValueError, "labels"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input(case):
    arguments, options, error, message = WRONG[case]
    options = {"cost": COST} | options
    with pytest.raises(error, match=message):
        wkl(*arguments, **options)
    with pytest.raises(error, match=message):
        WKL(**options)(*arguments)

"""SinKD against the paper's formulas, value and gradient."""

import functools

import pytest
import torch
from sinkd_cases import (
    BACKENDS,
    TRANSCRIPTIONS,
    algorithm_1,
    assignment_cost,
    logits,
    relative_error,
    value_and_gradient,
)

from otkd_fast.losses import SinKD, sinkd
from otkd_fast.reference import sinkd as oracle

SIZES = [(b, d) for b in (2, 8, 64, 256) for d in (2, 3, 100, 1000)]
LINE_FORMS = ("flattened", "regression")


@functools.cache
def expected_batch(b, d, variant):
    return value_and_gradient(TRANSCRIPTIONS["batch", variant], *logits(b, d))


@functools.cache
def oracle_batch(b, d, epsilon):
    student, teacher = (x.double() for x in logits(b, d, dtype=torch.float32))
    return value_and_gradient(functools.partial(oracle.sinkd, epsilon=epsilon), student, teacher)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize(("b", "d"), SIZES)
def test_batch_equals_algorithm_1(b, d, variant, backend):
    value, gradient = value_and_gradient(SinKD(variant=variant, backend=backend), *logits(b, d))
    expected_value, expected_gradient = expected_batch(b, d, variant)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected_value, rtol=1e-10, atol=0.0)
    assert relative_error(gradient, expected_gradient) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize(("b", "d"), SIZES)
def test_batch_float32_is_near_float64(b, d, epsilon, backend):
    student, teacher = logits(b, d, dtype=torch.float32)
    value, gradient = value_and_gradient(SinKD(epsilon=epsilon, backend=backend), student, teacher)
    expected_value, expected_gradient = oracle_batch(b, d, epsilon)
    assert value.dtype == torch.float32 and gradient.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected_value, rtol=1e-5, atol=0.0)
    row_errors = (gradient.double() - expected_gradient).norm(dim=1) / expected_gradient.norm(dim=1).max()
    assert row_errors.quantile(0.9) < 1e-5
    # The L1 cost has a kink where two probabilities meet: where a pair agrees to the rounding of a float32 softmax
    # (and only there) its sign is open and moves the gradient of a row or two.
    assert row_errors.max() < (1e-5 if closest_pair(b, d) > 5e-7 else 5e-3)


@functools.cache
def closest_pair(b, d):
    """The smallest relative difference between a probability of the student and one of the teacher, same class."""
    s, t = (torch.softmax(x.double() / 2.0, -1) for x in logits(b, d, dtype=torch.float32))
    return min(((row - t).abs() / torch.maximum(row, t)).min().item() for row in s)


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_epsilon_where_the_published_form_underflows(backend):
    student, teacher = logits(8, 100, dtype=torch.float32)
    student = -student
    assert TRANSCRIPTIONS["batch", "paper"](student, teacher, epsilon=0.001).isnan()
    value, gradient = value_and_gradient(SinKD(epsilon=0.001, backend=backend), student, teacher)
    assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parameters", [{}, {"epsilon": 0.3, "num_iters": 3, "temperature": 1.5}, {"num_iters": 1}])
@pytest.mark.parametrize(("form", "variant"), list(TRANSCRIPTIONS))
def test_every_form_equals_its_formula(form, variant, parameters, backend):
    student, teacher = logits(9, 1 if form == "regression" else 4)
    loss = SinKD(form=form, variant=variant, backend=backend, **parameters)
    value, gradient = value_and_gradient(loss, student, teacher)
    formula = functools.partial(TRANSCRIPTIONS[form, variant], **parameters)
    expected_value, expected_gradient = value_and_gradient(formula, student, teacher)
    torch.testing.assert_close(value, expected_value, rtol=1e-10, atol=0.0)
    assert relative_error(gradient, expected_gradient) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("form", "variant"), list(TRANSCRIPTIONS))
def test_teacher_gets_its_gradient_if_it_wants_one(form, variant, backend):
    student, teacher = (x.requires_grad_() for x in logits(6, 1 if form == "regression" else 3))
    actual = torch.autograd.grad(
        sinkd(student, teacher, form=form, variant=variant, backend=backend), (student, teacher)
    )
    expected = torch.autograd.grad(TRANSCRIPTIONS[form, variant](student, teacher), (student, teacher))
    only = torch.autograd.grad(sinkd(student.detach(), teacher, form=form, variant=variant, backend=backend), teacher)
    for a, e in zip((*actual, *only), (*expected, expected[1]), strict=True):
        assert relative_error(a, e) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_released_sample_form_is_the_l1_distance(backend):
    student, teacher = logits(7, 5)
    value = sinkd(student, teacher, form="sample", variant="released", temperature=1.0, backend=backend)
    expected = 0.001 * (torch.softmax(student, -1) - torch.softmax(teacher, -1)).abs().sum()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        oracle.sinkd(student, teacher, form="sample", variant="released", temperature=1.0), expected
    )


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_released_regression_is_exactly_zero_and_attached(shape):
    student, teacher = (x.reshape(shape) for x in logits(5, 1))
    student[0] = float("inf")
    value, gradient = value_and_gradient(SinKD(form="regression", variant="released"), student, teacher)
    assert value.item() == 0.0 and gradient.abs().max().item() == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_regression_takes_either_shape(backend):
    student, teacher = logits(6, 1)
    column = sinkd(student, teacher, form="regression", backend=backend)
    assert torch.equal(column, sinkd(student[:, 0], teacher[:, 0], form="regression", backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["batch", "sample", "flattened", "regression"])
def test_mean_is_the_sum_over_the_rows(form, backend):
    student, teacher = logits(6, 1 if form == "regression" else 3)
    mask = torch.tensor([True, False, True, True, True, False])
    for m, rows in ((None, 6), (mask, 4)):
        total = sinkd(student, teacher, m, form=form, backend=backend)
        mean = sinkd(student, teacher, m, form=form, reduction="mean", backend=backend)
        torch.testing.assert_close(mean * rows, total)


@pytest.mark.parametrize("form", LINE_FORMS)
def test_sorting_is_exact(form):
    student, teacher = logits(6, 1) if form == "regression" else logits(3, 2)
    s, t = (student, teacher) if form == "regression" else (torch.softmax(x / 2.0, -1) for x in (student, teacher))
    exact = assignment_cost((t.reshape(-1, 1) - s.reshape(1, -1)).abs())
    assert sinkd(student, teacher, form=form, solver="sort").item() == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("form", "epsilon"), [("flattened", 2e-3), ("regression", 1e-2)])
def test_sorting_is_the_limit_of_sinkhorn(form, epsilon, backend):
    student, teacher = logits(5, 1) if form == "regression" else logits(3, 2)
    exact, exact_gradient = value_and_gradient(SinKD(form=form, solver="sort"), student, teacher)
    near = SinKD(form=form, epsilon=epsilon, num_iters=1000, backend=backend)
    limit, gradient = value_and_gradient(near, student, teacher)
    torch.testing.assert_close(limit, exact, rtol=5e-3, atol=0.0)
    assert relative_error(gradient, exact_gradient) < 2e-2


def test_sorting_gradient_is_the_sign_of_the_matched_difference():
    student = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
    teacher = torch.tensor([0.0, 2.0, 0.5], dtype=torch.float64)
    value, gradient = value_and_gradient(SinKD(form="regression", solver="sort"), student, teacher)
    assert value.item() == 2.0  # matched: -1 with 0, 0.5 with 0.5, 3 with 2
    assert gradient.tolist() == [1.0, -1.0, 0.0]


def test_flattened_is_the_batch_form_for_two_classes_on_one_side():
    generator = torch.Generator().manual_seed(3)
    student, teacher = (
        torch.rand(6, 1, generator=generator, dtype=torch.float64) * torch.tensor([4.0, -4.0]) for _ in range(2)
    )
    s, t = torch.softmax(student / 2.0, -1), torch.softmax(teacher / 2.0, -1)
    exact = assignment_cost(torch.cdist(t, s, p=1))
    assert sinkd(student, teacher, form="flattened", solver="sort").item() == pytest.approx(exact, rel=1e-12)


def test_flattened_forgets_which_class_a_probability_belongs_to():
    student, teacher = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert sinkd(student, teacher, form="flattened", solver="sort").item() == pytest.approx(0.0, abs=1e-6)
    assert sinkd(student, teacher).item() > 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["batch", "flattened"])
def test_labels_are_one_hot_teacher_rows(form, backend):
    student, _ = logits(7, 4)
    labels = torch.tensor([0, 3, 1, 1, 2, 0, 3])
    one_hot = torch.eye(4, dtype=torch.float64)[labels]
    s = torch.softmax(student / 2.0, -1)
    rows, columns = (one_hot, s) if form == "batch" else (one_hot.reshape(-1, 1), s.reshape(-1, 1))
    for dtype in (torch.int64, torch.int32, torch.uint8):
        torch.testing.assert_close(
            sinkd(student, labels.to(dtype), form=form, backend=backend), algorithm_1(rows, columns)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_in_the_sample_form_move_all_mass_to_one_entry(backend):
    student, _ = logits(3, 4)
    labels = torch.tensor([2, 0, 3])
    s = torch.softmax(student / 2.0, -1)
    value, gradient = value_and_gradient(SinKD(form="sample", backend=backend), student, labels)
    # The only plan: everything goes to the entry with t = 1, at cost 1 - s_m for mass s_m.
    torch.testing.assert_close(value, (s * (1.0 - s)).sum())
    assert gradient.isfinite().all()

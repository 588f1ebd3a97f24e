"""SinKD of tokens: leading axes, ignored labels, every reduction, and rows as long as a vocabulary."""

import functools

import pytest
import torch
from sinkd_cases import BACKENDS, logits, relative_error, value_and_gradient

from otkd_fast.functional.softmax_l1 import softmax_l1
from otkd_fast.losses import SinKD, _sinkd_forms, sinkd

FORMS = [("batch", "sinkhorn"), ("sample", "sinkhorn"), ("flattened", "sinkhorn"), ("flattened", "sort")]
every_form = pytest.mark.parametrize(("form", "solver"), FORMS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
LABELS = torch.tensor([[3, -100, 1], [0, 2, -100]])
KEPT = (LABELS != -100).reshape(-1)


@every_backend
@every_form
def test_leading_axes_are_rows(form, solver, backend):
    student, teacher = logits(6, 4)
    loss = SinKD(form=form, solver=solver, backend=backend)
    expected, expected_gradient = value_and_gradient(loss, student, teacher)
    value, gradient = value_and_gradient(loss, student.reshape(2, 3, 4), teacher.reshape(2, 3, 4))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient.reshape(6, 4), expected_gradient)


@every_backend
@every_form
def test_ignored_labels_are_rows_left_out(form, solver, backend):
    student, teacher = (x.reshape(2, 3, 4) for x in logits(6, 4))
    student[0, 1] = float("nan")
    loss = SinKD(form=form, solver=solver, backend=backend)
    expected = loss(student.reshape(6, 4)[KEPT], teacher.reshape(6, 4)[KEPT])
    torch.testing.assert_close(loss(student, teacher, labels=LABELS), expected)
    torch.testing.assert_close(loss(student, teacher, LABELS != -100), expected)
    other = SinKD(form=form, solver=solver, backend=backend, ignore_index=7)
    torch.testing.assert_close(other(student, teacher, labels=LABELS.masked_fill(LABELS == -100, 7)), expected)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    both = loss(student.reshape(6, 4)[[0, 3, 4]], teacher.reshape(6, 4)[[0, 3, 4]])
    torch.testing.assert_close(loss(student, teacher, mask, labels=LABELS), both)


@every_backend
@pytest.mark.parametrize("form", ["batch", "sample", "flattened"])
def test_ignored_labels_as_the_teacher(form, backend):
    student, _ = logits(6, 4)
    value = sinkd(student.reshape(2, 3, 4), LABELS, form=form, backend=backend)
    expected = sinkd(student[KEPT], LABELS.reshape(-1)[KEPT], form=form, backend=backend)
    torch.testing.assert_close(value, expected)
    with pytest.raises(ValueError, match=r"teacher: expected class labels in \[0, 4\), got -100"):
        sinkd(student, LABELS.reshape(-1), ignore_index=-1, form=form, backend=backend)


@every_backend
@pytest.mark.parametrize(
    ("form", "solver", "variant"),
    [(*form, "paper") for form in FORMS] + [(*form, "released") for form in FORMS if form[0] != "flattened"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_reductions(form, solver, variant, masked, backend):
    student, teacher = (x.reshape(2, 3, 4) for x in logits(6, 4))
    mask = LABELS != -100 if masked else None
    make = functools.partial(SinKD, form=form, solver=solver, variant=variant, backend=backend)
    total, gradient = value_and_gradient(make(), student, teacher, mask)
    count = 4 if masked else 6
    for reduction, items, divisor in (
        ("mean", None, count), ("batchmean", None, 2), ("mean", 11, 11), ("batchmean", torch.tensor(11), 11)
    ):  # fmt: skip
        value, own = value_and_gradient(make(reduction=reduction), student, teacher, mask, items)
        torch.testing.assert_close(value, total / divisor)
        torch.testing.assert_close(own, gradient / divisor)
    rows = make(reduction="none")
    assert rows(student, teacher, mask).shape == (2, 3)
    value, own = value_and_gradient(lambda *inputs: rows(*inputs).sum(), student, teacher, mask)
    torch.testing.assert_close(value, total)
    torch.testing.assert_close(own, gradient)
    if masked:
        assert not rows(student, teacher, mask)[~mask].any()
    with pytest.raises(ValueError, match="num_items_in_batch"):
        make()(student, teacher, mask, 6)


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_none_is_what_each_row_of_the_student_pays(variant, epsilon):
    student, teacher = logits(5, 3)
    s, t = torch.softmax(student / 2, -1), torch.softmax(teacher / 2, -1)
    distance = torch.cdist(s, t, p=1)  # rows are the student's
    kernel = torch.exp(-distance / epsilon)
    for _ in range(20):
        for axis in (0, 1) if variant == "paper" else (1, 0):  # the teacher's sums first, or the student's
            kernel = kernel / kernel.sum(axis, keepdim=True)
    expected = (kernel * distance).sum(1) * (1.0 if variant == "paper" else 0.001)
    torch.testing.assert_close(sinkd(student, teacher, variant=variant, epsilon=epsilon, reduction="none"), expected)
    single = sinkd(student.float(), teacher.float(), variant=variant, epsilon=epsilon, reduction="none")
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-7)


def test_sorted_rows_are_those_of_the_student():
    student, teacher = torch.tensor([3.0, -1.0, 0.5]), torch.tensor([0.0, 2.0, 0.5])
    rows = sinkd(student, teacher, form="regression", solver="sort", reduction="none")
    assert rows.tolist() == [1.0, 1.0, 0.0]
    mask = torch.tensor([True, False, True])
    rows = sinkd(student, teacher, mask, form="regression", solver="sort", reduction="none")
    assert rows.tolist() == [2.5, 0.0, 0.5]


@pytest.fixture
def small_pieces(monkeypatch):
    """Everything is streamed, in pieces that do not divide the sizes."""
    monkeypatch.setattr(_sinkd_forms, "LEAST_STREAMED", 0)
    module = softmax_l1.__globals__
    for name, value in (("_PIECE", 60), ("_LEAST_COLUMNS", 7), ("_ROWS_PIECE", 90), ("_LEAST_ROWS", 4)):
        monkeypatch.setitem(module, name, value)


@every_backend
@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_streamed_equals_stored(variant, reduction, masked, backend, small_pieces, monkeypatch):
    student, teacher = (x.requires_grad_() for x in logits(9, 30))
    mask = torch.arange(9) % 3 != 1 if masked else None
    loss = SinKD(variant=variant, reduction=reduction, backend=backend)
    weights = torch.arange(1.0, 10.0, dtype=torch.float64)

    def answer():
        value = loss(student, teacher, mask)
        scalar = (value * weights).sum() if value.dim() else value
        return value, *torch.autograd.grad(scalar, (student, teacher))

    streamed = answer()
    monkeypatch.setattr(_sinkd_forms, "LEAST_STREAMED", 1 << 40)
    for actual, expected in zip(streamed, answer(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


@every_backend
def test_streamed_with_a_mask_that_cannot_be_read(backend, small_pieces, monkeypatch):
    student, teacher = logits(9, 30)
    mask = torch.arange(9) % 3 != 1
    student[1], teacher[4] = float("nan"), float("inf")
    expected = [
        value_and_gradient(SinKD(reduction=r, backend=backend), student, teacher, mask) for r in ("sum", "mean")
    ]
    rows = sinkd(student, teacher, mask, reduction="none", backend=backend)
    monkeypatch.setattr(_sinkd_forms, "values_readable", lambda *_: False)
    for reduction, (value, gradient) in zip(("sum", "mean"), expected, strict=True):
        blind = value_and_gradient(SinKD(reduction=reduction, backend=backend), student, teacher, mask)
        torch.testing.assert_close(blind, (value, gradient), rtol=1e-9, atol=1e-14)
    blind = sinkd(student, teacher, mask, reduction="none", backend=backend)
    torch.testing.assert_close(blind, rows, rtol=1e-9, atol=1e-14)
    nothing = value_and_gradient(SinKD(backend=backend), student, teacher, mask & False)
    assert nothing[0].item() == 0.0 and not nothing[1].any()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("epsilon", [0.1, 0.01])
def test_streamed_dtypes(dtype, epsilon, backend, small_pieces):
    student, teacher = logits(9, 30, dtype=dtype)
    loss = SinKD(backend=backend, epsilon=epsilon)
    value, gradient = value_and_gradient(loss, student, teacher)
    expected, expected_gradient = value_and_gradient(loss, student.double(), teacher.double())
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0.0)
    bound = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 2e-5}[dtype]
    assert relative_error(gradient, expected_gradient) < bound
    none = torch.zeros(9, dtype=torch.bool)
    value, gradient = value_and_gradient(loss, student, teacher, none)
    assert value.item() == 0.0 and value.dtype == torch.float32 and not gradient.any()


def test_streamed_under_compile_and_transforms_is_stored(small_pieces):
    student, teacher = logits(9, 30)
    expected, expected_gradient = value_and_gradient(SinKD(), student, teacher)
    torch._dynamo.reset()
    compiled = torch.compile(SinKD(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(value_and_gradient(compiled, student, teacher), (expected, expected_gradient))
    torch.testing.assert_close(torch.func.grad(SinKD())(student, teacher), expected_gradient)


def test_streamed_has_no_second_derivative(small_pieces):
    student, teacher = logits(5, 30)
    student.requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(sinkd(student, teacher), student, create_graph=True)


@pytest.mark.slow
def test_memory_of_a_vocabulary():
    """320 tokens of 150 000 classes, bfloat16: beside the gradient less than half of a softmaxed copy is made."""
    import subprocess
    import sys

    program = """
import resource, torch
from otkd_fast.losses import SinKD
student, teacher = (torch.empty(320, 150_000, dtype=torch.bfloat16).normal_() for _ in range(2))
student.requires_grad_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
SinKD(num_iters=5)(student, teacher).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    gradient, copies = 320 * 150_000 * 2, 2 * 320 * 150_000 * 4
    extra = int(result.stdout) - gradient
    print(f"beside the gradient: {extra / 1e6:.0f} MB; a softmaxed copy: {copies / 1e6:.0f} MB")
    assert extra < copies

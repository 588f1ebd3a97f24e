"""The published total losses of SinKD, written down term by term."""

import pytest
import torch
from sinkd_cases import algorithm_1, logits, regression_paper, value_and_gradient

from otkd_fast.losses import SinKD, sinkd_total

LABELS = torch.tensor([0, 3, 1, 1, 2, 0])


def cross_entropy(student):
    return -torch.stack([row.log_softmax(0)[y] for row, y in zip(student, LABELS, strict=True)])


def kl(student, teacher, temperature):
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    return (p * (p / q).log()).sum(-1)


def eq_19(student, teacher, alpha=0.9, beta=0.8, kl_temperature=4.0):
    s, t = torch.softmax(student / 2, -1), torch.softmax(teacher / 2, -1)
    rows = (1 - alpha) * cross_entropy(student) + alpha * kl(student, teacher, kl_temperature)
    return rows.sum() + beta * algorithm_1(t, s)


def eq_22(student, teacher, targets, alpha=0.9, beta=0.8):
    rows = (1 - alpha) * (student - targets) ** 2 + alpha * (student - teacher) ** 2
    return rows.sum() + beta * regression_paper(student, teacher)


def eq_23(student, alpha=1.0, beta=0.8):
    one_hot = torch.eye(4, dtype=torch.float64)[LABELS]
    return alpha * cross_entropy(student).sum() + beta * algorithm_1(one_hot, torch.softmax(student / 2, -1), 0.1, 30)


def check(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=0.0)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.8, "beta": 0.08, "kl_temperature": 1.0}, {"alpha": 1.0}])
def test_eq_19(options):
    student, teacher = logits(6, 4)
    actual = value_and_gradient(lambda s: sinkd_total(s, teacher, LABELS, **options), student)
    check(actual, value_and_gradient(lambda s: eq_19(s, teacher, **options), student))
    mean = sinkd_total(student, teacher, LABELS, transport=SinKD(reduction="mean"), **options)
    torch.testing.assert_close(mean, actual[0] / 6)
    parts = sinkd_total(student, teacher, LABELS, None, 12, transport=SinKD(reduction="mean"), **options)
    torch.testing.assert_close(parts, actual[0] / 12)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_eq_22(shape):
    student, teacher, targets = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    form = SinKD(form="regression")
    actual = value_and_gradient(lambda s: sinkd_total(s, teacher, targets, transport=form, alpha=0.7), student)
    check(actual, value_and_gradient(lambda s: eq_22(s, teacher, targets, alpha=0.7), student))
    mask = torch.tensor([True, False, True, True, True, False])
    masked = sinkd_total(student, teacher, targets, mask, transport=form)
    torch.testing.assert_close(masked, eq_22(student[mask], teacher[mask], targets[mask]))


def test_eq_23():
    student, _ = logits(6, 4)
    check(value_and_gradient(lambda s: sinkd_total(s, None, LABELS), student), value_and_gradient(eq_23, student))


@pytest.mark.parametrize("one_hot", [False, True])
def test_masks_and_ignored_labels(one_hot):
    student, teacher = logits(6, 4)
    kept = torch.tensor([True, True, False, True, False, True])
    student[2], teacher[4] = float("nan"), float("inf")
    labels = LABELS.masked_fill(~kept, -100)
    for transport in (SinKD(), SinKD(reduction="mean")):
        given = None if one_hot else teacher
        expected = sinkd_total(
            student[kept], None if one_hot else teacher[kept], LABELS[kept], transport=transport
        )  # fmt: skip
        value, gradient = value_and_gradient(
            lambda s, g=given, t=transport: sinkd_total(s, g, labels, transport=t), student
        )
        torch.testing.assert_close(value, expected)
        assert gradient.isfinite().all() and not gradient[~kept].any()
        torch.testing.assert_close(sinkd_total(student, given, LABELS, kept, transport=transport), expected)


def test_half_precision_compile_and_tokens():
    student, teacher = logits(6, 4, dtype=torch.float32)
    expected = sinkd_total(student, teacher, LABELS)
    tokens = sinkd_total(student.reshape(2, 3, 4), teacher.reshape(2, 3, 4), LABELS.reshape(2, 3))
    torch.testing.assert_close(tokens, expected)
    half = sinkd_total(student.bfloat16(), teacher.bfloat16(), LABELS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=2e-2, atol=0.0)
    torch._dynamo.reset()
    transport = SinKD()
    compiled = torch.compile(
        lambda s, t, y: sinkd_total(s, t, y, transport=transport), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(student, teacher, LABELS), expected)


S, T = logits(6, 4)
REGRESSION = SinKD(form="regression")
WRONG = {
    "another loss": ((S, T, LABELS), {"transport": torch.nn.MSELoss()}, TypeError, "transport"),
    "alpha": ((S, T, LABELS), {"alpha": 1.5}, ValueError, "alpha"),
    "beta": ((S, T, LABELS), {"beta": -1.0}, ValueError, "beta"),
    "kl_temperature": ((S, T, LABELS), {"kl_temperature": 0.0}, ValueError, "kl_temperature"),
    "labels": ((S, T, LABELS[:5]), {}, ValueError, "labels"),
    "label out of range": ((S, T, LABELS + 1), {}, ValueError, "labels"),
    "labels for regression": ((S[:, 0], T[:, 0], LABELS), {"transport": REGRESSION}, TypeError, "labels"),
    "targets of another shape": ((S[:, 0], T[:, 0], T[:, :1]), {"transport": REGRESSION}, ValueError, "labels"),
    "no teacher": ((S[:, 0], None, T[:, 0]), {"transport": REGRESSION}, ValueError, "teacher"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input(case):
    arguments, options, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        sinkd_total(*arguments, **options)

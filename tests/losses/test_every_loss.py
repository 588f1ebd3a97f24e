"""What all losses promise alike: masks, reductions, accumulation, no wait for the device, compilation, autocast."""

import pytest
import torch
from every_loss import CASES, MASK, ROWS, value_and_gradient
from torch.utils.checkpoint import checkpoint

from otkd_fast.losses import SinKD, _sinkd_forms

REDUCTIONS = ("mean", "sum", "batchmean")
every_loss = pytest.mark.parametrize("name", list(CASES))
on_device = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.on_device])


@every_loss
def test_mask_is_as_if_the_rows_were_removed(name):
    case = CASES[name]
    student, teacher = case.inputs()
    student[1], teacher[4] = float("nan"), float("inf")
    loss = case.make(reduction="mean")
    value, gradient = value_and_gradient(loss, student, teacher, MASK)
    expected, wanted = value_and_gradient(loss.of_rows(MASK), student[MASK], teacher[MASK])
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(gradient[MASK], wanted, rtol=0.0, atol=1e-9 * wanted.abs().max().item() + 1e-14)
    assert not gradient[~MASK].any()


@every_loss
@pytest.mark.parametrize("masked", [False, True])
def test_reductions_are_those_of_none(name, masked):
    case = CASES[name]
    inputs = (*case.inputs(), MASK if masked else None)
    rows = case.make(reduction="none")(*inputs)
    counted, size = case.items(MASK if masked else torch.ones(ROWS, dtype=torch.bool))
    assert rows.shape == ((ROWS,) if size == ROWS else () if size == 1 else (size,))
    if masked and size == ROWS:
        assert not rows[~MASK].any()
    for reduction, divisor in zip(REDUCTIONS, (counted, 1, size), strict=True):
        value, gradient = value_and_gradient(case.make(reduction=reduction), *inputs)
        torch.testing.assert_close(value, rows.sum() / divisor, rtol=1e-9, atol=1e-14)
        weights = torch.full_like(rows, 1 / divisor)
        _, wanted = value_and_gradient(case.make(reduction="none"), *inputs, weights=weights)
        torch.testing.assert_close(gradient, wanted, rtol=0.0, atol=1e-9 * wanted.abs().max().item() + 1e-15)


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_num_items_in_batch(name, reduction):
    """Gradient accumulation: parts add up to the batch, or the loss says that they cannot."""
    case = CASES[name]
    student, teacher = case.inputs()
    loss = case.make(reduction=reduction)
    if case.parts is None:
        with pytest.raises(ValueError, match=r"num_items_in_batch: .*do not add up"):
            loss(student, teacher, MASK, 4)
        return
    total, gradient = value_and_gradient(case.make(reduction="sum"), student, teacher, MASK)
    for number in (11, torch.tensor(11), torch.tensor([11])):
        value, own = value_and_gradient(loss, student, teacher, MASK, number)
        torch.testing.assert_close(value, total / 11)
        torch.testing.assert_close(own, gradient / 11)
    with pytest.raises(ValueError, match="num_items_in_batch: expected None for reduction 'sum'"):
        case.make(reduction="sum")(student, teacher, MASK, 4)
    if case.parts is True:
        whole, gradient = value_and_gradient(case.make(reduction="mean"), student, teacher, MASK)
        parts = [
            value_and_gradient(loss.of_rows(part), student[part], teacher[part], MASK[part], 4)
            for part in (slice(0, 4), slice(4, ROWS))
        ]
        torch.testing.assert_close(sum(value for value, _ in parts), whole, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(torch.cat([g for _, g in parts]), gradient, rtol=1e-9, atol=1e-13)


@every_loss
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_no_row_that_counts_is_zero(name, reduction):
    case = CASES[name]
    student, teacher = case.inputs()
    loss = case.make(reduction=reduction)
    shape = loss(student, teacher).shape
    student[2], teacher[0] = float("nan"), float("inf")
    value, gradient = value_and_gradient(loss, student, teacher, MASK & False, weights=torch.ones(shape).double())
    assert value.shape == shape and not value.any() and not gradient.any()
    nothing = loss.of_rows(slice(0, 0))(student[:0].requires_grad_(), teacher[:0])
    assert nothing.requires_grad and not nothing.any()


def nan_or_error(loss, *inputs):
    """Whether a loss shows that its input was NaN."""
    try:
        return bool(loss(*inputs).isnan().any())
    except ValueError as error:
        assert "finite" in str(error) or "positive definite" in str(error) or "variance" in str(error)
        return True


@every_loss
def test_nan_that_counts_is_not_hidden(name):
    case = CASES[name]
    student, teacher = case.inputs()
    loss = case.make(reduction="mean")
    bad = student.clone()
    bad[2] = float("nan")
    assert nan_or_error(loss, bad, teacher, MASK)
    bad = teacher.clone()
    bad[2] = float("nan")
    assert nan_or_error(loss, student, bad, MASK)


@on_device
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_waits_for_no_value(name, reduction):
    """On the device 'meta' there are no values: whatever reads one on the host raises, forward or backward."""
    case = CASES[name]
    loss, (student, teacher) = case.make(reduction=reduction).to("meta"), (x.to("meta") for x in case.inputs())
    value, gradient = value_and_gradient(loss, student, teacher, MASK.to("meta"), weights=1)
    assert value.device.type == "meta" and gradient.shape == student.shape
    if case.parts is not None and reduction == "mean":
        loss(student, teacher, MASK.to("meta"), torch.empty((), dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("banks", [True, False])
def test_wcord_in_training_waits_for_no_value(banks):
    """Its banks take in the batch, and its power iteration runs."""
    loss = CASES["WCoRD" if banks else "WCoRD without banks"].make(reduction="mean").to("meta")
    loss.loss.train()
    student, teacher = (x.to("meta") for x in CASES["WCoRD"].inputs())
    value, gradient = value_and_gradient(loss, student, teacher, MASK.to("meta"))
    assert value.device.type == "meta" and gradient.shape == student.shape


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_tokens_of_a_long_vocabulary_wait_for_no_value(reduction, monkeypatch):
    """The form that makes no softmaxed copy, here of a few tokens in bfloat16."""
    monkeypatch.setattr(_sinkd_forms, "LEAST_STREAMED", 1)
    student, teacher = (torch.empty(2, 4, 30, dtype=torch.bfloat16, device="meta") for _ in range(2))
    labels = torch.empty(2, 4, dtype=torch.int64, device="meta")
    loss = SinKD(reduction=reduction)
    value, gradient = value_and_gradient(lambda s: loss(s, teacher, labels=labels), student, weights=1)
    assert value.shape == (() if reduction == "sum" else (2, 4)) and gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["KD2M w2", "KD2M cw2", "KD2M jw2"])
def test_exact_transport_waits(name):
    """The documented exception, and that the test above sees it."""
    case = CASES[name]
    loss, inputs = case.make().to("meta"), [x.to("meta") for x in case.inputs()]
    with pytest.raises(NotImplementedError, match="meta"):
        loss(*inputs)


def compiled_cases():
    """Every loss and reduction. Quick: whole batches without reduction (test_behaviour.py has the losses of rows)."""
    for name, case in CASES.items():
        for reduction in ("none", *REDUCTIONS):
            quick = reduction == "none" and case.parts is None
            if case.on_device:
                yield pytest.param(name, reduction, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "reduction"), list(compiled_cases()))
def test_compiles_in_one_graph(name, reduction):
    case = CASES[name]
    loss, inputs = case.make(reduction=reduction), (*case.inputs(), MASK)
    torch._dynamo.reset()
    compiled = torch.compile(loss.__call__, backend="eager", fullgraph=True)
    expected = value_and_gradient(loss, *inputs, weights=1)
    for actual, wanted in zip(value_and_gradient(compiled, *inputs, weights=1), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.on_device and case.parts is not True])
def test_compiles_with_inductor(name):
    """The losses of whole batches (test_behaviour.py has those of rows)."""
    case = CASES[name]
    loss, inputs = case.make(reduction="mean"), (*case.inputs(), MASK)
    torch._dynamo.reset()
    compiled = torch.compile(loss.__call__, fullgraph=True)
    expected = value_and_gradient(loss, *inputs)
    for actual, wanted in zip(value_and_gradient(compiled, *inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_half_precision(name, dtype):
    """Under autocast nothing changes; half-precision inputs give float32 losses; large ones no NaN."""
    case = CASES[name]
    loss = case.make(reduction="mean").to(torch.float32)
    student, teacher = (x.to(dtype) for x in case.inputs())
    expected, wanted = value_and_gradient(loss, student.float(), teacher.float())

    def under_autocast(*inputs):
        with torch.autocast("cpu", dtype=dtype):
            return loss(*inputs)

    value, gradient = value_and_gradient(under_autocast, student, teacher)
    single, own = value_and_gradient(under_autocast, student.float(), teacher.float())
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(value, expected) and torch.equal(gradient, wanted.to(dtype))
    assert torch.equal(single, expected) and torch.equal(own, wanted)
    value, gradient = value_and_gradient(loss, 100 * student, -100 * teacher)
    assert value.isfinite() and gradient.isfinite().all()


@every_loss
def test_gradient_checkpointing(name):
    case = CASES[name]
    loss, inputs = case.make(reduction="mean"), (*case.inputs(), MASK)
    torch.manual_seed(0)
    expected = value_and_gradient(loss, *inputs)
    torch.manual_seed(0)
    again = value_and_gradient(lambda *given: checkpoint(loss, *given, use_reentrant=False), *inputs)
    assert all(torch.equal(actual, wanted) for actual, wanted in zip(again, expected, strict=True))


@every_loss
def test_training_lowers_the_loss(name):
    case = CASES[name]
    student, teacher = case.inputs(dtype=torch.float32)
    loss = case.make(reduction="mean").to(torch.float32)
    student = student.clone().requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.05)
    values = []
    for _ in range(40):
        value = loss(student, teacher)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]


WRONG = {
    "student no tensor": (lambda s, t: ([1.0], t, None), TypeError, "student"),
    "teacher no tensor": (lambda s, t: (s, [1.0], None), TypeError, "teacher"),
    "integer student": (lambda s, t: (s.long(), t, None), TypeError, "student"),
    "complex teacher": (lambda s, t: (s, t.to(torch.complex64), None), TypeError, "teacher"),
    "teacher elsewhere": (lambda s, t: (s, t.to("meta"), None), ValueError, "teacher"),
    "no features": (lambda s, t: (s[..., :0], t[..., :0], None), ValueError, "student|positions"),
    "no axes": (lambda s, t: (s.sum(), t.sum(), None), ValueError, "student"),
    "mask of numbers": (lambda s, t: (s, t, MASK.float()), TypeError, "mask"),
    "mask no tensor": (lambda s, t: (s, t, MASK.tolist()), TypeError, "mask"),
    "mask too short": (lambda s, t: (s, t, MASK[:4]), ValueError, "mask"),
    "mask elsewhere": (lambda s, t: (s, t, MASK.to("meta")), ValueError, "mask"),
    "teacher too short": (lambda s, t: (s, t[:4], MASK), ValueError, "teacher"),
}


@pytest.mark.parametrize("name", [name for name in CASES if name != "KD2M jw2 released"])
@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input_is_named(name, case):
    if name == "SinkhornDivergence" and case == "teacher too short":
        return  # it may have other rows
    change, error, message = WRONG[case]
    student, teacher = CASES[name].inputs()
    loss = CASES[name].make(reduction="mean")
    with pytest.raises(error, match=rf"^({message})"):
        loss(*change(student, teacher))


@every_loss
def test_unknown_reduction(name):
    with pytest.raises(ValueError, match="reduction: expected one of"):
        CASES[name].make(reduction="average")
        if name.startswith("wcord_local"):
            CASES[name].make(reduction="average")(*CASES[name].inputs())

"""Losses of rows as citizens of PyTorch: masks, reductions, dtypes, compilation, transforms, pickling."""

import copy
import functools
import pickle

import pytest
import torch
from behaviour_cases import CASES, CLASSES, LABELLED
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from wkd_cases import value_and_gradient

every_case = pytest.mark.parametrize("case", list(CASES))
every_labelled = pytest.mark.parametrize("case", LABELLED)
MASK = torch.tensor([True, False, True, True, False, True])


def rows_of(inputs, kept):
    return tuple(x[kept] if isinstance(x, torch.Tensor) and x.dim() else x for x in inputs)


def weighted(loss, *inputs):
    """A scalar of a loss whatever its reduction, with another weight for each row."""
    value = loss(*inputs)
    return value if value.dim() == 0 else (value * torch.arange(1, 1 + value.numel(), dtype=value.dtype)).sum()


@every_case
def test_mask_is_as_if_the_rows_were_removed(case):
    make, inputs = CASES[case]
    inputs = list(inputs())
    inputs[0] = inputs[0].index_fill(0, torch.tensor([1]), float("nan"))
    inputs[1] = inputs[1].index_fill(0, torch.tensor([4]), float("inf"))
    for reduction, factor in (("mean", 1.0), ("sum", 1.0), ("batchmean", 4 / 6)):
        loss = make(reduction=reduction)
        value, gradient = value_and_gradient(loss, *inputs, MASK)
        expected, expected_gradient = value_and_gradient(loss, *rows_of(inputs, MASK))
        torch.testing.assert_close(value, factor * expected, rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(gradient[MASK], factor * expected_gradient, rtol=1e-8, atol=1e-12)
        assert gradient[~MASK].abs().max().item() == 0.0
    loss = make(reduction="none")
    value = loss(*inputs, MASK)
    torch.testing.assert_close(value[MASK], loss(*rows_of(inputs, MASK)), rtol=1e-10, atol=1e-15)
    assert value.shape == (6,) and value[~MASK].tolist() == [0.0, 0.0]


@every_case
def test_reductions(case):
    make, inputs = CASES[case]
    inputs = inputs()
    rows = make(reduction="none")(*inputs)
    assert rows.shape == (6,)
    each = torch.stack([make()(*rows_of(inputs, slice(k, k + 1))) for k in range(6)])
    torch.testing.assert_close(rows, each, rtol=1e-9, atol=1e-13)
    for reduction, expected in (("mean", rows.mean()), ("sum", rows.sum()), ("batchmean", rows.mean())):
        torch.testing.assert_close(make(reduction=reduction)(*inputs), expected)


@every_case
def test_num_items_in_batch_replaces_the_divisor(case):
    make, inputs = CASES[case]
    inputs = inputs()
    total = make(reduction="sum")(*inputs, MASK)
    for reduction in ("mean", "batchmean"):
        for number in (11, torch.tensor(11), torch.tensor([11.0])):
            torch.testing.assert_close(make(reduction=reduction)(*inputs, MASK, number), total / 11)
    parts = [make()(*rows_of(inputs, part), None, 6) for part in (slice(0, 4), slice(4, 6))]
    torch.testing.assert_close(sum(parts), make()(*inputs))
    for wrong, error in ((1.5, TypeError), (-1, ValueError), (torch.ones(2), ValueError)):
        with pytest.raises(error, match="num_items_in_batch"):
            make()(*inputs, None, wrong)
    with pytest.raises(ValueError, match="num_items_in_batch"):
        make(reduction="sum")(*inputs, None, 6)


@every_case
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
def test_nothing_that_counts(case, reduction):
    make, inputs = CASES[case]
    loss = make(reduction=reduction)
    inputs = list(inputs())
    inputs[0] = inputs[0].index_fill(0, torch.tensor([2]), float("nan"))
    value, gradient = value_and_gradient(functools.partial(weighted, loss), *inputs, torch.zeros(6, dtype=torch.bool))
    assert value.item() == 0.0 and not gradient.any()
    empty = rows_of(inputs, slice(0, 0))
    assert loss(*empty).shape == ((0,) if reduction == "none" else ())
    value, gradient = value_and_gradient(functools.partial(weighted, loss), *empty)
    assert value.item() == 0.0 and gradient.shape == empty[0].shape


@every_labelled
def test_ignored_labels(case):
    make, inputs = CASES[case]
    inputs = list(inputs())
    kept = rows_of(inputs, MASK)
    inputs[2] = torch.where(MASK, inputs[2], -100)
    inputs[0] = inputs[0].index_fill(0, torch.tensor([1]), float("nan"))
    loss = make()
    value, gradient = value_and_gradient(loss, *inputs)
    expected, expected_gradient = value_and_gradient(loss, *kept)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(gradient[MASK], expected_gradient, rtol=1e-8, atol=1e-12)
    inputs[2] = torch.where(MASK, inputs[2], 3)
    both = loss(*inputs, MASK)
    torch.testing.assert_close(both, expected, rtol=1e-10, atol=0.0)
    inputs[2] = torch.where(MASK, inputs[2], 77)
    torch.testing.assert_close(make(ignore_index=77)(*inputs), expected, rtol=1e-10, atol=0.0)


@every_labelled
def test_labels_out_of_range(case):
    make, inputs = CASES[case]
    inputs = list(inputs())
    good = inputs[2]
    for wrong in (CLASSES, -1):
        inputs[2] = torch.where(torch.arange(6) == 4, wrong, good)
        with pytest.raises(ValueError, match=rf"labels: expected class labels in \[0, {CLASSES}\), got {wrong}"):
            make()(*inputs)
        make()(*inputs, torch.arange(6) != 4)
    # where values cannot be read, the row is NaN
    torch._dynamo.reset()
    loss = torch.compile(make(reduction="none"), backend="aot_eager", fullgraph=True)
    value = loss(*inputs)
    assert value.isnan().tolist() == [False] * 4 + [True, False]


@every_labelled
def test_label_dtypes_and_leading_axes(case):
    make, inputs = CASES[case]
    student, teacher, labels, *others = inputs()
    loss = make(reduction="none")
    expected = loss(student, teacher, labels, *others)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(loss(student, teacher, labels.to(dtype), *others), expected)
    shaped = loss(*(x.reshape(2, 3, *x.shape[1:]) for x in (student, teacher, labels)), *others)
    torch.testing.assert_close(shaped, expected.reshape(2, 3))
    batchmean = make(reduction="batchmean")
    shaped = batchmean(*(x.reshape(2, 3, *x.shape[1:]) for x in (student, teacher, labels)), *others)
    torch.testing.assert_close(shaped, expected.sum() / 2)
    one = make()(student[0], teacher[0], labels[0], *others)
    torch.testing.assert_close(one, expected[0])
    with pytest.raises(TypeError, match="labels"):
        loss(student, teacher, labels.double(), *others)
    with pytest.raises(ValueError, match="labels"):
        loss(student, teacher, labels[:5], *others)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_loss(case, dtype):
    make, inputs = CASES[case]
    inputs = inputs(dtype=dtype)
    loss = make().float()
    value, gradient = value_and_gradient(loss, *inputs)
    single = (inputs[0].float(), inputs[1].float(), *inputs[2:])
    expected, expected_gradient = value_and_gradient(loss, *single)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(value, expected) and torch.equal(gradient, expected_gradient.to(dtype))
    mixed = loss(inputs[0].float(), *inputs[1:])
    assert torch.equal(mixed, expected)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(case, dtype):
    make, inputs = CASES[case]
    loss, inputs = make().float(), inputs(dtype=torch.float32)
    expected, expected_gradient = value_and_gradient(loss, *inputs)
    student = inputs[0].clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        value = loss(student, *inputs[1:])
    (gradient,) = torch.autograd.grad(value, student)
    assert value.dtype == torch.float32 and torch.equal(value, expected) and torch.equal(gradient, expected_gradient)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_under_autocast_is_finite(case, dtype):
    """Large half-precision outputs of a model: a few steps without NaN, and the loss goes down."""
    make, inputs = CASES[case]
    student, teacher, *others = inputs(dtype=torch.float32)
    model = torch.nn.Linear(student[0].numel(), student[0].numel())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    loss, values = make().float(), []
    for _ in range(25):
        with torch.autocast("cpu", dtype=dtype):
            outputs = model(4 * student.flatten(1)).reshape(student.shape)
            value = loss(outputs, 4 * teacher.to(dtype), *others)
        optimizer.zero_grad()
        value.backward()
        assert model.weight.grad.isfinite().all()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0]


@every_case
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_in_one_graph(case, masked):
    make, inputs = CASES[case]
    loss, inputs = make(), (*inputs(), MASK if masked else None)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value, gradient = value_and_gradient(compiled, *inputs)
    expected, expected_gradient = value_and_gradient(loss, *inputs)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.slow
@every_case
def test_compiles_with_inductor(case):
    make, inputs = CASES[case]
    loss, inputs = make(), (*inputs(), MASK)
    torch._dynamo.reset()
    value, gradient = value_and_gradient(torch.compile(loss, fullgraph=True), *inputs)
    expected, expected_gradient = value_and_gradient(loss, *inputs)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("WKL")])
def test_progress_as_a_tensor_compiles_once(case):
    make, inputs = CASES[case]
    loss, inputs = make(), list(inputs())
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for epoch in range(1, 13):
        inputs[-1] = torch.tensor(epoch / 12, dtype=torch.float64)
        with torch.compiler.set_stance("fail_on_recompile" if epoch > 1 else "default"):
            value = compiled(*inputs)
        torch.testing.assert_close(value, loss(*inputs[:-1], epoch / 12))


@every_case
def test_waits_for_no_value(case):
    """Tensors without values: whatever looks at one raises (DataDependentOutputException)."""
    make, inputs = CASES[case]
    loss, real = make(), (*inputs(), MASK)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in real]
        for name, buffer in loss.named_buffers():
            setattr(loss, name, mode.from_tensor(buffer))
        student = fake[0].requires_grad_()
        value = loss(student, *fake[1:], torch.empty((), dtype=torch.int64))
        (gradient,) = torch.autograd.grad(value, student)
        assert value.shape == () and gradient.shape == student.shape


@every_case
def test_func_grad(case):
    make, inputs = CASES[case]
    loss, inputs = make(), inputs()
    gradient, value = torch.func.grad_and_value(loss)(*inputs)
    expected, expected_gradient = value_and_gradient(loss, *inputs)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@every_case
def test_vmap_over_several_batches(case):
    make, inputs = CASES[case]
    loss, first = make(), inputs()
    second = tuple(x.flip(0) * (1 if x.dtype == torch.int64 else 1.5) if torch.is_tensor(x) else x for x in first)
    stacked = [torch.stack([x, y]) if torch.is_tensor(x) else x for x, y in zip(first, second, strict=True)]
    dims = tuple(0 if torch.is_tensor(x) else None for x in first)
    values = torch.vmap(loss, in_dims=dims)(*stacked)
    gradients = torch.vmap(torch.func.grad(loss), in_dims=dims)(*stacked)
    expected = [value_and_gradient(loss, *batch) for batch in (first, second)]
    torch.testing.assert_close(values, torch.stack([value for value, _ in expected]))
    torch.testing.assert_close(gradients, torch.stack([gradient for _, gradient in expected]))


@every_case
def test_gradient_checkpointing(case):
    make, inputs = CASES[case]
    loss, inputs = make(), inputs()
    expected, expected_gradient = value_and_gradient(loss, *inputs)
    value, gradient = value_and_gradient(functools.partial(checkpoint, loss, use_reentrant=False), *inputs)
    assert torch.equal(value, expected) and torch.equal(gradient, expected_gradient)


@every_case
def test_pickle_copy_and_state(case):
    make, inputs = CASES[case]
    loss, inputs = make(reduction="sum"), inputs()
    assert not list(loss.parameters()) and set(loss.state_dict()) <= {"cost"}
    for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert torch.equal(twin(*inputs), loss(*inputs))
    assert "reduction='sum'" in repr(loss)


@every_case
def test_same_bits_and_inputs_left_alone(case):
    make, inputs = CASES[case]
    loss, inputs = make().float(), (*inputs(dtype=torch.float32), MASK)
    before = copy.deepcopy(inputs)
    first, second = (value_and_gradient(loss, *inputs) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    for x, y in zip(inputs, before, strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@every_case
def test_strided_inputs(case):
    make, inputs = CASES[case]
    loss, (student, teacher, *others) = make(), inputs()
    expected, expected_gradient = value_and_gradient(loss, student, teacher, *others)
    turned = student.transpose(0, 1).contiguous().transpose(0, 1)
    value, gradient = value_and_gradient(loss, turned, teacher.repeat_interleave(2, 0)[::2], *others)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-13)


@every_case
def test_wrong_masks_and_reductions(case):
    make, inputs = CASES[case]
    inputs = inputs()
    for wrong, error in (([True] * 6, TypeError), (torch.ones(6), TypeError), (MASK[:5], ValueError)):
        with pytest.raises(error, match="mask"):
            make()(*inputs, wrong)
    with pytest.raises(ValueError, match="mask"):
        make()(*inputs, MASK.to("meta"))
    with pytest.raises(ValueError, match="reduction"):
        make(reduction="max")
    if case == "ULD":
        return
    with pytest.raises(TypeError, match="backend"):
        make(backend=0)
    with pytest.raises(ValueError, match="backend"):
        make(backend="tpu")(*inputs)

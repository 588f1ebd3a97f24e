"""SinKD as a citizen of PyTorch: masks, dtypes, transforms, compilation, pickling, determinism and wrong arguments."""

import copy
import pickle

import pytest
import torch
from sinkd_cases import BACKENDS, logits, value_and_gradient

from otkd_fast.losses import SinKD, sinkd
from otkd_fast.reference import sinkd as oracle

FORMS = [
    ("batch", "paper", "sinkhorn"),
    ("batch", "released", "sinkhorn"),
    ("sample", "paper", "sinkhorn"),
    ("sample", "released", "sinkhorn"),
    ("flattened", "paper", "sinkhorn"),
    ("flattened", "paper", "sort"),
    ("regression", "paper", "sinkhorn"),
    ("regression", "paper", "sort"),
    ("regression", "released", "sinkhorn"),
]
every_form = pytest.mark.parametrize(("form", "variant", "solver"), FORMS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def inputs(form, b=6, d=4, dtype=torch.float64):
    return logits(b, 1 if form == "regression" else d, dtype=dtype)


@every_backend
@every_form
def test_mask_is_as_if_the_rows_were_removed(form, variant, solver, backend):
    student, teacher = inputs(form)
    mask = torch.tensor([True, False, True, True, False, True])
    student[1], teacher[4] = float("nan"), float("inf")
    options = {"form": form, "variant": variant, "solver": solver}
    for reduction in ("sum", "mean"):
        value, gradient = value_and_gradient(
            SinKD(backend=backend, reduction=reduction, **options), student, teacher, mask
        )
        removed = SinKD(backend=backend, reduction=reduction, **options)
        expected, expected_gradient = value_and_gradient(removed, student[mask], teacher[mask])
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(gradient[mask], expected_gradient, rtol=1e-9, atol=1e-12)
        assert gradient[~mask].abs().max().item() == 0.0
        torch.testing.assert_close(
            value, oracle.sinkd(student, teacher, mask, reduction=reduction, **options), rtol=1e-10, atol=1e-15
        )


@every_backend
def test_labels_of_masked_rows_may_be_anything(backend):
    student, _ = inputs("batch")
    labels = torch.tensor([0, 3, -100, 1, 2, -100])
    value = sinkd(student, labels, labels >= 0, backend=backend)
    kept = labels >= 0
    torch.testing.assert_close(value, sinkd(student[kept], labels[kept], backend=backend), rtol=1e-10, atol=0.0)


@every_backend
@every_form
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_all_masked_is_zero_with_zero_gradient(form, variant, solver, reduction, backend):
    student, teacher = inputs(form)
    student[2] = float("nan")
    loss = SinKD(form=form, variant=variant, solver=solver, reduction=reduction, backend=backend)
    value, gradient = value_and_gradient(loss, student, teacher, torch.zeros(6, dtype=torch.bool))
    assert value.item() == 0.0 and gradient.tolist() == torch.zeros_like(gradient).tolist()


@every_backend
@every_form
def test_no_rows_is_zero_and_attached(form, variant, solver, backend):
    student, teacher = (x[:0] for x in inputs(form))
    loss = SinKD(form=form, variant=variant, solver=solver, backend=backend)
    value, gradient = value_and_gradient(loss, student, teacher)
    assert value.item() == 0.0 and gradient.shape == student.shape


@every_backend
@pytest.mark.parametrize(("b", "d"), [(1, 1), (1, 5), (5, 1)])
def test_smallest_sizes(b, d, backend):
    student, teacher = logits(b, d)
    expected = (
        (torch.softmax(student / 2, -1) - torch.softmax(teacher / 2, -1)).abs().sum() if b == 1 else torch.zeros(())
    )
    torch.testing.assert_close(sinkd(student, teacher, backend=backend), expected.double())


@every_backend
@every_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_loss(dtype, form, variant, solver, backend):
    student, teacher = inputs(form, dtype=dtype)
    loss = SinKD(form=form, variant=variant, solver=solver, backend=backend)
    value, gradient = value_and_gradient(loss, student, teacher)
    expected, expected_gradient = value_and_gradient(loss, student.float(), teacher.float())
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(value, expected) and torch.equal(gradient, expected_gradient.to(dtype))


@every_backend
def test_student_and_teacher_may_differ_in_dtype(backend):
    student, teacher = inputs("batch", dtype=torch.float32)
    half = teacher.bfloat16()
    value = sinkd(student, half, backend=backend)
    assert value.dtype == torch.float32
    assert torch.equal(value, sinkd(student, half.float(), backend=backend))
    assert sinkd(student, teacher.double(), backend=backend).dtype == torch.float64


@every_backend
@every_form
def test_autocast_changes_nothing(form, variant, solver, backend):
    student, teacher = inputs(form, dtype=torch.float32)
    loss = SinKD(form=form, variant=variant, solver=solver, backend=backend)
    expected, expected_gradient = value_and_gradient(loss, student, teacher)
    student = student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected) and torch.equal(gradient, expected_gradient)


@every_backend
def test_strided_inputs(backend):
    student, teacher = logits(6, 4)
    expected, expected_gradient = value_and_gradient(SinKD(backend=backend), student, teacher)
    transposed = student.t().contiguous().t()
    value, gradient = value_and_gradient(SinKD(backend=backend), transposed, teacher.repeat(1, 2)[:, :4])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)
    row = teacher[:1].expand(6, 4)
    torch.testing.assert_close(sinkd(student, row, backend=backend), sinkd(student, row.contiguous(), backend=backend))


@every_backend
@every_form
def test_same_inputs_same_bits(form, variant, solver, backend):
    student, teacher = inputs(form, 32, 5, torch.float32)
    loss = SinKD(form=form, variant=variant, solver=solver, backend=backend)
    first, second = (value_and_gradient(loss, student, teacher) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_pickle_copy_and_no_state():
    loss = SinKD(form="sample", epsilon=0.3, reduction="mean")
    assert not list(loss.parameters()) and not loss.state_dict()
    student, teacher = logits(4, 3)
    for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert torch.equal(twin(student, teacher), loss(student, teacher))
    assert "form='sample'" in repr(loss) and "epsilon=0.3" in repr(loss)


def test_module_and_function_take_keywords_only():
    student, teacher = logits(2, 2)
    with pytest.raises(TypeError):
        SinKD(2.0)
    with pytest.raises(TypeError):
        sinkd(student, teacher, None, 2.0)


@every_backend
@every_form
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_in_one_graph(form, variant, solver, masked, backend):
    student, teacher = inputs(form)
    mask = torch.tensor([True, True, False, True, True, True]) if masked else None
    loss = SinKD(form=form, variant=variant, solver=solver, num_iters=5, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value, gradient = value_and_gradient(compiled, student, teacher, mask)
    expected, expected_gradient = value_and_gradient(loss, student, teacher, mask)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@every_backend
def test_compiles_with_one_tensor_on_both_sides(backend):
    student, _ = inputs("batch")
    torch._dynamo.reset()
    loss = SinKD(backend=backend)
    compiled = torch.compile(lambda x: loss(x, x), backend="aot_eager", fullgraph=True)
    value, gradient = value_and_gradient(compiled, student)
    expected, expected_gradient = value_and_gradient(lambda x: loss(x, x), student)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@every_backend
def test_compiles_with_labels(backend):
    student, _ = inputs("batch")
    labels = torch.tensor([0, 3, 1, 1, 2, 0])
    torch._dynamo.reset()
    compiled = torch.compile(SinKD(backend=backend), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, labels), sinkd(student, labels, backend=backend))


@every_backend
@every_form
def test_func_grad(form, variant, solver, backend):
    student, teacher = inputs(form)
    loss = SinKD(form=form, variant=variant, solver=solver, backend=backend)
    gradient, value = torch.func.grad_and_value(loss)(student, teacher)
    expected, expected_gradient = value_and_gradient(loss, student, teacher)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@every_backend
@pytest.mark.parametrize("in_dims", [(0, 0), (1, 0), (0, None), (None, 0)])
def test_vmap_over_several_batches(in_dims, backend):
    pairs = [logits(5, 3, seed=seed) for seed in range(4)]
    stacked, arguments = [], []
    for side, dim in enumerate(in_dims):
        stacked.append(pairs[0][side] if dim is None else torch.stack([p[side] for p in pairs], dim=dim))
        arguments.append([pairs[0][side]] * 4 if dim is None else [p[side] for p in pairs])
    loss = SinKD(backend=backend)
    expected = torch.stack([loss(s, t) for s, t in zip(*arguments, strict=True)])
    torch.testing.assert_close(torch.vmap(loss, in_dims=in_dims)(*stacked), expected)
    gradients = torch.vmap(torch.func.grad(loss), in_dims=in_dims)(*stacked)
    expected = torch.stack([value_and_gradient(loss, s, t)[1] for s, t in zip(*arguments, strict=True)])
    torch.testing.assert_close(gradients, expected)


@every_backend
def test_vmap_over_masks_and_labels(backend):
    student, teacher = logits(5, 3)
    masks = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    loss = SinKD(backend=backend)
    values = torch.vmap(loss, in_dims=(None, None, 0))(student, teacher, masks)
    torch.testing.assert_close(values, torch.stack([loss(student, teacher, m) for m in masks]))
    labels = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 0, 1, 0]])
    values = torch.vmap(loss, in_dims=(None, 0))(student, labels)
    torch.testing.assert_close(values, torch.stack([loss(student, y) for y in labels]))


def test_gradcheck_of_the_reference():
    student, teacher = (x.requires_grad_() for x in logits(4, 3))
    loss = SinKD(num_iters=3, epsilon=0.5, backend="reference")
    assert torch.autograd.gradcheck(loss, (student, teacher))
    assert torch.autograd.gradgradcheck(loss, (student, teacher))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_second_derivative_of_the_kernels_is_an_error(backend):
    student, teacher = logits(4, 3)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(sinkd(student, teacher, backend=backend), student, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        gradient.sum().backward()


@every_backend
def test_stays_finite_and_trains(backend):
    """Gradient descent on the student's logits brings the loss down to the level of student = teacher."""
    student, teacher = logits(16, 5, dtype=torch.float32)
    student.requires_grad_()
    loss = SinKD(backend=backend)
    before = loss(student, teacher).item()
    optimizer = torch.optim.SGD([student], lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    floor = loss(teacher, teacher).item()
    after = loss(student, teacher).item()
    assert after - floor < 0.2 * (before - floor)


def test_gradient_flows_through_a_model():
    torch.manual_seed(0)
    model, (_, teacher) = torch.nn.Linear(3, 4), logits(8, 4, dtype=torch.float32)
    SinKD()(model(torch.randn(8, 3)), teacher).backward()
    assert model.weight.grad.abs().max() > 0 and teacher.grad is None


S, T = logits(4, 3)
WRONG_INPUTS = {
    "student is no tensor": (([1.0], T), {}, TypeError, "student"),
    "teacher is no tensor": ((S, [1.0]), {}, TypeError, "teacher"),
    "integer student": ((S.long(), T), {}, TypeError, "student"),
    "complex student": ((S.to(torch.complex64), T), {}, TypeError, "student"),
    "student of rank 1": ((S[0], T[0]), {}, ValueError, "student"),
    "student and teacher of different ranks": ((S[None], T), {}, ValueError, "teacher"),
    "no classes": ((S[:, :0], T[:, :0]), {}, ValueError, "student"),
    "other number of rows": ((S, T[:3]), {}, ValueError, "teacher"),
    "other number of classes": ((S, T[:, :2]), {}, ValueError, "teacher"),
    "other device": ((S, T.to("meta")), {}, ValueError, "teacher"),
    "bool teacher": ((S, torch.ones(4, dtype=torch.bool)), {}, TypeError, "teacher"),
    "labels of rank 2": ((S, torch.zeros(4, 1, dtype=torch.long)), {}, ValueError, "teacher"),
    "too few labels": ((S, torch.zeros(3, dtype=torch.long)), {}, ValueError, "teacher"),
    "label too large": ((S, torch.tensor([0, 1, 2, 3])), {}, ValueError, r"teacher.*\[0, 3\)"),
    "label negative": ((S, torch.tensor([0, 1, 2, -1])), {}, ValueError, "teacher"),
    "mask is no tensor": ((S, T, [True] * 4), {}, TypeError, "mask"),
    "float mask": ((S, T, torch.ones(4)), {}, TypeError, "mask"),
    "mask too short": ((S, T, torch.ones(3, dtype=torch.bool)), {}, ValueError, "mask"),
    "mask of rank 2": ((S, T, torch.ones(4, 3, dtype=torch.bool)), {}, ValueError, "mask"),
    "mask on another device": ((S, T, torch.ones(4, dtype=torch.bool, device="meta")), {}, ValueError, "mask"),
    "wide regression": ((S, T), {"form": "regression"}, ValueError, "student"),
    "labels in regression": ((S[:, 0], torch.zeros(4, dtype=torch.long)), {"form": "regression"}, TypeError, "teacher"),
}
WRONG_OPTIONS = {
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature"),
    "temperature nan": ({"temperature": float("nan")}, ValueError, "temperature"),
    "temperature str": ({"temperature": "2"}, TypeError, "temperature"),
    "epsilon negative": ({"epsilon": -0.1}, ValueError, "epsilon"),
    "epsilon inf": ({"epsilon": float("inf")}, ValueError, "epsilon"),
    "epsilon tensor": ({"epsilon": torch.tensor(0.1)}, TypeError, "epsilon"),
    "no iterations": ({"num_iters": 0}, ValueError, "num_iters"),
    "fractional iterations": ({"num_iters": 2.0}, TypeError, "num_iters"),
    "bool iterations": ({"num_iters": True}, TypeError, "num_iters"),
    "unknown form": ({"form": "token"}, ValueError, "form.*'batch', 'sample', 'flattened', 'regression'"),
    "unknown variant": ({"variant": "tnnls"}, ValueError, "variant.*'paper', 'released'"),
    "unknown solver": ({"solver": "emd"}, ValueError, "solver.*'sinkhorn', 'sort'"),
    "unknown reduction": ({"reduction": "max"}, ValueError, "reduction.*'none', 'mean', 'batchmean', 'sum'"),
    "sorting a batch": ({"solver": "sort"}, ValueError, "solver"),
    "sorting samples": ({"solver": "sort", "form": "sample"}, ValueError, "solver"),
    "released flattened": ({"form": "flattened", "variant": "released"}, ValueError, "variant"),
    "backend of a wrong type": ({"backend": 3}, TypeError, "backend"),
}


@pytest.mark.parametrize("case", list(WRONG_INPUTS))
def test_wrong_inputs(case):
    arguments, options, error, message = WRONG_INPUTS[case]
    with pytest.raises(error, match=message):
        sinkd(*arguments, **options)
    with pytest.raises(error, match=message):
        SinKD(**options)(*arguments)


@pytest.mark.parametrize("case", list(WRONG_OPTIONS))
def test_wrong_options(case):
    options, error, message = WRONG_OPTIONS[case]
    with pytest.raises(error, match=message):
        sinkd(S, T, **options)
    with pytest.raises(error, match=message):
        SinKD(**options)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend"):
        sinkd(S, T, backend="tpu")


@every_backend
def test_inputs_are_left_alone(backend):
    student, teacher = inputs("batch")
    before = student.clone(), teacher.clone()
    value_and_gradient(SinKD(backend=backend), student, teacher, torch.tensor([True] * 5 + [False]))
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])

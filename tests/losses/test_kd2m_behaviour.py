"""KD2M as a citizen of PyTorch: masks, dtypes, compilation, pickling, solvers that are missing, wrong arguments."""

import builtins
import copy
import pickle

import kd2m_cases as cases
import pytest
import torch
import torch.utils.checkpoint
from kd2m_cases import value_and_gradient

from otkd_fast.losses import KD2M, kd2m
from otkd_fast.losses._exact import exact_plan

ON_DEVICE = {
    "w2": {"metric": "w2", "solver": "sinkhorn"},
    "cw2": {"metric": "cw2", "solver": "sinkhorn"},
    "cw2 of known classes": {"metric": "cw2", "solver": "sinkhorn", "num_classes": 4},
    "jw2": {"metric": "jw2", "solver": "sinkhorn"},
    "jw2 released": {"metric": "jw2", "solver": "sinkhorn", "variant": "released"},
    "w2_gaussian": {"metric": "w2_gaussian"},
    "w2_gaussian full": {"metric": "w2_gaussian", "covariance": "full"},
    "cw2_gaussian": {"metric": "cw2_gaussian", "variant": "released"},
    "cw2_gaussian full": {"metric": "cw2_gaussian", "covariance": "full", "num_classes": 4},
    "kl_gaussian": {"metric": "kl_gaussian"},
    "kl_gaussian full": {"metric": "kl_gaussian", "covariance": "full", "jitter": 0.1},
    "mmd": {"metric": "mmd"},
    "mmd rbf": {"metric": "mmd", "kernel": "rbf"},
}
ON_HOST = {"w2 exact": {}, "cw2 exact": {"metric": "cw2"}, "jw2 exact": {"metric": "jw2"}}
every_metric = pytest.mark.parametrize("name", [*ON_DEVICE, *ON_HOST])
on_device = pytest.mark.parametrize("name", list(ON_DEVICE))
LABELS = torch.tensor([0, 1, 1, 0, 3, 3, 1, 0])


def loss_of(name, labels=LABELS, **more):
    """Function of student and teacher features (and outputs, where gradients can only go there)."""
    options = (ON_DEVICE | ON_HOST)[name]
    loss = KD2M(**options, **more)
    if options.get("variant") == "released" and options["metric"] == "jw2":
        return lambda x, y, mask=None: loss(x, y, student_outputs=x[:, :3], teacher_outputs=y[:, :3], mask=mask)
    return lambda x, y, mask=None: loss(x, y, labels, mask=mask)


@every_metric
def test_mask_is_as_if_the_rows_were_removed(name):
    student, teacher = cases.features(8, 8, 4)
    mask = torch.tensor([True, False, True, True, True, True, True, False])
    expected = value_and_gradient(loss_of(name, LABELS[mask]), student[mask], teacher[mask])
    student[1], teacher[7] = float("nan"), float("inf")
    value, gradients = value_and_gradient(lambda x, y: loss_of(name)(x, y, mask), student, teacher)
    torch.testing.assert_close(value, expected[0], rtol=1e-9, atol=1e-14)
    for gradient, wanted in zip(gradients, expected[1], strict=True):
        torch.testing.assert_close(gradient[mask], wanted, rtol=1e-7, atol=1e-11)
        assert gradient[~mask].abs().max() == 0


@pytest.mark.parametrize("name", ["cw2", "cw2 of known classes", "cw2 exact", "cw2_gaussian", "jw2", "jw2 exact"])
def test_ignored_labels_are_left_out(name):
    student, teacher = cases.features(8, 8, 4)
    labels = LABELS.clone()
    labels[2] = -100
    kept = labels >= 0
    expected = loss_of(name, LABELS[kept])(student[kept], teacher[kept])
    torch.testing.assert_close(loss_of(name, labels)(student, teacher), expected, rtol=1e-10, atol=1e-14)


@every_metric
def test_no_row_left_is_zero(name):
    student, teacher = cases.features(8, 8, 4)
    student[2] = float("nan")
    mask = torch.zeros(8, dtype=torch.bool)
    value, gradients = value_and_gradient(lambda x, y: loss_of(name)(x, y, mask), student, teacher)
    assert value == 0 and all(g.abs().max() == 0 for g in gradients)
    value, gradients = value_and_gradient(loss_of(name, LABELS[:0]), student[:0], teacher[:0])
    assert value == 0 and gradients[0].shape == (0, 4)


@every_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_float32_loss(name, dtype):
    student, teacher = cases.features(8, 8, 4, dtype=dtype)
    value, gradients = value_and_gradient(loss_of(name), student, teacher)
    expected, _ = value_and_gradient(loss_of(name), student.float(), teacher.float())
    assert value.dtype == torch.float32 and gradients[0].dtype == dtype
    assert torch.equal(value, expected)


@every_metric
def test_autocast_changes_nothing(name):
    student, teacher = cases.features(8, 8, 4, dtype=torch.float32)
    expected, expected_gradients = value_and_gradient(loss_of(name), student, teacher)
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss_of(name)(student, teacher)
    gradients = torch.autograd.grad(value, [student, teacher])
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert all(torch.equal(g, e) for g, e in zip(gradients, expected_gradients, strict=True))


@on_device
@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_in_one_graph(name, masked):
    student, teacher = cases.features(8, 8, 4)
    mask = torch.tensor([True] * 6 + [False, True]) if masked else None
    torch._dynamo.reset()
    loss = loss_of(name)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    value, gradients = value_and_gradient(lambda x, y: compiled(x, y, mask), student, teacher)
    expected, expected_gradients = value_and_gradient(lambda x, y: loss(x, y, mask), student, teacher)
    torch.testing.assert_close(value, expected)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("cw2", "w2_gaussian full", "mmd rbf") else pytest.mark.slow)
        for name in ON_DEVICE
    ],
)
def test_func_grad_and_vmap(name):
    pairs = [cases.features(8, 8, 4, seed=seed) for seed in range(3)]
    loss = loss_of(name)
    student, teacher = (torch.stack(side) for side in zip(*pairs, strict=True))
    gradients, values = torch.vmap(torch.func.grad_and_value(loss))(student, teacher)
    for k, pair in enumerate(pairs):
        value, (gradient, _) = value_and_gradient(loss, *pair)
        torch.testing.assert_close(values[k], value)
        torch.testing.assert_close(gradients[k], gradient)


def test_gradient_checkpointing():
    student, teacher = cases.features(8, 8, 4)
    student.requires_grad_()
    value = torch.utils.checkpoint.checkpoint(loss_of("cw2"), student, teacher, use_reentrant=False)
    (gradient,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(gradient, value_and_gradient(loss_of("cw2"), student, teacher)[1][0])


def test_exact_transport_breaks_the_graph_and_is_right():
    student, teacher = cases.features(8, 8, 4)
    torch._dynamo.reset()
    compiled = torch.compile(KD2M(), backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher), kd2m(student, teacher))


@on_device
def test_gradcheck(name):
    student, teacher = (x.requires_grad_() for x in cases.features(8, 8, 4))
    options = {} if ON_DEVICE[name].get("solver") != "sinkhorn" else {"gradient": "unroll", "num_iters": 4}
    if "sinkhorn" in ON_DEVICE[name].values():  # epsilon times a mean that is a constant: only the rest is derived
        options["epsilon"] = 0.2
        value, gradients = value_and_gradient(loss_of(name, **options), student, teacher)
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)
        return
    if name == "mmd rbf":
        options["bandwidth"] = 0.7
    assert torch.autograd.gradcheck(loss_of(name, **options), (student, teacher))


def test_pickle_copy_and_no_state():
    loss = KD2M(metric="cw2", num_classes=4, variant="released")
    assert not list(loss.parameters()) and not loss.state_dict()
    student, teacher = cases.features(8, 8, 4)
    for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert torch.equal(twin(student, teacher, LABELS), loss(student, teacher, LABELS))
    assert "metric='cw2'" in repr(loss)
    with pytest.raises(TypeError):
        KD2M("w2")


@pytest.mark.parametrize("name", ["w2 exact", "cw2 exact", "w2", "w2_gaussian", "mmd rbf"])
def test_training_brings_the_distance_down(name):
    student, teacher = cases.features(8, 8, 4, dtype=torch.float32)
    student.requires_grad_()
    loss = loss_of(name)
    before = loss(student, teacher).item()
    optimizer = torch.optim.SGD([student], lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    assert loss(student, teacher).item() < 0.5 * before


def test_exact_solvers_agree():
    """The assignment for equal masses, the network simplex for others: doubling each row changes nothing."""
    cost = torch.rand(6, 6, dtype=torch.float64)
    masses = torch.full((6,), 1 / 6, dtype=torch.float64)
    rows, columns, mass = exact_plan(cost, masses, masses)
    halves = torch.full((12,), 1 / 12, dtype=torch.float64)
    i, j, m = exact_plan(cost.repeat_interleave(2, 0), halves, masses)
    torch.testing.assert_close((mass * cost[rows, columns]).sum(), (m * cost[i // 2, j]).sum())
    a = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64)
    i, j, m = exact_plan(torch.rand(4, 3), a, a[[0, 2, 3]])
    assert 1 not in i.tolist()
    torch.testing.assert_close(torch.zeros(3).double().index_add(0, j, m.double()), a[[0, 2, 3]])


def without(monkeypatch, *names):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] in names:
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)


def test_solvers_that_are_not_installed(monkeypatch):
    student, teacher = cases.features(8, 8, 4)
    expected = kd2m(student, teacher)
    with monkeypatch.context() as context:
        without(context, "scipy")
        torch.testing.assert_close(kd2m(student, teacher), expected)
    with monkeypatch.context() as context:
        without(context, "ot")
        torch.testing.assert_close(kd2m(student, teacher), expected)
        with pytest.raises(ImportError, match="POT"):
            kd2m(student, teacher[:5])
    without(monkeypatch, "ot", "scipy")
    with pytest.raises(ImportError, match="solver='sinkhorn'"):
        kd2m(student, teacher)
    assert kd2m(student, teacher, solver="sinkhorn").isfinite()


S, T = cases.features(8, 8, 4)
L = LABELS
WRONG_INPUTS = {
    "no tensor": (([1.0], T), {}, TypeError, "student_features"),
    "integers": ((S.long(), T), {}, TypeError, "student_features"),
    "a map": ((S[None], T[None]), {}, ValueError, "student_features.*pool"),
    "no features": ((S[:, :0], T[:, :0]), {}, ValueError, "student_features"),
    "other features": ((S, T[:, :2]), {}, ValueError, "teacher_features.*project"),
    "other device": ((S, T.to("meta")), {}, ValueError, "teacher_features"),
    "no labels": ((S, T), {"metric": "cw2"}, ValueError, "labels"),
    "no labels for jw2": ((S, T), {"metric": "jw2"}, ValueError, "labels"),
    "float labels": ((S, T, L.float()), {"metric": "cw2"}, TypeError, "labels"),
    "too few labels": ((S, T, L[:3]), {"metric": "cw2"}, ValueError, "labels"),
    "label too large": ((S, T, L), {"metric": "cw2", "num_classes": 3}, ValueError, r"labels.*\[0, 3\)"),
    "other number of rows": ((S, T[:5], L), {"metric": "cw2"}, ValueError, "teacher_features"),
    "nan": ((S * float("nan"), T), {}, ValueError, "student_features.*finite"),
    "nan in a class": ((S * float("nan"), T, L), {"metric": "cw2"}, ValueError, "student_features.*finite"),
    "dead feature": ((S * 0, T), {"metric": "kl_gaussian"}, ValueError, "student_features.*variances.*jitter"),
    "few rows for full": (
        (S[:3], T), {"metric": "kl_gaussian", "covariance": "full"}, ValueError, "student_features.*positive definite",
    ),
}  # fmt: skip
WRONG_OPTIONS = {
    "metric": ({"metric": "w3"}, ValueError, "metric"),
    "variant": ({"variant": "arxiv"}, ValueError, "variant"),
    "solver": ({"solver": "emd"}, ValueError, "solver"),
    "gradient": ({"gradient": "envelope"}, ValueError, "gradient"),
    "full and released": ({"covariance": "full", "variant": "released"}, ValueError, "covariance"),
    "cross-entropy and released": ({"label_cost": "cross_entropy", "variant": "released"}, ValueError, "label_cost"),
    "epsilon": ({"epsilon": 0.0}, ValueError, "epsilon"),
    "beta": ({"beta": -1.0}, ValueError, "beta"),
    "jitter": ({"jitter": -1.0}, ValueError, "jitter"),
    "bandwidth": ({"bandwidth": 0.0}, ValueError, "bandwidth"),
    "num_classes": ({"num_classes": 2.5}, TypeError, "num_classes"),
    "backend": ({"backend": 3}, TypeError, "backend"),
}


@pytest.mark.parametrize("name", list(WRONG_INPUTS))
def test_wrong_inputs(name):
    arguments, options, error, message = WRONG_INPUTS[name]
    with pytest.raises(error, match=message):
        kd2m(*arguments, **options)


@pytest.mark.parametrize("name", list(WRONG_OPTIONS))
def test_wrong_options(name):
    options, error, message = WRONG_OPTIONS[name]
    with pytest.raises(error, match=message):
        KD2M(**options)


def test_wrong_outputs():
    with pytest.raises(ValueError, match="student_outputs"):
        kd2m(S, T, metric="jw2", teacher_outputs=T)
    with pytest.raises(ValueError, match="teacher_outputs.*shape"):
        kd2m(S, T, metric="jw2", student_outputs=S, teacher_outputs=T[:, :2])
    with pytest.raises(ValueError, match="student_outputs"):
        kd2m(S, T, L, metric="jw2", label_cost="cross_entropy")
    with pytest.raises(ValueError, match="teacher_outputs.*released"):
        kd2m(S, T, metric="jw2", variant="released", student_outputs=S)
    with pytest.raises(ValueError, match="student_outputs"):
        kd2m(S, T, metric="jw2", student_outputs=S[:3], teacher_outputs=T)

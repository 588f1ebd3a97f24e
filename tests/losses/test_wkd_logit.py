"""WKD-L against the published formula."""

import functools

import pytest
import torch
import wkd_cases as cases
from wkd_cases import BACKENDS, SETTINGS, relative_error, value_and_gradient

import otkd_fast
from otkd_fast.losses import WKDLogit, cosine_decay, stage_share, wkd_logit
from otkd_fast.testing import tolerance

VARIANTS = [(variant, backend) for variant in ("released", "paper") for backend in BACKENDS]
every_variant = pytest.mark.parametrize(("variant", "backend"), VARIANTS)


@functools.cache
def problem(setting):
    rows, classes, limits, kappa, temperature = SETTINGS[setting]
    return cases.sample(rows, classes), cases.distances(classes, limits), kappa, temperature


@functools.cache
def expected(setting, variant, dtype=torch.float64):
    (student, teacher, labels), distance, kappa, temperature = problem(setting)
    student, teacher, distance = (x.to(dtype).double() for x in (student, teacher, distance))
    options = {"kappa": kappa, "temperature": temperature, "guard": cases.GUARDS[variant]}
    return value_and_gradient(cases.wkd_logit, student, teacher, labels, distance, **options)


@every_variant
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_equals_the_formula(setting, variant, backend):
    (student, teacher, labels), distance, kappa, temperature = problem(setting)
    loss = WKDLogit(cost=distance, kappa=kappa, temperature=temperature, variant=variant, backend=backend)
    value, gradient = value_and_gradient(loss, student, teacher, labels)
    expected_value, expected_gradient = expected(setting, variant)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected_value, rtol=1e-9, atol=0.0)
    assert relative_error(gradient, expected_gradient) < 1e-9


@every_variant
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_float32_is_near_float64(setting, variant, backend):
    (student, teacher, labels), distance, kappa, temperature = problem(setting)
    loss = WKDLogit(cost=distance.float(), kappa=kappa, temperature=temperature, variant=variant, backend=backend)
    value, gradient = value_and_gradient(loss, student.float(), teacher.float(), labels)
    expected_value, expected_gradient = expected(setting, variant, torch.float32)
    assert value.dtype == torch.float32 and gradient.dtype == torch.float32
    rtol, atol = tolerance("sinkhorn", "transport_cost", torch.float32)
    torch.testing.assert_close(value.double(), expected_value, rtol=rtol, atol=atol * expected_value.item())
    rtol, atol = tolerance("sinkhorn", "gradient", torch.float32)
    assert relative_error(gradient, expected_gradient) < atol


def test_how_far_apart_the_variants_are():
    """The sizes that the documentation gives for the guards of the released code."""
    for setting, value_bound, gradient_bound in (("C100 res32x4", 5e-5, 2e-4), ("IN ResNet50", 5e-3, 3e-2)):
        (value, gradient), (plain_value, plain_gradient) = expected(setting, "released"), expected(setting, "paper")
        assert 1e-7 < relative_error(plain_value, value) < value_bound
        assert relative_error(plain_gradient, gradient) < gradient_bound


@every_variant
def test_the_cost_may_come_finished(variant, backend):
    student, teacher, labels = cases.sample(8, 12)
    distance = cases.distances(12)
    options = {"variant": variant, "backend": backend, "gamma": 3.0}
    sharp = wkd_logit(student, teacher, labels, cost=distance, kappa=2.0, **options)
    finished = wkd_logit(student, teacher, labels, cost=1 - torch.exp(-2 * distance), **options)
    torch.testing.assert_close(sharp, finished, rtol=1e-12, atol=0.0)
    negative = 1 - torch.exp(-2 * distance)
    negative.fill_diagonal_(-0.5)
    torch.testing.assert_close(wkd_logit(student, teacher, labels, cost=negative, **options), finished)


@every_variant
def test_identical_logits_leave_the_target_term_and_the_entropic_bias(variant, backend):
    (_, teacher, labels), distance, kappa, temperature = problem("C100 res32x4")
    loss = WKDLogit(cost=distance, kappa=kappa, temperature=temperature, gamma=1.0, variant=variant, backend=backend)
    only_target = loss(teacher, teacher, labels, gamma=0.0)
    p = torch.softmax(teacher, -1).gather(1, labels[:, None])
    torch.testing.assert_close(only_target, -(p * p.log()).mean(), rtol=1e-9, atol=0.0)
    bias = loss(teacher, teacher, labels) - only_target
    assert 0 < bias < 5e-3  # documented: 2e-3 to 3e-3 for kappa 1


@every_variant
def test_target_class_takes_no_part_in_the_transport(variant, backend):
    student, teacher, labels = cases.sample(8, 12)
    loss = WKDLogit(cost=cases.distances(12), gamma=1.0, variant=variant, backend=backend)

    def transport(s, t):
        return loss(s, t, labels) - loss(s, t, labels, gamma=0.0)

    _, gradient = value_and_gradient(transport, student, teacher)
    own = gradient.gather(1, labels[:, None])
    assert own.abs().max() < 1e-15 and gradient.abs().max() > 1e-4
    moved = student.scatter_add(1, labels[:, None], torch.full((8, 1), 5.0, dtype=torch.float64))
    torch.testing.assert_close(transport(moved, teacher), transport(student, teacher), rtol=1e-9, atol=1e-12)


@every_variant
def test_gradient_of_cost_and_teacher(variant, backend):
    student, teacher, labels = cases.sample(3, 5)
    distance = cases.distances(5)

    def ours(s, t, c):
        return wkd_logit(s, t, labels, cost=c, gamma=2.0, temperature=2.0, variant=variant, backend=backend)

    def formula(s, t, c):
        guard = cases.GUARDS[variant]
        return cases.wkd_logit(s, t, labels, c, kappa=0.0, temperature=2.0, gamma=2.0, guard=guard).mean()

    leaves = [x.clone().requires_grad_() for x in (student, teacher, distance + 0.1)]
    actual = torch.autograd.grad(ours(*leaves), leaves)
    wanted = torch.autograd.grad(formula(*leaves), leaves)
    for a, e in zip(actual, wanted, strict=True):
        assert relative_error(a, e) < 1e-9


@pytest.mark.parametrize("gradient", ["last_step", "implicit"])
def test_other_gradients_are_those_of_sinkhorn(gradient):
    student, teacher, labels = cases.sample(4, 6)
    cost = cases.distances(6) + 1e-8
    options = {"cost": cases.distances(6), "gamma": 1.0, "variant": "paper", "num_iters": 40}

    def direct(s):
        target = torch.nn.functional.one_hot(labels, 6).bool()
        p, q = (torch.softmax(x.masked_fill(target, -torch.inf) / 8, -1) for x in (s, teacher))
        sinkhorn = otkd_fast.sinkhorn(
            cost, p, q, epsilon=0.05, num_iters=40, update_first="b", gradient=gradient, backend="reference"
        )
        return sinkhorn.transport_cost

    _, actual = value_and_gradient(lambda s: wkd_logit(s, teacher, labels, gradient=gradient, **options), student)
    _, target_only = value_and_gradient(lambda s: wkd_logit(s, teacher, labels, **options | {"gamma": 0.0}), student)
    _, wanted = value_and_gradient(direct, student)
    assert relative_error(actual - target_only, wanted) < 1e-6


def test_cosine_decay():
    assert [cosine_decay(600.0, epoch, 240, start=150) for epoch in (1, 150)] == [600.0, 600.0]
    assert cosine_decay(600.0, 240, 240, start=150) == 0.0
    assert cosine_decay(600.0, 195, 240, start=150) == pytest.approx(300.0)
    assert cosine_decay(30.0, 1, 100) == pytest.approx(30.0 * 0.5 * (1 + 0.9995065603657316))
    assert cosine_decay(5.0, 7, 7, start=7) == 5.0
    for epoch in (1, 100, 151, 200, 239):
        share = stage_share(epoch / 240, start=150 / 240)
        assert cosine_decay(2.0, epoch, 240, start=150) == pytest.approx(2.0 * share)
        tensor = stage_share(torch.tensor(epoch / 240, dtype=torch.float64), start=150 / 240)
        assert tensor.item() == pytest.approx(share)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ((1.0, 0, 10), ValueError, "epoch"),
        ((1.0, 11, 10), ValueError, "epoch"),
        ((1.0, 1.0, 10), TypeError, "epoch"),
        ((-1.0, 1, 10), ValueError, "weight"),
        ((1.0, 1, 10, 11), ValueError, "start"),
        ((1.0, 1, 10, -1), ValueError, "start"),
    ],
)
def test_wrong_decay(arguments, error, name):
    with pytest.raises(error, match=name):
        cosine_decay(*arguments)


def test_gamma_of_one_call():
    student, teacher, labels = cases.sample(4, 6)
    loss = WKDLogit(cost=cases.distances(6), gamma=5.0)
    other = WKDLogit(cost=cases.distances(6), gamma=2.0)
    assert torch.equal(loss(student, teacher, labels, gamma=2.0), other(student, teacher, labels))
    assert torch.equal(loss(student, teacher, labels, gamma=torch.tensor(2.0)), other(student, teacher, labels))


S, T, Y = cases.sample(4, 3, dtype=torch.float32)
COST = torch.rand(3, 3)
WRONG = {
    "student no tensor": (([1.0], T, Y), {}, TypeError, "student_logits"),
    "integer student": ((S.long(), T, Y), {}, TypeError, "student_logits"),
    "other number of rows": ((S, T[:3], Y), {}, ValueError, "teacher_logits"),
    "other number of classes": ((S, T[:, :2], Y), {}, ValueError, "teacher_logits"),
    "teacher elsewhere": ((S, T.to("meta"), Y), {}, ValueError, "teacher_logits"),
    "one class": ((S[:, :1], T[:, :1], Y * 0), {}, ValueError, "student_logits.*two classes"),
    "labels elsewhere": ((S, T, Y.to("meta")), {}, ValueError, "labels"),
    "labels no tensor": ((S, T, [0, 1, 2, 0]), {}, TypeError, "labels"),
    "no cost": ((S, T, Y), {"cost": None}, TypeError, "cost"),
    "cost of another size": ((S, T, Y), {"cost": torch.rand(4, 4)}, ValueError, r"cost: expected shape \(3, 3\)"),
    "cost not square": ((S, T, Y), {"cost": torch.rand(3, 4)}, ValueError, "cost"),
    "cost of rank 3": ((S, T, Y), {"cost": torch.rand(2, 3, 3)}, ValueError, "cost"),
    "integer cost": ((S, T, Y), {"cost": torch.ones(3, 3, dtype=torch.long)}, TypeError, "cost"),
    "cost elsewhere": ((S, T, Y), {"cost": COST.to("meta")}, ValueError, "cost"),
    "temperature": ((S, T, Y), {"temperature": 0.0}, ValueError, "temperature"),
    "gamma": ((S, T, Y), {"gamma": -1.0}, ValueError, "gamma"),
    "epsilon": ((S, T, Y), {"epsilon": 0.0}, ValueError, "epsilon"),
    "num_iters": ((S, T, Y), {"num_iters": 0}, ValueError, "num_iters"),
    "kappa": ((S, T, Y), {"kappa": float("nan")}, ValueError, "kappa"),
    "variant": ((S, T, Y), {"variant": "official"}, ValueError, "variant"),
    "gradient": ((S, T, Y), {"gradient": "detach", "variant": "paper"}, ValueError, "gradient"),
    "gradient of the released loop": ((S, T, Y), {"gradient": "implicit"}, ValueError, "gradient.*variant"),
    "ignore_index": ((S, T, Y), {"ignore_index": None}, TypeError, "ignore_index"),
}


def test_costs_that_are_no_numbers():
    """Seen when the module is made; a call of the function does not scan its cost."""
    cost = 1 - torch.eye(3)
    for value, variant in ((torch.nan, "released"), (torch.inf, "released"), (torch.nan, "paper")):
        with pytest.raises(ValueError, match="cost: expected .*numbers"):
            WKDLogit(cost=cost.masked_fill(cost == 0, value), variant=variant)


@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_input(case):
    arguments, options, error, message = WRONG[case]
    options = {"cost": COST} | options
    with pytest.raises(error, match=message):
        wkd_logit(*arguments, **options)
    with pytest.raises(error, match=message):
        WKDLogit(**options)(*arguments)


def test_wrong_gamma_of_a_call():
    loss = WKDLogit(cost=COST)
    for gamma, error in ((-1.0, ValueError), ("1", TypeError), (torch.ones(2), ValueError)):
        with pytest.raises(error, match="gamma"):
            loss(S, T, Y, gamma=gamma)

"""KD2M against the paper's formulas, value and gradient."""

import functools

import kd2m_cases as cases
import pytest
import torch
from kd2m_cases import value_and_gradient

from otkd_fast.losses import KD2M, kd2m
from otkd_fast.testing import tolerance

ACTUAL_SHAPES = {
    "small": (6, 6, 4),
    "rectangular": (7, 5, 3),
    "published": (128, 128, 512),
    "last batch": (41, 41, 512),
}


def close(actual, expected, rtol=1e-9):
    value, gradients = actual
    expected_value, expected_gradients = expected
    torch.testing.assert_close(value, expected_value.to(value.dtype), rtol=rtol, atol=1e-14)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(gradient, wanted.to(gradient.dtype), rtol=0.0, atol=rtol * scale + 1e-15)


def many_labels(n, classes, seed=0):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


FORMULAS = {
    "w2": ({}, cases.w2),
    "w2_gaussian": ({}, cases.gaussian_w2),
    "kl_gaussian": ({}, cases.gaussian_kl),
    "mmd": ({}, cases.mmd_linear),
    "mmd rbf": ({"kernel": "rbf"}, cases.mmd_rbf),
    "mmd rbf 1.5": ({"kernel": "rbf", "bandwidth": 1.5}, functools.partial(cases.mmd_rbf, bandwidth=1.5)),
}


@functools.cache
def published(name):
    """The oracle at the published shape, once for both dtypes: float64 on inputs that float32 holds exactly."""
    pair = [x.float().double() for x in cases.features(*ACTUAL_SHAPES["published"])]
    return pair, value_and_gradient(vectorised(FORMULAS[name][1]), *pair)


def vectorised(formula):
    """128 x 128 distances of 512 features one by one take long: the same differences, broadcast."""

    def distances(x, y):
        return ((x[:, None] - y) ** 2).sum(-1)

    def call(*tensors):
        slow, cases.squared_distances = cases.squared_distances, distances
        try:
            return formula(*tensors)
        finally:
            cases.squared_distances = slow

    return call


@pytest.mark.parametrize("shape", ["small", "rectangular"])
@pytest.mark.parametrize("name", list(FORMULAS))
def test_equals_the_formula(name, shape):
    options, formula = FORMULAS[name]
    pair = cases.features(*ACTUAL_SHAPES[shape], seed=3)
    loss = KD2M(metric=name.split()[0], **options)
    close(value_and_gradient(loss, *pair), value_and_gradient(formula, *pair))


@pytest.mark.parametrize("name", list(FORMULAS))
def test_published_shape(name):
    pair, expected = published(name)
    loss = KD2M(metric=name.split()[0], **FORMULAS[name][0])
    close(value_and_gradient(loss, *pair), expected)
    assert value_and_gradient(loss, *(x.float() for x in pair))[0].dtype == torch.float32
    close(
        value_and_gradient(loss, *(x.float() for x in pair)),
        expected,
        tolerance("cost_matrix", "value", torch.float32)[0],
    )


@pytest.mark.parametrize(("classes", "n", "d"), [(3, 9, 2), (10, 128, 512), (100, 128, 512)])
@pytest.mark.parametrize("metric", ["cw2", "cw2_gaussian"])
def test_classes_of_a_batch(metric, classes, n, d):
    """Ten classes of a dozen rows, and a hundred of which many are absent and many have a single row."""
    student, teacher = cases.features(n, n, d, seed=1)
    labels = many_labels(n, classes)
    distance = vectorised(cases.w2 if metric == "cw2" else safe_gaussian_w2)

    def terms(x, y):
        return torch.stack(cases.by_class(distance, x, y, labels))

    expected_mean = value_and_gradient(lambda x, y: terms(x, y).mean(), student, teacher)
    actual = value_and_gradient(lambda x, y: kd2m(x, y, labels, metric=metric), student, teacher)
    close(actual, expected_mean)
    total = kd2m(student, teacher, labels, metric=metric, variant="released")
    torch.testing.assert_close(total, expected_mean[0] * len(labels.unique()), rtol=1e-9, atol=0.0)
    known = kd2m(student, teacher, labels, metric=metric, num_classes=classes)
    torch.testing.assert_close(known, total / classes, rtol=1e-9, atol=0.0)
    close(
        value_and_gradient(lambda x, y: kd2m(x, y, labels, metric=metric), student.float(), teacher.float()),
        value_and_gradient(lambda x, y: terms(x, y).mean(), student.float().double(), teacher.float().double()),
        1e-5,
    )


def safe_gaussian_w2(x, y):
    """A single row has deviation 0, whose root has no derivative: only the means count there."""
    return cases.gaussian_w2(x, y) if len(x) > 1 else ((x - y) ** 2).sum()


def test_full_covariance():
    student, teacher = cases.features(40, 30, 6, seed=2)
    expected = value_and_gradient(cases.gaussian_w2_full, student, teacher)
    close(value_and_gradient(KD2M(metric="w2_gaussian", covariance="full"), student, teacher), expected)
    close(value_and_gradient(cases.gaussian_w2_factors, student[:30], teacher), value_and_gradient(
        cases.gaussian_w2_full, student[:30], teacher
    ))  # fmt: skip


@pytest.mark.parametrize("shape", [*ACTUAL_SHAPES.values(), (80, 80, 64)])
def test_full_covariance_of_any_rank(shape):
    """Fewer rows than features, as published, where the printed roots lose half of the digits."""
    student, teacher = cases.features(min(shape[:2]), min(shape[:2]), shape[2], seed=2)
    expected = value_and_gradient(cases.gaussian_w2_factors, student, teacher)
    close(value_and_gradient(KD2M(metric="w2_gaussian", covariance="full"), student, teacher), expected)


@pytest.mark.parametrize("num_classes", [None, 5])
def test_full_covariance_by_class(num_classes):
    student, teacher = cases.features(40, 40, 3, seed=2)
    labels = many_labels(39, 3).tolist() + [4]  # class 3 is absent, class 4 has one row
    labels = torch.tensor(labels)
    terms = cases.by_class(cases.gaussian_w2_full, *(x[:39] for x in (student, teacher)), labels[:39])
    total = sum(terms) + (student[39] - teacher[39]).square().sum()
    options = {"metric": "cw2_gaussian", "covariance": "full", "num_classes": num_classes}
    torch.testing.assert_close(kd2m(student, teacher, labels, **options), total / (num_classes or 4), rtol=1e-9, atol=0)
    value, gradients = value_and_gradient(lambda x, y: kd2m(x, y, labels, **options), student, teacher)

    def formula(x, y):
        terms = cases.by_class(cases.gaussian_w2_full, x[:39], y[:39], labels[:39])
        return (sum(terms) + (x[39] - y[39]).square().sum()) / (num_classes or 4)

    close((value, gradients), value_and_gradient(formula, student, teacher))


def test_kl_direction_and_covariance():
    student, teacher = cases.features(30, 30, 4, seed=5)
    reverse = functools.partial(kd2m, metric="kl_gaussian", kl_direction="teacher_student")
    expected = value_and_gradient(lambda x, y: cases.gaussian_kl(y, x), student, teacher)
    close(value_and_gradient(reverse, student, teacher), expected)
    full = functools.partial(kd2m, metric="kl_gaussian", covariance="full", jitter=0.1)
    expected = value_and_gradient(functools.partial(cases.gaussian_kl_full, jitter=0.1), student, teacher)
    close(value_and_gradient(full, student, teacher), expected)


def test_released_kl_guards_its_divisors():
    student, teacher = cases.features(20, 20, 4, seed=5)
    teacher[:, 1] = 0.25
    released = kd2m(student, teacher, metric="kl_gaussian", variant="released")
    assert released > 1e15 or released.isinf()  # as that code: a dead feature of the teacher
    teacher[:, 1] += 1e-3 * torch.randn(20).double()
    expected = value_and_gradient(functools.partial(cases.gaussian_kl, guard=1e-9), student, teacher)
    loss = KD2M(metric="kl_gaussian", variant="released")
    close(value_and_gradient(loss, student, teacher), expected)


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("label_cost", ["euclidean", "sqeuclidean"])
def test_joint_with_labels(label_cost, beta):
    student, teacher = cases.features(9, 9, 4, seed=4)
    labels = many_labels(9, 3)
    one_hot = torch.eye(3, dtype=torch.float64)[labels]
    between = cases.squared_distances(one_hot, one_hot)
    between = between if label_cost == "sqeuclidean" else between.sqrt()
    expected = value_and_gradient(
        lambda x, y: cases.transport(cases.squared_distances(x, y) + beta * between), student, teacher
    )
    loss = KD2M(metric="jw2", label_cost=label_cost, beta=beta)
    close(value_and_gradient(lambda x, y: loss(x, y, labels), student, teacher), expected)
    if beta == 0:
        assert expected[0] == pytest.approx(kd2m(student, teacher).item(), rel=1e-12)


@pytest.mark.parametrize("targets", ["outputs", "labels"])
@pytest.mark.parametrize("label_cost", ["euclidean", "sqeuclidean", "cross_entropy", "kl"])
def test_joint_with_outputs(label_cost, targets):
    student, teacher = cases.features(8, 8, 4, seed=6)
    outputs, teacher_outputs = (3 * torch.randn(8, 3, dtype=torch.float64) for _ in range(2))
    labels = many_labels(8, 3)
    q = torch.softmax(teacher_outputs, -1) if targets == "outputs" else torch.eye(3, dtype=torch.float64)[labels]
    if label_cost == "kl" and targets == "labels":
        with pytest.raises(ValueError, match="teacher_outputs"):
            kd2m(student, teacher, labels, metric="jw2", label_cost="kl", student_outputs=outputs)
        return

    def formula(x, y, z):
        p = torch.softmax(z, -1)
        label = {
            "euclidean": lambda: cases.squared_distances(p, q).sqrt(),
            "sqeuclidean": lambda: cases.squared_distances(p, q),
            "cross_entropy": lambda: -(q[None] * p.log()[:, None]).sum(-1),
            "kl": lambda: (p[:, None] * (p[:, None] / q[None]).log()).sum(-1),
        }[label_cost]()
        return cases.transport(cases.squared_distances(x, y) + 2.0 * label)

    def actual(x, y, z):
        given = {"teacher_outputs": teacher_outputs} if targets == "outputs" else {"labels": labels}
        return kd2m(x, y, metric="jw2", beta=2.0, label_cost=label_cost, student_outputs=z, **given)

    close(value_and_gradient(actual, student, teacher, outputs), value_and_gradient(formula, student, teacher, outputs))


@pytest.mark.parametrize("label_cost", ["sqeuclidean", "kl"])
def test_joint_released(label_cost):
    student, teacher = cases.features(12, 12, 5, seed=7)
    outputs, teacher_outputs = (torch.randn(12, 4, dtype=torch.float64) for _ in range(2))
    loss = KD2M(metric="jw2", variant="released", label_cost=label_cost)

    def actual(z):
        return loss(student, teacher, student_outputs=z, teacher_outputs=teacher_outputs)

    expected = value_and_gradient(lambda z: cases.joint_released(student, z, teacher_outputs, label_cost), outputs)
    close(value_and_gradient(actual, outputs), expected)
    # no gradient for the features: an error, not a silent zero
    value = loss(student.clone().requires_grad_(), teacher)
    assert not value.requires_grad
    assert value == pytest.approx(0.0, abs=1e-12)  # each student is its own cheapest partner


@pytest.mark.parametrize("shape", ["small", "rectangular", "last batch"])
@pytest.mark.parametrize("gradient", ["detach", "unroll"])
def test_sinkhorn_of_all_rows(shape, gradient):
    pair = cases.features(*ACTUAL_SHAPES[shape], seed=8)
    labels = many_labels(ACTUAL_SHAPES[shape][0], 3)
    options = {"solver": "sinkhorn", "epsilon": 0.1, "num_iters": 50, "gradient": gradient}

    def formula(x, y, joint=0.0):
        cost = cases.squared_distances(x, y)
        if joint:
            cost = cost + joint * 2**0.5 * (labels[:, None] != labels).double()
        return cases.sinkhorn_detached(cost, 0.1, 50, gradient == "unroll")

    close(value_and_gradient(KD2M(**options), *pair), value_and_gradient(vectorised(formula), *pair))
    if shape != "rectangular":
        loss = functools.partial(kd2m, labels=labels, metric="jw2", beta=2.0, **options)
        close(value_and_gradient(loss, *pair), value_and_gradient(vectorised(formula_of(formula, 2.0)), *pair))


def formula_of(formula, joint):
    return lambda x, y: formula(x, y, joint)


@pytest.mark.parametrize("classes", [3, 12])
@pytest.mark.parametrize("gradient", ["detach", "unroll"])
def test_sinkhorn_by_class_is_one_problem_a_class(classes, gradient):
    student, teacher = cases.features(24, 24, 5, seed=9)
    teacher = teacher * torch.linspace(0.1, 5, 24, dtype=torch.float64)[:, None]
    labels = many_labels(24, classes)
    single = functools.partial(cases.sinkhorn_detached, epsilon=0.1, num_iters=50, unroll=gradient == "unroll")

    def formula(x, y):
        return torch.stack(cases.by_class(lambda p, q: single(cases.squared_distances(p, q)), x, y, labels)).mean()

    loss = KD2M(metric="cw2", solver="sinkhorn", epsilon=0.1, num_iters=50, gradient=gradient)
    actual = value_and_gradient(lambda x, y: loss(x, y, labels), student, teacher)
    close(actual, value_and_gradient(formula, student, teacher))


@pytest.mark.parametrize("metric", ["w2", "cw2", "jw2"])
def test_sinkhorn_tends_to_the_exact_transport(metric):
    student, teacher = cases.features(12, 12, 4, seed=10)
    labels = many_labels(12, 3)
    exact, (gradient, _) = value_and_gradient(lambda x, y: kd2m(x, y, labels, metric=metric), student, teacher)
    near = functools.partial(kd2m, labels=labels, metric=metric, solver="sinkhorn", epsilon=2e-3, num_iters=3000)
    value, (near_gradient, _) = value_and_gradient(near, student, teacher)
    torch.testing.assert_close(value, exact, rtol=2e-3, atol=0.0)
    assert (near_gradient - gradient).norm() < 0.05 * gradient.norm()


@pytest.mark.parametrize("metric", ["w2", "cw2", "jw2"])
@pytest.mark.parametrize("gradient", ["unroll", "last_step"])
def test_other_gradients_of_sinkhorn(metric, gradient):
    """Other vectors than that of the constant plan, for the same value."""
    student, teacher = cases.features(5, 5, 3, seed=11)
    labels = torch.tensor([0, 0, 1, 1, 1])
    loss = functools.partial(kd2m, labels=labels, metric=metric, solver="sinkhorn", epsilon=0.3, num_iters=5)
    value, (actual, _) = value_and_gradient(functools.partial(loss, gradient=gradient), student, teacher)
    _, (constant, _) = value_and_gradient(loss, student, teacher)
    torch.testing.assert_close(value, loss(student, teacher), rtol=1e-12, atol=0.0)
    assert (actual - constant).norm() > 1e-3 * constant.norm()


def test_identical_features():
    student, _ = cases.features(16, 16, 8)
    labels = many_labels(16, 4)
    for metric in ("w2", "cw2", "jw2", "w2_gaussian", "cw2_gaussian", "kl_gaussian", "mmd"):
        value, gradients = value_and_gradient(lambda x, m=metric: kd2m(x, student, labels, metric=m), student)
        assert abs(value) < 1e-14 and gradients[0].abs().max() < 1e-14, metric
    for kernel in ("linear", "rbf"):
        assert abs(kd2m(student, student, metric="mmd", kernel=kernel)) < 1e-14
    for options in ({"metric": "w2_gaussian"}, {"metric": "cw2_gaussian"}):
        assert abs(kd2m(student, student, labels, covariance="full", **options)) < 1e-12
    bias = kd2m(student, student, solver="sinkhorn")
    assert 0 < bias < 0.02 * torch.cdist(student, student).square().mean()


def test_constant_features_have_finite_gradients():
    student, teacher = torch.ones(6, 3), torch.zeros(6, 3)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    for options in (
        {"metric": "w2_gaussian"}, {"metric": "cw2_gaussian"}, {"metric": "mmd", "kernel": "rbf"},
        {"metric": "w2_gaussian", "covariance": "full"}, {"metric": "kl_gaussian", "jitter": 0.1},
    ):  # fmt: skip
        value, gradients = value_and_gradient(lambda x, o=options: kd2m(x, teacher, labels, **o), student)
        assert value.isfinite() and gradients[0].isfinite().all(), options
    same = kd2m(teacher, teacher, metric="mmd", kernel="rbf")
    assert same == 0

"""WCoRD against transcriptions of its parts: IPOT, local primal form, critic, memory bank, global dual form."""

import copy
import pickle

import numpy as np
import ot
import pytest
import torch
import torch.nn.functional as F

from otkd_fast.losses import WCoRD, ipot, wcord_global, wcord_local
from otkd_fast.losses._memory_bank import MemoryBank, SpectralLinear
from otkd_fast.testing import tolerance


def ipot_by_scalings(cost, a, b, beta=0.5, num_iters=20, inner=1):
    """The recurrence as it is printed, in the probability domain."""
    n, m = cost.shape
    sigma, plan = torch.ones(m, dtype=cost.dtype) / m, torch.ones(n, m, dtype=cost.dtype)
    kernel = torch.exp(-cost / beta)
    for _ in range(num_iters):
        q = kernel * plan
        for _ in range(inner):
            delta = a / (q @ sigma)
            sigma = b / (q.T @ delta)
        plan = delta[:, None] * q * sigma[None, :]
    return plan


def cosine_cost(x, y):
    return torch.stack([torch.stack([1 - (p @ q) / (p.norm() * q.norm()) for q in y]) for p in x])


def local_by_formula(x, y, solver, epsilon=0.1, beta=0.5, num_iters=50):
    cost = cosine_cost(x, y)
    n, m = cost.shape
    a, b = torch.full((n,), 1 / n, dtype=x.dtype), torch.full((m,), 1 / m, dtype=x.dtype)
    if solver == "ipot":
        plan = ipot_by_scalings(cost.detach(), a, b, beta, num_iters)
    else:
        kernel, v = torch.exp(-cost.detach() / epsilon), torch.ones(m, dtype=x.dtype)
        for _ in range(num_iters):
            u = a / (kernel @ v)
            v = b / (kernel.T @ u)
        plan = u[:, None] * kernel * v
    return (plan * cost).sum()


def value_and_gradients(loss, *tensors):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize(("beta", "num_iters", "inner"), [(0.5, 20, 1), (0.5, 50, 1), (1.0, 5, 3)])
def test_ipot_is_the_recurrence(beta, num_iters, inner):
    cost = torch.rand(7, 5, dtype=torch.float64)
    a, b = (torch.softmax(torch.randn(n, dtype=torch.float64), 0) for n in (7, 5))
    expected = ipot_by_scalings(cost, a, b, beta, num_iters, inner)
    actual = ipot(cost, a, b, beta=beta, num_iters=num_iters, inner_iters=inner)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(actual.sum(0), b)
    stacked = ipot(torch.stack([cost, cost]), a, b, beta=beta, num_iters=num_iters, inner_iters=inner)
    torch.testing.assert_close(stacked[1], expected, rtol=1e-10, atol=1e-14)


def test_ipot_tends_to_the_exact_plan():
    cost = torch.rand(8, 8, dtype=torch.float64)
    exact = ot.emd2(np.full(8, 1 / 8), np.full(8, 1 / 8), cost.numpy())
    assert (ipot(cost, num_iters=2000) * cost).sum().item() == pytest.approx(exact, rel=1e-3)
    assert (ipot(cost, num_iters=2) * cost).sum().item() > 1.01 * exact


def test_ipot_gradient_half_precision_and_zero_masses():
    cost = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: ipot(c, num_iters=3), cost)
    assert ipot(torch.rand(3, 4).half()).dtype == torch.float32
    a = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    plan = ipot(cost.detach(), a, num_iters=200)
    assert plan[1].abs().max() == 0 and plan.isfinite().all()
    torch.testing.assert_close(plan[[0, 2]], ipot(cost.detach()[[0, 2]], num_iters=200))


@pytest.mark.parametrize("solver", ["sinkhorn", "ipot"])
@pytest.mark.parametrize("shape", [(64, 64, 128), (5, 7, 4)])
def test_local_part(solver, shape):
    n, m, d = shape
    x, y = torch.randn(n, d).double(), torch.randn(m, d).double()
    expected = value_and_gradients(lambda p, q: local_by_formula(p, q, solver), x, y)
    actual = value_and_gradients(lambda p, q: wcord_local(p, q, solver=solver), x, y)
    single = value_and_gradients(lambda p, q: wcord_local(p, q, solver=solver), x.float(), y.float())
    rtol, atol = tolerance("sinkhorn", "gradient", torch.float32)
    for got, in32, wanted in zip(actual, single, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9 * wanted.abs().max().item())
        torch.testing.assert_close(in32.double(), wanted, rtol=rtol, atol=atol * wanted.abs().max().item())


@pytest.mark.parametrize("solver", ["sinkhorn", "ipot"])
def test_local_part_of_identical_embeddings(solver):
    x = torch.randn(16, 32, dtype=torch.float64)
    value = wcord_local(x, x, solver=solver)
    assert value < (2e-2 if solver == "sinkhorn" else 1e-12)  # the entropic bias


@pytest.mark.parametrize("solver", ["sinkhorn", "ipot"])
def test_local_part_with_a_mask(solver):
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True, False])
    expected = wcord_local(x[mask], y[mask], solver=solver)
    x[2], y[5] = float("nan"), float("inf")
    value, gradient = value_and_gradients(lambda p: wcord_local(p, y, mask, solver=solver), x)
    torch.testing.assert_close(value, expected)
    assert gradient[~mask].abs().max() == 0 and gradient[mask].isfinite().all()
    assert wcord_local(x, y, torch.zeros(6, dtype=torch.bool), solver=solver) == 0
    assert wcord_local(x[:0], y[:0], solver=solver) == 0


@pytest.mark.parametrize("gradient", [pytest.param("unroll", marks=pytest.mark.slow), "detach"])
@pytest.mark.parametrize("solver", ["sinkhorn", "ipot"])
def test_local_part_compiles_in_one_graph(solver, gradient):
    torch._dynamo.reset()
    x, y = torch.randn(6, 4), torch.randn(6, 4)

    def loss(p, q):
        return wcord_local(p, q, solver=solver, gradient=gradient, num_iters=5)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(value_and_gradients(compiled, x, y), value_and_gradients(loss, x, y), strict=True):
        torch.testing.assert_close(got, wanted)


def double_module(**options):
    torch.manual_seed(0)
    settings = {"num_samples": 50, "num_negatives": 9, "embedding_dim": 8, "hidden_dim": 16} | options
    return WCoRD(6, 10, **settings).double()


def batch(n=5):
    generator = torch.Generator().manual_seed(3)
    index = torch.randperm(50, generator=generator)[:n]
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (6, 10)), index


def score(module, x, y):
    """w . relu(A [x; y] + c) + bias with both weights divided by their largest singular value."""
    (w1, b1), (w2, b2) = ((layer.weight, layer.bias) for layer in (module.critic.joint, module.critic.score))
    sigma1, sigma2 = (torch.linalg.svdvals(w.detach())[0] for w in (w1, w2))
    return (w2 / sigma2 @ torch.relu(w1 / sigma1 @ torch.cat([x, y]) + b1) + b2)[0]


def converge(critic):
    for layer in (critic.joint, critic.score):
        for _ in range(500):
            layer._iterate()


@pytest.mark.parametrize("training", [False, True])
def test_global_part_with_memory_banks(training):
    """Pair by pair: embeddings, critic, both directions, draws of the same generator, and then the banks' update."""
    module = double_module(local_weight=0.0).train(training)
    (student, teacher), index = batch()
    banks = module.bank_student.entries.clone(), module.bank_teacher.entries.clone()
    converge(module.critic)
    torch.manual_seed(5)
    drawn_teachers, drawn_students = (torch.randint(50, (5 * 9,)).view(5, 9) for _ in range(2))

    def formula(student):
        x = [module.embed_student(row) for row in student]
        y = [module.embed_teacher(row) for row in teacher]
        x, y = ([e / e.norm() for e in side] for side in (x, y))
        positive = sum(score(module, x[i], y[i]) for i in range(5)) / 5
        from_teachers = [score(module, x[i], banks[1][j]) for i in range(5) for j in drawn_teachers[i]]
        from_students = [score(module, banks[0][j], y[i]) for i in range(5) for j in drawn_students[i]]
        return 0.8 * (sum(from_teachers + from_students) / 90 - positive)

    expected = value_and_gradients(formula, student)
    torch.manual_seed(5)
    actual = value_and_gradients(lambda s: module(s, teacher, index), student)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    for bank, before, layer, features in (
        (module.bank_student, banks[0], module.embed_student, student),
        (module.bank_teacher, banks[1], module.embed_teacher, teacher),
    ):
        after = before.clone()
        if training:
            for i, row in zip(index, features, strict=True):
                e = layer(row) / layer(row).norm()
                moved = 0.5 * before[i] + 0.5 * e
                after[i] = (moved / moved.norm()).detach()
        torch.testing.assert_close(bank.entries, after)


def test_global_part_with_negatives_of_the_batch():
    module = double_module(num_samples=None, local_weight=0.0, negative_weight=2.0).eval()
    converge(module.critic)
    (student, teacher), _ = batch()
    x, y = F.normalize(module.embed_student(student), dim=-1), F.normalize(module.embed_teacher(teacher), dim=-1)
    positive = sum(score(module, x[i], y[i]) for i in range(5)) / 5
    negative = sum(score(module, x[i], y[j]) for i in range(5) for j in range(5) if i != j) / 20
    torch.testing.assert_close(module(student, teacher), 0.8 * (2 * negative - positive), rtol=1e-9, atol=1e-12)


def test_parts_add_up_by_their_weights():
    (student, teacher), index = batch()
    module = double_module().eval()
    x, y = F.normalize(module.embed_student(student), dim=-1), F.normalize(module.embed_teacher(teacher), dim=-1)
    torch.manual_seed(1)
    total = module(student, teacher, index)
    module.local_weight = 0.0
    torch.manual_seed(1)
    torch.testing.assert_close(total - module(student, teacher, index), 0.05 * wcord_local(x, y))
    local = double_module(global_weight=0.0, local_weight=1.0)
    assert local(student, teacher).isfinite()  # no index needed


def test_critic_is_1_lipschitz():
    module = WCoRD(6, 10, embedding_dim=8, hidden_dim=32).double().train()
    optimizer = torch.optim.SGD(module.critic.parameters(), lr=0.5)
    for _ in range(10):
        (student, teacher), _ = batch()
        optimizer.zero_grad()
        module(student, teacher).backward()
        optimizer.step()
    converge(module.critic)
    p, q = torch.randn(2, 500, 16, dtype=torch.float64)
    with torch.no_grad():
        slope = (module.critic(*p.chunk(2, -1)) - module.critic(*q.chunk(2, -1))).abs() / (p - q).norm(dim=-1)
    assert slope.max() <= 1 + 1e-6
    assert slope.max() > 0.05  # and not a constant
    for layer in (module.critic.joint, module.critic.score):
        assert torch.linalg.matrix_norm(layer.normalised_weight(), 2).item() == pytest.approx(1.0, abs=1e-6)


def test_training_separates_congruent_pairs():
    """The dual value rises: teacher and student features of a sample depend on each other, those of others do not."""
    torch.manual_seed(0)
    data = torch.randn(64, 6)
    network = torch.nn.Linear(6, 6)
    module = WCoRD(6, 6, num_samples=64, embedding_dim=16, num_negatives=64, local_weight=0.0)
    optimizer = torch.optim.Adam([*network.parameters(), *module.parameters()], lr=1e-2)
    values = []
    for _ in range(40):
        loss = module(network(data), data, torch.arange(64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert np.mean(values[-5:]) < np.mean(values[:5]) - 0.05


def test_bank_keeps_unit_length_and_survives_state_dict_pickle_and_copy():
    module = double_module()
    (student, teacher), index = batch()
    module(student, teacher, index)
    torch.testing.assert_close(module.bank_student.entries[index].norm(dim=1), torch.ones(5).double())
    names = {name for name, _ in module.named_buffers()}
    assert names == {
        "bank_student.entries", "bank_teacher.entries", "critic.joint.left", "critic.joint.right",
        "critic.score.left", "critic.score.right",
    }  # fmt: skip
    module.eval()
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        torch.manual_seed(2)
        expected = module(student, teacher, index)
        torch.manual_seed(2)
        assert torch.equal(twin(student, teacher, index), expected)
    fresh = double_module()
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh.bank_teacher.entries, module.bank_teacher.entries)
    assert "negative_weight=1.0" in repr(module)


def test_gradients_reach_student_and_embeddings_but_not_the_teacher():
    module = double_module()
    (student, teacher), index = batch()
    student.requires_grad_(), teacher.requires_grad_()
    module(student, teacher, index).backward()
    assert student.grad.abs().max() > 0 and teacher.grad is None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_two_steps_before_one_backward():
    """The power iteration's buffers change in place between the two forward passes."""
    module = double_module()
    (student, teacher), index = batch()
    (module(student, teacher, index) + module(student, teacher, index)).backward()
    assert module.critic.joint.weight.grad.isfinite().all()


def test_half_precision_and_autocast():
    module = WCoRD(6, 10, num_samples=50, num_negatives=9).eval()
    (student, teacher), index = batch()
    student, teacher = student.bfloat16().requires_grad_(), teacher.bfloat16()
    torch.manual_seed(4)
    expected = module(student.float(), teacher.float(), index)
    torch.manual_seed(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = module(student, teacher, index)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    value.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True])
def test_compiles_in_one_graph(training):
    torch._dynamo.reset()
    module = double_module(num_samples=None).train(training)
    twin = copy.deepcopy(module)
    (student, teacher), _ = batch()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected = value_and_gradients(lambda s: twin(s, teacher), student)
    for got, wanted in zip(value_and_gradients(lambda s: compiled(s, teacher), student), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_rows_left_out_enter_no_bank():
    """Whatever index they have; and with no row left the banks stay as they were, without a division by 0."""
    for training in (True, False):
        module = double_module().train(training)
        twin = copy.deepcopy(module)
        (student, teacher), index = batch()
        mask = torch.tensor([False, True, False, True, True])
        wrong = torch.where(mask, index, torch.tensor([999, 0, int(index[3]), 0, 0]))
        student[0], teacher[2] = float("nan"), float("inf")
        leaf = student.clone().requires_grad_()
        value = module(leaf, teacher, wrong, mask)
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all() and not leaf.grad[~mask].any()
        twin(student[mask], teacher[mask], index[mask])
        for name in ("bank_student", "bank_teacher"):
            assert torch.equal(getattr(module, name).entries, getattr(twin, name).entries)
        before = module.bank_student.entries.clone()
        assert module(student, teacher, wrong, mask & False) == 0
        assert torch.equal(module.bank_student.entries, before)
    with pytest.raises(ValueError, match=r"index.*\[0, 50\)"):
        module(student, teacher, wrong, ~mask)


def test_only_row_that_counts():
    """It has no negatives in the batch: an error where the mask can be read, else NaN, not a loss of nothing."""
    module = double_module(num_samples=None, local_weight=0.0).eval()
    (student, teacher), _ = batch()
    mask = torch.arange(5) == 2
    with pytest.raises(ValueError, match="at least two rows"):
        module(student, teacher, mask=mask)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert compiled(student, teacher, mask=mask).isnan()


def test_global_part_row_by_row():
    """Reduction "none": the row's own pairs; with a mask, negatives are the other rows that count."""
    module = double_module(num_samples=None, local_weight=0.0, negative_weight=2.0, reduction="none").eval()
    converge(module.critic)
    (student, teacher), _ = batch()
    x, y = F.normalize(module.embed_student(student), dim=-1), F.normalize(module.embed_teacher(teacher), dim=-1)
    for kept in ([0, 1, 2, 3, 4], [0, 2, 3]):
        mask = torch.zeros(5, dtype=torch.bool).index_fill(0, torch.tensor(kept), True)
        expected = torch.zeros(5, dtype=torch.float64)
        for i in kept:
            negative = sum(score(module, x[i], y[j]) for j in kept if j != i) / (len(kept) - 1)
            expected[i] = 0.8 * (2 * negative - score(module, x[i], y[i]))
        torch.testing.assert_close(module(student, teacher, mask=mask), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", ["sinkhorn", "ipot"])
@pytest.mark.parametrize("gradient", ["detach", "unroll"])
def test_local_part_row_by_row(solver, gradient):
    x, y = torch.randn(5, 4).double(), torch.randn(7, 4).double()
    options = {"solver": solver, "gradient": gradient, "num_iters": 20}
    rows = wcord_local(x, y, reduction="none", **options)
    cost = cosine_cost(x, y)
    if solver == "ipot":
        plan = ipot_by_scalings(cost, *(torch.full((n,), 1 / n, dtype=x.dtype) for n in (5, 7)), num_iters=20)
    else:
        kernel, v = torch.exp(-cost / 0.1), torch.ones(7, dtype=x.dtype)
        for _ in range(20):
            u = (1 / 5) / (kernel @ v)
            v = (1 / 7) / (kernel.T @ u)
        plan = u[:, None] * kernel * v
    torch.testing.assert_close(rows, 5 * (plan * cost).sum(1), rtol=1e-9, atol=0.0)
    got = value_and_gradients(lambda p, q: wcord_local(p, q, reduction="none", **options).mean(), x, y)
    wanted = value_and_gradients(lambda p, q: wcord_local(p, q, **options), x, y)
    for actual, expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-14)


def test_own_critic():
    class Dot(torch.nn.Module):
        def forward(self, x, y):
            return (x * y).sum(-1)

    module = double_module(critic=Dot(), num_samples=None, local_weight=0.0, global_weight=1.0)
    (student, teacher), _ = batch()
    x, y = F.normalize(module.embed_student(student), dim=-1), F.normalize(module.embed_teacher(teacher), dim=-1)
    dots = x @ y.T
    negative = (dots.sum() - dots.trace()) / 20
    torch.testing.assert_close(module(student, teacher), negative - dots.trace() / 5)


def test_wcord_global():
    positive, negative = torch.randn(5), torch.randn(5, 7)
    value = wcord_global(positive, negative, negative_weight=3.0)
    torch.testing.assert_close(value, 3 * negative.mean() - positive.mean())
    any_shape = wcord_global(positive, negative.flatten(), negative_weight=3.0)
    torch.testing.assert_close(any_shape, value)
    rows = 3 * negative.mean(1) - positive
    mask = torch.tensor([True, False, True, True, False])
    negative[1] = float("nan")
    options = {"mask": mask, "negative_weight": 3.0}
    expected = torch.where(mask, rows, 0)
    torch.testing.assert_close(wcord_global(positive, negative, reduction="none", **options), expected)
    for reduction, divisor in (("mean", 3), ("sum", 1), ("batchmean", 5)):
        value = wcord_global(positive, negative, reduction=reduction, **options)
        torch.testing.assert_close(value, rows[mask].sum() / divisor)
    torch.testing.assert_close(wcord_global(positive, negative, mask, 12, negative_weight=3.0), rows[mask].sum() / 12)
    assert wcord_global(positive.half(), negative.half(), mask).dtype == torch.float32
    for given in ({"reduction": "none"}, {"mask": mask}, {"num_items_in_batch": 3}):
        with pytest.raises(ValueError, match=r"negative: expected shape \(\*\(5,\), K\)"):
            wcord_global(positive, negative.flatten(), **given)
    with pytest.raises(TypeError, match="positive"):
        wcord_global([1.0], negative)
    with pytest.raises(ValueError, match="negative: expected at least one"):
        wcord_global(positive, negative[:, :0])


def test_no_rows():
    module = double_module()
    value = module(torch.zeros(0, 6), torch.zeros(0, 10), torch.zeros(0, dtype=torch.long))
    assert value == 0 and value.requires_grad


(S, T), INDEX = batch()
WRONG_INPUTS = {
    "no tensor": (([1], T, INDEX), TypeError, "student_features"),
    "width": ((T, T, INDEX), ValueError, r"student_features.*\(n, 6\)"),
    "rank": ((S[None], T, INDEX), ValueError, "student_features"),
    "teacher width": ((S, S, INDEX), ValueError, "teacher_features"),
    "rows": ((S, T[:3], INDEX), ValueError, "teacher_features"),
    "no index": ((S, T), ValueError, "index"),
    "int32 index": ((S, T, INDEX.int()), TypeError, "index"),
    "short index": ((S, T, INDEX[:3]), ValueError, "index"),
    "index out of range": ((S, T, INDEX + 50), ValueError, r"index.*\[0, 50\)"),
    "negative index": ((S, T, INDEX - 50), ValueError, "index"),
}
WRONG_OPTIONS = {
    "student_dim": ({"student_dim": 0}, ValueError, "student_dim"),
    "momentum": ({"momentum": 1.5}, ValueError, "momentum"),
    "weight": ({"global_weight": -1.0}, ValueError, "global_weight"),
    "solver": ({"solver": "emd"}, ValueError, "solver"),
    "gradient": ({"solver": "ipot", "gradient": "implicit"}, ValueError, "gradient"),
    "critic": ({"critic": lambda x, y: x}, TypeError, "critic"),
    "negatives": ({"num_negatives": 0}, ValueError, "num_negatives"),
    "samples": ({"num_samples": 2.5}, TypeError, "num_samples"),
}


@pytest.mark.parametrize("name", list(WRONG_INPUTS))
def test_wrong_inputs(name):
    arguments, error, message = WRONG_INPUTS[name]
    with pytest.raises(error, match=message):
        double_module()(*arguments)


@pytest.mark.parametrize("name", list(WRONG_OPTIONS))
def test_wrong_options(name):
    options, error, message = WRONG_OPTIONS[name]
    with pytest.raises(error, match=message):
        WCoRD(**{"student_dim": 6, "teacher_dim": 10, "num_samples": 5} | options)


def test_other_wrong_arguments():
    with pytest.raises(ValueError, match="at least two rows"):
        double_module(num_samples=None)(S[:1], T[:1])
    with pytest.raises(ValueError, match="teacher"):
        wcord_local(S, T)
    with pytest.raises(ValueError, match="rows with a mask"):
        wcord_local(S, S[:3], torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="a: expected shape"):
        ipot(torch.rand(3, 4), torch.ones(4) / 4)
    with pytest.raises(ValueError, match="beta"):
        ipot(torch.rand(3, 4), beta=0.0)
    with pytest.raises(ValueError, match="at least one row"):
        ipot(torch.rand(0, 4))


def test_parts():
    bank = MemoryBank(10, 4, 0.5)
    assert bank.draw(3, 5).shape == (3, 5, 4) and bank.entries.abs().max() <= (3 / 4) ** 0.5
    layer = SpectralLinear(4, 3).eval()
    assert torch.linalg.matrix_norm(layer.normalised_weight(), 2).item() == pytest.approx(1.0, abs=1e-3)

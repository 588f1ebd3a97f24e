"""Universal logit distillation and multi-level OT against their published code's formulas."""

import pickle

import pytest
import torch
from sinkd_cases import BACKENDS, algorithm_1, value_and_gradient

import otkd_fast
from otkd_fast.losses import MultiLevelOT, UniversalLogitDistillation, multi_level_ot, universal_logit_distillation

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def tokens(batch=3, length=5, student=12, teacher=17, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        2 * torch.randn(batch, length, size, generator=generator, dtype=torch.float64).to(dtype)
        for size in (student, teacher)
    )


def uld_rows(student, teacher, temperature=1.0, teacher_temperature=1.0):
    """A token at a time: sorted, filled up with zeros, L1."""
    values = []
    for s, t in zip(student.flatten(0, -2), teacher.flatten(0, -2), strict=True):
        p = torch.softmax(s / temperature, 0).sort(descending=True).values
        q = torch.softmax(t / teacher_temperature, 0).sort(descending=True).values
        size = max(len(p), len(q))
        p, q = (torch.nn.functional.pad(x, (0, size - len(x))) for x in (p, q))
        values.append((p - q).abs().sum())
    return torch.stack(values)


@pytest.mark.parametrize("sizes", [(12, 17), (17, 12), (9, 9)])
def test_uld_equals_the_formula(sizes):
    student, teacher = tokens(student=sizes[0], teacher=sizes[1])
    loss = UniversalLogitDistillation(temperature=1.5, teacher_temperature=2.0)
    value, gradient = value_and_gradient(loss, student, teacher)
    formula = value_and_gradient(lambda s: uld_rows(s, teacher, 1.5, 2.0).mean(), student)
    torch.testing.assert_close((value, gradient), formula, rtol=1e-9, atol=1e-15)
    single = loss(student.float(), teacher.float())
    torch.testing.assert_close(single.double(), formula[0], rtol=1e-5, atol=0.0)


def test_uld_is_a_wasserstein_distance():
    student, teacher = tokens(student=9, teacher=9)
    p, q = torch.softmax(student, -1), torch.softmax(teacher, -1)
    value = universal_logit_distillation(student, teacher, reduction="none")
    torch.testing.assert_close(value, 9 * otkd_fast.wasserstein_1d(p, q))


def test_uld_of_the_largest_probabilities_only():
    student, teacher = tokens()
    p, q = (torch.softmax(x, -1).sort(-1, descending=True).values[..., :4] for x in (student, teacher))
    value = universal_logit_distillation(student, teacher, top_k=4)
    torch.testing.assert_close(value, (p - q).abs().sum(-1).mean())
    assert torch.equal(
        universal_logit_distillation(student, teacher, top_k=99), universal_logit_distillation(student, teacher)
    )


def test_uld_of_a_permuted_vocabulary_is_zero():
    student, _ = tokens()
    assert universal_logit_distillation(student, student[..., torch.randperm(12)]).item() < 1e-15
    value, gradient = value_and_gradient(UniversalLogitDistillation(), student, student)
    assert value.item() == 0.0 and not gradient.any()


def multi_level_rows(student, teacher, lengths=None, top_k=50, kl_weight=0.1, sequence_weight=0.1):
    """The released loss, an answer at a time; with `lengths`, of answers cut to them."""
    batch, length, _ = student.shape
    lengths = lengths or [length] * batch

    def probabilities(logits):
        scaled = logits / (logits.std(-1, keepdim=True) + 1e-4)
        answers = [torch.softmax(row[:n], -1) for row, n in zip(scaled, lengths, strict=True)]
        sums = torch.cat(answers).sum(0)
        order = sums.argsort(descending=True)[:top_k]
        return [torch.nn.functional.pad(x[:, order], (0, max(0, size - len(order)))) for x in answers]

    size = max(min(top_k, x.shape[-1]) for x in (student, teacher))
    s, t = probabilities(student), probabilities(teacher)
    token = sum((x - y).abs().sum(-1).mean() for x, y in zip(s, t, strict=True)) / batch
    kl = torch.cat([-(torch.softmax(x, -1) * torch.log_softmax(y, -1)).sum(-1) for x, y in zip(s, t, strict=True)])
    sequence = sum(
        0.001 * algorithm_1(torch.softmax(y / 2, -1), torch.softmax(x / 2, -1), 0.1, 10)
        for x, y in zip(s, t, strict=True)
    )
    return token + kl_weight * kl.mean() + sequence_weight * sequence


@every_backend
@pytest.mark.parametrize("top_k", [4, 14, 50])
def test_multi_level_ot_equals_the_formula(top_k, backend):
    student, teacher = tokens()
    value, gradient = value_and_gradient(MultiLevelOT(top_k=top_k, backend=backend), student, teacher)
    formula = value_and_gradient(lambda s: multi_level_rows(s, teacher, top_k=top_k), student)
    torch.testing.assert_close((value, gradient), formula, rtol=1e-9, atol=1e-13)
    only = {"kl_weight": 0.0, "sequence_weight": 30.0}
    value = multi_level_ot(student, teacher, top_k=top_k, backend=backend, **only)
    torch.testing.assert_close(value, multi_level_rows(student, teacher, top_k=top_k, **only), rtol=1e-9, atol=0.0)
    single, own = value_and_gradient(
        MultiLevelOT(top_k=top_k, backend=backend), student.float(), teacher.float()
    )  # fmt: skip
    torch.testing.assert_close(single.double(), formula[0], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(own.double(), formula[1], rtol=1e-3, atol=1e-4 * formula[1].abs().max().item())


@every_backend
def test_multi_level_ot_of_answers_of_different_lengths(backend):
    student, teacher = tokens()
    lengths = [5, 2, 3]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    student[~mask], teacher[1, 4] = float("nan"), float("inf")
    value, gradient = value_and_gradient(MultiLevelOT(backend=backend), student, teacher, mask)
    clean = torch.where(mask.unsqueeze(-1), student, 0), torch.where(mask.unsqueeze(-1), teacher, 0)
    formula = value_and_gradient(lambda s: multi_level_rows(s, clean[1], lengths), clean[0])
    torch.testing.assert_close(value, formula[0], rtol=1e-9, atol=0.0)
    torch.testing.assert_close(gradient[mask], formula[1][mask], rtol=1e-9, atol=1e-13)
    assert not gradient[~mask].any()
    mask[1] = False  # an answer without tokens is as if it were not there
    others = MultiLevelOT(backend=backend)(student[[0, 2]], teacher[[0, 2]], mask[[0, 2]])
    value, gradient = value_and_gradient(MultiLevelOT(backend=backend), student, teacher, mask)
    torch.testing.assert_close(value, others, rtol=1e-9, atol=0.0)
    assert gradient.isfinite().all()
    value, gradient = value_and_gradient(MultiLevelOT(backend=backend), student, teacher, mask & False)
    assert value.item() == 0.0 and not gradient.any()
    assert MultiLevelOT(backend=backend)(student[:0], teacher[:0]).item() == 0.0


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_multi_level_ot_in_half_precision_and_compiled(dtype, backend):
    student, teacher = tokens(dtype=dtype)
    loss = MultiLevelOT(backend=backend)
    value, gradient = value_and_gradient(loss, student, teacher)
    expected, expected_gradient = value_and_gradient(loss, student.float(), teacher.float())
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(value, expected) and torch.equal(gradient, expected_gradient.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(loss(student, teacher), expected)
    constant, gradient = value_and_gradient(loss, torch.ones_like(student), teacher)
    assert constant.isfinite() and gradient.isfinite().all()
    if dtype == torch.bfloat16:
        torch._dynamo.reset()
        mask = torch.ones(3, 5, dtype=torch.bool)
        compiled = torch.compile(pickle.loads(pickle.dumps(loss)), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(student, teacher, mask), expected)


S, T = tokens()
WRONG = {
    "student no tensor": ((None, T), {}, TypeError, "student_logits"),
    "integer teacher": ((S, T.long()), {}, TypeError, "teacher_logits"),
    "other lengths": ((S, T[:, :4]), {}, ValueError, "teacher_logits"),
    "elsewhere": ((S, T.to("meta")), {}, ValueError, "teacher_logits"),
    "no vocabulary": ((S[..., :0], T), {}, ValueError, "student_logits"),
    "mask": ((S, T, torch.ones(3, 4, dtype=torch.bool)), {}, ValueError, "mask"),
    "top_k": ((S, T), {"top_k": 0}, ValueError, "top_k"),
    "temperature": ((S, T), {"temperature": -1.0}, ValueError, "temperature"),
}
WRONG_ULD = {
    "teacher_temperature": ((S, T), {"teacher_temperature": 0.0}, ValueError, "teacher_temperature"),
    "reduction": ((S, T), {"reduction": "max"}, ValueError, "reduction"),
}
WRONG_MULTI_LEVEL = {
    "rank 2": ((S[0], T[0]), {}, ValueError, "student_logits"),
    "rank 4": ((S[None], T[None]), {}, ValueError, "student_logits"),
    "one logit": ((S[..., :1], T), {}, ValueError, "student_logits"),
    "kl_weight": ((S, T), {"kl_weight": -1.0}, ValueError, "kl_weight"),
    "sequence_weight": ((S, T), {"sequence_weight": "1"}, TypeError, "sequence_weight"),
    "epsilon": ((S, T), {"epsilon": 0.0}, ValueError, "epsilon"),
    "num_iters": ((S, T), {"num_iters": 0}, ValueError, "num_iters"),
    "backend": ((S, T), {"backend": "tpu"}, ValueError, "backend"),
}


@pytest.mark.parametrize("case", list(WRONG | WRONG_ULD))
def test_wrong_input_of_uld(case):
    arguments, options, error, message = (WRONG | WRONG_ULD)[case]
    with pytest.raises(error, match=message):
        universal_logit_distillation(*arguments, **options)
    with pytest.raises(error, match=message):
        UniversalLogitDistillation(**options)(*arguments)


@pytest.mark.parametrize("case", list(WRONG | WRONG_MULTI_LEVEL))
def test_wrong_input_of_multi_level_ot(case):
    arguments, options, error, message = (WRONG | WRONG_MULTI_LEVEL)[case]
    with pytest.raises(error, match=message):
        multi_level_ot(*arguments, **options)
    with pytest.raises(error, match=message):
        MultiLevelOT(**options)(*arguments)

"""The integrations inside stand-ins of their frameworks, against the losses called by hand."""

import copy
from types import SimpleNamespace

import pytest
import stand_ins
import torch
from torch.nn import functional as F

from otkd_fast.integrations.huggingface import DistillationMixin, gkd_loss
from otkd_fast.integrations.lightning import DistillationStep
from otkd_fast.integrations.mdistiller import TransportDistiller
from otkd_fast.losses import KD2M, SinKD, UniversalLogitDistillation, WKDFeature, WKDLogit


class DistillationTrainer(DistillationMixin, stand_ins.Trainer):
    pass


class TransportGKDTrainer(stand_ins.GKDTrainer):
    generalized_jsd_loss = staticmethod(gkd_loss(SinKD(reduction="mean")))


def tokens(rows=4, length=6, vocabulary=7):
    ids = torch.randint(vocabulary, (rows, length))
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, 4:] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def trainer(student, loss, num_processes=1, average=False, **options):
    args = SimpleNamespace(
        device=torch.device("cpu"), num_processes=num_processes, average_tokens_across_devices=average
    )
    return DistillationTrainer(
        model=student, args=args, teacher_model=stand_ins.LanguageModel(seed=1), distillation_loss=loss, **options
    )


def test_trainer_computes_the_sum_of_both_terms():
    student, batch = stand_ins.LanguageModel(), tokens()
    loss = SinKD(reduction="mean")
    train = trainer(student, loss, distillation_weight=0.8, hard_weight=0.2)
    value, outputs = train.compute_loss(student, batch, return_outputs=True)
    kept = batch["labels"][:, 1:] != -100
    s, t = (m(batch["input_ids"]).logits[:, :-1][kept] for m in (student, train.teacher_model))
    expected = 0.2 * F.cross_entropy(s, batch["labels"][:, 1:][kept]) + 0.8 * loss(s, t)
    torch.testing.assert_close(value, expected)
    assert outputs.logits.shape == (4, 6, 7)
    value.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in train.teacher_model.parameters())


@pytest.mark.parametrize("count_items", [True, False])
def test_trainer_with_gradient_accumulation(count_items):
    """A loss that is a mean over tokens has the same gradient in parts of different numbers of tokens as at once."""
    loss, batch = UniversalLogitDistillation(), tokens()
    student = stand_ins.LanguageModel()
    whole = trainer(copy.deepcopy(student), loss).train_on([batch], count_items)
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    accumulated = trainer(copy.deepcopy(student), loss).train_on(parts, count_items)
    same = all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(accumulated, whole, strict=True))
    assert same == count_items  # without the count the mean of means is another number


def test_trainer_accumulates_a_distance_of_batches_by_shares():
    """A loss that is no sum over rows says so, or its parts are averaged by their tokens."""
    loss, batch = KD2M(metric="mmd"), tokens()
    student = stand_ins.LanguageModel()
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    with pytest.raises(ValueError, match="num_items_in_batch.*do not add up"):
        trainer(student, loss).train_on(parts)
    train = trainer(copy.deepcopy(student), loss, divides_by_items=False, hard_weight=0.0)
    expected = 0.0
    for part in parts:
        kept = part["labels"][:, 1:] != -100
        s, t = (m(part["input_ids"]).logits[:, :-1][kept] for m in (student, train.teacher_model))
        expected = expected + loss(s, t) * len(s) / (batch["labels"][:, 1:] != -100).sum()
    wanted = torch.autograd.grad(expected, list(student.parameters()))
    for actual, gradient in zip(train.train_on(parts), wanted, strict=True):
        torch.testing.assert_close(actual, gradient)


def test_trainer_on_several_devices_and_without_shift():
    student, batch = stand_ins.LanguageModel(), tokens()
    items = (batch["labels"][:, 1:] != -100).sum()
    values = [
        trainer(student, SinKD(reduction="mean"), num_processes=4, average=average).compute_loss(
            student, batch, num_items_in_batch=items
        )
        for average in (True, False)
    ]
    torch.testing.assert_close(values[0], 4 * values[1])
    train = trainer(student, SinKD(reduction="mean"), shift_labels=False, hard_weight=0.0)
    kept = batch["labels"] != -100
    s, t = (m(batch["input_ids"]).logits[kept] for m in (student, train.teacher_model))
    torch.testing.assert_close(train.compute_loss(student, batch), SinKD(reduction="mean")(s, t))
    batch_wise = trainer(student, KD2M(metric="mmd"), divides_by_items=False)  # it has no divisor
    assert batch_wise.compute_loss(student, batch, num_items_in_batch=items).isfinite()


def test_trainer_with_a_teacher_of_a_longer_vocabulary():
    student, batch = stand_ins.LanguageModel(), tokens()
    train = trainer(student, SinKD(reduction="mean"))
    train.teacher_model = stand_ins.LanguageModel(vocabulary=9, seed=1)
    assert train.compute_loss(student, batch).isfinite()


def test_gkd_trainer():
    student, teacher, batch = stand_ins.LanguageModel(), stand_ins.LanguageModel(seed=1), tokens()
    value = TransportGKDTrainer().compute(student, teacher, batch)
    kept = batch["labels"][:, 1:] != -100
    s, t = (m(batch["input_ids"]).logits[:, :-1][kept] for m in (student, teacher))
    torch.testing.assert_close(value, SinKD(reduction="mean")(s, t))
    function = gkd_loss(UniversalLogitDistillation())
    logits = student(batch["input_ids"]).logits, teacher(batch["input_ids"]).logits
    torch.testing.assert_close(function(*logits), UniversalLogitDistillation()(*logits))
    half = function(*logits, batch["labels"], num_items_in_batch=2 * (batch["labels"] != -100).sum())
    torch.testing.assert_close(2 * half, function(*logits, batch["labels"]))


def test_lightning_step():
    class Distillation(DistillationStep, stand_ins.LightningModule):
        def __init__(self, student, teacher):
            super().__init__()
            self.set_up_distillation(student, teacher, WKDLogit(cost=1 - torch.eye(4)), distillation_weight=0.5)

    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    module = Distillation(student, teacher)
    x, y = torch.randn(6, 3), torch.randint(4, (6,))
    total = module.training_step((x, y), 0)
    expected = F.cross_entropy(student(x), y) + 0.5 * WKDLogit(cost=1 - torch.eye(4))(student(x), teacher(x), y)
    torch.testing.assert_close(total, expected)
    assert set(module.logged) == {"train/cross_entropy", "train/distillation"}
    assert module.trained_parameters() == [*student.parameters()]
    assert not any("teacher" in name for name in module.state_dict())


def images(n=6):
    return torch.randn(n, 3, 8, 8), torch.randint(4, (n,))


def test_mdistiller_distiller():
    student, teacher = stand_ins.ImageModel(5), stand_ins.ImageModel(8, seed=1)
    projector = torch.nn.Conv2d(5, 8, 1)
    wkd, feature = WKDLogit(cost=1 - torch.eye(4), gamma=20.0), WKDFeature()
    distiller = TransportDistiller(
        student, teacher, logit_loss=wkd, feature_loss=feature, projector=projector,
        logit_weight=lambda epoch: 1.0 if epoch < 5 else 0.0, feature_weight=0.1,
    )  # fmt: skip
    assert distiller.training and not teacher.training
    image, target = images()
    logits, losses = distiller(image=image, target=target, epoch=1)
    s, t = student(image), teacher(image)
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(s[0], target))
    torch.testing.assert_close(losses["loss_kd"], wkd(s[0], t[0], target))
    expected = 0.1 * feature(projector(s[1]["feats"][-1]), t[1]["feats"][-1])
    torch.testing.assert_close(losses["loss_feature"], expected)
    assert distiller(image=image, target=target, epoch=6)[1]["loss_kd"] == 0
    sum(losses.values()).backward()
    learnable = distiller.get_learnable_parameters()
    assert all(p.grad is not None for p in learnable)
    assert distiller.get_extra_parameters() == sum(p.numel() for p in projector.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    distiller.eval()
    assert distiller(image=image).shape == (6, 4)


def test_mdistiller_distiller_with_pooled_features():
    student, teacher = stand_ins.ImageModel(5), stand_ins.ImageModel(5, seed=1)
    loss = KD2M(metric="cw2")
    distiller = TransportDistiller(student, teacher, feature_loss=loss, hint_layer="pooled_feat")
    image, target = images()
    _, losses = distiller(image=image, target=target)
    expected = loss(student(image)[1]["pooled_feat"], teacher(image)[1]["pooled_feat"], target)
    torch.testing.assert_close(losses["loss_feature"], expected)
    assert set(losses) == {"loss_ce", "loss_feature"}

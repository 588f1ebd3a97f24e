"""What the integrations need of frameworks that are heavy to install: the calls that they make, and nothing else."""

from types import SimpleNamespace

import torch
from torch import nn


class LanguageModel(nn.Module):
    """Returns an object with `logits` (B, L, V), as transformers' models do."""

    def __init__(self, vocabulary=7, width=5, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


class Trainer:
    """transformers' Trainer: its training step with gradient accumulation, around compute_loss."""

    def __init__(self, model, args):
        self.model, self.args = model, args
        self.accelerator = SimpleNamespace(num_processes=args.num_processes)

    def train_on(self, batches, count_items=True):
        """Gradients of one optimizer step over the batches; the items are counted over all of them."""
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches) if count_items else None
        for batch in batches:
            loss = self.compute_loss(self.model, batch, num_items_in_batch=items)
            if items is None:
                loss = loss / len(batches)
            loss.backward()
        return [p.grad.clone() for p in self.model.parameters()]


class GKDTrainer:
    """TRL's: how compute_loss calls the static method."""

    @staticmethod
    def generalized_jsd_loss(
        student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, reduction="batchmean"
    ):
        raise NotImplementedError

    def compute(self, student, teacher, batch):
        shifted = student(batch["input_ids"]).logits[:, :-1, :], teacher(batch["input_ids"]).logits[:, :-1, :]
        return self.generalized_jsd_loss(
            student_logits=shifted[0], teacher_logits=shifted[1], labels=batch["labels"][:, 1:], beta=0.5
        )


class LightningModule(nn.Module):
    """The methods that a training step calls."""

    def __init__(self):
        super().__init__()
        self.logged = {}

    def log_dict(self, values):
        self.logged.update(values)


class ImageModel(nn.Module):
    """mdistiller's: (logits, {"feats": maps of the stages, "pooled_feat": features})."""

    def __init__(self, channels, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stages = nn.ModuleList([nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)])
        self.norm, self.fc = nn.BatchNorm2d(channels), nn.Linear(channels, 4)

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = torch.relu(stage(x))
            maps.append(x)
        pooled = self.norm(x).mean((-2, -1))
        return self.fc(pooled), {"feats": maps, "pooled_feat": pooled}

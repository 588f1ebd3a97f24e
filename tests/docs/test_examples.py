"""The Python of README and docs runs: blocks without a prompt here, those with one as doctests.

A page's blocks share their names, and may use those of a training step: what NAMES holds.
"""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    return [text for text in BLOCK.findall(page.read_text()) if ">>>" not in text]


def names():
    """What a training step has at hand: 16 rows of 100 classes, features and maps, weights, the other losses."""
    student_logits, teacher_logits = torch.randn(16, 100, requires_grad=True), torch.randn(16, 100)
    labels = torch.arange(16)
    return {
        "torch": torch, "student_logits": student_logits, "teacher_logits": teacher_logits, "labels": labels,
        "student_features": torch.randn(16, 32, requires_grad=True), "teacher_features": torch.randn(16, 32),
        "student_maps": torch.randn(16, 8, 4, 4, requires_grad=True), "teacher_maps": torch.randn(16, 8, 4, 4),
        "student": torch.nn.Linear(4, 100), "index": torch.arange(16),
        "cost": 1 - torch.eye(100), "alpha": 0.9, "beta": 0.8, "epoch": 3, "epochs": 240,
        "cross_entropy": F.cross_entropy(student_logits, labels), "kl": torch.tensor(0.5),
    }  # fmt: skip


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(1 - torch.eye(100), "cost.pt")
    namespace = names()
    for text in blocks(page):
        exec(compile(text, str(page), "exec"), namespace)
        if "loss" in namespace:
            assert torch.as_tensor(namespace["loss"]).isfinite().all()


def test_there_are_pages_with_blocks():
    assert sum(len(blocks(page)) for page in PAGES) >= 4

"""The recipes of examples/plain_pytorch.py: each trains, and its distillation term falls."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

import plain_pytorch  # noqa: E402


@pytest.mark.parametrize("name", plain_pytorch.LOSSES)
def test_distillation_term_falls(name):
    torch.set_num_threads(1)
    history, accuracy = plain_pytorch.distil(name, 30)
    first, last = sum(history[:5]) / 5, sum(history[-5:]) / 5
    assert last < first - 0.02 * abs(first)
    assert accuracy > 0.3  # chance: 1 / 6


def test_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plain_pytorch.py", "SinKD", "--steps", "2"])
    plain_pytorch.main()
    assert "SinKD" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["plain_pytorch.py", "CE"])
    with pytest.raises(SystemExit):
        plain_pytorch.main()

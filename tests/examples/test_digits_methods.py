"""Every method of the digits example lowers its own loss, on the example's networks and data."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

import digits_methods  # noqa: E402
from digits_data import Digits, batches, load  # noqa: E402

ROWS, EPOCHS = digits_methods.STUDENT_ROWS, 12


@pytest.fixture(scope="module")
def taught():
    """The data, and what a briefly trained teacher says of it, its features scaled as the example does."""
    data = load(0)
    teacher = digits_methods.train_teacher(data, 3, seed=0)
    with torch.no_grad():
        out = teacher(data.train_x)
    scale = out.maps.std()
    return data, digits_methods.Outputs(out.maps / scale, out.features / scale, out.logits)


@pytest.mark.parametrize("name", [name for name, method in digits_methods.METHODS.items() if method.weight])
def test_training_lowers_the_loss(taught, name):
    data, out = taught
    torch.manual_seed(0)
    few = Digits(data.train_x[:ROWS], data.train_y[:ROWS], data.test_x, data.test_y)
    student = digits_methods.Network(digits_methods.STUDENT_CHANNELS, project=digits_methods.TEACHER_CHANNELS[1])
    distil = digits_methods.METHODS[name].build(out.features[:ROWS], few.train_y)
    trained = [*student.parameters(), *getattr(distil, "parameters", ())]
    optimizer = torch.optim.Adam(trained, lr=5e-3)
    values = []
    for rows in batches(few, EPOCHS, seed=0):
        optimizer.zero_grad()
        teacher = digits_methods.Outputs(out.maps[rows], out.features[rows], out.logits[rows])
        step = digits_methods.Step(student(few.train_x[rows]), teacher, few.train_y[rows], rows, progress=0.5)
        loss = distil(step)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert all(torch.isfinite(torch.tensor(values)))
    assert sum(values[-4:]) / 4 < values[0] - 0.01 * abs(values[0]), values

"""The losses under torchdistill's own registry, and the error without torchdistill."""

import importlib
import sys

import pytest
import torch

from otkd_fast import losses
from otkd_fast.integrations.torchdistill import MidLevelLoss
from otkd_fast.losses import KD2M, WKL, SinKD, WKDFeature, WKDLogit, WKLFeature


@pytest.fixture
def registry():
    module = pytest.importorskip("torchdistill.losses.registry")
    importlib.import_module("torchdistill.losses")
    importlib.import_module("otkd_fast.integrations.torchdistill")
    return module


@pytest.fixture
def outputs():
    """What the hooks of both models store, and the labels."""
    student = {"fc": {"output": torch.randn(6, 4)}, "layer4": {"output": torch.randn(6, 5, 4, 4)}}
    teacher = {"fc": {"output": torch.randn(6, 4)}, "layer4": {"output": torch.randn(6, 5, 4, 4)}}
    return student, teacher, torch.randint(4, (6,))


def paths(layer):
    return {
        "student_module_path": layer, "student_module_io": "output", "teacher_module_path": layer,
        "teacher_module_io": "output",
    }  # fmt: skip


def test_low_level_with_torchdistills_wrapper(registry, outputs):
    wrapper = {
        "key": "SimpleLossWrapper",
        "kwargs": {
            "input": {"is_from_teacher": False, "module_path": "fc", "io": "output"},
            "target": {"is_from_teacher": True, "module_path": "fc", "io": "output"},
        },
    }
    config = {"key": "otkd_fast.SinKD", "kwargs": {"reduction": "mean"}}
    criterion = registry.get_mid_level_loss(config, wrapper)
    expected = SinKD(reduction="mean")(outputs[0]["fc"]["output"], outputs[1]["fc"]["output"])
    torch.testing.assert_close(criterion(*outputs), expected)


def test_mid_level(registry, outputs, tmp_path):
    student, teacher, labels = outputs
    cost = 1 - torch.eye(4)
    torch.save(cost, tmp_path / "cost.pt")
    cases = {
        "SinKD": ("fc", {}, lambda s, t: SinKD()(s, t)),
        "WKDLogit": ("fc", {"cost": str(tmp_path / "cost.pt")}, lambda s, t: WKDLogit(cost=cost)(s, t, labels)),
        "WKDFeature": ("layer4", {"grid": 2}, lambda s, t: WKDFeature(grid=2)(s, t)),
        "KD2M": ("fc", {"metric": "cw2"}, lambda s, t: KD2M(metric="cw2")(s, t, labels)),
    }
    for name, (layer, parameters, expected) in cases.items():
        config = {"key": f"otkd_fast.{name}.mid", "kwargs": {**paths(layer), **parameters}}
        criterion = registry.get_mid_level_loss(config)
        value = criterion(student, teacher, labels)
        torch.testing.assert_close(value, expected(student[layer]["output"], teacher[layer]["output"]))
        assert f"student={layer}.output" in repr(criterion)
    config = {"key": "otkd_fast.KD2M.mid", "kwargs": {**paths("layer4"), "flatten": True, "metric": "w2_gaussian"}}
    flat = [z["layer4"]["output"].flatten(1) for z in (student, teacher)]
    torch.testing.assert_close(
        registry.get_mid_level_loss(config)(student, teacher, labels), KD2M(metric="w2_gaussian")(*flat)
    )


def test_stages_of_the_training(registry, outputs):
    """WKL and WKLFeature are told the epoch by their own count of the steps: 3 epochs of 2 batches."""
    student, teacher, labels = outputs
    cost = 1 - torch.eye(4)
    stage = {"num_epochs": 3, "steps_per_epoch": 2}
    cases = {
        "WKL": ("fc", {"cost": cost, "gamma": 2.0}, lambda s, t, p: WKL(cost=cost, gamma=2.0)(s, t, labels, p)),
        "WKLFeature": ("layer4", {"grid": 2}, lambda s, t, p: WKLFeature(grid=2)(s, t, p)),
    }
    for name, (layer, parameters, expected) in cases.items():
        config = {"key": f"otkd_fast.{name}.mid", "kwargs": {**paths(layer), **stage, **parameters}}
        criterion = registry.get_mid_level_loss(config)
        pair = [z[layer]["output"] for z in (student, teacher)]
        for epoch in (1, 1, 2, 2, 3, 3, 3):
            torch.testing.assert_close(criterion(*outputs), expected(*pair, epoch / 3))
        later = registry.get_mid_level_loss({**config, "kwargs": {**config["kwargs"], "first_epoch": 2}})
        for mode in (False, True):
            torch.testing.assert_close(later.train(mode)(*outputs), expected(*pair, 2 / 3))
        assert later.steps == 1
        for wrong in ("num_epochs", "steps_per_epoch"):
            with pytest.raises(TypeError, match=wrong):
                registry.get_mid_level_loss({**config, "kwargs": {**config["kwargs"], wrong: None}})
    with pytest.raises(ValueError, match="for WKL and WKLFeature only"):
        MidLevelLoss("SinKD", "fc", "fc", num_epochs=3)


def test_every_loss_is_registered(registry):
    """All but WCoRD, whose parameters torchdistill would not train, and what is no loss of two tensors."""
    without = {"WCoRD", "WKLDiagnostics"}
    classes = {name for name in losses.__all__ if isinstance(getattr(losses, name), type)} - without
    for name in [*classes, "wcord_local"]:
        assert f"otkd_fast.{name}.mid" in registry.MIDDLE_LEVEL_LOSS_DICT
        assert (f"otkd_fast.{name}" in registry.LOW_LEVEL_LOSS_DICT) == (name not in ("WKDLogit", "WKL", "WKLFeature"))


def test_local_part_of_wcord(registry, outputs):
    config = {"key": "otkd_fast.wcord_local.mid", "kwargs": {**paths("fc"), "solver": "ipot"}}
    criterion = registry.get_mid_level_loss(config)
    pair = [z["fc"]["output"] for z in outputs[:2]]
    torch.testing.assert_close(criterion(*outputs), losses.wcord_local(*pair, solver="ipot"))
    assert "solver='ipot'" in repr(criterion)


def test_inside_a_weighted_sum(registry, outputs):
    config = {
        "key": "WeightedSumLoss",
        "kwargs": {
            "sub_terms": {
                "transport": {
                    "criterion": {"key": "otkd_fast.SinKD.mid", "kwargs": {**paths("fc"), "reduction": "mean"}},
                    "weight": 0.8,
                }
            }
        },
    }
    criterion = registry.get_high_level_loss(config)
    student, teacher, labels = outputs
    value = criterion({"student": student, "teacher": teacher}, {}, labels)
    torch.testing.assert_close(value, 0.8 * SinKD(reduction="mean")(student["fc"]["output"], teacher["fc"]["output"]))


def test_without_torchdistill(monkeypatch):
    """The module can be imported (as the tests of all docstrings do); registering says what is missing."""
    for name in [name for name in sys.modules if name.split(".")[0] == "torchdistill"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchdistill", None)
    monkeypatch.delitem(sys.modules, "otkd_fast.integrations.torchdistill", raising=False)
    module = importlib.import_module("otkd_fast.integrations.torchdistill")
    with pytest.raises(ImportError, match="pip install torchdistill"):
        module.register()

"""bench.gpu without a GPU: it refuses in a sentence, and on the CPU's backend its parts work."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench import gpu, gpu_cases, gpu_measure  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as error:
        gpu.main([])
    assert error.value.code == 2
    assert "no GPU that torch can use" in capsys.readouterr().err


def test_the_parts_that_run_on_a_cpu(tmp_path, monkeypatch):
    cases = tuple(c for c in gpu_cases.SMALL_CASES if c.name.startswith(("WKD-L", "Gaussian", "sqrtm")))
    monkeypatch.setattr(gpu, "SMALL_CASES", cases)
    options = ["--device", "cpu", "--small", "--parts", "graphs", "sanitizer", "speed", "--out", str(tmp_path)]
    assert gpu.main(options) == 0
    report = json.loads((tmp_path / "cpu-trial.json").read_text())
    assert "CUDA graphs need a GPU" in report["parts"]["graphs"]["skipped"]
    rows = report["parts"]["speed"]["cases"]
    assert [row["case"] for row in rows] == [case.name for case in cases]
    for row in rows:
        assert row["floor_ms"] > 0
        times = {name: v["forward_backward_ms"] for name, v in row["variants"].items() if "forward_ms" in v}
        assert "otkd_fast reference" in times and len(times) >= 2 and all(ms > 0 for ms in times.values())
    page = (tmp_path / "cpu-trial.md").read_text()
    assert all(f"## {case.name}" in page for case in cases)


def test_a_wrong_answer_gets_no_time(tmp_path, monkeypatch):
    case = next(c for c in gpu_cases.SMALL_CASES if c.name.startswith("WKD-L"))
    peers = {"wrong": lambda: lambda s, t: 1.01 * case.ours("reference")(s, t)}
    wrong = gpu_cases.Case(case.name, case.inputs, case.ours, case.work, peers)
    monkeypatch.setattr(gpu, "SMALL_CASES", (wrong,))
    assert gpu.main(["--device", "cpu", "--small", "--parts", "speed", "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "cpu-trial.json").read_text())
    row = report["parts"]["speed"]["cases"][0]["variants"]["wrong"]
    assert "value" in row["wrong"] and "forward_ms" not in row


def test_the_floor_is_the_largest_of_its_parts():
    rate = {"copy_bytes_per_s": 1e6, "multiply_adds_per_s": 1e6, "exponentials_per_s": 1e6, "launch_ms": 0.5}
    assert gpu_measure.floor_ms(gpu_cases.Work(1.0), rate) == 0.5
    assert gpu_measure.floor_ms(gpu_cases.Work(2e6, 1e6, 3e6), rate) == 3e3

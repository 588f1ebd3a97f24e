"""The demonstration runs, says what it found and what it left out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "distill_digits.py"


def demo(out, *arguments, block=()):
    """Runs the program with some packages made unimportable."""
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in block)
    code = f"import sys, runpy; {blocked}sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(SCRIPT), "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_quick_run_without_optional_packages(tmp_path):
    pytest.importorskip("sklearn")
    result = demo(tmp_path, "--quick", "--seeds", "2", block=("ot", "geomloss", "matplotlib"))
    assert result.returncode == 0, result.stderr
    report = (tmp_path / "report.md").read_text()
    assert report.strip() in result.stdout
    for heading in ("## Accuracy", "## Training step", "## Microbenchmark", "Quick run"):
        assert heading in report
    for missing in ("SinKD through POT", "the plot", "geomloss SamplesLoss at 64x100"):
        assert missing in report.split("Left out", 1)[1]
    numbers = json.loads((tmp_path / "results.json").read_text())
    assert set(numbers["accuracy"]) == {"teacher", "cross-entropy", "KL", "SinKD"}
    assert all(len(values) == 2 and all(5.0 < v <= 100.0 for v in values) for values in numbers["accuracy"].values())
    assert {"SinKD, otkd_fast", "SinKD, released PyTorch loop"} <= set(numbers["step_ms"])
    assert not (tmp_path / "distill_digits.png").exists()


def test_plot(tmp_path):
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    result = demo(tmp_path, "--quick", "--seeds", "1", block=("ot", "geomloss"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "distill_digits.png").read_bytes().startswith(b"\x89PNG")
    assert "![" in (tmp_path / "report.md").read_text()


def test_seeds_must_be_positive(tmp_path):
    pytest.importorskip("sklearn")
    result = demo(tmp_path, "--seeds", "0")
    assert result.returncode == 2 and "--seeds" in result.stderr


def test_every_method(tmp_path):
    pytest.importorskip("sklearn")
    result = demo(tmp_path, "--method", "all", "--quick", "--seeds", "1", block=("matplotlib",))
    assert result.returncode == 0, result.stderr
    methods = json.loads((tmp_path / "digits_methods.json").read_text())["methods"]
    published = {"SinKD", "WKD-L", "WKD-F", "WKD-F full", "WKL", "KD2M W2", "KD2M CW2", "KD2M W2 Gaussian", "WCoRD"}
    assert published | {"teacher", "cross-entropy", "KL"} <= set(methods)
    assert all(5.0 < row["accuracy"][0] <= 100.0 for row in methods.values())
    report = (tmp_path / "digits_methods.md").read_text()
    assert all(f"| {name} |" in report for name in published) and "Left out: the plot" in report


def test_unknown_method_names_those_that_are_there(tmp_path):
    pytest.importorskip("sklearn")
    result = demo(tmp_path, "--method", "magic")
    assert result.returncode == 1
    assert "--method: expected 'all' or some of" in result.stderr and "'WKD-L'" in result.stderr

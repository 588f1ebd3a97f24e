"""The language model example runs, says what it found, and refuses what it cannot use."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "distill_text.py"


def example(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)


def test_quick_run(tmp_path):
    result = example("--quick", "--seeds", "2", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    report = (tmp_path / "distill_text.md").read_text()
    assert report.strip() in result.stdout and "Quick run" in report
    numbers = json.loads((tmp_path / "distill_text.json").read_text())
    assert {"cross-entropy", "KL", "SinKD"} <= set(numbers["students"])
    for row in numbers["students"].values():
        assert len(row["bits"]) == 2 and all(1 < bits < 9 for bits in row["bits"])
    bits = {name: row["bits"] for name, row in numbers["students"].items()}
    assert bits["KL"] != bits["cross-entropy"] != bits["SinKD"] != bits["KL"]


def test_a_text_that_is_too_short(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    result = example("--quick", "--text", str(short))
    assert result.returncode == 1 and "--text: expected at least 1280 characters, got 9" in result.stderr

"""`python -m bench`: its commands, and what they say of files that are wrong."""

import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench import run  # noqa: E402
from bench.__main__ import COMMANDS, main  # noqa: E402

RECORD = Path(__file__).resolve().parents[2] / "bench" / "results" / "cpu.json"


@pytest.fixture
def written(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def slower(report, factor, directions=("forward_ms", "forward_backward_ms")):
    """The report in which otkd_fast takes `factor` times as long."""
    report = copy.deepcopy(report)
    for case in report["cases"]:
        row = case["results"]["otkd_fast"]
        row.update({key: row[key] * factor for key in directions if key in row})  # some cases are forward only
    return report


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.1, 0), (0.5, 0), (1.25, 1)])
def test_compare_finds_regressions(written, capsys, factor, code):
    report = json.loads(RECORD.read_text())
    assert main(["compare", str(RECORD), written("new.json", slower(report, factor))]) == code
    shown = capsys.readouterr().out
    assert f"x {1 / factor:.2f}" in shown
    assert ("REGRESSION" in shown) == bool(code)


def test_compare_takes_each_direction_by_itself(written, capsys):
    report = json.loads(RECORD.read_text())
    assert main(["compare", str(RECORD), written("new.json", slower(report, 2, ("forward_ms",)))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(("REGRESSION" in line) == (" forward  " in line) for line in lines[:-1])


def test_a_machine_that_is_slower_as_a_whole_is_no_regression(written):
    report = json.loads(RECORD.read_text())
    for case in report["cases"]:
        for row in case["results"].values():
            for key in ("forward_ms", "forward_backward_ms"):
                if key in row:
                    row[key] *= 3
    assert main(["compare", str(RECORD), written("new.json", report)]) == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "written by `python -m bench run`"),
        ([], "it lacks cases"),
        ({"cases": []}, "it lacks created"),
        ({"format": 1} | dict.fromkeys(("created", "dtype", "machine", "cases")), "another version of the benchmarks"),
    ],
)
def test_a_wrong_file_ends_with_2_and_a_sentence(written, capsys, monkeypatch, content, said):
    monkeypatch.setattr(run.memory, "measure_all", lambda threads, names: [])
    path = written("x.json", content)
    merge = ["run", "--merge", "--ops", "none", "--no-scaling", "--memory", "points otkd_fast, envelope gradient"]
    for command in (["compare", str(RECORD), path], ["plots", path], ["report", path], [*merge, "--out", path]):
        with pytest.raises(SystemExit) as error:
            main(command)
        assert error.value.code == 2
        assert said in capsys.readouterr().err


def test_a_missing_file_and_nothing_in_common(written, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        main(["compare", str(RECORD), str(tmp_path / "none.json")])
    assert error.value.code == 2 and "none.json: No such file" in capsys.readouterr().err
    empty = {**json.loads(RECORD.read_text()), "cases": []}
    with pytest.raises(SystemExit) as error:
        main(["compare", str(RECORD), written("empty.json", empty)])
    assert error.value.code == 2 and "no case with a common peer" in capsys.readouterr().err


def test_unknown_command(capsys):
    assert main(["race"]) == 2
    assert "expected one of run, report, plots, scaling, compare, got 'race'" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ops", "sinkhorm"], "--ops: expected some of"),
        (["--sizes", "7x7"], "got '7x7'"),
        (["--peers", "nobody"], "got 'nobody'"),
        (["--peers", "flash-sinkhorn"], "flash-sinkhorn is not installed: pip install flash-sinkhorn"),
        (["--threads", "0"], "--threads: expected a number above 0, got 0"),
        (["--seconds", "-1"], "--seconds: expected a number above 0, got -1"),
        (["--out", "nowhere/there/x.json"], "there is no folder nowhere/there"),
        (["--merge", "--out", "none.json"], "there is no file none.json to merge into"),
        (["--ops", "sqrtm", "--sizes", "64x100", "--no-memory", "--no-scaling"], "nothing to measure"),
    ],
)
def test_bad_arguments_of_run(arguments, said, capsys):
    with pytest.raises(SystemExit) as error:
        main(["run", *arguments])
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_a_run_of_one_case(tmp_path, capsys):
    path = tmp_path / "one.json"
    arguments = ["run", "--quick", "--ops", "wcord_local", "--no-memory", "--no-scaling", "--out", str(path)]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "wcord_local 64x128 sinkhorn" in shown.out and "1/1 wcord_local" in shown.err
    assert main([*arguments, "--merge"]) == 0
    case = json.loads(path.read_text())["cases"][0]
    assert case["results"]["plain"]["forward_backward_ms"] > 0 and "plain-compiled" not in case["results"]
    assert main(["report", str(path)]) == 0
    assert "Equal iterations: scaling loop, PyTorch." in capsys.readouterr().out
    assert main(["compare", str(path), str(path)]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command, capsys):
    with pytest.raises(SystemExit) as error:
        main([command, "--help"])
    assert error.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_plots(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["plots", str(RECORD), "--out", str(tmp_path)]) == 0
    made = {path.name: path.stat().st_size for path in tmp_path.glob("*.png")}
    assert {"sinkd.png", "accuracy.png", "memory.png", "scaling.png"} <= set(made) and min(made.values()) > 5000

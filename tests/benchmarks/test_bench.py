"""The benchmark's own rules: no time for a wrong answer, and a README made from the JSON."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench import cases, measure, report, run  # noqa: E402
from bench.peers import Peer  # noqa: E402

SMALL = cases.Size(8, 4)


def test_a_wrong_peer_gets_no_time():
    inputs, expected = run.sinkd_problem(SMALL)
    right = next(p for p in run.peers.SINKD_PEERS if p.name == "otkd_fast")
    wrong_value = Peer("wrong", "wrong", lambda: lambda s, t: 1.001 * right.build()(s, t))
    nan = Peer("nan", "nan", lambda: lambda s, t: right.build()(s, t) * float("nan"))
    results = measure.measure((right, wrong_value, nan), inputs, expected, seconds=0.02)
    assert results["otkd_fast"]["forward_ms"] > 0
    for name in ("wrong", "nan"):
        assert "wrong answer" in results[name]["wrong"] and "forward_ms" not in results[name]


def test_a_missing_peer_is_left_out_with_its_reason():
    def build():
        raise ImportError("No module named 'nothing'")

    inputs, expected = run.sinkd_problem(SMALL)
    right = next(p for p in run.peers.SINKD_PEERS if p.name == "otkd_fast")
    results = measure.measure((right, Peer("absent", "absent", build)), inputs, expected, seconds=0.02)
    assert results["absent"] == {"skipped": "not installed (No module named 'nothing')"}


def test_our_own_failure_is_not_swallowed():
    def build():
        return lambda s, t: 1 / 0

    inputs, expected = run.sinkd_problem(SMALL)
    with pytest.raises(ZeroDivisionError):
        measure.measure((Peer("otkd_fast", "otkd_fast", build),), inputs, expected, seconds=0.02)


@pytest.mark.parametrize("name", ["released", "pot"])
def test_peers_solve_the_same_problem(name):
    inputs, expected = run.sinkd_problem(SMALL)
    peer = next(p for p in run.peers.SINKD_PEERS if p.name == name)
    try:
        function = peer.build()
    except ImportError as error:
        pytest.skip(str(error))
    result = measure.check(peer, function, expected, inputs)
    assert result["value_error"] < 1e-5 and result["gradient_error"] < 1e-4


def made_up_report():
    rows = {
        "otkd_fast": {"forward_ms": 0.02, "forward_backward_ms": 0.1, "first_call_s": 0.001},
        "released": {"forward_ms": 0.3, "forward_backward_ms": 1.25, "first_call_s": 0.002},
        "pot": {"wrong": "pot: wrong answer, relative errors 1 (value) and 1 (gradient)"},
        "geomloss": {"skipped": "not installed (No module named 'geomloss')"},
    }
    parameters = {"temperature": 2.0, "epsilon": 0.1, "num_iters": 20}
    case = {"op": "sinkd", "size": "64x100", "parameters": parameters, "results": rows}
    return run.make_report([case])


def test_markdown_has_ratios_and_requirements():
    text = report.markdown(made_up_report())
    assert "| 64 x 100 | **0.100** | 1.25 (12.5 x, at least 10) | - | wrong answer | - |" in text
    assert "geomloss SamplesLoss at 64x100 (sinkd): not installed" in text
    assert "wrong answer, relative errors" in text


def test_readme_is_made_from_the_json(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "cpu.json"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    results.write_text(json.dumps(made_up_report()))
    for _ in range(2):
        report.main([str(results), "--update-readme", "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:begin -->\n") and text.endswith("<!-- bench:end -->\nafter\n")
    assert "old" not in text and text.count("**0.100**") == 1
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="bench:begin"):
        report.main([str(results), "--update-readme", "--readme", str(readme)])


def test_medians_are_of_all_functions():
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1
        torch.zeros(10).sum()

    medians = measure.interleaved_medians({name: lambda name=name: count(name) for name in calls}, seconds=0.05)
    assert set(medians) == {"a", "b"} and all(value > 0 for value in medians.values())
    assert all(value >= 7 for value in calls.values())

"""The benchmark's own rules: no time for a wrong answer, and pages made from the JSON."""

import io
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench import (  # noqa: E402
    gaussian,
    loss_features,
    loss_others,
    loss_sinkd,
    matrix_roots,
    measure,
    progress,
    published,
    report,
    results_file,
    run,
    scaling,
    sinkd,
    sinkhorn_dense,
    sinkhorn_points,
    sinkhorn_ragged,
    sinkhorn_shared,
    summary,
    training_step,
)
from bench.family import Peer  # noqa: E402

SMALL = "8x4"


def ours(family):
    return next(peer for peer in family.peers if peer.name == "otkd_fast")


def test_a_wrong_peer_gets_no_time():
    right = ours(sinkd.FAMILY)
    wrong_value = Peer("wrong", "wrong", lambda size: lambda s, t: 1.001 * right.build(size)(s, t))
    nan = Peer("nan", "nan", lambda size: lambda s, t: right.build(size)(s, t) * float("nan"))
    results = measure.measure(sinkd.problem(SMALL), (right, wrong_value, nan), SMALL, seconds=0.02)
    assert results["otkd_fast"]["forward_ms"] > 0
    for name in ("wrong", "nan"):
        assert "wrong answer" in results[name]["wrong"] and "forward_ms" not in results[name]


def test_a_missing_peer_is_left_out_with_its_reason():
    def build(size):
        raise ImportError("No module named 'nothing'")

    peers = (ours(sinkd.FAMILY), Peer("absent", "absent", build))
    results = measure.measure(sinkd.problem(SMALL), peers, SMALL, seconds=0.02)
    assert results["absent"] == {"skipped": "not installed (No module named 'nothing')"}


def test_our_own_failure_is_not_swallowed():
    failing = Peer("otkd_fast", "otkd_fast", lambda size: lambda s, t: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure.measure(sinkd.problem(SMALL), (failing,), SMALL, seconds=0.02)


FAMILIES = {
    "sinkd": (sinkd.FAMILY, SMALL),
    "shared": (sinkhorn_shared.FAMILY, "12"),
    "dense": (sinkhorn_dense.FAMILY, "3x5x5"),
    "points": (sinkhorn_points.FAMILY, "7"),
    "ragged": (sinkhorn_ragged.FAMILY, "5x1-6"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_peers_solve_the_problem_that_they_claim_to_solve(family):
    """Also ours: value and gradient against float64."""
    family, size = FAMILIES[family]
    problem = family.problem(size)
    checked = 0
    for peer in (peer for peer in family.peers if not peer.name.endswith("compiled") and peer.name != "log-envelope"):
        try:
            function = peer.build(size)
        except ImportError:
            continue
        result = measure.check(peer, function, problem.expected, problem.inputs)
        assert result["value_error"] < 1e-5 and result["gradient_error"] < 1e-3
        checked += 1
    assert checked >= 2


NEW_FAMILIES = {
    "sqrtm": (matrix_roots.ROOTS, "3x6"),
    "polar": (matrix_roots.NORMS, "3x6"),
    "gaussian": (gaussian.DISTANCES, "2x5x8"),
    "covariances": (gaussian.COVARIANCES, "3x6"),
    "moments": (gaussian.MOMENTS, "2x3x5x5 grid 2"),
    "moments of the batch": (gaussian.MOMENTS, "8x3 batch"),
}


@pytest.mark.parametrize("family", NEW_FAMILIES)
def test_peers_of_matrix_problems_keep_to_their_limits(family):
    """check() raises beyond them; ours has those of everybody."""
    family, size = NEW_FAMILIES[family]
    problem = family.problem(size)
    assert ours(family).max_errors is None
    checked = 0
    for peer in family.peers:
        try:
            function = peer.build(size)
        except ImportError:
            continue
        measure.check(peer, function, problem.expected, problem.inputs)
        checked += 1
    assert checked >= 2


def test_a_peer_without_a_gradient_is_timed_forward():
    peers = (ours(matrix_roots.ROOTS), Peer("half", "half", ours(matrix_roots.ROOTS).build, forward_only=True))
    results = measure.measure(matrix_roots.root_problem("2x3"), peers, "2x3", seconds=0.02)
    assert results["half"]["forward_ms"] > 0 and "forward_backward_ms" not in results["half"]


def made_up_report():
    rows = {
        "otkd_fast": {"forward_ms": 0.02, "forward_backward_ms": 0.1, "first_call_s": 0.001},
        "released": {"forward_ms": 0.3, "forward_backward_ms": 1.25, "first_call_s": 0.002},
        "pot": {"wrong": "pot: wrong answer, relative errors 1 (value) and 1 (gradient)"},
        "geomloss": {"skipped": "not installed (No module named 'geomloss')"},
    }
    case = {"op": "sinkd", "size": "64x100", "parameters": sinkd.FAMILY.parameters, "results": rows}
    memory = [{"case": "wkd otkd_fast", "peak_mb": 63.4}, {"case": "wkd released form", "skipped": "no memory"}]
    return run.make_report([case], memory)


def test_a_run_in_pieces_is_merged():
    """What is measured again replaces, the rest stays, in the order of the families; other machines are refused."""
    old, new = made_up_report(), made_up_report()
    second = new["cases"][0] | {"size": "256x100"}
    new["cases"] = [second]
    new["memory"] = [{"case": "wkd released form", "peak_mb": 2000.0}]
    report = run.merged(new, old)
    assert [case["size"] for case in report["cases"]] == ["64x100", "256x100"]
    report = run.merged(old, new)
    assert [case["size"] for case in report["cases"]] == ["64x100", "256x100"]
    assert report["memory"] == [old["memory"][0], new["memory"][0]]
    with pytest.raises(SystemExit):
        run.merged(old | {"machine": old["machine"] | {"cpu": "another"}}, new)


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ("0.1.0+cu131", "0.1.0+cpu", []),
        ("0.1.0+cpu", "0.1.0+cu130", []),
        ("0.1.0+reference", "0.1.0+cpu", ["otkd_fast (0.1.0+reference, now 0.1.0+cpu)"]),
        ("0.1.0+cpu", "0.2.0+cpu", ["otkd_fast (0.1.0+cpu, now 0.2.0+cpu)"]),
    ],
)
def test_what_may_stand_in_one_table(before, after, changed):
    """Whether it was built with CUDA says nothing of the CPU's kernels; the rest of the version does."""
    old = run.machine()
    new = old | {"versions": old["versions"] | {"otkd_fast": after, "pykeops": None}}
    old = old | {"versions": old["versions"] | {"otkd_fast": before, "pykeops": "2.3"}}
    assert results_file.differences(old, new) == changed
    assert results_file.differences(old | {"threads": 7}, new)[0].startswith("threads (7, now")


def test_markdown_has_ratios_and_requirements():
    text = report.markdown(made_up_report())
    assert "| 64 x 100 | **0.100** | 1.25 (12.5 x, at least 10) | wrong answer |" in text
    assert "geomloss SamplesLoss at 64x100 (sinkd): not installed" in text
    assert "wrong answer, relative errors" in text
    assert "10 iterations: otkd_fast | 63 |" in text and "released form | no memory |" in text


def test_pages_are_made_from_the_json(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pages, results = [tmp_path / "README.md", tmp_path / "benchmarks.md"], tmp_path / "cpu.json"
    for page in pages:
        page.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    pages[1].write_text(pages[1].read_text().replace("after", "<!-- pictures:begin --><!-- pictures:end -->\nafter"))
    numerics = tmp_path / "numerics.md"
    numerics.write_text("before\n<!-- bench:begin -->\n<!-- bench:end -->\n")
    sweep = {"kernel": "dense", "variable": "n", "values": [64, 128], "milliseconds": [1.0, 4.0]}
    sweep |= {"exponent_of_operations": 2, "fitted_exponent": 2.0, "floor_ms": [0.5, 2.0]}
    rates = {"copy_bytes_per_s": 1e10, "multiply_adds_per_s": 1e11}
    results.write_text(json.dumps(made_up_report() | {"sweeps": [sweep], "rates": rates}))
    arguments = [str(results), "--update-docs", "--readme", str(pages[0]), "--docs", str(pages[1])]
    plot = tmp_path / "scaling.png"
    arguments += ["--numerics", str(numerics), "--plot", str(plot)]
    for _ in range(2):
        report.main(arguments)
    for page in pages:
        text = page.read_text()
        assert text.startswith("before\n<!-- bench:begin -->\n") and text.endswith(":end -->\nafter\n")
        assert "old" not in text
    assert pages[1].read_text().count("**0.100**") == 1
    assert "| SinKD | 1 | 12.5 x (64x100: released loop, PyTorch) | " in pages[0].read_text()
    assert "](plots/sinkd.png)" in pages[1].read_text() and "](scaling.png)" in pages[1].read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "| dense | n | 64 ... 128 | 2 | 2.00 | 4.00 | 2.0 |" in numerics.read_text()
    pages[0].write_text("no markers")
    with pytest.raises(SystemExit) as error:
        report.main(arguments)
    assert error.value.code == 2 and "bench:begin" in capsys.readouterr().err


WHOLE_LOSSES = {
    "sinkd_published": (loss_sinkd.BATCH, "4x3 T5"),
    "sinkd_flattened": (loss_sinkd.FLATTENED, "4x3"),
    "sinkd_sample": (loss_sinkd.SAMPLE, "3x4"),
    "sinkd_tokens": (loss_sinkd.TOKENS, "4x40"),
    "wkl": (loss_others.WKL, "4x6 dwkd_dkd"),
    "wkl_value": (loss_others.WKL_VALUE, "4x6"),
    "multi_level_ot": (loss_others.MULTI_LEVEL, "2x3x70"),
    **{f"kd2m {m}": (loss_features.KD2M, f"12x5 {m}") for m in ("w2", "jw2", "w2_gaussian", "cw2, 3 classes")},
    "wcord_local": (loss_features.LOCAL, "6x5 sinkhorn"),
    "ipot": (loss_features.LOCAL, "6x5 ipot"),
    "wcord_global": (loss_features.GLOBAL, "3x7x4"),
    **{f"step {m}": (training_step.FAMILY, f"linear 4x6, {m}") for m in ("SinKD", "WKD-L")},
    "step WKD-F": (training_step.FAMILY, "convolutions 2x6, WKD-F"),
}


@pytest.mark.parametrize("name", WHOLE_LOSSES)
def test_whole_losses_equal_their_formulas(name):
    family, size = WHOLE_LOSSES[name]
    problem = family.problem(size)
    checked = 0
    for peer in (peer for peer in family.peers if not peer.name.endswith("compiled")):
        measure.check(peer, peer.build(size), problem.expected, problem.inputs)
        checked += peer.same_answer
    assert checked >= 2


def test_a_training_step_is_that_of_the_network():
    """The step on one vector of parameters has the loss and the gradients of an ordinary step."""
    size = "convolutions 2x6, WKD-F"
    student, teacher, data, labels = training_step.networks(size)
    with torch.no_grad():
        targets = teacher(data)
    outputs = student(data)
    loss = torch.nn.functional.cross_entropy(outputs[0], labels) + training_step.our_loss(size)(outputs, targets)
    loss.backward()
    problem = training_step.problem(size)
    value, gradient = measure.forward_backward(training_step.step(size, training_step.our_loss), *problem.inputs)
    torch.testing.assert_close(value, loss)
    torch.testing.assert_close(gradient, torch.cat([p.grad.flatten() for p in student.parameters()]))


def test_the_published_cases_are_measured():
    sizes = {family.op: family.sizes for family in run.FAMILIES}
    assert len(published.CASES) == 17 and len({case.id for case in published.CASES}) == 17
    for case in published.CASES:
        assert case.measured and all(size in sizes[op] for op, size in case.measured), case
    assert all(case.id in "\n".join(published.markdown()) for case in published.CASES)


def test_the_fewest_steps_that_reach_our_marginal_error():
    from bench import peers

    assert peers.fewest_steps(lambda steps: 1 / steps, 0.1)[0] == 10
    steps, said = peers.fewest_steps(lambda steps: 1.0, 0.1)
    assert steps == peers.STEPS[-1] and said["marginal_error"] == 1.0 and said["marginal_error_of_ours"] == 0.1


def test_what_is_equal_is_said():
    text = "\n".join(report.section(sinkd.FAMILY, made_up_report()["cases"]))
    assert "Equal iterations: released loop, PyTorch." in text


def test_a_slow_call_is_timed_twice_or_once_after_the_first(monkeypatch):
    monkeypatch.setattr(measure, "SLOW", 0.0)
    calls = []

    def compiles():
        calls.append(1)
        time.sleep(0.05 if len(calls) == 1 else 0)

    medians = measure.interleaved_medians({"slow": compiles}, seconds=0.01)
    assert len(calls) == 3 and 0 < medians["slow"] < 50
    monkeypatch.setattr(measure, "VERY_SLOW", 0.0)
    measure.interleaved_medians({"slow": compiles}, seconds=0.01)
    assert len(calls) == 5


def test_floors_are_the_largest_of_their_parts():
    rate = {"copy_bytes_per_s": 1e6, "multiply_adds_per_s": 1e6}
    assert scaling.floor_ms(scaling.Work(2e3, 1e3, 100), rate) == 2.0
    assert scaling.floor_ms(scaling.Work(2e3, 1e3, 500), rate) == 4.0
    for sweep in scaling.SWEEPS:
        values, work = sweep.values, [sweep.work(value) for value in sweep.values]
        assert all(w.bytes > 0 and w.operations > 0 for w in work)
        growth = math.log(work[-1].operations / work[-2].operations) / math.log(values[-1] / values[-2])
        assert sweep.exponent - 0.3 < growth < sweep.exponent + 0.3


def test_progress_is_shown_line_by_line_or_as_a_bar(capsys):
    class Screen(io.StringIO):
        def isatty(self):
            return True

    lines, screen = io.StringIO(), Screen()
    for stream in (lines, screen):
        shown = progress.Progress([1.0, 3.0], stream)
        shown.step("first")
        shown.step("second")
        shown.finish()
    assert "[  0 %] 1/2 first" in lines.getvalue() and "[ 25 %] 2/2 second" in lines.getvalue()
    assert "########......................] 2/2 second" in screen.getvalue()


def test_medians_are_of_all_functions():
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1
        torch.zeros(10).sum()

    medians = measure.interleaved_medians({name: lambda name=name: count(name) for name in calls}, seconds=0.05)
    assert set(medians) == {"a", "b"} and all(value > 0 for value in medians.values())
    assert all(value >= 7 for value in calls.values())


def test_exponents_are_fitted():
    values = (10, 20, 40, 80)
    assert scaling.fitted_exponent(values, [5.0, 3.0 * 20**1.5, 3.0 * 40**1.5, 3.0 * 80**1.5]) == pytest.approx(1.5)


def test_the_short_table_names_the_fastest_that_gives_the_same_answer():
    cases = made_up_report()
    rows = cases["cases"][0]["results"]
    rows["released-compiled"] = {"forward_backward_ms": 0.05, "forward_ms": 0.4}
    rows["geomloss"] = {"forward_backward_ms": 0.01, "forward_ms": 0.01}  # solves another problem
    (line,) = [line for line in summary.summary(cases) if line.startswith("| SinKD | 1 |")]
    assert "| 0.5 x (64x100: released loop, PyTorch, torch.compile) |" in line  # a loss is shown
    assert "| 15.0 x (64x100: released loop, PyTorch) |" in line
    cases["cases"].append(cases["cases"][0] | {"size": "256x100", "results": made_up_report()["cases"][0]["results"]})
    (line,) = [line for line in summary.summary(cases) if line.startswith("| SinKD | 2 |")]
    assert "0.5 x (64x100: released loop, PyTorch, torch.compile) to 12.5 x (256x100: released loop, PyTorch)" in line

"""Distils handwritten digits: cross-entropy, KL distillation and SinKD on the same splits and initial weights.

    python examples/distill_digits.py --out out
    python examples/distill_digits.py --method all --out out      # every method, on small convolutional networks

The teacher learns from half of the rows, the student from 128 of them: what a teacher knows matters most where data
are few. This writes out/report.md, out/distill_digits.png and out/results.json. The data ship with scikit-learn. What
is left out for want of a package (POT, geomloss, matplotlib) is said in the report.

Losses, each a mean over the b rows of a batch (the paper's Eq. 19 is their sum, b times as large):
    cross-entropy  CE(y, s)
    KL             (1 - alpha) CE(y, s) + alpha KL(t, s)
    SinKD          (1 - alpha) CE(y, s) + alpha KL(t, s) + beta SinKD(t, s)        (Eq. 19)
KL is taken between softmax(z / tau), without a factor tau^2, as in the code that was released with SinKD. SinKD has
its published parameters (temperature 2, epsilon 0.1, 20 iterations). alpha, tau and beta are the best of nine
settings for KL and of nine for SinKD, on validation rows taken from the training half, with seeds that the report
does not use: `--tune --seeds 8` does that again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# bench/ lies beside examples/; appended, so that an installed otkd_fast goes before the folder of the same name.
sys.path += [str(folder) for folder in Path(__file__).resolve().parents[:2]]

from digits_data import BATCH, Digits, Progress, batches, load, mean_and_error  # noqa: E402

from bench import cost_l1, measure, report, run, sinkd  # noqa: E402
from otkd_fast.losses import SinKD  # noqa: E402

TEACHER_EPOCHS, STUDENT_EPOCHS, STUDENT_ROWS, HIDDEN = 40, 150, 128, 16
KL_GRID = [{"alpha": a, "tau": t} for a, t in itertools.product((0.5, 0.8, 0.95), (1.0, 2.0, 4.0))]
# The paper's own grid for CIFAR-100.
SINKD_GRID = [{"alpha": a, "tau": 4.0, "beta": b} for a, b in itertools.product((0.85, 0.9, 0.95), (0.08, 0.8, 8.0))]
KL_CHOICE = {"alpha": 0.95, "tau": 4.0}
SINKD_CHOICE = {"alpha": 0.85, "tau": 4.0, "beta": 0.08}
FIRST_TUNING_SEED = 1000

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student logits (b, 10), teacher logits (b, 10), labels (b,)


def make_teacher() -> nn.Module:
    wide = 512
    return nn.Sequential(
        nn.Linear(64, wide),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(wide, wide),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(wide, 10),
    )


def make_student() -> nn.Module:
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


def cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(student, labels)


def kl_loss(alpha: float, tau: float) -> Loss:
    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        soft_student, soft_teacher = F.log_softmax(student / tau, -1), F.log_softmax(teacher / tau, -1)
        soft = F.kl_div(soft_student, soft_teacher, reduction="batchmean", log_target=True)
        return (1 - alpha) * F.cross_entropy(student, labels) + alpha * soft

    return loss


def with_transport(
    alpha: float, tau: float, beta: float, transport: Callable[[Tensor, Tensor], Tensor], divide: bool = True
) -> Loss:
    """Eq. 19 over b; `transport` gives the loss for a plan of mass b, or its mean with divide=False."""
    base = kl_loss(alpha, tau)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        weight = beta / student.shape[0] if divide else beta
        return base(student, teacher, labels) + weight * transport(student, teacher)

    return loss


def sinkd_loss(alpha: float, tau: float, beta: float) -> Loss:
    return with_transport(alpha, tau, beta, SinKD(reduction="mean"), divide=False)


def train_teacher(data: Digits, epochs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    teacher = make_teacher()
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-3)
    for rows in batches(data, epochs, seed):
        optimizer.zero_grad()
        F.cross_entropy(teacher(data.train_x[rows]), data.train_y[rows]).backward()
        optimizer.step()
    return teacher.eval()


def train_student(data: Digits, teacher_logits: Tensor, loss: Loss, epochs: int, seed: int) -> nn.Module:
    """On the first STUDENT_ROWS training rows; initial weights and batches depend on the seed, not on the loss."""
    torch.manual_seed(seed)
    data = Digits(data.train_x[:STUDENT_ROWS], data.train_y[:STUDENT_ROWS], data.test_x, data.test_y)
    student = make_student()
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    for rows in batches(data, epochs, seed):
        optimizer.zero_grad()
        loss(student(data.train_x[rows]), teacher_logits[rows], data.train_y[rows]).backward()
        optimizer.step()
    return student.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of the test rows that are right, in percent."""
    return 100.0 * (model(data.test_x).argmax(-1) == data.test_y).float().mean().item()


@torch.no_grad()
def logits_of(model: nn.Module, data: Digits) -> Tensor:
    return model(data.train_x)


def accuracies(
    losses: dict[str, Loss], seeds: Iterable[int], quick: bool, validation: bool, title: str
) -> dict[str, list[float]]:
    """Test accuracy of the teacher and of a student for each loss, one number a seed."""
    seeds = list(seeds)
    results: dict[str, list[float]] = {name: [] for name in ("teacher", *losses)}
    teacher_epochs, student_epochs = (2, 2) if quick else (TEACHER_EPOCHS, STUDENT_EPOCHS)
    progress = Progress(len(seeds) * len(results), title)
    for seed in seeds:
        data = load(seed, validation)
        teacher = train_teacher(data, teacher_epochs, seed)
        results["teacher"].append(accuracy(teacher, data))
        progress.step()
        teacher_logits = logits_of(teacher, data)
        for name, loss in losses.items():
            student = train_student(data, teacher_logits, loss, student_epochs, seed)
            results[name].append(accuracy(student, data))
            progress.step()
    return results


def tune(seeds: int) -> None:
    """Prints the validation accuracy of every setting in the two grids."""
    losses = {f"KL {s}": kl_loss(**s) for s in KL_GRID} | {f"SinKD {s}": sinkd_loss(**s) for s in SINKD_GRID}
    chosen = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + seeds)
    results = accuracies(losses, chosen, quick=False, validation=True, title="settings")
    for name, values in sorted(results.items(), key=lambda item: -statistics.mean(item[1])):
        print(f"{statistics.mean(values):7.2f} {name}")


def step_times(quick: bool) -> tuple[dict[str, float], list[str]]:
    """Median ms of a training step (student, loss, backward, optimizer) by loss; and what is left out."""
    choice = SINKD_CHOICE
    losses = {
        "cross-entropy": cross_entropy,
        "KL": kl_loss(**KL_CHOICE),
        "SinKD, otkd_fast": sinkd_loss(**choice),
        "SinKD, released PyTorch loop": with_transport(**choice, transport=sinkd.released_loop),
    }
    skipped = []
    try:
        pot = next(p for p in sinkd.PEERS if p.name == "pot").build(f"{BATCH}x10")
        losses["SinKD, POT"] = with_transport(**choice, transport=pot)
    except ImportError as error:
        skipped.append(f"SinKD through POT ({error})")
    data = load(0)
    teacher_logits = logits_of(make_teacher().eval(), data)
    rows = torch.arange(BATCH)
    x, y, teacher = data.train_x[rows], data.train_y[rows], teacher_logits[rows]

    def stepper(loss: Loss) -> Callable[[], None]:
        torch.manual_seed(0)
        student = make_student()
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-4)

        def step() -> None:
            optimizer.zero_grad()
            loss(student(x), teacher, y).backward()
            optimizer.step()

        return step

    steppers = {name: stepper(loss) for name, loss in losses.items()}
    return measure.interleaved_medians(steppers, seconds=0.2 if quick else 6.0), skipped


def microbenchmark(quick: bool) -> dict:
    """bench's SinKD and cost problems at 64 x 100, and at 256 x 100 without the compiled peer."""
    names = {"otkd_fast", "released", "pot", "geomloss", "cdist"}
    first, second = sinkd.SIZES[:2]
    seconds = 0.2 if quick else 6.0
    chosen = names if quick else None
    measured = [
        run.measure_case(sinkd.FAMILY, first, seconds, chosen),
        run.measure_case(cost_l1.FAMILY, first, seconds),
    ]
    if not quick:
        measured += [run.measure_case(family, second, seconds, names) for family in (sinkd.FAMILY, cost_l1.FAMILY)]
    return run.make_report(measured)


def verdict(better: list[float], than: list[float], names: tuple[str, str]) -> str:
    """What the paired differences over the seeds say."""
    mean, error = mean_and_error([a - b for a, b in zip(better, than, strict=True)])
    if len(better) < 2:
        return f"{names[0]} minus {names[1]}: {mean:+.2f} points on a single seed, which says nothing."
    clear = abs(mean) > 2 * error
    says = "a difference" if clear else "no difference beyond two standard errors"
    return f"{names[0]} minus {names[1]}, paired over {len(better)} seeds: {mean:+.2f} +- {error:.2f} points: {says}."


def words(choice: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in choice.items())


def write_markdown(path: Path, result: dict, plot: str) -> str:
    accuracy_table = ["| | test accuracy, % | standard error |", "|---|---|---|"]
    for name, values in result["accuracy"].items():
        mean, error = mean_and_error(values)
        accuracy_table.append(f"| {name} | {mean:.2f} | {error:.2f} |")
    ours = result["step_ms"]["SinKD, otkd_fast"]
    time_table = ["| loss | ms a step | over otkd_fast |", "|---|---|---|"]
    time_table += [f"| {name} | {ms:.3f} | {ms / ours:.2f} x |" for name, ms in result["step_ms"].items()]
    students = result["accuracy"]
    lines = [
        "# Distilling handwritten digits",
        "",
        f"scikit-learn's digits, half for training and half for testing, {result['seeds']} seeds (split, "
        f"weights, order). Teacher: an MLP with 2 x 512 hidden units; student: one with {HIDDEN}, which sees only "
        f"{STUDENT_ROWS} training rows; {BATCH} rows a batch, {STUDENT_EPOCHS} epochs. KL: {words(KL_CHOICE)}; "
        f"SinKD: {words(SINKD_CHOICE)}, and the published parameters. {result['seconds']:.0f} s in all.",
        *([] if not result["quick"] else ["", "**Quick run: too little training and timing for any conclusion.**"]),
        "",
        "## Accuracy",
        "",
        *accuracy_table,
        "",
        verdict(students["SinKD"], students["cross-entropy"], ("SinKD", "cross-entropy")),
        verdict(students["SinKD"], students["KL"], ("SinKD", "KL")),
        "",
        f"## Training step at {BATCH} x 10 on one thread: student, loss, backward and optimizer",
        "",
        *time_table,
        "",
        plot,
        "",
        "## Microbenchmark",
        "",
        report.markdown(result["microbenchmark"]),
    ]
    if result["left_out"]:
        lines += ["", "Left out: " + "; ".join(result["left_out"]) + "."]
    text = "\n".join(lines) + "\n"
    path.write_text(text)
    return text


def draw(path: Path, result: dict) -> None:
    """Accuracy with standard errors beside the time of a step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    names = list(result["accuracy"])
    summary = [mean_and_error(values) for values in result["accuracy"].values()]
    left.errorbar(range(len(names)), [m for m, _ in summary], yerr=[e for _, e in summary], fmt="o", capsize=4)
    left.set_xticks(range(len(names)), names)
    left.set_ylabel("test accuracy, % (mean and standard error)")
    left.margins(x=0.15)
    times = dict(reversed(result["step_ms"].items()))
    bars = right.barh(
        list(times), list(times.values()), color=["C1" if "otkd_fast" in name else "C0" for name in times]
    )
    right.bar_label(bars, fmt="%.2f", padding=3)
    right.margins(x=0.15)
    right.set_xlabel(f"ms a training step, batch {BATCH} x 10")
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the report")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds")
    parser.add_argument(
        "--quick", action="store_true", help="two epochs and short timings: a test that everything runs"
    )
    parser.add_argument(
        "--method", nargs="+", metavar="NAME", help="compare methods: 'all', or names (an unknown one lists them)"
    )
    parser.add_argument("--tune", action="store_true", help="print the validation accuracy of all settings, then stop")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {options.seeds}")
    torch.set_num_threads(1)  # models this small gain nothing from a second thread
    if options.method:
        import digits_methods

        digits_methods.run(options.method, options.out, options.seeds, options.quick, options.tune)
        return
    if options.tune:
        tune(options.seeds)
        return
    start = time.perf_counter()
    losses = {"cross-entropy": cross_entropy, "KL": kl_loss(**KL_CHOICE), "SinKD": sinkd_loss(**SINKD_CHOICE)}
    result: dict = {"quick": options.quick, "seeds": options.seeds}
    result["accuracy"] = accuracies(losses, range(options.seeds), options.quick, False, "teachers and students")
    print("timing training steps", file=sys.stderr)
    result["step_ms"], result["left_out"] = step_times(options.quick)
    torch.set_num_threads(2)
    print("microbenchmark" + ("" if options.quick else " (torch.compile takes a while)"), file=sys.stderr)
    result["microbenchmark"] = microbenchmark(options.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    plot = ""
    try:
        draw(options.out / "distill_digits.png", result)
        plot = "![accuracy and time](distill_digits.png)"
    except ImportError as error:
        result["left_out"].append(f"the plot ({error})")
    result["seconds"] = time.perf_counter() - start
    print(write_markdown(options.out / "report.md", result, plot))
    (options.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {', '.join(str(options.out / f.name) for f in sorted(options.out.iterdir()))}")


if __name__ == "__main__":
    main()

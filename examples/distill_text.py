"""Distils a small transformer language model on the text of Python's own documentation.

    python examples/distill_text.py --out out

A teacher (2 layers, width 128) and students (1 layer, width 32) predict the next character; the text ships with Python
(pydoc_data.topics), its last tenth is held out. The students see the same batches from the same initial weights; they
differ in the loss, a mean over the tokens of a batch:

    cross-entropy  CE(y, s)
    KL             (1 - alpha) CE + alpha tau^2 KL(softmax(t / tau), softmax(s / tau))
    SinKD          (1 - alpha) CE + alpha KL + beta SinKD between the tokens of the batch    (tokens x vocabulary)

This writes out/distill_text.md, out/distill_text.json and out/distill_text.png: bits a character on the held-out text
and seconds a training step, mean and standard error over the seeds. `--text FILE` takes another text.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from otkd_fast.losses import SinKD

CONTEXT, BATCH = 64, 16
TEACHER_STEPS, STUDENT_STEPS, SHOWN_SECONDS = 600, 150, 1.0
ALPHA, TAU, BETA = 0.5, 2.0, 0.8

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student, teacher logits (tokens, V); next characters (tokens,)


@dataclass
class Text:
    """Characters as integers: for training, and held out."""

    train: Tensor
    held_out: Tensor
    vocabulary: int


class LanguageModel(nn.Module):
    """A decoder of pre-norm transformer layers with learned positions."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 32, 4 * width, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, L, V) of the characters that follow those of x (B, L)."""
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device)
        hidden = self.tokens(x) + self.positions.weight[:length]
        return self.head(self.layers(hidden, mask=mask, is_causal=True))


def load(path: Path | None) -> Text:
    if path is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics.values())
    else:
        text = path.read_text()
    if len(text) < 20 * CONTEXT:
        raise SystemExit(f"--text: expected at least {20 * CONTEXT} characters, got {len(text)}")
    alphabet = {character: k for k, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[character] for character in text])
    end = len(codes) * 9 // 10
    return Text(codes[:end], codes[end:], len(alphabet))


def batch(codes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """BATCH random pieces: characters (B, L) and those that follow (B, L)."""
    starts = torch.randint(len(codes) - CONTEXT - 1, (BATCH, 1), generator=generator)
    places = starts + torch.arange(CONTEXT + 1)
    pieces = codes[places]
    return pieces[:, :-1], pieces[:, 1:]


@torch.no_grad()
def bits_per_character(model: nn.Module, codes: Tensor, batches: int) -> float:
    """Cross-entropy on the same held-out pieces for every model, in bits."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(batches):
        x, y = batch(codes, generator)
        total += F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()
    return total / batches / math.log(2)


def kl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    soft = F.kl_div(
        F.log_softmax(student / TAU, -1), F.log_softmax(teacher / TAU, -1), reduction="batchmean", log_target=True
    )
    return (1 - ALPHA) * F.cross_entropy(student, labels) + ALPHA * TAU**2 * soft


def losses() -> dict[str, Loss]:
    transport = SinKD(reduction="mean")
    return {
        "cross-entropy": lambda student, teacher, labels: F.cross_entropy(student, labels),
        "KL": kl,
        "SinKD": lambda student, teacher, labels: kl(student, teacher, labels) + BETA * transport(student, teacher),
    }


def train_teacher(text: Text, steps: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    teacher = LanguageModel(text.vocabulary, width=128, layers=2)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    progress = Progress(steps, "teacher")
    for _ in range(steps):
        x, y = batch(text.train, generator)
        optimizer.zero_grad()
        F.cross_entropy(teacher(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
        progress.step()
    return teacher.eval()


def train_student(text: Text, teacher: nn.Module, loss: Loss, steps: int, seed: int) -> tuple[nn.Module, float]:
    """The student, and the median milliseconds of a step without the teacher's part."""
    torch.manual_seed(seed)
    student = LanguageModel(text.vocabulary, width=32, layers=1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    times = []
    for _ in range(steps):
        x, y = batch(text.train, generator)
        with torch.no_grad():
            target = teacher(x).flatten(0, 1)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(student(x).flatten(0, 1), target, y.flatten()).backward()
        optimizer.step()
        times.append(1e3 * (time.perf_counter() - start))
    return student.eval(), statistics.median(times)


class Progress:
    """A line on stderr about once a second."""

    def __init__(self, total: int, title: str) -> None:
        self.total, self.title, self.done, self.last = total, title, 0, time.monotonic()

    def step(self) -> None:
        self.done += 1
        if self.done == self.total or time.monotonic() - self.last > SHOWN_SECONDS:
            self.last = time.monotonic()
            end = "\n" if self.done == self.total or not sys.stderr.isatty() else ""
            print(f"\r{self.title}: {self.done}/{self.total}", end=end, file=sys.stderr, flush=True)


def summary(values: list[float]) -> str:
    """Mean, and its standard error where there is one."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def markdown(result: dict) -> str:
    tokens = BATCH * CONTEXT
    lines = [
        "# Distilling a language model",
        "",
        f"Next character of {result['characters']}, over an alphabet of {result['vocabulary']}; {tokens} tokens a "
        f"batch. Teacher: {result['teacher']:.3f} bits a character after {result['teacher_steps']} steps; students: "
        f"{result['student_steps']} steps, {result['seeds']} seed(s). {result['seconds']:.0f} s in all.",
        *(["", "**Quick run: too little training for any conclusion.**"] if result["quick"] else []),
        "",
        "| loss | bits a character, held out | ms a training step |",
        "|---|---|---|",
    ]
    for name, row in result["students"].items():
        lines.append(f"| {name} | {summary(row['bits'])} | {statistics.median(row['step_ms']):.1f} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, result: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for name, row in result["students"].items():
        axes.scatter(row["step_ms"], row["bits"], label=name)
    axes.axhline(result["teacher"], color="black", linewidth=0.8, label="teacher")
    axes.set(xlabel="ms a training step", ylabel="bits a character, held out")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the report")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of the students")
    parser.add_argument("--text", type=Path, help="a text file instead of Python's documentation")
    parser.add_argument("--quick", action="store_true", help="a few steps: a test that everything runs")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {options.seeds}")
    torch.set_num_threads(1)  # two of them wait for each other on a machine that does something else, too
    start = time.perf_counter()
    text = load(options.text)
    teacher_steps, student_steps, held_out = (4, 3, 2) if options.quick else (TEACHER_STEPS, STUDENT_STEPS, 40)
    teacher = train_teacher(text, teacher_steps, seed=0)
    result: dict = {
        "quick": options.quick, "seeds": options.seeds, "characters": len(text.train) + len(text.held_out),
        "vocabulary": text.vocabulary, "teacher_steps": teacher_steps, "student_steps": student_steps,
        "teacher": bits_per_character(teacher, text.held_out, held_out), "students": {},
    }  # fmt: skip
    chosen = losses()
    progress = Progress(options.seeds * len(chosen), "students")
    for seed in range(options.seeds):
        for name, loss in chosen.items():
            student, step_ms = train_student(text, teacher, loss, student_steps, seed)
            row = result["students"].setdefault(name, {"bits": [], "step_ms": []})
            row["bits"].append(bits_per_character(student, text.held_out, held_out))
            row["step_ms"].append(step_ms)
            progress.step()
    result["seconds"] = time.perf_counter() - start
    options.out.mkdir(parents=True, exist_ok=True)
    report = markdown(result)
    try:
        draw(options.out / "distill_text.png", result)
        report += "\n![bits and time](distill_text.png)\n"
    except ImportError as error:
        report += f"\nLeft out: the plot ({error}).\n"
    (options.out / "distill_text.md").write_text(report)
    (options.out / "distill_text.json").write_text(json.dumps(result, indent=1) + "\n")
    print(report)


if __name__ == "__main__":
    main()

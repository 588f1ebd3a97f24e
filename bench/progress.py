"""Progress of a run on standard error: a bar on a terminal, a line a step elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 30


class Progress:
    """`step(text)` says what begins now; `finish()` ends the line. Weights are the expected shares of the steps."""

    def __init__(self, weights: list[float], stream: TextIO | None = None) -> None:
        self.weights = weights
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty()
        self.start = time.monotonic()
        self.done = -1

    def step(self, text: str) -> None:
        self.done += 1
        share = sum(self.weights[: self.done]) / sum(self.weights)
        elapsed = time.monotonic() - self.start
        left = f", about {clock(elapsed / share * (1 - share))} left" if share > 0.03 else ""
        counted = f"{min(self.done + 1, len(self.weights))}/{len(self.weights)}"
        self._write(share, f"{counted} {text}, {clock(elapsed)}{left}")

    def finish(self) -> None:
        self._write(1.0, f"{clock(time.monotonic() - self.start)} in all")
        if self.terminal:
            print(file=self.stream)

    def print(self, text: str) -> None:
        """A line on standard output, above the bar."""
        if self.terminal:
            print("\r\x1b[K", end="", file=self.stream, flush=True)
        print(text, flush=True)

    def _write(self, share: float, text: str) -> None:
        if self.terminal:
            filled = round(WIDTH * share)
            bar = "#" * filled + "." * (WIDTH - filled)
            print(f"\r\x1b[K[{bar}] {text}", end="", file=self.stream, flush=True)
        else:
            print(f"[{100 * share:3.0f} %] {text}", file=self.stream, flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

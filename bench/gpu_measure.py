"""Times on a device: cold cache, medians, with and without the launch overhead; and the rates behind the floors."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20  # more than the last-level cache of any GPU so far


class Clock:
    """Milliseconds of a call on the device, its cache emptied before each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.flush = torch.empty(FLUSH_BYTES if self.on_gpu else 1, dtype=torch.uint8, device=device)

    def once(self, call: Callable[[], object]) -> float:
        self.flush.zero_()
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def median(self, call: Callable[[], object], seconds: float, least: int = 5) -> float:
        """Median after three calls that warm up; at least `least` samples, then until `seconds` have passed.

        A call that takes more than a second is measured once, after one that warms up.
        """
        call()
        first = self.once(call)
        if first > 1e3:
            return first
        call()
        samples, stop = [], time.perf_counter() + seconds
        while len(samples) < least or (time.perf_counter() < stop and len(samples) < 1000):
            samples.append(self.once(call))
        return statistics.median(samples)

    def replayed(self, call: Callable[[], object], seconds: float) -> float | None:
        """The same for a CUDA graph of the call, which has no launch overhead; None where there are no graphs."""
        if not self.on_gpu:
            return None
        graph = captured(call)
        return self.median(graph.replay, seconds)


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The call as a CUDA graph, after three runs on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def rates(clock: Clock, seconds: float) -> dict[str, float]:
    """Measured: bytes a second of a copy (read and write), float32 operations of a product, exponentials."""
    size = 1 << (28 if clock.on_gpu else 22)
    x = torch.rand(size, device=clock.device)
    y = torch.empty_like(x)
    side = 8192 if clock.on_gpu else 512
    a = torch.rand(side, side, device=clock.device)
    copy = clock.median(lambda: y.copy_(x), seconds)
    product = clock.median(lambda: a @ a, seconds)
    small = torch.rand(1 << 20, device=clock.device)  # stays in the cache: the exponential, not the memory
    exponential = clock.median(lambda: torch.exp(small), seconds)
    launch = clock.median(lambda: small[:1].add_(0), seconds)
    return {
        "copy_bytes_per_s": 2 * 4 * size / copy * 1e3,
        "multiply_adds_per_s": side**3 / product * 1e3,
        "exponentials_per_s": small.numel() / exponential * 1e3,
        "launch_ms": launch,
    }


def floor_ms(work, rate: dict[str, float]) -> float:
    """The largest of bytes, multiply-adds and exponentials over the measured rates, and of one launch."""
    return max(
        1e3 * work.bytes / rate["copy_bytes_per_s"],
        1e3 * work.multiply_adds / rate["multiply_adds_per_s"],
        1e3 * work.exponentials / rate["exponentials_per_s"],
        rate["launch_ms"],
    )


def value_and_gradients(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """The loss, and its gradients for the first `count` inputs."""
    leaves = tuple(x.detach().requires_grad_(k < count) for k, x in enumerate(inputs))
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves[:count])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double().cpu() - expected.double().cpu()).norm()
    return (difference / expected.double().norm().cpu().clamp(min=1e-300)).item()

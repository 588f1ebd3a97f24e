"""Answer first, then time: accuracy against float64, first-call time, interleaved medians."""

from __future__ import annotations

import contextlib
import io
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .family import Function, Peer, Problem, Unavailable

# Relative errors against float64 above which a result counts as wrong and no time is shown.
MAX_VALUE_ERROR = 1e-5
MAX_GRADIENT_ERROR = 1e-3
# Seconds of a call: beyond the first it is timed twice, beyond the second once.
SLOW, VERY_SLOW = 0.4, 2.0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what other packages print and warn of at their first call; errors come through."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def forward_backward(function: Function, x: Tensor, y: Tensor, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Value and gradient with respect to x (a leaf that requires it); `grad` is needed where the value is no scalar."""
    value = function(x, y)
    (gradient,) = torch.autograd.grad(value, x, grad)
    return value, gradient


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm()).item()


def check(
    peer: Peer, function: Function, expected: tuple[Tensor, ...], inputs: tuple, oracle: Function | None = None
) -> dict:
    """Errors of value and gradient, and the time of this first call; ValueError when the errors are too large.

    `oracle`: what a peer with another answer is compared with in float64; None is the function itself.
    """
    start = time.perf_counter()
    actual = (function(*inputs[:2]),) if peer.forward_only else forward_backward(function, *inputs)
    seconds = time.perf_counter() - start
    if not peer.same_answer:
        x, y, *rest = inputs
        wide = x.detach().double().requires_grad_()
        own = forward_backward(oracle or function, wide, y.double(), *(g if g is None else g.double() for g in rest))
        difference = relative_error(actual[0], expected[0])
        expected = own
    errors = [relative_error(a, e) for a, e in zip(actual, expected[: len(actual)], strict=True)]
    errors += [0.0] * (2 - len(errors))
    value_limit, gradient_limit = peer.max_errors or (MAX_VALUE_ERROR, MAX_GRADIENT_ERROR)
    # NaN must fail too, so the comparison asks for smallness.
    if not (errors[0] <= value_limit and errors[1] <= gradient_limit):
        raise ValueError(
            f"{peer.name}: wrong answer, relative errors {errors[0]:.1e} (value) and {errors[1]:.1e} (gradient)"
        )
    result = {"first_call_s": seconds, "value_error": errors[0], "gradient_error": errors[1]}
    result |= getattr(function, "compared", {})
    return result if peer.same_answer else result | {"value_differs_from_ours_by": difference}


def interleaved_medians(
    functions: dict[str, Callable[[], object]], seconds: float, min_rounds: int = 5
) -> dict[str, float]:
    """Median milliseconds of single calls; a block of each function in turn: a slow spell of the machine meets all.

    A block is as many calls as take about 10 ms, after up to three untimed ones that warm the caches again (none where
    a call takes longer than 0.1 s); rounds are repeated until `seconds` are used, at least `min_rounds`. A call that
    takes longer than SLOW seconds is timed twice, one of more than VERY_SLOW seconds once. The first call is never
    timed: it may compile.
    """
    calls, untimed = {}, {}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    rounds_of = dict.fromkeys(functions, math.inf)
    for name, function in functions.items():
        function()
        start = time.perf_counter()
        function()
        once = time.perf_counter() - start
        calls[name] = max(1, int(10e-3 / once))
        untimed[name] = min(3, calls[name] - 1) or int(once < 0.1)
        if once > SLOW:
            samples[name].append(1e3 * once)
            calls[name], untimed[name], rounds_of[name] = 1, 0, int(once <= VERY_SLOW)
    stop = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < stop or rounds < min_rounds:
        left = [name for name in functions if rounds < rounds_of[name]]
        if not left:
            break
        rounds += 1
        for name in left:
            function = functions[name]
            for _ in range(untimed[name]):
                function()
            for _ in range(calls[name]):
                start = time.perf_counter()
                function()
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in samples.items()}


def measure(
    problem: Problem, peers: tuple[Peer, ...], size: str, seconds: float, min_rounds: int = 5
) -> dict[str, dict]:
    """Every peer on the same inputs: name -> errors and milliseconds, or {"skipped": reason} / {"wrong": reason}."""
    inputs, expected = problem.inputs, problem.expected
    x, y, *rest = inputs
    results, ready = {}, {}
    for peer in peers:
        try:
            with quiet():
                function = peer.build(size)
                results[peer.name] = check(peer, function, expected, inputs, peer.oracle and peer.oracle(size))
            ready[peer.name] = function
        except Unavailable as error:
            results[peer.name] = {"skipped": str(error)}
        except ImportError as error:
            results[peer.name] = {"skipped": f"not installed ({error})"}
        except ValueError as error:
            results[peer.name] = {"wrong": str(error)}
        except Exception as error:  # a peer that fails (no C++ compiler for torch.compile, say) must not end the run
            if peer.name == "otkd_fast":
                raise
            results[peer.name] = {
                "skipped": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            }
    plain = x.detach()

    def forward(function: Function) -> Callable[[], object]:
        return lambda: function(plain, y)

    def both(function: Function) -> Callable[[], object]:
        return lambda: forward_backward(function, x, y, *rest)

    with torch.no_grad():
        forward_ms = interleaved_medians({name: forward(f) for name, f in ready.items()}, seconds / 2, min_rounds)
    one_way = {peer.name for peer in peers if peer.forward_only}
    two_way = {name: both(f) for name, f in ready.items() if name not in one_way}
    total_ms = interleaved_medians(two_way, seconds / 2, min_rounds)
    for name in ready:
        results[name] |= {"forward_ms": forward_ms[name]}
        results[name] |= {} if name in one_way else {"forward_backward_ms": total_ms[name]}
    return results

"""Points in O(n + m) memory: the peak of a process that solves and differentiates, and its answers at sampled rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from otkd_fast.testing import backends

pytestmark = [
    pytest.mark.skipif("cpu" not in backends("sinkhorn_points"), reason="no compiled backend"),
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured through /proc"),
]

# Prints MB above the inputs at the peak of one forward and backward pass, and the errors at ten rows and columns.
PROGRAM = """
import json, sys, torch, otkd_fast

n, d, gradient = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
x = torch.randn(n, d, generator=generator).requires_grad_()
y = torch.randn(n, d, generator=generator) + 0.2
epsilon, options = 0.5 * d, {"metric": "sqeuclidean", "storage": "streamed", "gradient": gradient}

def memory(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

def solve(x, y):
    result = otkd_fast.sinkhorn_points(x, y, epsilon=epsilon, num_iters=3, **options)
    value = result.regularized_cost
    return result, *torch.autograd.grad(value, x)

solve(x[:100], y[:100])  # what the first call of anything takes
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
result, grad = solve(x, y)
peak = memory("VmHWM") - before

with torch.no_grad():
    rows = torch.arange(0, n, n // 10)[:10]
    f, g, x, y, grad = (tensor.double() for tensor in (result.f, result.g, x, y, grad))
    cost = torch.cdist(x, y[rows]).square()  # (n, 10)
    columns = -epsilon * torch.log(n * torch.exp((f[:, None] - cost) / epsilon).sum(0))
    plan = torch.exp((f[rows, None] + g - torch.cdist(x[rows], y).square()) / epsilon)  # (10, n)
    envelope = 2 * (plan.sum(1, keepdim=True) * x[rows] - plan @ y)
    off = float((g[rows] - columns).abs().max()), float((grad[rows] - envelope).norm() / envelope.norm())
print(json.dumps({"peak_mb": peak, "potential": off[0] / epsilon, "gradient": off[1]}))
"""


def measured(n, d, gradient):
    command = [sys.executable, "-c", PROGRAM, str(n), str(d), gradient]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_matrix():
    """8000 points: a matrix of theirs would take 256 MB."""
    result = measured(8000, 4, "envelope")
    assert result["peak_mb"] < 32, result
    assert result["potential"] < 1e-5 and result["gradient"] < 1e-4, result


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["envelope", "unroll"])
def test_fifty_thousand(gradient):
    """A matrix would take 10 GB; inputs and gradient are 2 x 3.2 MB."""
    result = measured(50_000, 16, gradient)
    assert result["peak_mb"] < 64, result
    assert result["potential"] < 1e-5, result
    # the unrolled gradient is another one before convergence, here not far away
    assert result["gradient"] < (1e-4 if gradient == "envelope" else 1e-2), result

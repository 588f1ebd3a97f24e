"""The guards of the interpreter tests catch what the interpreter does not."""

import pytest
import torch

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from otkd_fast.triton_kernels import _runtime  # noqa: E402

from otkd_fast.testing.guarded import OutOfBoundsError, guarded, run_guarded  # noqa: E402


@triton.jit
def copy_kernel(x, out, n, m, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + offsets, mask=offsets < n, other=0.0), mask=offsets < m)


@triton.jit
def overwrite_kernel(x, out, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(x + offsets, tl.load(x + offsets, mask=offsets < n) + 1, mask=offsets < n)
    tl.store(out + offsets, tl.load(x + offsets, mask=offsets < n), mask=offsets < n)


def copy(x, n=None, m=None):
    out = _runtime.empty(x.shape, x)
    size = x.numel()
    copy_kernel[(triton.cdiv(size, 4),)](x, out, size if n is None else n, size if m is None else m, BLOCK=4)
    return out


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_a_correct_kernel_passes(size):
    x = torch.arange(float(size))
    assert torch.equal(run_guarded(copy, x), x)


def test_a_read_out_of_bounds_is_caught():
    with pytest.raises(Exception, match="copy_kernel loads 1 elements outside"):
        run_guarded(copy, torch.ones(5), n=6)


def test_a_write_out_of_bounds_is_caught():
    with pytest.raises(Exception, match="copy_kernel stores 2 elements outside"):
        run_guarded(copy, torch.ones(5), m=7)


def test_a_changed_input_is_caught():
    def change(x):
        out = _runtime.empty(x.shape, x)
        overwrite_kernel[(1,)](x, out, 3, BLOCK=4)
        return out

    with pytest.raises(OutOfBoundsError, match="wrote to input"):
        run_guarded(change, torch.ones(3))


def test_a_write_to_a_band_is_caught():
    with pytest.raises(OutOfBoundsError, match="wrote behind result or workspace"), guarded() as guards:
        out = guards.empty((3,), dtype=torch.float32, device=torch.device("cpu"))
        torch.as_strided(out, (1,), (1,), out.storage_offset() + 3).fill_(1)


@triton.jit
def product_kernel(a, b, out, PRECISION: tl.constexpr):
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    tl.store(out + 16 * i + j, tl.dot(tl.load(a + 16 * i + j), tl.load(b + 16 * i + j), input_precision=PRECISION))


@pytest.mark.parametrize("precision, least, most", [("tf32", 1e-4, 1e-3), ("tf32x3", 0, 1e-6), ("ieee", 0, 5e-7)])
def test_products_have_the_precision_that_they_ask_for(precision, least, most, generator):
    """A single TF32 product is seen in the result, as on a GPU."""
    a, b = torch.randn(2, 16, 16, generator=generator)

    def run(a, b):
        out = _runtime.empty((16, 16), a)
        product_kernel[(1,)](a, b, out, PRECISION=precision)
        return out

    exact = a.double() @ b.double()
    error = (run_guarded(run, a, b) - exact).norm() / exact.norm()
    assert least <= error <= most


def test_results_start_as_nan():
    with guarded() as guards:
        assert guards.empty((2, 3), dtype=torch.bfloat16, device=torch.device("cpu")).isnan().all()


def test_a_run_without_a_kernel_is_an_error():
    with pytest.raises(AssertionError, match="no Triton kernel was launched"):
        run_guarded(lambda x: x + 1, torch.ones(3))


def test_out_of_memory_says_what_was_asked_for(monkeypatch):
    def allocate(shape, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(_runtime, "_allocate", allocate)
    with pytest.raises(torch.OutOfMemoryError, match=r"\(1024, 1048576\) torch.float32 on cpu, 4 GiB"):
        _runtime.empty((1024, 1 << 20), torch.empty(0))

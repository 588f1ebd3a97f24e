"""Set-up of every test: reproducible numbers, poisoned memory, the state that a test may change put back."""

import os
import zlib

os.environ["TRITON_INTERPRET"] = "1"  # read when a Triton kernel is decorated, so before any import
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # each its share: spinning threads in each other's
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))  # way take 10 times

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--triton", action="store_true", help="run the tests on the Triton kernels, too (slow)")
    parser.addoption("--instruction-set", metavar="NAME", help="of the CPU kernels: baseline, avx2 or avx512")


def pytest_configure(config):
    if config.getoption("--triton"):
        from otkd_fast.testing.backends import _TESTED
        from otkd_fast.testing.guarded import repair_rounding

        _TESTED.append("triton")
        repair_rounding()
    if name := config.getoption("--instruction-set"):
        from otkd_fast import _native

        _native.module.set_instruction_set(name)


@pytest.fixture(autouse=True)
def seeded(request):
    """Seed from the test's name: the same numbers in any order and any selection."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def generator(request):
    """Generator for the functions of otkd_fast.testing, seeded from the test's name."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory():
    """torch.empty hands out NaN, so that an element that no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def threads_restored():
    """A test may change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_workspace():
    """The scratch memory that the ops keep from call to call starts as NaN too."""
    from otkd_fast.ops import _library

    kept = getattr(_library._kept, "tensor", None)
    if kept is not None:
        kept.fill_(0xFF)

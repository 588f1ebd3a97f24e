"""Every kernel compiles for every advertised architecture and takes no more of it than the tables in resources/ say.

After a change: ``python -m otkd_fast.testing.aot --update tests/triton/resources --modules <changed>``
"""

import json
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from otkd_fast.testing import aot  # noqa: E402

TABLES = [json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "resources").glob("*.json"))]
KERNELS = {name: row for table in TABLES for name, row in table["kernels"].items()}
SAME_VERSION = {table["triton"] for table in TABLES} == {triton.__version__}
# shared memory a block may have, bytes, and registers of a multiprocessor: what a launch is refused for
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

# bytes that another Triton's ptxas may spill where the tables' does not (3.6 to 3.8, as measured: 8 to 72)
OTHER_VERSIONS_SPILL = 0 if SAME_VERSION else 72


def check(report, may_spill):
    for name, row in report["kernels"].items():
        for architecture, found in row.items():
            what = f"{name} for {architecture}: {found}"
            assert found["shared"] <= SHARED_LIMIT[int(architecture)], what
            assert found["spills"] <= OTHER_VERSIONS_SPILL or may_spill[name], what
            if SAME_VERSION:
                registers, spills, shared = KERNELS[name][architecture]
                assert found["registers"] <= registers, f"{what}, more registers than the table's {registers}"
                assert found["spills"] <= spills, f"{what}, more spills than the table's {spills}"
                assert found["shared"] <= shared, f"{what}, more shared memory than the table's {shared}"


def spills_allowed():
    return {name: case.may_spill for name, case in aot.cases()}


def test_the_tables_have_every_kernel_and_no_other():
    assert set(KERNELS) == set(spills_allowed())
    for row in KERNELS.values():
        assert list(map(int, row)) == list(aot.ARCHITECTURES)


def test_representative_kernels_compile():
    check(aot.run(["--quick", "--arch", "80", "90"]), spills_allowed())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_every_kernel_compiles(architecture):
    check(aot.run(["--arch", str(architecture)]), spills_allowed())

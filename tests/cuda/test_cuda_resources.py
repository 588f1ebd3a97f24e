"""The table of registers and spills: no spills where it counts, and the build does not take more than it says."""

import json
import re

import pytest
import resources

TABLE = json.loads(resources.TABLE.read_text())
MEASURED = [str(arch) for arch in resources.ARCHITECTURES if str(arch) in TABLE]
# Kernels that may spill, and why. Spilled bytes are touched once a problem or a chunk, never once an entry.
MAY_SPILL = {
    r"(differentiate_tile|solve_tile)<float, Shape<2, 8, 6, 12>>": "96 of 168 registers hold the kernel",
    r"(differentiate_tile|solve_tile|differentiate_packed)<float, Shape<1, 8, 4, 16>>": "up to 9 words; 512 threads "
    "leave 128 registers, of which 32 hold the kernel",
    r"run_phase<(float|double)>": "for large problems; 4 words, once a phase",
    r"run_backward_phase<(float|double)>": "for large problems; once a phase",
    r"shared_left_cost<double>": "3 words on 100, in the log domain",
    r"(differentiate_tile|solve_tile)<double, .*>": "a double takes two registers",
    r"points_(block|join|once)<(float|double)>": "up to 33 words in float32, 6 in float64, once a step",
    r"points_gradient<(float|double), double>": "a double takes two registers; once a tile",
}


def test_table_has_every_kernel():
    assert MEASURED
    names = set(TABLE[MEASURED[0]])
    assert all(set(TABLE[arch]) == names for arch in MEASURED)
    assert {name.partition("<")[0] for name in names} == {
        "rewrite_rows", "cost_tile", "add_splits", "gradient_tile", "rows_backward", "solve_tile", "differentiate_tile",
        "run_phase", "run_backward_phase", "sinkd_tile", "scale_values", "cost_packed", "gradient_packed",
        "rows_backward_packed", "solve_packed", "solve_packed_large", "differentiate_packed",
        "differentiate_packed_large", "transpose_packed", "product_tile", "polar_tile", "polar_begin", "polar_end",
        "sample_means", "sample_rows", "samples_value", "centre_factor", "window_moments", "moments_gradient",
        "jacobi_root", "jacobi_root_backward", "root_factor", "root_end", "root_by_eigenvectors", "adjoint_begin",
        "adjoint_end", "adjoint_by_eigenvectors", "covariance_factor", "covariance_eigenvectors", "bures_value",
        "bures_gradient", "sample_factor", "convert", "points_block", "points_join", "points_once", "points_gradient",
        "plan_product",
        "plan_gradient", "shared_range", "shared_summary", "shared_matrices", "shared_turn", "shared_product",
        "shared_join", "shared_left", "shared_left_cost", "shared_cost_gradient", "solve_cluster",
        "differentiate_cluster",
    }  # fmt: skip


@pytest.mark.parametrize("arch", MEASURED)
def test_no_spills_but_those_explained(arch):
    for name, (registers, _, stores, loads, _) in TABLE[arch].items():
        assert registers <= 255
        if stores or loads:
            assert any(re.fullmatch(pattern, name) for pattern in MAY_SPILL), f"{name} spills {stores}, {loads} bytes"
            assert stores < 500


@pytest.mark.slow
@pytest.mark.skipif(resources.NVCC is None, reason="no nvcc")
def test_the_build_takes_no_more_than_the_table_says():
    if resources.toolkit() != TABLE["nvcc"]:
        pytest.skip(f"the table was made with nvcc {TABLE['nvcc']}")
    assert not resources.worse(resources.measure([int(arch) for arch in MEASURED]), TABLE)


@pytest.mark.slow
@pytest.mark.skipif(resources.NVCC is None, reason="no nvcc")
@pytest.mark.parametrize("file", resources.FILES)
def test_host_code_calls_no_function_of_the_device(file):
    assert not resources.calls_device_code(file)

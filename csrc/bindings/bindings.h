// What the binding files share. csrc/bindings/ is the Python face of the native core and the only place that knows
// pybind11: raw addresses, sizes, strides and type codes in, nothing allocated, no torch. otkd_fast/ops/ makes every
// operand contiguous and every size right before it calls; a null address (0) stands for an operand that is absent or
// not wanted.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "otkd_fast/dispatch.h"

namespace otkd_fast {

using Address = uintptr_t;
enum class DType : int { float32 = 0, float64 = 1 };

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Calls `body(T{})` with the type that the code stands for, without the interpreter lock.
template <class Body>
auto with_type(int dtype, Body body) {
    pybind11::gil_scoped_release unlocked;
    if (dtype == static_cast<int>(DType::float32)) return body(float{});
    if (dtype == static_cast<int>(DType::float64)) return body(double{});
    throw std::invalid_argument("dtype code must be 0 (float32) or 1 (float64), got " + std::to_string(dtype));
}

// One function a file: it adds the family's functions to the module.
void bind_cost_matrix(pybind11::module_& module);
void bind_sinkhorn(pybind11::module_& module);
void bind_sinkhorn_shared(pybind11::module_& module);
void bind_sinkhorn_ragged(pybind11::module_& module);
void bind_sinkhorn_points(pybind11::module_& module);
void bind_sinkd(pybind11::module_& module);
void bind_gaussian(pybind11::module_& module);
void bind_moments(pybind11::module_& module);
void bind_polar(pybind11::module_& module);
void bind_sqrtm(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);         // where OTKD_FAST_WITH_CUDA is defined
void bind_cuda_sinkhorn(pybind11::module_& module);  // called by bind_cuda

}  // namespace otkd_fast

// The Python face of the native core, and the only file that knows pybind11: raw addresses, sizes, strides and type
// codes in, nothing allocated, no torch. otkd_fast/ops/ makes every operand contiguous and every size right before it
// calls; a null address (0) stands for an operand that is absent or not wanted.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "otkd_fast/dispatch.h"
#include "otkd_fast/sinkd.h"
#include "otkd_fast/threads.h"
#ifdef OTKD_FAST_WITH_CUDA
#include "otkd_fast/device_info.h"
#endif

namespace py = pybind11;

#ifndef OTKD_FAST_VERSION
#define OTKD_FAST_VERSION "unknown"
#endif
#ifndef OTKD_FAST_COMPILER
#define OTKD_FAST_COMPILER "unknown"
#endif

namespace otkd_fast {
namespace {

using Address = uintptr_t;
enum class DType : int { float32 = 0, float64 = 1 };

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Calls `body(T{})` with the type that the code stands for, without the interpreter lock.
template <class Body>
auto with_type(int dtype, Body body) {
    py::gil_scoped_release unlocked;
    if (dtype == static_cast<int>(DType::float32)) return body(float{});
    if (dtype == static_cast<int>(DType::float64)) return body(double{});
    throw std::invalid_argument("dtype code must be 0 (float32) or 1 (float64), got " + std::to_string(dtype));
}

template <class T>
CostMatrixArgs<T> cost_matrix_args(Address x, Address y, Address cost, Address workspace, int64_t batch, int64_t n,
                                   int64_t m, int64_t d, int64_t x_batch_stride, int64_t y_batch_stride, int metric,
                                   double temperature_x, double temperature_y, int threads) {
    CostMatrixArgs<T> args{};
    args.x = pointer<T>(x);
    args.y = pointer<T>(y);
    args.cost = pointer<T>(cost);
    args.workspace = pointer<T>(workspace);
    args.batch = batch;
    args.n = n;
    args.m = m;
    args.d = d;
    args.x_batch_stride = x_batch_stride;
    args.y_batch_stride = y_batch_stride;
    args.metric = static_cast<Metric>(metric);
    args.temperature_x = temperature_x;
    args.temperature_y = temperature_y;
    args.threads = threads;
    return args;
}

int64_t cost_matrix_workspace_elements(int dtype, int64_t batch, int64_t n, int64_t m, int64_t d, int metric,
                                       double temperature_x, double temperature_y, bool backward) {
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        return cost_matrix_workspace(
            cost_matrix_args<T>(0, 0, 0, 0, batch, n, m, d, 0, 0, metric, temperature_x, temperature_y, 1), backward);
    });
}

void cost_matrix_fwd(int dtype, Address x, Address y, Address cost, Address workspace, int64_t batch, int64_t n,
                     int64_t m, int64_t d, int64_t x_batch_stride, int64_t y_batch_stride, int metric,
                     double temperature_x, double temperature_y, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        kernels().of<T>().cost_matrix_fwd(cost_matrix_args<T>(x, y, cost, workspace, batch, n, m, d, x_batch_stride,
                                                              y_batch_stride, metric, temperature_x, temperature_y,
                                                              threads));
    });
}

void cost_matrix_bwd(int dtype, Address x, Address y, Address cost, Address grad_cost, Address grad_x, Address grad_y,
                     Address workspace, int64_t batch, int64_t n, int64_t m, int64_t d, int64_t x_batch_stride,
                     int64_t y_batch_stride, int metric, double temperature_x, double temperature_y, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        CostMatrixArgs<T> args = cost_matrix_args<T>(x, y, cost, workspace, batch, n, m, d, x_batch_stride,
                                                     y_batch_stride, metric, temperature_x, temperature_y, threads);
        args.grad_cost = pointer<T>(grad_cost);
        args.grad_x = pointer<T>(grad_x);
        args.grad_y = pointer<T>(grad_y);
        kernels().of<T>().cost_matrix_bwd(args);
    });
}

template <class T>
SinkhornArgs<T> sinkhorn_args(Address cost, Address a, Address b, Address history, Address workspace, int64_t batch,
                              int64_t n, int64_t m, int64_t num_iters, int64_t kept, double epsilon, int threads) {
    SinkhornArgs<T> args{};
    args.cost = pointer<T>(cost);
    args.a = pointer<T>(a);
    args.b = pointer<T>(b);
    args.history = pointer<double>(history);
    args.workspace = pointer<unsigned char>(workspace);
    args.batch = batch;
    args.n = n;
    args.m = m;
    args.num_iters = num_iters;
    args.kept = kept;
    args.epsilon = epsilon;
    args.threads = threads;
    return args;
}

int64_t sinkhorn_workspace_bytes(int dtype, int64_t batch, int64_t n, int64_t m, int64_t num_iters, int threads,
                                 bool backward) {
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        const SinkhornArgs<T> args = sinkhorn_args<T>(0, 0, 0, 0, 0, batch, n, m, num_iters, 0, 1.0, threads);
        return kernels().of<T>().sinkhorn_workspace_bytes(args, backward);
    });
}

void sinkhorn_fwd(int dtype, Address cost, Address a, Address b, Address history, Address workspace, int64_t batch,
                  int64_t n, int64_t m, int64_t num_iters, int64_t kept, double epsilon, int threads,
                  Address transport_cost, Address regularized_cost, Address f, Address g, Address marginal_error) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        SinkhornArgs<T> args =
            sinkhorn_args<T>(cost, a, b, history, workspace, batch, n, m, num_iters, kept, epsilon, threads);
        args.transport_cost = pointer<T>(transport_cost);
        args.regularized_cost = pointer<T>(regularized_cost);
        args.f = pointer<T>(f);
        args.g = pointer<T>(g);
        args.marginal_error = pointer<T>(marginal_error);
        kernels().of<T>().sinkhorn_fwd(args);
    });
}

void sinkhorn_bwd(int dtype, Address cost, Address a, Address b, Address history, Address workspace, int64_t batch,
                  int64_t n, int64_t m, int64_t num_iters, int64_t kept, double epsilon, int threads, int gradient,
                  Address grad_transport_cost, Address grad_regularized_cost, Address grad_f, Address grad_g,
                  Address grad_cost, Address grad_a, Address grad_b) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        SinkhornArgs<T> args =
            sinkhorn_args<T>(cost, a, b, history, workspace, batch, n, m, num_iters, kept, epsilon, threads);
        args.gradient = static_cast<Gradient>(gradient);
        args.grad_transport_cost = pointer<T>(grad_transport_cost);
        args.grad_regularized_cost = pointer<T>(grad_regularized_cost);
        args.grad_f = pointer<T>(grad_f);
        args.grad_g = pointer<T>(grad_g);
        args.grad_cost = pointer<T>(grad_cost);
        args.grad_a = pointer<T>(grad_a);
        args.grad_b = pointer<T>(grad_b);
        kernels().of<T>().sinkhorn_bwd(args);
    });
}

template <class T>
SinkdArgs<T> sinkd_args(int64_t batch, int64_t n, int64_t m, int64_t d, int64_t num_iters, double temperature_rows,
                        double temperature_columns, double epsilon, double scale, int threads, Address grad_rows,
                        Address grad_columns) {
    SinkdArgs<T> args{};
    args.batch = batch;
    args.n = n;
    args.m = m;
    args.d = d;
    args.num_iters = num_iters;
    args.temperature_rows = temperature_rows;
    args.temperature_columns = temperature_columns;
    args.epsilon = epsilon;
    args.scale = scale;
    args.threads = threads;
    args.grad_rows = pointer<T>(grad_rows);
    args.grad_columns = pointer<T>(grad_columns);
    return args;
}

int64_t sinkd_workspace(int dtype, int64_t batch, int64_t n, int64_t m, int64_t d, int64_t num_iters,
                        double temperature_rows, double temperature_columns, double epsilon, double scale, int threads,
                        Address grad_rows, Address grad_columns) {
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        return sinkd_workspace_bytes(sinkd_args<T>(batch, n, m, d, num_iters, temperature_rows, temperature_columns,
                                                   epsilon, scale, threads, grad_rows, grad_columns));
    });
}

void sinkd_call(int dtype, Address rows, Address columns, Address weights_rows, Address weights_columns,
                Address workspace, Address transport_cost, int64_t batch, int64_t n, int64_t m, int64_t d,
                int64_t num_iters, double temperature_rows, double temperature_columns, double epsilon, double scale,
                int threads, Address grad_rows, Address grad_columns) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        SinkdArgs<T> args = sinkd_args<T>(batch, n, m, d, num_iters, temperature_rows, temperature_columns, epsilon,
                                          scale, threads, grad_rows, grad_columns);
        args.rows = pointer<T>(rows);
        args.columns = pointer<T>(columns);
        args.weights_rows = pointer<T>(weights_rows);
        args.weights_columns = pointer<T>(weights_columns);
        args.workspace = pointer<unsigned char>(workspace);
        args.transport_cost = pointer<T>(transport_cost);
        sinkd_value_and_grad(args);
    });
}

py::dict build_info() {
    py::dict info;
    info["version"] = OTKD_FAST_VERSION;
    info["compiler"] = OTKD_FAST_COMPILER;
#ifdef OTKD_FAST_WITH_CUDA
    info["cuda"] = OTKD_FAST_CUDA_VERSION;
    info["cuda_architectures"] = OTKD_FAST_CUDA_ARCHITECTURES;
#else
    info["cuda"] = py::none();
    info["cuda_architectures"] = py::none();
#endif
#if defined(__x86_64__)
    info["instruction_sets"] = std::vector<std::string>{"baseline", "avx2", "avx512"};
#else
    info["instruction_sets"] = std::vector<std::string>{"baseline"};
#endif
    return info;
}

#ifdef OTKD_FAST_WITH_CUDA
py::dict cuda_info_dict() {
    const CudaInfo found = cuda_info();
    py::dict info;
    info["runtime_version"] = found.runtime_version;
    info["driver_version"] = found.driver_version;
    info["error"] = found.error;
    py::list devices;
    for (const CudaDevice& device : found.devices) {
        py::dict entry;
        entry["name"] = device.name;
        entry["capability"] = py::make_tuple(device.major, device.minor);
        entry["total_memory"] = device.total_memory;
        entry["processors"] = device.processors;
        devices.append(entry);
    }
    info["devices"] = devices;
    return info;
}
#endif

}  // namespace
}  // namespace otkd_fast

PYBIND11_MODULE(_C, module) {
    using namespace otkd_fast;
    module.doc() = "Native core of otkd_fast: raw addresses in, called by otkd_fast.ops only.";
    module.def("build_info", &build_info);
    module.def("instruction_sets", &instruction_sets, "Instruction sets that this processor can run.");
    module.def("instruction_set", [] { return kernels().name; }, "The instruction set in use.");
    module.def("set_instruction_set", [](const std::string& name) {
        if (!set_instruction_set(name)) {
            std::string known;
            for (const std::string& set : instruction_sets()) known += (known.empty() ? "" : ", ") + set;
            throw std::invalid_argument("instruction set must be one of " + known + " on this processor, got " + name);
        }
    });
    module.def("thread_source", &thread_source);
#ifdef OTKD_FAST_WITH_CUDA
    module.def("cuda_info", &cuda_info_dict);
#endif
    module.def("cost_matrix_workspace", &cost_matrix_workspace_elements);
    module.def("cost_matrix_fwd", &cost_matrix_fwd);
    module.def("cost_matrix_bwd", &cost_matrix_bwd);
    module.def("sinkhorn_workspace", &sinkhorn_workspace_bytes);
    module.def("sinkhorn_fwd", &sinkhorn_fwd);
    module.def("sinkhorn_bwd", &sinkhorn_bwd);
    module.def("sinkd_workspace", &sinkd_workspace);
    module.def("sinkd_value_and_grad", &sinkd_call);
}

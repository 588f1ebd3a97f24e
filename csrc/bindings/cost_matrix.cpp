#include "bindings.h"

namespace otkd_fast {
namespace {

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

}  // namespace

void bind_cost_matrix(pybind11::module_& module) {
    module.def("cost_matrix_workspace", &cost_matrix_workspace_elements);
    module.def("cost_matrix_fwd", &cost_matrix_fwd);
    module.def("cost_matrix_bwd", &cost_matrix_bwd);
}

}  // namespace otkd_fast

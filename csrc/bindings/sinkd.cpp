#include "bindings.h"
#include "otkd_fast/sinkd.h"

namespace otkd_fast {
namespace {

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

}  // namespace

void bind_sinkd(pybind11::module_& module) {
    module.def("sinkd_workspace", &sinkd_workspace);
    module.def("sinkd_value_and_grad", &sinkd_call);
}

}  // namespace otkd_fast

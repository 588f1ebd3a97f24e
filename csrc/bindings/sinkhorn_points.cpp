#include "bindings.h"

namespace otkd_fast {
namespace {

template <class T>
SinkhornPointsArgs<T> points_args(Address x, Address y, Address a, Address b, Address history, Address workspace,
                                  int64_t batch, int64_t n, int64_t m, int64_t d, int64_t x_batch_stride,
                                  int64_t y_batch_stride, int metric, bool stored, int64_t num_iters, int64_t kept,
                                  double epsilon, int threads) {
    SinkhornPointsArgs<T> args{};
    args.x = pointer<T>(x);
    args.y = pointer<T>(y);
    args.a = pointer<T>(a);
    args.b = pointer<T>(b);
    args.history = pointer<double>(history);
    args.workspace = pointer<unsigned char>(workspace);
    args.batch = batch;
    args.n = n;
    args.m = m;
    args.d = d;
    args.x_batch_stride = x_batch_stride;
    args.y_batch_stride = y_batch_stride;
    args.metric = static_cast<Metric>(metric);
    args.stored = stored;
    args.num_iters = num_iters;
    args.kept = kept;
    args.epsilon = epsilon;
    args.threads = threads;
    return args;
}

int64_t workspace_bytes(int dtype, int64_t batch, int64_t n, int64_t m, int64_t d, int metric, bool stored,
                        int64_t num_iters, int threads, bool backward, int gradient, bool need_x, bool need_y) {
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        SinkhornPointsArgs<T> args = points_args<T>(0, 0, 0, 0, 0, 0, batch, n, m, d, 0, 0, metric, stored, num_iters, 0,
                                                    1.0, threads);
        args.gradient = static_cast<Gradient>(gradient);
        args.need_x = need_x;
        args.need_y = need_y;
        return kernels().of<T>().sinkhorn_points_workspace_bytes(args, backward);
    });
}

void forward(int dtype, Address x, Address y, Address a, Address b, Address history, Address workspace, int64_t batch,
             int64_t n, int64_t m, int64_t d, int64_t x_batch_stride, int64_t y_batch_stride, int metric, bool stored,
             int64_t num_iters, int64_t kept, double epsilon, int threads, Address transport_cost,
             Address regularized_cost, Address f, Address g, Address marginal_error) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        SinkhornPointsArgs<T> args = points_args<T>(x, y, a, b, history, workspace, batch, n, m, d, x_batch_stride,
                                                    y_batch_stride, metric, stored, num_iters, kept, epsilon, threads);
        args.transport_cost = pointer<T>(transport_cost);
        args.regularized_cost = pointer<T>(regularized_cost);
        args.f = pointer<T>(f);
        args.g = pointer<T>(g);
        args.marginal_error = pointer<T>(marginal_error);
        kernels().of<T>().sinkhorn_points_fwd(args);
    });
}

void backward(int dtype, Address x, Address y, Address a, Address b, Address history, Address workspace, int64_t batch,
              int64_t n, int64_t m, int64_t d, int64_t x_batch_stride, int64_t y_batch_stride, int metric, bool stored,
              int64_t num_iters, int64_t kept, double epsilon, int threads, int gradient, Address grad_transport_cost,
              Address grad_regularized_cost, Address grad_f, Address grad_g, bool need_x, bool need_y, Address grad_x,
              Address grad_y, Address grad_a, Address grad_b) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        SinkhornPointsArgs<T> args = points_args<T>(x, y, a, b, history, workspace, batch, n, m, d, x_batch_stride,
                                                    y_batch_stride, metric, stored, num_iters, kept, epsilon, threads);
        args.gradient = static_cast<Gradient>(gradient);
        args.grad_transport_cost = pointer<T>(grad_transport_cost);
        args.grad_regularized_cost = pointer<T>(grad_regularized_cost);
        args.grad_f = pointer<T>(grad_f);
        args.grad_g = pointer<T>(grad_g);
        args.need_x = need_x;
        args.need_y = need_y;
        args.grad_x = pointer<T>(grad_x);
        args.grad_y = pointer<T>(grad_y);
        args.grad_a = pointer<T>(grad_a);
        args.grad_b = pointer<T>(grad_b);
        kernels().of<T>().sinkhorn_points_bwd(args);
    });
}

template <class T>
PlanApplyArgs<T> apply_args(Address x, Address y, Address f, Address g, Address v, Address out, Address workspace,
                            int64_t batch, int64_t n, int64_t m, int64_t d, int64_t columns, int64_t x_batch_stride,
                            int64_t y_batch_stride, int metric, double epsilon, int threads) {
    PlanApplyArgs<T> args{};
    args.x = pointer<T>(x);
    args.y = pointer<T>(y);
    args.f = pointer<T>(f);
    args.g = pointer<T>(g);
    args.v = pointer<T>(v);
    args.out = pointer<T>(out);
    args.workspace = pointer<unsigned char>(workspace);
    args.batch = batch;
    args.n = n;
    args.m = m;
    args.d = d;
    args.columns = columns;
    args.x_batch_stride = x_batch_stride;
    args.y_batch_stride = y_batch_stride;
    args.metric = static_cast<Metric>(metric);
    args.epsilon = epsilon;
    args.threads = threads;
    return args;
}

int64_t apply_workspace_bytes(int dtype, int64_t n, int64_t m, int64_t d, int64_t columns, int metric, int threads) {
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        return kernels().of<T>().plan_apply_workspace_bytes(
            apply_args<T>(0, 0, 0, 0, 0, 0, 0, 1, n, m, d, columns, 0, 0, metric, 1.0, threads));
    });
}

void apply(int dtype, Address x, Address y, Address f, Address g, Address v, Address out, Address workspace,
           int64_t batch, int64_t n, int64_t m, int64_t d, int64_t columns, int64_t x_batch_stride,
           int64_t y_batch_stride, int metric, double epsilon, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        kernels().of<T>().plan_apply(apply_args<T>(x, y, f, g, v, out, workspace, batch, n, m, d, columns, x_batch_stride,
                                                   y_batch_stride, metric, epsilon, threads));
    });
}

}  // namespace

void bind_sinkhorn_points(pybind11::module_& module) {
    module.def("sinkhorn_points_workspace", &workspace_bytes);
    module.def("sinkhorn_points_fwd", &forward);
    module.def("sinkhorn_points_bwd", &backward);
    module.def("plan_apply_workspace", &apply_workspace_bytes);
    module.def("plan_apply", &apply);
}

}  // namespace otkd_fast

#include "bindings.h"

namespace otkd_fast {
namespace {

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

}  // namespace

void bind_sinkhorn(pybind11::module_& module) {
    module.def("sinkhorn_workspace", &sinkhorn_workspace_bytes);
    module.def("sinkhorn_fwd", &sinkhorn_fwd);
    module.def("sinkhorn_bwd", &sinkhorn_bwd);
}

}  // namespace otkd_fast

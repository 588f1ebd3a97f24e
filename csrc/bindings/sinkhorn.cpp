#include <tuple>

#include "bindings.h"

namespace otkd_fast {
namespace {

// What every call says of its problems, as `problems` of ops/sinkhorn.py builds it: dtype; cost, a, b, initial_f, initial_g,
// history, workspace; batch, n, m, num_iters; keep; epsilon, tol, relaxation, penalty_a, penalty_b; threads
using Problems = std::tuple<int, Address, Address, Address, Address, Address, Address, Address, int64_t, int64_t, int64_t,
                            int64_t, int, double, double, double, double, double, int>;
// transport_cost, regularized_cost, f, g, marginal_error, iterations
using Outputs = std::tuple<Address, Address, Address, Address, Address, Address>;
// of transport_cost, regularized_cost, f, g; then those of cost, a, b
using Gradients = std::tuple<Address, Address, Address, Address, Address, Address, Address>;

int dtype_of(const Problems& problems) { return std::get<0>(problems); }

template <class T>
SinkhornArgs<T> sinkhorn_args(const Problems& problems) {
    const auto& [dtype, cost, a, b, initial_f, initial_g, history, workspace, batch, n, m, num_iters, keep, epsilon, tol,
                 relaxation, penalty_a, penalty_b, threads] = problems;
    (void)dtype;
    SinkhornArgs<T> args{};
    args.cost = pointer<T>(cost);
    args.a = pointer<T>(a);
    args.b = pointer<T>(b);
    args.initial_f = pointer<T>(initial_f);
    args.initial_g = pointer<T>(initial_g);
    args.history = pointer<double>(history);
    args.workspace = pointer<unsigned char>(workspace);
    args.batch = batch;
    args.n = n;
    args.m = m;
    args.num_iters = num_iters;
    args.keep = static_cast<Keep>(keep);
    args.epsilon = epsilon;
    args.tol = tol;
    args.relaxation = relaxation;
    args.penalty_a = penalty_a;
    args.penalty_b = penalty_b;
    args.threads = threads;
    return args;
}

// `gradient` negative: of the forward.
int64_t sinkhorn_workspace_bytes(const Problems& problems, int gradient) {
    return with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornArgs<T> args = sinkhorn_args<T>(problems);
        if (gradient >= 0) args.gradient = static_cast<Gradient>(gradient);
        return kernels().of<T>().sinkhorn_workspace_bytes(args, gradient >= 0);
    });
}

void sinkhorn_fwd(const Problems& problems, const Outputs& outputs) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornArgs<T> args = sinkhorn_args<T>(problems);
        args.transport_cost = pointer<T>(std::get<0>(outputs));
        args.regularized_cost = pointer<T>(std::get<1>(outputs));
        args.f = pointer<T>(std::get<2>(outputs));
        args.g = pointer<T>(std::get<3>(outputs));
        args.marginal_error = pointer<T>(std::get<4>(outputs));
        args.iterations = pointer<int64_t>(std::get<5>(outputs));
        kernels().of<T>().sinkhorn_fwd(args);
    });
}

void sinkhorn_bwd(const Problems& problems, int gradient, const Gradients& gradients) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornArgs<T> args = sinkhorn_args<T>(problems);
        args.gradient = static_cast<Gradient>(gradient);
        args.grad_transport_cost = pointer<T>(std::get<0>(gradients));
        args.grad_regularized_cost = pointer<T>(std::get<1>(gradients));
        args.grad_f = pointer<T>(std::get<2>(gradients));
        args.grad_g = pointer<T>(std::get<3>(gradients));
        args.grad_cost = pointer<T>(std::get<4>(gradients));
        args.grad_a = pointer<T>(std::get<5>(gradients));
        args.grad_b = pointer<T>(std::get<6>(gradients));
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

// What the binding files of the Sinkhorn family share: the arguments of every call.
#pragma once
#include <tuple>

#include "bindings.h"

namespace otkd_fast {

// What every call says of its problems, as `problems` of ops/sinkhorn.py builds it: dtype; cost, a, b, initial_f, initial_g,
// history, workspace; batch, n, m, num_iters; keep; epsilon, tol, relaxation, penalty_a, penalty_b; threads
using Problems = std::tuple<int, Address, Address, Address, Address, Address, Address, Address, int64_t, int64_t, int64_t,
                            int64_t, int, double, double, double, double, double, int>;
// transport_cost, regularized_cost, f, g, marginal_error, iterations
using Outputs = std::tuple<Address, Address, Address, Address, Address, Address>;
// of transport_cost, regularized_cost, f, g; then those of cost, a, b
using Gradients = std::tuple<Address, Address, Address, Address, Address, Address, Address>;

inline int dtype_of(const Problems& problems) { return std::get<0>(problems); }

template <class T>
void set_problems(SinkhornArgs<T>& args, const Problems& problems) {
    const auto& [dtype, cost, a, b, initial_f, initial_g, history, workspace, batch, n, m, num_iters, keep, epsilon, tol,
                 relaxation, penalty_a, penalty_b, threads] = problems;
    (void)dtype;
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
    args.keep = static_cast<Keep>(keep & 7);
    args.together = (keep & 8) != 0;
    args.epsilon = epsilon;
    args.tol = tol;
    args.relaxation = relaxation;
    args.penalty_a = penalty_a;
    args.penalty_b = penalty_b;
    args.threads = threads;
}

template <class T>
void set_outputs(SinkhornArgs<T>& args, const Outputs& outputs) {
    args.transport_cost = pointer<T>(std::get<0>(outputs));
    args.regularized_cost = pointer<T>(std::get<1>(outputs));
    args.f = pointer<T>(std::get<2>(outputs));
    args.g = pointer<T>(std::get<3>(outputs));
    args.marginal_error = pointer<T>(std::get<4>(outputs));
    args.iterations = pointer<int64_t>(std::get<5>(outputs));
}

template <class T>
void set_gradients(SinkhornArgs<T>& args, const Gradients& gradients) {
    args.grad_transport_cost = pointer<T>(std::get<0>(gradients));
    args.grad_regularized_cost = pointer<T>(std::get<1>(gradients));
    args.grad_f = pointer<T>(std::get<2>(gradients));
    args.grad_g = pointer<T>(std::get<3>(gradients));
    args.grad_cost = pointer<T>(std::get<4>(gradients));
    args.grad_a = pointer<T>(std::get<5>(gradients));
    args.grad_b = pointer<T>(std::get<6>(gradients));
}

// `gradient` negative: of the forward.
template <class T>
SinkhornArgs<T> solve_args(const Problems& problems, int gradient) {
    SinkhornArgs<T> args{};
    set_problems(args, problems);
    if (gradient >= 0) args.gradient = static_cast<Gradient>(gradient);
    return args;
}

}  // namespace otkd_fast

// What the binding files of Sinkhorn between points share.
#pragma once
#include "otkd_fast/sinkhorn_points.h"
#include "sinkhorn_problems.h"

namespace otkd_fast {

// x, y; d; metric. `cost` of the problems is not used.
using Points = std::tuple<Address, Address, int64_t, int>;
// of transport_cost, regularized_cost, f, g; then those of x, y, a, b
using PointGradients = std::tuple<Address, Address, Address, Address, Address, Address, Address, Address>;
// dtype; f, g, v, out, workspace; batch, n, m, columns; epsilon; threads
using Products = std::tuple<int, Address, Address, Address, Address, Address, int64_t, int64_t, int64_t, int64_t, double, int>;

template <class Args>
void set_points(Args& args, const Points& points) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(args.x)>>;
    args.x = pointer<T>(std::get<0>(points));
    args.y = pointer<T>(std::get<1>(points));
    args.d = std::get<2>(points);
    args.metric = static_cast<Metric>(std::get<3>(points));
}

// `gradient` negative: of the forward.
template <class T>
SinkhornPointsArgs<T> points_args(const Points& points, const Problems& problems, int gradient) {
    SinkhornPointsArgs<T> args{};
    set_problems(args, problems);
    set_points(args, points);
    if (gradient >= 0) args.gradient = static_cast<Gradient>(gradient);
    return args;
}

template <class T>
void set_gradients(SinkhornPointsArgs<T>& args, const PointGradients& gradients) {
    args.grad_transport_cost = pointer<T>(std::get<0>(gradients));
    args.grad_regularized_cost = pointer<T>(std::get<1>(gradients));
    args.grad_f = pointer<T>(std::get<2>(gradients));
    args.grad_g = pointer<T>(std::get<3>(gradients));
    args.grad_x = pointer<T>(std::get<4>(gradients));
    args.grad_y = pointer<T>(std::get<5>(gradients));
    args.grad_a = pointer<T>(std::get<6>(gradients));
    args.grad_b = pointer<T>(std::get<7>(gradients));
}

template <class T>
PlanApplyArgs<T> apply_args(const Points& points, const Products& products) {
    PlanApplyArgs<T> args{};
    set_points(args, points);
    Address f, g, v, out, workspace;
    int dtype;
    std::tie(dtype, f, g, v, out, workspace, args.batch, args.n, args.m, args.columns, args.epsilon, args.threads) = products;
    args.f = pointer<T>(f);
    args.g = pointer<T>(g);
    args.v = pointer<T>(v);
    args.out = pointer<T>(out);
    args.workspace = pointer<unsigned char>(workspace);
    return args;
}

}  // namespace otkd_fast

#include "sinkhorn_problems.h"

namespace otkd_fast {
namespace {

// x, y; d; metric. `cost` of the problems is not used.
using Points = std::tuple<Address, Address, int64_t, int>;
// of transport_cost, regularized_cost, f, g; then those of x, y, a, b
using Gradients = std::tuple<Address, Address, Address, Address, Address, Address, Address, Address>;

template <class Args>
void set_points(Args& args, const Points& points) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(args.x)>>;
    args.x = pointer<T>(std::get<0>(points));
    args.y = pointer<T>(std::get<1>(points));
    args.d = std::get<2>(points);
    args.metric = static_cast<Metric>(std::get<3>(points));
}

template <class T>
SinkhornPointsArgs<T> points_args(const Points& points, const Problems& problems, bool stored) {
    SinkhornPointsArgs<T> args{};
    set_problems(args, problems);
    set_points(args, points);
    args.stored = stored;
    return args;
}

// `gradient` negative: of the forward.
int64_t workspace_bytes(const Points& points, const Problems& problems, bool stored, int gradient, bool need_x,
                        bool need_y) {
    return with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornPointsArgs<T> args = points_args<T>(points, problems, stored);
        if (gradient >= 0) args.gradient = static_cast<Gradient>(gradient);
        args.need_x = need_x;
        args.need_y = need_y;
        return kernels().of<T>().sinkhorn_points_workspace_bytes(args, gradient >= 0);
    });
}

void forward(const Points& points, const Problems& problems, bool stored, const Outputs& outputs) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornPointsArgs<T> args = points_args<T>(points, problems, stored);
        set_outputs(args, outputs);
        kernels().of<T>().sinkhorn_points_fwd(args);
    });
}

void backward(const Points& points, const Problems& problems, bool stored, int gradient, bool need_x, bool need_y,
              const Gradients& gradients) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornPointsArgs<T> args = points_args<T>(points, problems, stored);
        args.gradient = static_cast<Gradient>(gradient);
        args.need_x = need_x;
        args.need_y = need_y;
        args.grad_transport_cost = pointer<T>(std::get<0>(gradients));
        args.grad_regularized_cost = pointer<T>(std::get<1>(gradients));
        args.grad_f = pointer<T>(std::get<2>(gradients));
        args.grad_g = pointer<T>(std::get<3>(gradients));
        args.grad_x = pointer<T>(std::get<4>(gradients));
        args.grad_y = pointer<T>(std::get<5>(gradients));
        args.grad_a = pointer<T>(std::get<6>(gradients));
        args.grad_b = pointer<T>(std::get<7>(gradients));
        kernels().of<T>().sinkhorn_points_bwd(args);
    });
}

// dtype; f, g, v, out, workspace; batch, n, m, columns; epsilon; threads
using Products = std::tuple<int, Address, Address, Address, Address, Address, int64_t, int64_t, int64_t, int64_t, double, int>;

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

int64_t apply_workspace_bytes(const Points& points, const Products& products, bool backward, bool need_x, bool need_y) {
    return with_type(std::get<0>(products), [&](auto type) {
        using T = decltype(type);
        PlanApplyArgs<T> args = apply_args<T>(points, products);
        args.need_x = need_x;
        args.need_y = need_y;
        return kernels().of<T>().plan_apply_workspace_bytes(args, backward);
    });
}

void apply(const Points& points, const Products& products) {
    with_type(std::get<0>(products), [&](auto type) {
        using T = decltype(type);
        kernels().of<T>().plan_apply(apply_args<T>(points, products));
    });
}

void apply_bwd(const Points& points, const Products& products, bool need_x, bool need_y, Address grad_out, Address grad_x,
               Address grad_y) {
    with_type(std::get<0>(products), [&](auto type) {
        using T = decltype(type);
        PlanApplyArgs<T> args = apply_args<T>(points, products);
        args.need_x = need_x;
        args.need_y = need_y;
        args.grad_out = pointer<T>(grad_out);
        args.grad_x = pointer<T>(grad_x);
        args.grad_y = pointer<T>(grad_y);
        kernels().of<T>().plan_apply_bwd(args);
    });
}

}  // namespace

void bind_sinkhorn_points(pybind11::module_& module) {
    module.def("sinkhorn_points_workspace", &workspace_bytes);
    module.def("sinkhorn_points_fwd", &forward);
    module.def("sinkhorn_points_bwd", &backward);
    module.def("plan_apply_workspace", &apply_workspace_bytes);
    module.def("plan_apply", &apply);
    module.def("plan_apply_bwd", &apply_bwd);
}

}  // namespace otkd_fast

#include "points_problems.h"

namespace otkd_fast {
namespace {

// `gradient` negative: of the forward.
int64_t workspace_bytes(const Points& points, const Problems& problems, bool stored, int gradient, bool need_x,
                        bool need_y) {
    return with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornPointsArgs<T> args = points_args<T>(points, problems, gradient);
        args.stored = stored;
        args.need_x = need_x;
        args.need_y = need_y;
        return kernels().of<T>().sinkhorn_points_workspace_bytes(args, gradient >= 0);
    });
}

void forward(const Points& points, const Problems& problems, bool stored, const Outputs& outputs) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornPointsArgs<T> args = points_args<T>(points, problems, -1);
        args.stored = stored;
        set_outputs(args, outputs);
        kernels().of<T>().sinkhorn_points_fwd(args);
    });
}

void backward(const Points& points, const Problems& problems, bool stored, int gradient, bool need_x, bool need_y,
              const PointGradients& gradients) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornPointsArgs<T> args = points_args<T>(points, problems, gradient);
        args.stored = stored;
        args.need_x = need_x;
        args.need_y = need_y;
        set_gradients(args, gradients);
        kernels().of<T>().sinkhorn_points_bwd(args);
    });
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

// The parts of bindings/cuda.cpp that have Sinkhorn between points and by products of matrices.
#include "cuda_place.h"
#include "points_problems.h"

namespace otkd_fast {
namespace {

int64_t workspace_bytes(const Points& points, const Problems& problems, int gradient) {
    return with_type(dtype_of(problems), [&](auto type) {
        return cuda::sinkhorn_points_workspace_bytes(points_args<decltype(type)>(points, problems, gradient), gradient >= 0);
    });
}

void forward(const Points& points, const Problems& problems, const Outputs& outputs, const Place& place) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornPointsArgs<T> args = points_args<T>(points, problems, -1);
        set_outputs(args, outputs);
        cuda::sinkhorn_points_fwd(args, target_of(place));
    });
}

void backward(const Points& points, const Problems& problems, int gradient, const PointGradients& gradients, const Place& place) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornPointsArgs<T> args = points_args<T>(points, problems, gradient);
        set_gradients(args, gradients);
        cuda::sinkhorn_points_bwd(args, target_of(place));
    });
}

int64_t apply_workspace_bytes(const Points& points, const Products& products) {
    return with_type(std::get<0>(products), [&](auto type) {
        return cuda::plan_apply_workspace_bytes(apply_args<decltype(type)>(points, products));
    });
}

void apply(const Points& points, const Products& products, const Place& place) {
    with_type(std::get<0>(products), [&](auto type) {
        cuda::plan_apply(apply_args<decltype(type)>(points, products), target_of(place));
    });
}

void apply_bwd(const Points& points, const Products& products, Address grad_out, Address grad_x, Address grad_y, const Place& place) {
    with_type(std::get<0>(products), [&](auto type) {
        using T = decltype(type);
        PlanApplyArgs<T> args = apply_args<T>(points, products);
        args.grad_out = pointer<T>(grad_out);
        args.grad_x = pointer<T>(grad_x);
        args.grad_y = pointer<T>(grad_y);
        cuda::plan_apply_bwd(args, target_of(place));
    });
}

int64_t shared_workspace(const Problems& problems, int gradient) {
    return with_type(dtype_of(problems), [&](auto type) {
        return cuda::sinkhorn_shared_workspace_bytes(solve_args<decltype(type)>(problems, gradient), gradient >= 0);
    });
}

void shared_forward(const Problems& problems, const Outputs& outputs, const Place& place) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornArgs<T> args = solve_args<T>(problems, -1);
        set_outputs(args, outputs);
        cuda::sinkhorn_shared_fwd(args, target_of(place));
    });
}

void shared_backward(const Problems& problems, int gradient, const Gradients& gradients, const Place& place) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornArgs<T> args = solve_args<T>(problems, gradient);
        set_gradients(args, gradients);
        cuda::sinkhorn_shared_bwd(args, target_of(place));
    });
}

}  // namespace

void bind_cuda_sinkhorn(pybind11::module_& module) {
    module.def("sinkhorn_points_workspace", &workspace_bytes);
    module.def("sinkhorn_points_fwd", &forward);
    module.def("sinkhorn_points_bwd", &backward);
    module.def("sinkhorn_shared_workspace", &shared_workspace);
    module.def("sinkhorn_shared_fwd", &shared_forward);
    module.def("sinkhorn_shared_bwd", &shared_backward);
    module.def("plan_apply_workspace", &apply_workspace_bytes);
    module.def("plan_apply", &apply);
    module.def("plan_apply_bwd", &apply_bwd);
}

}  // namespace otkd_fast

#include <array>

#include <pybind11/stl.h>

#include "bindings.h"

namespace otkd_fast {
namespace {

using Axes = std::array<int64_t, kMomentAxes>;

template <class T>
FeatureMomentsArgs<T> moments_args(Address x, Address workspace, int64_t outer, const Axes& size, const Axes& grid,
                                   int64_t inner, bool unbiased, double eps, int threads) {
    FeatureMomentsArgs<T> args{};
    args.x = pointer<T>(x);
    args.workspace = pointer<unsigned char>(workspace);
    args.outer = outer;
    args.inner = inner;
    for (int axis = 0; axis < kMomentAxes; ++axis) {
        args.size[axis] = size[axis];
        args.grid[axis] = grid[axis];
    }
    args.unbiased = unbiased;
    args.eps = eps;
    args.threads = threads;
    return args;
}

int64_t feature_moments_workspace(int dtype, int64_t outer, const Axes& size, const Axes& grid, int64_t inner, bool unbiased,
                                  double eps, int threads) {
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        return feature_moments_workspace_bytes(moments_args<T>(0, 0, outer, size, grid, inner, unbiased, eps, threads));
    });
}

void feature_moments_fwd(int dtype, Address x, Address mean, Address std, Address workspace, int64_t outer, const Axes& size,
                         const Axes& grid, int64_t inner, bool unbiased, double eps, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        FeatureMomentsArgs<T> args = moments_args<T>(x, workspace, outer, size, grid, inner, unbiased, eps, threads);
        args.mean = pointer<T>(mean);
        args.std = pointer<T>(std);
        kernels().of<T>().feature_moments_fwd(args);
    });
}

void feature_moments_bwd(int dtype, Address x, Address grad_mean, Address grad_std, Address grad_x, Address workspace,
                         int64_t outer, const Axes& size, const Axes& grid, int64_t inner, bool unbiased, double eps,
                         int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        FeatureMomentsArgs<T> args = moments_args<T>(x, workspace, outer, size, grid, inner, unbiased, eps, threads);
        args.grad_mean = pointer<T>(grad_mean);
        args.grad_std = pointer<T>(grad_std);
        args.grad_x = pointer<T>(grad_x);
        kernels().of<T>().feature_moments_bwd(args);
    });
}

}  // namespace

void bind_moments(pybind11::module_& module) {
    module.def("feature_moments_workspace", &feature_moments_workspace);
    module.def("feature_moments_fwd", &feature_moments_fwd);
    module.def("feature_moments_bwd", &feature_moments_bwd);
}

}  // namespace otkd_fast

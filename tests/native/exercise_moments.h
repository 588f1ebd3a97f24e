// Feature moments, part of exercise_costs.cpp.
#pragma once
#include "exercise.h"

template <class T>
void feature_moments(int64_t outer, int64_t rows, int64_t columns, int64_t inner, int64_t grid, int threads) {
    FeatureMomentsArgs<T> args{};
    args.outer = outer;
    args.inner = inner;
    const int64_t size[kMomentAxes] = {1, rows, columns}, counts[kMomentAxes] = {1, grid, grid};
    for (int axis = 0; axis < kMomentAxes; ++axis) {
        args.size[axis] = size[axis];
        args.grid[axis] = counts[axis];
    }
    args.eps = 1e-3;
    args.threads = threads;
    std::vector<T> x = uniform<T>(outer * args.positions() * inner), grad_x(x.size());
    std::vector<T> mean(outer * args.cells() * inner), std_(mean.size());
    Workspace workspace(feature_moments_workspace_bytes(args));
    args.workspace = static_cast<unsigned char*>(workspace.memory);
    args.x = x.data();
    args.mean = mean.data();
    args.std = std_.data();
    kernels().of<T>().feature_moments_fwd(args);
    check_finite(mean, "mean");
    check_finite(std_, "std");
    args.grad_mean = mean.data();
    args.grad_std = std_.data();
    args.grad_x = grad_x.data();
    kernels().of<T>().feature_moments_bwd(args);
    check_finite(grad_x, "moments grad_x");
}

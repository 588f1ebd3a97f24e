// Means and standard deviations over windows of positions, and their adjoint, on the CPU. Everything contiguous.
#pragma once
#include <cstdint>

namespace otkd_fast {

constexpr int kMomentAxes = 3;

template <class T>
struct FeatureMomentsArgs {
    const T* x;          // (outer, size[0], size[1], size[2], inner)
    T *mean, *std;       // (outer, grid[0], grid[1], grid[2], inner); forward only
    const T *grad_mean, *grad_std;  // the same; null: 0; backward only
    T* grad_x;           // as x; backward only
    unsigned char* workspace;  // feature_moments_workspace_bytes bytes, 64-byte aligned
    int64_t outer, inner;
    int64_t size[kMomentAxes], grid[kMomentAxes];
    bool unbiased;       // variances divide by the number of positions - 1
    double eps;          // added to the variances
    int threads;

    int64_t positions() const { return size[0] * size[1] * size[2]; }
    int64_t cells() const { return grid[0] * grid[1] * grid[2]; }
};

template <class T>
int64_t feature_moments_workspace_bytes(const FeatureMomentsArgs<T>& args) {
    return args.threads * (2 * args.positions() + 2 * args.cells()) * 64;
}

#define OTKD_FAST_DECLARE_MOMENTS(ISA)                           \
    namespace ISA {                                              \
    void feature_moments_fwd(const FeatureMomentsArgs<float>&);  \
    void feature_moments_fwd(const FeatureMomentsArgs<double>&); \
    void feature_moments_bwd(const FeatureMomentsArgs<float>&);  \
    void feature_moments_bwd(const FeatureMomentsArgs<double>&); \
    }
OTKD_FAST_DECLARE_MOMENTS(baseline)
OTKD_FAST_DECLARE_MOMENTS(avx2)
OTKD_FAST_DECLARE_MOMENTS(avx512)

}  // namespace otkd_fast

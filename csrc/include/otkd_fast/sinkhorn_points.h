// Sinkhorn between points, on the CPU: the problem of sinkhorn.h with C_ij = metric(x_i, y_j), which is computed a block of
// rows at a time and never held as a whole. Everything contiguous.
#pragma once
#include "otkd_fast/cost_matrix.h"
#include "otkd_fast/sinkhorn.h"

namespace otkd_fast {

// `cost` and `grad_cost` of the base are not used.
template <class T>
struct SinkhornPointsArgs : SinkhornArgs<T> {
    const T* x;  // (batch, n, d)
    const T* y;  // (batch, m, d)
    int64_t d;
    Metric metric;
    bool stored;          // the kernel exp(-C / epsilon) may be kept in memory while the iterations run
    bool need_x, need_y;  // backward: which gradients are wanted
    T* grad_x;            // (batch, n, d)
    T* grad_y;            // (batch, m, d)
};

// out = P v for the plan P_ij = exp((f_i + g_j - C_ij) / epsilon), and the gradient of that by the points.
template <class T>
struct PlanApplyArgs {
    const T* x;  // (batch, n, d)
    const T* y;  // (batch, m, d)
    const T* f;  // (batch, n)
    const T* g;  // (batch, m)
    const T* v;  // (batch, m, columns)
    T* out;      // (batch, n, columns)
    unsigned char* workspace;  // plan_apply_workspace_bytes bytes, 64-byte aligned
    int64_t batch, n, m, d, columns;
    Metric metric;
    double epsilon;
    int threads;
    // backward
    bool need_x, need_y;
    const T* grad_out;  // (batch, n, columns)
    T* grad_x;          // (batch, n, d)
    T* grad_y;          // (batch, m, d)
};

#define OTKD_FAST_DECLARE_SINKHORN_POINTS(ISA)                                                \
    namespace ISA {                                                                           \
    void sinkhorn_points_fwd(const SinkhornPointsArgs<float>&);                               \
    void sinkhorn_points_fwd(const SinkhornPointsArgs<double>&);                              \
    void sinkhorn_points_bwd(const SinkhornPointsArgs<float>&);                               \
    void sinkhorn_points_bwd(const SinkhornPointsArgs<double>&);                              \
    int64_t sinkhorn_points_workspace_bytes(const SinkhornPointsArgs<float>&, bool backward); \
    int64_t sinkhorn_points_workspace_bytes(const SinkhornPointsArgs<double>&, bool backward); \
    void plan_apply(const PlanApplyArgs<float>&);                                             \
    void plan_apply(const PlanApplyArgs<double>&);                                            \
    void plan_apply_bwd(const PlanApplyArgs<float>&);                                         \
    void plan_apply_bwd(const PlanApplyArgs<double>&);                                        \
    int64_t plan_apply_workspace_bytes(const PlanApplyArgs<float>&, bool backward);           \
    int64_t plan_apply_workspace_bytes(const PlanApplyArgs<double>&, bool backward);          \
    }
OTKD_FAST_DECLARE_SINKHORN_POINTS(baseline)
OTKD_FAST_DECLARE_SINKHORN_POINTS(avx2)
OTKD_FAST_DECLARE_SINKHORN_POINTS(avx512)

}  // namespace otkd_fast

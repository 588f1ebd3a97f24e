// Pairwise cost matrices on the CPU. Sizes in elements; batch strides may be 0 (one operand shared by the batch).
#pragma once
#include <cstdint>

namespace otkd_fast {

enum class Metric : int { l1 = 0, l2 = 1, sqeuclidean = 2, cosine = 3 };

template <class T>
struct CostMatrixArgs {
    const T* x;             // (batch, n, d)
    const T* y;             // (batch, m, d)
    T* cost;                // (batch, n, m); read by the backward
    T* workspace;           // cost_matrix_workspace elements
    int64_t batch, n, m, d;
    int64_t x_batch_stride, y_batch_stride;
    Metric metric;
    double temperature_x, temperature_y;  // 0: rows as they are; t > 0: softmax(row / t)
    int threads;
    // backward only
    bool rows_ready;        // the workspace still holds the rows as the forward rewrote them
    const T* grad_cost;     // (batch, n, m)
    T* grad_x;              // (batch, n, d) or null
    T* grad_y;              // (batch, m, d) or null
};

// Elements of workspace that a call needs: rows rewritten (softmax, scaled) and, backward, the weights both ways round.
template <class T>
int64_t cost_matrix_workspace(const CostMatrixArgs<T>& args, bool backward) {
    const bool rewrites = args.metric == Metric::cosine || args.temperature_x > 0 || args.temperature_y > 0;
    int64_t size = rewrites ? (args.n + args.m) * args.d : 0;
    if (args.metric == Metric::cosine) size += 2 * (args.n + args.m) * (sizeof(double) / sizeof(T));
    if (backward) size += 2 * args.n * args.m;
    return args.batch * size;
}

#define OTKD_FAST_DECLARE_COST_MATRIX(ISA)                \
    namespace ISA {                                       \
    void cost_matrix_fwd(const CostMatrixArgs<float>&);   \
    void cost_matrix_fwd(const CostMatrixArgs<double>&);  \
    void cost_matrix_bwd(const CostMatrixArgs<float>&);   \
    void cost_matrix_bwd(const CostMatrixArgs<double>&);  \
    }
OTKD_FAST_DECLARE_COST_MATRIX(baseline)
OTKD_FAST_DECLARE_COST_MATRIX(avx2)
OTKD_FAST_DECLARE_COST_MATRIX(avx512)

}  // namespace otkd_fast

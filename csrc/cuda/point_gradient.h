// From dL/dC to the gradient of the points, a tile of costs at a time: for sinkhorn_points.cu and plan_apply.cu.
//   dL/dx_i = sum_j w_ij (x_i - y_j), l1: with signs in place of differences; weights w as in cost_matrix_tile.h
// A block has 32 own points and goes through the tiles of the others in order; the sums of a tile are added to the gradient in memory,
// by the same thread each time. 2 d operations (l1: 3 d) an entry for the costs and as many for the gradient.
#pragma once
#include "point_tile.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kWeightValues = kOther * kOwnLine;  // of S: the weights of a tile, (kOther, kOwnLine)

// A thread's entries of a tile into (kOther, kOwnLine).
template <class S>
OTKD_DEVICE void store_weights(const S (&entry)[4][4], S* weights) {
    OTKD_UNROLL
    for (int c = 0; c < 4; ++c) {
        const Four<S> column{{entry[0][c], entry[1][c], entry[2][c], entry[3][c]}};
        *reinterpret_cast<Four<S>*>(weights + (other_of_thread() + c) * kOwnLine + own_of_thread()) = column;
    }
}

// In place from dL/dC of the tile at (i0, j0) to the factors of (x_i - y_j). Cosine: along_i gets the part along x_i.
template <class S, class T>
OTKD_DEVICE void point_weights(const Clouds<T>& p, int64_t i0, int64_t j0, const S (&cost)[4][4], S (&by)[4][4], double (&along)[4]) {
    OTKD_UNROLL
    for (int r = 0; r < 4; ++r) {
        const int64_t i = i0 + own_of_thread() + r;
        OTKD_UNROLL
        for (int c = 0; c < 4; ++c) {
            const int64_t j = j0 + other_of_thread() + c;
            if (p.metric == Metric::sqeuclidean) by[r][c] *= 2;
            if (p.metric == Metric::l2) by[r][c] = cost[r][c] > 0 ? by[r][c] / cost[r][c] : S(0);
            if (p.metric != Metric::cosine) continue;
            const bool inside = i < p.count && j < p.others;
            const double own = inside ? p.own_norms[i] : 0.0, other = inside ? p.other_norms[j] : 0.0;
            const double grad = by[r][c], product = own * other;
            if (product != 0) along[r] += grad * ((1 / own - 1 / other) - cost[r][c] / own);
            by[r][c] = product != 0 ? static_cast<S>(grad / product) : S(0);
        }
    }
}

// The gradient of the own points gets the sums over a tile whose weights lie in `weights`, `first`: is set to them. `stage`: kStageValues.
template <bool kL1, class S, class T>
OTKD_DEVICE void add_tile(const Clouds<T>& p, int64_t i0, int64_t j0, const S* weights, S* stage, bool first, T* grad) {
    const int own0 = own_of_thread(), k_own = other_of_thread();  // here a thread has 4 points x 4 features
    for (int64_t k0 = 0; k0 < p.d; k0 += kOther) {
        S own[4][4], sums[4][4] = {};
        OTKD_UNROLL
        for (int r = 0; r < 4; ++r) {
            OTKD_UNROLL
            for (int c = 0; c < 4; ++c) {
                const int64_t i = i0 + own0 + r, k = k0 + k_own + c;
                own[r][c] = i < p.count && k < p.d ? static_cast<S>(p.own[i * p.d + k]) : S(0);
            }
        }
        for (int b0 = 0; b0 < kOther && j0 + b0 < p.others; b0 += kFeatures) {
            OTKD_UNROLL_4
            for (int e = thread_id(); e < kFeatures * kOther; e += kPointThreads) {
                const int b = e / kOther, k = e % kOther;
                const bool inside = j0 + b0 + b < p.others && k0 + k < p.d;
                stage[b * kOtherLine + k] = inside ? static_cast<S>(p.other[(j0 + b0 + b) * p.d + k0 + k]) : S(0);
            }
            barrier();
            const int count = static_cast<int>(smaller<int64_t>(kFeatures, p.others - j0 - b0));
            OTKD_ROLLED
            for (int b = 0; b < count; ++b) {
                const Four<S> w = four(weights + (b0 + b) * kOwnLine + own0), other = four(stage + b * kOtherLine + k_own);
                OTKD_UNROLL
                for (int r = 0; r < 4; ++r) {
                    OTKD_UNROLL
                    for (int c = 0; c < 4; ++c) {
                        const S delta = own[r][c] - other.v[c];
                        if (kL1) {
                            sums[r][c] += delta > 0 ? w.v[r] : delta < 0 ? -w.v[r] : delta;
                        } else {
                            sums[r][c] += w.v[r] * delta;
                        }
                    }
                }
            }
            barrier();
        }
        OTKD_UNROLL
        for (int r = 0; r < 4; ++r) {
            OTKD_UNROLL
            for (int c = 0; c < 4; ++c) {
                const int64_t i = i0 + own0 + r, k = k0 + k_own + c;
                if (i >= p.count || k >= p.d) continue;
                T& to = grad[i * p.d + k];
                to = first ? static_cast<T>(sums[r][c]) : to + static_cast<T>(sums[r][c]);
            }
        }
    }
}

// Cosine: the part along the own row, and back to the row as it came. `along`: of the thread's columns.
template <class T>
OTKD_DEVICE void finish_cosine(const Clouds<T>& p, int64_t i0, const double (&along)[4], const double* scales, T* grad) {
    OTKD_UNROLL
    for (int r = 0; r < 4; ++r) {
        const double total = row_sum(along[r]);
        const int64_t i = i0 + own_of_thread() + r;
        if (i >= p.count) continue;
        const double norm = p.own_norms[i];
        const T factor = static_cast<T>(norm > 0 ? total / norm : 0.0), back = static_cast<T>(scales[i]);
        for (int64_t k0 = other_of_thread(); k0 < p.d; k0 += kOther) {
            for (int64_t k = k0; k < k0 + 4 && k < p.d; ++k) grad[i * p.d + k] = (grad[i * p.d + k] + factor * p.own[i * p.d + k]) * back;
        }
    }
}

// The gradient (count, d) of the own points from i0 on; gradient_of(cost, j0, stage, by) tells dL/dC of a tile, by the whole block.
// `shared`: kStageValues + kWeightValues. `scales`: of the own rows, cosine.
template <class S, class T, class Gradient>
OTKD_DEVICE void point_gradient(const Clouds<T>& p, int64_t i0, const double* scales, S* shared, T* grad, Gradient gradient_of) {
    if (p.d == 0) return;
    S *stage = shared, *weights = shared + kStageValues;
    double along[4] = {};
    for (int64_t j0 = 0; j0 < p.others; j0 += kOther) {
        S cost[4][4], by[4][4] = {};
        tile_costs(p, i0, j0, stage, cost);
        gradient_of(cost, j0, stage, by);
        point_weights(p, i0, j0, cost, by, along);
        store_weights(by, weights);
        barrier();
        if (p.metric == Metric::l1) {
            add_tile<true>(p, i0, j0, weights, stage, j0 == 0, grad);
        } else {
            add_tile<false>(p, i0, j0, weights, stage, j0 == 0, grad);
        }
    }
    if (p.metric == Metric::cosine) finish_cosine(p, i0, along, scales, grad);
}

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

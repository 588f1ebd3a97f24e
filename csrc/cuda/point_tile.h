// A tile of costs between two sets of points, never a matrix of them: for sinkhorn_points.cu and plan_apply.cu. A block of
// 128 threads has 32 own x 64 other points, a thread 4 x 4 neighbours; 16 features at a time go through shared memory, by feature,
// so that a thread reads its 4 in one piece. Differences are formed first. Sums in S, over kSumDepth features, then over those.
#pragma once
#include "cost_matrix_tile.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kOwn = 32, kOther = 64, kFeatures = 16, kPointThreads = 128;
constexpr int kOwnLine = kOwn + 4, kOtherLine = kOther + 4;            // steps from feature to feature
constexpr int kStageValues = kFeatures * (kOwnLine + kOtherLine);      // of S, what point_sums needs

template <class S>
struct alignas(16) Four {
    S v[4];
};
template <class S>
OTKD_DEVICE Four<S> four(const S* at) {
    return *reinterpret_cast<const Four<S>*>(at);
}

// Who a thread of a tile is: rows 4 own() + r, columns 4 other() + c.
OTKD_DEVICE int own_of_thread() { return thread_id() / 16 * 4; }
OTKD_DEVICE int other_of_thread() { return thread_id() % 16 * 4; }

// The points that a sweep goes over. `flipped`: those of y are the own ones.
template <class T>
struct Clouds {
    const T *own, *other;                   // (count, d), (others, d), as they are compared
    const double *own_norms, *other_norms;  // cosine: of these rows
    int64_t count, others, d;
    Metric metric;

    OTKD_DEVICE Clouds(const Plan<T>& plan, int64_t index, bool flipped)
        : own_norms(nullptr), other_norms(nullptr), count(flipped ? plan.args.m : plan.args.n),
          others(flipped ? plan.args.n : plan.args.m), d(plan.args.d), metric(plan.args.metric) {
        const T *x = plan.x + index * plan.x_stride, *y = plan.y + index * plan.y_stride;
        own = flipped ? y : x;
        other = flipped ? x : y;
        if (metric != Metric::cosine) return;
        const double* norms = plan.norms + index * (count + others);
        own_norms = norms + (flipped ? plan.args.n : 0);
        other_norms = norms + (flipped ? 0 : plan.args.n);
    }
};

// Rows of d numbers each, `stride` apart.
template <class T>
struct Rows {
    const T* data;
    int64_t count, stride;
};

// `lines` rows from `first` on, features from k0 on, into (kFeatures, line); 0 beyond.
template <class S, class T>
OTKD_DEVICE void stage_rows(const Rows<T>& rows, int64_t d, int64_t first, int64_t k0, int lines, int line, S* to) {
    OTKD_UNROLL_4
    for (int e = thread_id(); e < lines * kFeatures; e += kPointThreads) {
        const int r = e / kFeatures, k = e % kFeatures;
        const bool inside = first + r < rows.count && k0 + k < d;
        to[k * line + r] = inside ? static_cast<S>(rows.data[(first + r) * rows.stride + k0 + k]) : S(0);
    }
}

enum class Form : int { absolute, square, product };

// Sums over the d features of |x - y|, (x - y)^2 or x y for the tile at (i0, j0).
template <Form kForm, class S, class T>
OTKD_DEVICE void point_sums(const Rows<T>& own, const Rows<T>& other, int64_t d, int64_t i0, int64_t j0, S* shared, S (&total)[4][4]) {
    S *own_rows = shared, *other_rows = shared + kFeatures * kOwnLine;
    constexpr bool kFolds = sizeof(S) == sizeof(float);  // double needs no second level
    S part[4][4] = {};
    OTKD_UNROLL
    for (int r = 0; r < 4; ++r) {
        OTKD_UNROLL
        for (int c = 0; c < 4; ++c) total[r][c] = 0;
    }
    for (int64_t k0 = 0; k0 < d; k0 += kFeatures) {
        stage_rows(own, d, i0, k0, kOwn, kOwnLine, own_rows);
        stage_rows(other, d, j0, k0, kOther, kOtherLine, other_rows);
        barrier();
        OTKD_UNROLL_4
        for (int k = 0; k < kFeatures; ++k) {
            const Four<S> x = four(own_rows + k * kOwnLine + own_of_thread()), y = four(other_rows + k * kOtherLine + other_of_thread());
            OTKD_UNROLL
            for (int r = 0; r < 4; ++r) {
                OTKD_UNROLL
                for (int c = 0; c < 4; ++c) {
                    S& sum = kFolds ? part[r][c] : total[r][c];
                    const S delta = x.v[r] - y.v[c];
                    if (kForm == Form::absolute) sum += delta < 0 ? -delta : delta;
                    if (kForm == Form::square) sum += delta * delta;
                    if (kForm == Form::product) sum += x.v[r] * y.v[c];
                }
            }
        }
        barrier();
        if (kFolds && (k0 % kSumDepth == kSumDepth - kFeatures || k0 + kFeatures >= d)) {
            OTKD_UNROLL
            for (int r = 0; r < 4; ++r) {
                OTKD_UNROLL
                for (int c = 0; c < 4; ++c) {
                    total[r][c] += part[r][c];
                    part[r][c] = 0;
                }
            }
        }
    }
}

// The cosine from the squared distance of rows that were scaled to norms in [1, 2): see cost_matrix.cu.
template <class S>
OTKD_DEVICE S cosine_of(S square, double nx, double ny) {
    const double gap = static_cast<double>(square) - (nx - ny) * (nx - ny);
    return nx * ny == 0 ? S(1) : static_cast<S>((gap < 0 ? 0 : gap) / (2 * nx * ny));
}

// The costs of the tile at (i0, j0), 4 x 4 a thread; beyond the points some number. `shared`: kStageValues. Ends with a barrier if d > 0.
template <class S, class T>
OTKD_DEVICE void tile_costs(const Clouds<T>& p, int64_t i0, int64_t j0, S* shared, S (&cost)[4][4]) {
    const Rows<T> own{p.own, p.count, p.d}, other{p.other, p.others, p.d};
    if (p.metric == Metric::l1) return point_sums<Form::absolute>(own, other, p.d, i0, j0, shared, cost);
    point_sums<Form::square>(own, other, p.d, i0, j0, shared, cost);
    if (p.metric == Metric::sqeuclidean) return;
    OTKD_UNROLL
    for (int r = 0; r < 4; ++r) {
        const int64_t i = i0 + own_of_thread() + r;
        OTKD_UNROLL
        for (int c = 0; c < 4; ++c) {
            const int64_t j = j0 + other_of_thread() + c;
            if (p.metric == Metric::l2) {
                cost[r][c] = sqrt(cost[r][c]);
            } else if (i < p.count && j < p.others) {
                cost[r][c] = cosine_of(cost[r][c], p.own_norms[i], p.other_norms[j]);
            }
        }
    }
}

// Sum, or largest, over the 16 threads of a tile's row, the same in all of them.
template <class S>
OTKD_DEVICE S row_sum(S value) {
    OTKD_UNROLL
    for (int offset = 8; offset > 0; offset >>= 1) value += shuffle_xor(value, offset);
    return value;
}
template <class S>
OTKD_DEVICE S row_max(S value) {
    OTKD_UNROLL
    for (int offset = 8; offset > 0; offset >>= 1) value = larger(value, shuffle_xor(value, offset));
    return value;
}

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

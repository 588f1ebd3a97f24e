// Costs between two sets of points and their gradients, a block of rows at a time, for kernels that never hold the whole
// matrix. The costs and conventions are those of cost_matrix.cpp, computed in S from points in T: differences first.
// y is packed once a problem, two vectors of columns at a time; a panel then serves all rows of a block from the cache.
// The gradient of y is summed by each thread over its rows, the threads in the order of their ranks: the same bits for the
// same number of threads.
#pragma once
#include "cost_matrix_tiles.h"
#include "otkd_fast/cost_matrix.h"
#include "sinkhorn_buffers.h"
#include "transpose.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr int64_t kTileDepth = 256;               // features that are summed before they are added to the rest
constexpr int64_t kTileBytes = 512 * 1024;        // of the costs of a block: they stay in the second-level cache
constexpr int64_t kFewestRows = 2 * kRows;        // so that a panel of y is used more than once
constexpr int64_t kMostRows = 64;

template <class T>
struct PointSets {
    const T *x, *y;  // (batch, n, d), (batch, m, d)
    int64_t n, m, d;
    Metric metric;
};

// The cosine from squared distances of rows that were scaled to norms in [1, 2), in double: see cost_matrix.cpp.
template <class S>
OTKD_INLINE Vec<S> cosine(Vec<S> squares, double norm_x, const double* norm_y) {
    constexpr int parts = sizeof(double) / sizeof(S);
    typedef S Part __attribute__((vector_size(sizeof(Vec<S>) / parts)));
    Part part[parts];
    std::memcpy(part, &squares, sizeof squares);
    for (int k = 0; k < parts; ++k) {
        const Vec<double> ny = load(norm_y + k * width<double>), difference = norm_x - ny, norms = norm_x * ny;
        const Vec<double> gap = __builtin_convertvector(part[k], Vec<double>) - difference * difference;
        const Vec<double> zero = {}, one = splat(1.0);
        const Vec<double> value = (gap < zero ? zero : gap) / (2.0 * norms);
        part[k] = __builtin_convertvector(norms == zero ? one : value, Part);
    }
    std::memcpy(&squares, part, sizeof squares);
    return squares;
}

template <class S>
OTKD_INLINE Vec<S> square_root(Vec<S> v) {
    for (int w = 0; w < width<S>; ++w) v[w] = std::sqrt(v[w]);
    return v;
}

template <class S, class T>
class PointTiles {
  public:
    static constexpr int64_t kPanel = 2 * width<S>;

    PointTiles(const PointSets<T>& points, Arena& arena, int threads, bool need_x, bool need_y)
        : points_(points),
          panels_((points.m + kPanel - 1) / kPanel),
          rewrites_(sizeof(S) != sizeof(T) || points.metric == Metric::cosine),
          need_x_(need_x),
          need_y_(need_y) {
        const int64_t rows = points.n + points.m, padded = points.n + panels_ * kPanel;
        packed_ = arena.take<S>(panels_ * kPanel * points.d);
        if (rewrites_) rewritten_ = arena.take<S>(rows * points.d);
        if (points.metric == Metric::cosine) {
            norms_ = arena.take<double>(padded);
            scales_ = arena.take<double>(padded);
        }
        if (need_x) grad_rows_ = arena.take<S>(threads * block() * points.d);
        if (!need_y) return;
        weights_t_ = arena.take<S>(threads * block() * points.m);
        grad_y_ = arena.take<S>(threads * points.m * points.d);
        along_y_ = arena.take<double>(points.metric == Metric::cosine ? threads * points.m : 0);
    }

    // Rows of one request: as many as keep their costs in the cache.
    int64_t block() const {
        const int64_t fit = kTileBytes / (panels_ * kPanel * static_cast<int64_t>(sizeof(S))) / kRows * kRows;
        const int64_t rows = fit < kFewestRows ? kFewestRows : fit > kMostRows ? kMostRows : fit;
        const int64_t all = round_up(points_.n, kBlock);
        return rows < all ? rows : all;
    }

    void open(int64_t index, const Team& team);

    // Calls use(r, j, costs of row i + r and the columns from j on, a vector of them) for the rows [i, i + count). Columns
    // beyond m carry the cost of some other column.
    template <class Use>
    OTKD_INLINE void for_costs(int64_t i, int64_t count, Use use) const {
        switch (points_.metric) {
            case Metric::l1: return for_metric<Metric::l1>(i, count, use);
            case Metric::l2: return for_metric<Metric::l2>(i, count, use);
            case Metric::sqeuclidean: return for_metric<Metric::sqeuclidean>(i, count, use);
            case Metric::cosine: return for_metric<Metric::cosine>(i, count, use);
        }
    }
    // cost (count, m)
    void costs(int64_t i, int64_t count, S* cost) const {
        const int64_t m = points_.m;
        for_costs(i, count, [&](int64_t r, int64_t j, Vec<S> c) {
            store_up_to(cost + r * m + j, c, m - j < width<S> ? m - j : width<S>);
        });
    }

    // Takes dL/dC of the rows [i, i + count), (count, m), overwritten, to the gradients of the points. `cost` is read for l2
    // and cosine.
    void emit(int64_t i, int64_t count, S* grad, const S* cost, T* grad_x);
    // All rows were emitted: writes grad_y (m, d). By the whole team.
    void close(const Team& team, T* grad_y);

  private:
    template <Metric kMetric, class Use>
    void for_metric(int64_t i, int64_t count, Use use) const;
    // The terms of up to kTileDepth features from k0 on, rows from i on.
    template <Metric kMetric>
    OTKD_INLINE void add_tile(int64_t i, int rows, const S* packed, int64_t k0, Vec<S> (&acc)[kRows][2]) const {
        const S* x[kRows];
        for (int r = 0; r < kRows; ++r) x[r] = row_x(i + (r < rows ? r : rows - 1)) + k0;
        const int64_t depth = points_.d - k0 < kTileDepth ? points_.d - k0 : kTileDepth;
        accumulate_tile<S, kMetric == Metric::l1>(x, packed + k0 * kPanel, depth, acc);
    }
    void rewrite_row(int64_t row);
    void weights(int64_t i, int64_t count, S* grad, const S* cost, double* along);
    void bwd(const Side<S>& side) const {
        constexpr int64_t depth = 2 * kGroup * width<S>;
        for (int64_t k0 = 0; k0 < points_.d; k0 += depth) {
            points_.metric == Metric::l1 ? group_bwd<S, true>(side, k0, 0, side.na) : group_bwd<S, false>(side, k0, 0, side.na);
        }
    }
    // From sum_j w (own - other), and for the cosine its part along the own row, to the gradient of the row as it came.
    void finish_row(S* sums, double along, int64_t row, T* out) const;
    const S* row_x(int64_t i) const { return x_ + i * points_.d; }
    const S* row_y(int64_t j) const { return y_ + j * points_.d; }

    const PointSets<T> points_;
    const int64_t panels_;
    const bool rewrites_, need_x_, need_y_;
    S *packed_ = nullptr, *rewritten_ = nullptr, *grad_rows_ = nullptr, *weights_t_ = nullptr, *grad_y_ = nullptr;
    double *norms_ = nullptr, *scales_ = nullptr, *along_y_ = nullptr;  // norms and scales: x, then y, padded
    const T *given_x_ = nullptr, *given_y_ = nullptr;
    const S *x_ = nullptr, *y_ = nullptr;
    int rank_ = 0;
};

template <class S, class T>
void PointTiles<S, T>::rewrite_row(int64_t row) {
    const int64_t n = points_.n, d = points_.d;
    const T* in = row < n ? given_x_ + row * d : given_y_ + (row - n) * d;
    S* out = rewritten_ + row * d;
    for (int64_t k = 0; k < d; ++k) out[k] = static_cast<S>(in[k]);
    if (points_.metric == Metric::cosine) scale_row(out, out, d, norms_[row], scales_[row]);
}

// Everything that the costs of problem `index` are computed from.
template <class S, class T>
void PointTiles<S, T>::open(int64_t index, const Team& team) {
    const int64_t n = points_.n, m = points_.m, d = points_.d;
    rank_ = team.rank;
    given_x_ = points_.x + index * n * d;
    given_y_ = points_.y + index * m * d;
    int64_t begin, end;
    if (rewrites_) {
        x_ = rewritten_;
        y_ = rewritten_ + n * d;
        split(n + m, 1, team.size, team.rank, begin, end);
        for (int64_t row = begin; row < end; ++row) rewrite_row(row);
    } else if constexpr (sizeof(S) == sizeof(T)) {
        x_ = given_x_;
        y_ = given_y_;
    }
    team.barrier();
    split(panels_, 1, team.size, team.rank, begin, end);
    for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t j0 = panel * kPanel, columns = m - j0 < kPanel ? m - j0 : kPanel;
        S* packed = packed_ + j0 * d;
        transpose(row_y(j0), d, packed, kPanel, columns, d);
        for (int64_t k = 0; columns < kPanel && k < d; ++k) {
            for (int64_t c = columns; c < kPanel; ++c) packed[k * kPanel + c] = packed[k * kPanel];
        }
        for (int64_t c = columns; norms_ && c < kPanel; ++c) norms_[n + j0 + c] = norms_[n + j0];
    }
    if (need_y_) std::memset(grad_y_ + team.rank * m * d, 0, m * d * sizeof(S));
    for (int64_t j = 0; along_y_ && norms_ && j < m; ++j) along_y_[team.rank * m + j] = 0;
    team.barrier();
}

template <class S, class T>
template <Metric kMetric, class Use>
void PointTiles<S, T>::for_metric(int64_t i, int64_t count, Use use) const {
    const int64_t d = points_.d;
    for (int64_t j0 = 0; j0 < points_.m; j0 += kPanel) {
        const S* packed = packed_ + j0 * d;
        for (int64_t r0 = 0; r0 < count; r0 += kRows) {
            const int rows = count - r0 < kRows ? static_cast<int>(count - r0) : kRows;
            Vec<S> acc[kRows][2] = {};
            add_tile<kMetric>(i + r0, rows, packed, 0, acc);
            for (int64_t k0 = kTileDepth; k0 < d; k0 += kTileDepth) {
                Vec<S> more[kRows][2] = {};
                add_tile<kMetric>(i + r0, rows, packed, k0, more);
                for (int r = 0; r < kRows; ++r) {
                    acc[r][0] += more[r][0];
                    acc[r][1] += more[r][1];
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                if (r >= rows) continue;
#pragma GCC unroll 2
                for (int c = 0; c < 2; ++c) {
                    const int64_t j = j0 + c * width<S>;
                    if (j >= points_.m) continue;
                    Vec<S> cost = acc[r][c];
                    if (kMetric == Metric::l2) cost = square_root<S>(cost);
                    if (kMetric == Metric::cosine) cost = cosine<S>(cost, norms_[i + r0 + r], norms_ + points_.n + j);
                    use(r0 + r, j, cost);
                }
            }
        }
    }
}

// In place from dL/dC to the factors of (x_i - y_j), as in cost_matrix.cpp; for the cosine also the parts along the rows:
// along_i = sum_j dL/dC_ij ((1 / |x_i| - 1 / |y_j|) - C_ij / |x_i|), and along_y_ with x and y exchanged.
template <class S, class T>
void PointTiles<S, T>::weights(int64_t i, int64_t count, S* grad, const S* cost, double* along) {
    const int64_t m = points_.m;
    const Metric metric = points_.metric;
    for (int64_t k = 0; metric == Metric::sqeuclidean && k < count * m; ++k) grad[k] *= 2;
    for (int64_t k = 0; metric == Metric::l2 && k < count * m; ++k) grad[k] = cost[k] > 0 ? grad[k] / cost[k] : S(0);
    if (metric != Metric::cosine) return;
    double* along_y = along_y_ ? along_y_ + rank_ * m : nullptr;
    for (int64_t r = 0; r < count; ++r) {
        const double norm_x = norms_[i + r];
        double sum = 0;
        for (int64_t j = 0; j < m; ++j) {
            const double norm_y = norms_[points_.n + j], norms = norm_x * norm_y;
            S& g = grad[r * m + j];
            if (norms == 0) {
                g = 0;
                continue;
            }
            const double gap = 1 / norm_x - 1 / norm_y, c = cost[r * m + j];
            sum += g * (gap - c / norm_x);
            if (along_y) along_y[j] += g * (-gap - c / norm_y);
            g = static_cast<S>(g / norms);
        }
        along[r] = sum;
    }
}

template <class S, class T>
void PointTiles<S, T>::finish_row(S* sums, double along, int64_t row, T* out) const {
    const int64_t d = points_.d;
    if (points_.metric == Metric::cosine) {
        const double norm = norms_[row];
        const S factor = norm > 0 ? static_cast<S>(along / norm) : S(0), back = static_cast<S>(scales_[row]);
        const S* own = rewritten_ + row * d;
        for (int64_t k = 0; k < d; ++k) sums[k] = (sums[k] + factor * own[k]) * back;
    }
    for (int64_t k = 0; k < d; ++k) out[k] = static_cast<T>(sums[k]);
}

template <class S, class T>
void PointTiles<S, T>::emit(int64_t i, int64_t count, S* grad, const S* cost, T* grad_x) {
    const int64_t m = points_.m, d = points_.d;
    double along[kMostRows] = {};
    weights(i, count, grad, cost, along);
    if (need_x_) {
        S* sums = grad_rows_ + rank_ * block() * d;
        bwd({row_x(i), y_, grad, sums, count, m, d, false});
        for (int64_t r = 0; r < count; ++r) finish_row(sums + r * d, along[r], i + r, grad_x + (i + r) * d);
    }
    if (need_y_) {
        S* weights_t = weights_t_ + rank_ * block() * m;
        transpose(grad, m, weights_t, count, count, m);
        bwd({y_, row_x(i), weights_t, grad_y_ + rank_ * m * d, m, count, d, true});
    }
}

template <class S, class T>
void PointTiles<S, T>::close(const Team& team, T* grad_y) {
    team.barrier();
    const int64_t m = points_.m, d = points_.d;
    int64_t begin, end;
    split(m, 1, team.size, team.rank, begin, end);
    for (int64_t j = begin; need_y_ && j < end; ++j) {
        S* sums = grad_y_ + j * d;
        double along = points_.metric == Metric::cosine ? along_y_[j] : 0.0;
        for (int r = 1; r < team.size; ++r) {
            for (int64_t k = 0; k < d; ++k) sums[k] += grad_y_[r * m * d + j * d + k];
            if (points_.metric == Metric::cosine) along += along_y_[r * m + j];
        }
        finish_row(sums, along, points_.n + j, grad_y + j * d);
    }
    team.barrier();
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

// The half-iterations of sinkhorn_points.cu: sweeps over tiles of costs (point_tile.h) with one running log-sum-exp, or with sums of the
// plan, and what becomes of a row's sums. Potentials and history are those of sinkhorn_log.h; a column is a row of the problem
// with x and y exchanged.
// Costs, exponents and sums are in float where the input is and the exponents reach to 60 at most (as for scalings), else in double
// from the points on. A sweep may be cut over several blocks; their sums are joined in double, in order.
#pragma once
#include "point_tile.h"
#include "sinkhorn_log_bwd.h"

namespace otkd_fast {
namespace cuda {
namespace {

// A batch of problems between points as the kernels get it.
template <class T>
struct PointBatch {
    Batch<T> batch;
    Plan<T> points;   // the rows as they are compared
    double* partial;  // (batch, pieces, 2, longest): sums of the pieces of a sweep
    int64_t longest;  // max(n, m)
    int64_t row_tiles_a_piece, column_tiles_a_piece, row_pieces, column_pieces;  // rows: of a sweep whose own points are x
    bool in_one;      // a block solves a problem

    OTKD_BOTH int64_t pieces(bool flipped) const { return flipped ? column_pieces : row_pieces; }
    OTKD_BOTH int64_t tiles_a_piece(bool flipped) const { return flipped ? column_tiles_a_piece : row_tiles_a_piece; }
    OTKD_BOTH int64_t most_pieces() const { return larger(row_pieces, column_pieces); }
    OTKD_DEVICE double* sums(int64_t index, int64_t piece) const { return partial + (index * most_pieces() + piece) * 2 * longest; }
};

enum class Step : int { range, rows, columns, plan_rows, first_rows, first_columns, adjoint_rows, adjoint_columns };

OTKD_BOTH bool flipped(Step step) {
    return step == Step::columns || step == Step::first_columns || step == Step::adjoint_columns;
}

enum class Sum : int {
    range,    // -(smallest), largest cost
    log_sum,  // log2 of sum_j 2^(level_j - C_ij / eps), as its largest term and the sum relative to it
    plan      // sum_j P_ij w_j, sum_j P_ij C_ij
};

struct Sweep {
    Sum sum;
    const double *own, *other, *weights;  // potentials / epsilon of rows and columns; w or null: ones
};

// Whether the sums of this history's problem were in double.
template <class T>
OTKD_DEVICE bool was_wide(const Problem<T>& p) {
    return sizeof(T) != sizeof(float) || p.history()[0] == static_cast<int>(Method::log);
}

// False: the step has nothing to do for this problem.
template <class T>
OTKD_DEVICE bool sweep_of(const Problem<T>& p, Step step, int64_t k, Sweep& sweep) {
    sweep = {Sum::plan, nullptr, nullptr, nullptr};
    if (step == Step::range) return sweep.sum = Sum::range, true;
    if (step <= Step::plan_rows) {
        if (k >= 0 && !p.state()->running) return false;
        if (step == Step::plan_rows) return sweep.own = p.phi(), sweep.other = p.gamma(), true;
        sweep.sum = Sum::log_sum;
        sweep.other = step == Step::rows ? p.gamma() : p.phi();
        return true;
    }
    const Trace<T> t(p);
    if (step == Step::first_rows || step == Step::first_columns) {
        sweep.own = step == Step::first_rows ? t.phi : t.gamma;
        sweep.other = step == Step::first_rows ? t.gamma : t.phi;
        return t.steps > 0;
    }
    if (k >= t.steps) return false;
    sweep.own = t.phi_of(k);
    sweep.other = t.gamma_of(k);
    sweep.weights = t.w(k);
    if (step == Step::adjoint_rows) return true;
    if (k == 0) return false;  // what comes before the first step is a constant
    sweep.own = p.template kept_v<double>(k - 1);
    sweep.other = t.phi_of(k);
    sweep.weights = t.z(k);
    return true;
}

constexpr int kSweepValues = kStageValues + 4 * kOther;  // of S

// The sums of one thread's 4 rows over a tile's 4 columns.
template <class S>
struct RowSums {
    S one[4], two[4];
    OTKD_DEVICE explicit RowSums(Sum sum) {
        const S none = sum == Sum::plan ? S(0) : static_cast<S>(-kInfinity);
        OTKD_UNROLL
        for (int r = 0; r < 4; ++r) {
            one[r] = none;
            two[r] = sum == Sum::range ? none : S(0);
        }
    }
    OTKD_DEVICE void add_range(int r, const S (&cost)[4], int columns) {
        OTKD_UNROLL
        for (int c = 0; c < 4; ++c) {
            one[r] = c < columns ? larger(one[r], -cost[c]) : one[r];
            two[r] = c < columns && cost[c] < static_cast<S>(kInfinity) ? larger(two[r], cost[c]) : two[r];
        }
    }
    OTKD_DEVICE void add_exponents(int r, const S (&x)[4]) {
        const S most = larger(larger(x[0], x[1]), larger(x[2], x[3]));
        if (most > one[r]) {
            two[r] *= exp2_of(one[r] - most);
            one[r] = most;
        }
        const S top = one[r] > static_cast<S>(-kInfinity) ? one[r] : S(0);
        S sum = 0;
        OTKD_UNROLL
        for (int c = 0; c < 4; ++c) sum += exp2_of(x[c] - top);  // NaN goes here, and stays
        two[r] += sum;
    }
    OTKD_DEVICE void add_plan(int r, const S (&x)[4], const S (&cost)[4], const Four<S>& weights) {
        S mass = 0, moved = 0;
        OTKD_UNROLL
        for (int c = 0; c < 4; ++c) {
            const S entry = exp2_of(x[c]);
            mass += entry * weights.v[c];
            moved += entry != 0 ? entry * cost[c] : S(0);  // 0 times +inf is 0, NaN stays
        }
        one[r] += mass;
        two[r] += moved;
    }
    OTKD_DEVICE void over_row(Sum sum, int r) {
        if (sum == Sum::plan) {
            one[r] = row_sum(one[r]);
            two[r] = row_sum(two[r]);
            return;
        }
        const S most = row_max(one[r]);
        if (sum == Sum::range) {
            two[r] = row_max(two[r]);
        } else {
            two[r] = row_sum(one[r] > static_cast<S>(-kInfinity) ? two[r] * exp2_of(one[r] - most) : two[r]);
        }
        one[r] = most;
    }
};

// Rows [i0, i0 + kOwn) over the tiles [begin, end) of the others; out (2, longest). `shared`: kSweepValues.
template <class S, class T>
OTKD_DEVICE void sweep_tiles(const Clouds<T>& points, const Sweep& sweep, double epsilon, int64_t i0, int64_t begin, int64_t end, S* shared,
                             double* out, int64_t longest) {
    const S inverse = static_cast<S>(kLog2E / epsilon);
    const int own0 = own_of_thread(), other0 = other_of_thread();
    S own[4];
    OTKD_UNROLL
    for (int r = 0; r < 4; ++r) own[r] = sweep.own && i0 + own0 + r < points.count ? static_cast<S>(sweep.own[i0 + own0 + r] * kLog2E) : S(0);
    RowSums<S> sums(sweep.sum);
    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t j0 = tile * kOther;
        S *levels = shared + kStageValues + (tile & 1) * 2 * kOther, *weights = levels + kOther;  // in turns: slow threads may still read
        for (int e = thread_id(); sweep.sum != Sum::range && e < kOther; e += kPointThreads) {
            const bool inside = j0 + e < points.others;
            levels[e] = static_cast<S>(inside ? sweep.other[j0 + e] * kLog2E : -kInfinity);
            weights[e] = inside ? sweep.weights ? static_cast<S>(sweep.weights[j0 + e]) : S(1) : S(0);
        }
        S cost[4][4];
        tile_costs(points, i0, j0, shared, cost);
        if (points.d == 0) barrier();
        if (sizeof(S) == sizeof(float) && sweep.sum == Sum::range) {
            const int64_t left = points.others - j0 - other0;
            OTKD_UNROLL
            for (int r = 0; r < 4; ++r) sums.add_range(r, cost[r], static_cast<int>(left < 4 ? left : 4));
            continue;
        }
        const Four<S> level = four(levels + other0), weight = four(weights + other0);
        OTKD_UNROLL
        for (int r = 0; r < 4; ++r) {
            S x[4];
            OTKD_UNROLL
            for (int c = 0; c < 4; ++c) x[c] = own[r] - cost[r][c] * inverse + level.v[c];
            sweep.sum == Sum::log_sum ? sums.add_exponents(r, x) : sums.add_plan(r, x, cost[r], weight);
        }
    }
    OTKD_UNROLL
    for (int r = 0; r < 4; ++r) {
        sums.over_row(sweep.sum, r);
        const int64_t i = i0 + own0 + r;
        if (other0 != 0 || i >= points.count) continue;
        out[i] = static_cast<double>(sums.one[r]);
        out[longest + i] = static_cast<double>(sums.two[r]);
    }
}

// The tile of own points and the piece of the others that a block has of a step. A call, for the kernels share it.
template <class T>
OTKD_CALL void run_sweep(const PointBatch<T>& all, int64_t index, Step step, int64_t k, int64_t tile, int64_t piece) {
    const Problem<T> p(all.batch, index, nullptr, nullptr);
    Sweep sweep;
    if (!sweep_of(p, step, k, sweep)) return;
    const bool flip = flipped(step);
    const Clouds<T> points(all.points, index, flip);
    const int64_t begin = piece * all.tiles_a_piece(flip), tiles = (points.others + kOther - 1) / kOther;
    const int64_t end = smaller(begin + all.tiles_a_piece(flip), tiles);
    double* out = all.sums(index, piece);
    unsigned char* shared = shared_memory();
    if constexpr (sizeof(T) == sizeof(float)) {
        const bool wide = step >= Step::first_rows ? was_wide(p) : step != Step::range && p.state()->wide;
        if (!wide) {
            return sweep_tiles(points, sweep, p.args.epsilon, tile * kOwn, begin, end, reinterpret_cast<float*>(shared), out, all.longest);
        }
    }
    sweep_tiles(points, sweep, p.args.epsilon, tile * kOwn, begin, end, reinterpret_cast<double*>(shared), out, all.longest);
}

// log of the sum that the pieces hold in log2.
template <class T>
OTKD_DEVICE double joined_log(const PointBatch<T>& all, int64_t index, bool flip, int64_t i) {
    double top = -kInfinity, sum = 0;
    for (int64_t piece = 0; piece < all.pieces(flip); ++piece) {
        const double* part = all.sums(index, piece) + i;
        const double most = larger(top, part[0]);
        if (most > -kInfinity) {
            sum = sum * exp2(top - most) + part[all.longest] * exp2(part[0] - most);
        } else {
            sum += part[all.longest];
        }
        top = most;
    }
    return sum != 0 ? top / kLog2E + log(sum) : -kInfinity;
}

// What becomes of the sums of the own points [first, ...) with `stride` between them.
template <class T>
OTKD_CALL void join_sweep(const PointBatch<T>& all, int64_t index, Step step, int64_t k, int64_t first, int64_t stride) {
    const Problem<T> p(all.batch, index, nullptr, nullptr);
    Sweep sweep;
    if (!sweep_of(p, step, k, sweep)) return;
    const bool flip = flipped(step);
    for (int64_t i = first; i < (flip ? p.m : p.n); i += stride) {
        if (sweep.sum == Sum::log_sum) {
            const double lse = joined_log(all, index, flip, i);
            step == Step::rows ? update_row(p, i, lse, k) : update_column(p, i, lse, k);
            continue;
        }
        double one = 0, two = 0;
        for (int64_t piece = 0; piece < all.pieces(flip); ++piece) {
            const double* part = all.sums(index, piece) + i;
            one = piece > 0 && sweep.sum == Sum::range ? larger(one, part[0]) : one + part[0];
            two = piece > 0 && sweep.sum == Sum::range ? larger(two, part[all.longest]) : two + part[all.longest];
        }
        if (step <= Step::plan_rows) {
            p.row_mass()[i] = one;
            p.row_moved()[i] = two;
            continue;
        }
        const Trace<T> t(p);
        if (step == Step::first_rows) first_row(t, i, one, two / p.args.epsilon);
        if (step == Step::first_columns) first_column(t, i, two / p.args.epsilon);
        if (step == Step::adjoint_rows) row_adjoint(t, k, i, one);
        if (step == Step::adjoint_columns) column_adjoint(t, k - 1, i, -one);
    }
}

// Before the first iteration, for float after the range: whether costs and exponents are taken in double. One block.
template <class T>
OTKD_DEVICE void begin_points(const Problem<T>& p, double* shared) {
    log_start(p);
    if (sizeof(T) != sizeof(float)) return;
    barrier();
    double high = 0;
    for (int64_t i = thread_id(); i < p.n; i += block_threads()) high = larger(high, p.row_moved()[i]);
    const double reach = block_max(high, shared) / p.args.epsilon + given_range(p, shared);
    const bool given = p.args.initial_f && p.args.relaxation != 1;
    if (thread_id() == 0) p.state()->wide = given || !(reach <= Limits<float>::kRange);
}

// Outputs and history, whose first number says whether the sums were in double. One block.
template <class T>
OTKD_DEVICE void finish_points(const Problem<T>& p, double* shared) {
    log_finish(p, shared);
    if (p.history() && thread_id() == 0) p.history()[0] = static_cast<int>(p.state()->wide ? Method::log : Method::scaling_float);
}

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

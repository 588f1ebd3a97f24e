// Forward iterations of a block of problems on scalings that leave the masses out: u = a x, v = b y with
//   x_i = 1 / (K v)_i,   y_j = 1 / (K^T u)_j
// so that tiny masses do not widen the range of the exponents: x and y stay within exp(+-range) whatever a and b are. A
// product of a mass and a scaling that underflows is lost in a sum of at least kSmallest. Masses of 0 have scaling 0.
// With guards x_i = 1 / ((K v)_i + guard), y likewise: nothing else changes, but the last columns are no longer exact.
// The plain loop reads K once an iteration. With tol, over-relaxation or penalties the errors decide between the two
// products of an iteration, and K is read twice.
#pragma once
#include "sinkhorn_shared_side.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// The smallest and the largest sum of each lane.
template <class S>
struct SumRange {
    Vec<S> low[kMaxVectors], high[kMaxVectors];
    SumRange() {
        for (int c = 0; c < kMaxVectors; ++c) low[c] = high[c] = splat(S(1));
    }
    bool left(int64_t lane) const {
        const int64_t c = lane / width<S>, w = lane % width<S>;
        return low[c][w] < kSmallest<S> || high[c][w] > kLargest<S>;
    }
};

// scaling = 1 / (sums + guard) where there is mass, 0 elsewhere; operand = mass scaling. (rows, L) each; operand may be
// sums, scaling null.
template <class S, int kVectors>
OTKD_INLINE void divide_lanes(const S* sums, const S* mass, S guard, S* scaling, S* operand, int64_t rows,
                              SumRange<S>& range) {
    const Vec<S> zero = {}, one = splat(S(1)), more = splat(guard);
    Vec<S> low[kVectors], high[kVectors];
    for (int c = 0; c < kVectors; ++c) {
        low[c] = range.low[c];
        high[c] = range.high[c];
    }
    for (int64_t i = 0; i < rows; ++i) {
        for (int c = 0; c < kVectors; ++c) {
            const int64_t k = (i * kVectors + c) * width<S>;
            const Vec<S> own = load(mass + k), sum = own > zero ? load(sums + k) + more : one;
            low[c] = min<S>(sum, low[c]);
            high[c] = max<S>(sum, high[c]);
            const Vec<S> inverse = own > zero ? reciprocal<S>(sum) : zero;
            if (scaling) store(scaling + k, inverse);
            store(operand + k, own > zero ? own * inverse : zero);
        }
    }
    for (int c = 0; c < kVectors; ++c) {
        range.low[c] = low[c];
        range.high[c] = high[c];
    }
}

template <class S, class T>
class SharedForward : SharedSweep<S, T> {
    using Base = SharedSweep<S, T>;
    using Base::at_, Base::kernel_, Base::lanes_, Base::vectors_;

  public:
    // One object a thread; those of a team lie on the same memory.
    SharedForward(const Block<S, T>& block, const SharedKernel<S, T>& kernel, Arena& arena, int threads)
        : Base(kernel, arena, threads, block.lanes()), args_(block.args), block_(block), control_(block) {
        const SinkhornSharedArgs<T>& args = block.args;
        const int64_t lanes = lanes_;
        const bool damped = args.penalty_a < kInfinity || args.penalty_b < kInfinity;
        const bool derived = damped && (args.keep == Keep::all || args.keep == Keep::last_step);
        plain_ = args.tol == 0 && args.relaxation == 1 && !damped;
        rows_ = side(args.n, at_.n, kernel.shifts(), args.penalty_a, derived, arena);
        columns_ = side(args.m, at_.m, nullptr, args.penalty_b, derived, arena);
        v_ = arena.take<S>(at_.m * lanes);
        u_ = arena.take<S>(plain_ ? 0 : at_.n * lanes);
        totals_ = arena.take<double>(threads * kTotals * kMaxLanes);
    }

    // Solves the block; left[lane] tells which problems left the range. By all threads of the team.
    void solve(const Team& team, unsigned char* left);

  private:
    enum Total { out_of_range, row_error, column_error, plan_mass, moved, dual, mass_a, mass_b, kTotals };

    Side<S> side(int64_t size, int64_t padded, const S* shift, double penalty, bool derived, Arena& arena) const {
        S *mass = arena.take<S>(padded * lanes_), *scaling = arena.take<S>(size * lanes_);
        return {size, shift, mass, scaling, derived ? arena.take<S>(size * lanes_) : nullptr, {penalty, args_.epsilon}};
    }
    void divide(const S* sums, const S* mass, S guard, S* scaling, S* operand, int64_t rows, SumRange<S>& range) const {
        if (vectors_ == 1) return divide_lanes<S, 1>(sums, mass, guard, scaling, operand, rows, range);
        divide_lanes<S, 2>(sums, mass, guard, scaling, operand, rows, range);
    }
    void start(const Team& team);
    void start_scalings(const Side<S>& side, const T* initial, double* out_of_range);
    void iterate(const Team& team);
    void iterate_with_options(const Team& team);
    bool all_stopped(const Team& team, int64_t done);
    void place_scalings(int64_t slot);
    void keep_scalings(const Team& team, int64_t slot, bool running_only);
    void keep_side(const Side<S>& side, int64_t begin, int64_t end, int64_t slot, bool running_only);
    bool all_out_of_range(const Team& team, const SumRange<S>& range);
    void plan_sums(const Team& team);
    void potentials(const Team& team);
    void write(const Team& team) const;
    void forget(int64_t lane) const;

    double* own(const Team& team, Total total) const { return totals_ + (team.rank * kTotals + total) * kMaxLanes; }
    double* cleared(const Team& team, Total total) const {
        return static_cast<double*>(std::memset(own(team, total), 0, kMaxLanes * sizeof(double)));
    }
    double sum(const Team& team, Total total, int64_t lane) const {
        double result = 0;
        for (int r = 0; r < team.size; ++r) result += totals_[(r * kTotals + total) * kMaxLanes + lane];
        return result;
    }
    void own_atoms(const Team& team, bool row_side, int64_t& begin, int64_t& end) const {
        row_side ? this->rows_of(team, begin, end) : this->columns_of(team, begin, end);
        const int64_t size = row_side ? args_.n : args_.m;
        end = end < size ? end : size;
    }

    const SinkhornSharedArgs<T>& args_;
    const Block<S, T> block_;
    LaneControl control_;
    bool plain_;
    Side<S> rows_, columns_;
    S *v_, *u_;       // v = b y (m, L); u = a x (n, L), where the iteration is not plain
    double* totals_;  // (threads, kTotals, kMaxLanes)
};

template <class S, class T>
void SharedForward<S, T>::start(const Team& team) {
    if (team.rank == 0) block_.load_masses(args_.a, args_.n, rows_.mass);
    if (team.rank == team.size - 1) {
        block_.load_masses(args_.b, args_.m, columns_.mass);
        std::memset(v_ + args_.m * lanes_, 0, (at_.m - args_.m) * lanes_ * sizeof(S));
        start_columns(block_, columns_, 0, args_.m, v_);
    }
    for (int total = 0; total < kTotals; ++total) cleared(team, static_cast<Total>(total));
    team.barrier();
    if (!plain_ && team.rank == 0) {
        start_scalings(rows_, args_.initial_f, own(team, out_of_range));
        start_scalings(columns_, args_.initial_g, own(team, out_of_range));
    }
    team.barrier();
}

// Where plain iterations leave their scalings: in the kept slot if there is one, else in the object's own memory.
template <class S, class T>
void SharedForward<S, T>::place_scalings(int64_t slot) {
    S* kept = block_.kept(slot);
    if (!kept) return;
    rows_.scaling = kept;
    columns_.scaling = kept + args_.n * lanes_;
}

// Whether every problem of the block has left the range: the rest of the iterations would be for nothing.
template <class S, class T>
bool SharedForward<S, T>::all_out_of_range(const Team& team, const SumRange<S>& range) {
    double* counts = own(team, out_of_range);
    for (int64_t lane = 0; lane < lanes_; ++lane) counts[lane] += range.left(lane) ? 1 : 0;
    team.barrier();
    for (int64_t lane = 0; lane < block_.count; ++lane) {
        if (sum(team, out_of_range, lane) == 0) return false;
    }
    return true;
}

template <class S, class T>
void SharedForward<S, T>::iterate(const Team& team) {
    int64_t begin, end;
    own_atoms(team, false, begin, end);
    const S row_guard = kernel_.row_guard(), column_guard = kernel_.column_guard();
    SumRange<S> range;
    for (int64_t t = 0; t < args_.num_iters; ++t) {
        const int64_t slot = args_.keep == Keep::all        ? t
                             : args_.keep == Keep::last_step ? 1 - (args_.num_iters - 1 - t) % 2
                                                            : 0;
        const bool wanted = args_.keep == Keep::all || args_.num_iters - t <= 2;
        place_scalings(slot);
        this->sweep(team, v_, [&](int64_t row, int64_t rows, S* panel) {
            const int64_t used = args_.n - row < rows ? args_.n - row : rows, k = row * lanes_;
            divide(panel, rows_.mass + k, row_guard, wanted ? rows_.scaling + k : nullptr, panel, used, range);
        });
        const int64_t k = begin * lanes_;
        S* scaling = wanted ? columns_.scaling + k : nullptr;
        divide(this->sums_ + k, columns_.mass + k, column_guard, scaling, v_ + k, end - begin, range);
        if (t == 0 && !kernel_.guarded() && all_out_of_range(team, range)) return;
        team.barrier();
        if (wanted && args_.keep != Keep::nothing && !block_.kept(slot)) keep_scalings(team, slot, false);
    }
    all_out_of_range(team, range);
}

// Row sums of the plan and <P, C - base>; the column sums where guards change them.
template <class S, class T>
void SharedForward<S, T>::plan_sums(const Team& team) {
    int64_t begin, end;
    own_atoms(team, true, begin, end);
    S *panel = this->own_panel(team), *weighted = this->own_weighted(team);
    double *error = cleared(team, row_error), *mass = cleared(team, plan_mass), *cost = cleared(team, moved);
    for_panels(begin, end, [&](int64_t row, int64_t rows) {
        this->times(kernel_.panel(row), row, padded(rows), v_, panel);
        add_errors(rows_, panel, lanes_, row, row + rows, error, mass);
        kernel_.weigh(row, padded(rows), weighted);
        this->times(weighted, row, padded(rows), v_, panel);
        add_products(rows_, panel, lanes_, row, row + rows, cost);
    });
    if (!kernel_.guarded()) return;
    own_atoms(team, false, begin, end);
    double unused[kMaxLanes] = {};
    add_errors(columns_, this->sums_ + begin * lanes_, lanes_, begin, end, cleared(team, column_error), unused);
}

template <class S, class T>
void SharedForward<S, T>::potentials(const Team& team) {
    S* panel = this->own_panel(team);
    for (bool row_side : {true, false}) {
        const Side<S>& side = row_side ? rows_ : columns_;
        T* out = row_side ? args_.f : args_.g;
        double* masses = own(team, row_side ? mass_a : mass_b);
        int64_t begin, end;
        own_atoms(team, row_side, begin, end);
        for_panels(begin, end, [&](int64_t i, int64_t count) {
            add_potentials(side, lanes_, i, i + count, panel, own(team, dual), masses);
            block_.save(panel, side.size, count, out + i);
        });
    }
}

template <class S, class T>
void SharedForward<S, T>::write(const Team& team) const {
    const double eps = args_.epsilon;
    for (int64_t lane = 0; lane < block_.count; ++lane) {
        const int64_t p = block_.problem(lane);
        const double a = sum(team, mass_a, lane), b = sum(team, mass_b, lane), plan = sum(team, plan_mass, lane);
        const double nan_mass = 0 * (a + b);  // a mass that is NaN took no part: say so in the result
        const double cost = sum(team, moved, lane) + static_cast<double>(kernel_.base()) * plan;
        args_.transport_cost[p] = static_cast<T>(cost + nan_mass);
        args_.regularized_cost[p] = static_cast<T>(sum(team, dual, lane) + eps * (a * b - plan));
        args_.marginal_error[p] = static_cast<T>(sum(team, row_error, lane) + sum(team, column_error, lane) + nan_mass);
        args_.iterations[p] = control_.iterations[lane];
    }
}

// No scalings of a problem that goes elsewhere: in the backward of its block it takes no part.
template <class S, class T>
void SharedForward<S, T>::forget(int64_t lane) const {
    for (int64_t slot = 0; slot < kept_slots(args_.keep, args_.num_iters); ++slot) {
        S* kept = block_.kept(slot);
        for (int64_t i = 0; kept && i < args_.n + args_.m; ++i) kept[i * lanes_ + lane] = 0;
    }
}

template <class S, class T>
void SharedForward<S, T>::solve(const Team& team, unsigned char* left) {
    const FlushSubnormals flush;
    start(team);
    if (plain_) {
        iterate(team);
    } else {
        iterate_with_options(team);
    }
    plan_sums(team);
    potentials(team);
    team.barrier();
    if (team.rank == 0) {
        write(team);
        for (int64_t lane = 0; lane < block_.count; ++lane) {
            const double nan = 0 * (sum(team, row_error, lane) + sum(team, moved, lane));  // of a NaN in the cost
            left[lane] = !(sizeof(S) == 8 && kernel_.guarded()) && (sum(team, out_of_range, lane) > 0 || nan != 0);
            if (left[lane]) forget(lane);
        }
    }
    team.barrier();
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

#include "sinkhorn_shared_options.h"

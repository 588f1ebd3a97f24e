// Sinkhorn in the log domain on the device: every option, every size, every range of exponents.
//   phi_i = log a_i - lambda_a LSE_j(gamma_j - X_ij),   gamma_j = log b_j - lambda_b LSE_i(phi_i - X_ij)
// Exponents are formed in double, so that nothing is lost where C / epsilon is large. Exponentials and their sums (type E) are
// in double, too, unless the input is float and the exponents of the problem span at most 60, as for scalings.
// One exponential an entry and half-iteration, by a running maximum.
// The work is cut into phases: a block goes through them with barriers between (small problems), or each is a launch of
// its own in which `parts` blocks share a problem. Rows: a warp each. Columns: a block takes 32 at a time, lane a column,
// its warps share the rows. Potentials lie in the workspace.
#pragma once
#include "sinkhorn_range.h"

namespace otkd_fast {
namespace cuda {
namespace {

enum class Phase : int { range, start, rows, columns, plan_rows, control, finish };

struct Part {
    int64_t part, parts;
};

// exp(x) summed for many x: the largest one so far, and the sum relative to it.
template <class E>
struct RunningSum {
    double top = -kInfinity;
    E sum = 0;
    OTKD_DEVICE void add(double x) {
        if (x == -kInfinity) return;
        if (x > top) {
            sum = sum * exp_of(static_cast<E>(top - x)) + E(1);
            top = x;
        } else {
            sum += exp_of(static_cast<E>(x - top));  // NaN goes here, and stays
        }
    }
    OTKD_DEVICE void join(double other_top, E other_sum) {
        const double most = larger(top, other_top);
        if (most > -kInfinity) {
            sum = sum * exp_of(static_cast<E>(top - most)) + other_sum * exp_of(static_cast<E>(other_top - most));
        } else {
            sum += other_sum;
        }
        top = most;
    }
    OTKD_DEVICE void over_warp() {
        OTKD_ROLLED
        for (int offset = 16; offset > 0; offset >>= 1) {
            const double other_top = shuffle_xor(top, offset);
            const E other_sum = shuffle_xor(sum, offset);
            join(other_top, other_sum);
        }
    }
    OTKD_DEVICE double log_sum() const { return sum != 0 ? top + log(static_cast<double>(sum)) : -kInfinity; }
};

OTKD_DEVICE double relaxed(double old, double target, double omega) {
    return old == -kInfinity || target == -kInfinity || omega == 1 ? target : (1 - omega) * old + omega * target;
}

template <class T>
OTKD_DEVICE void log_start(const Problem<T>& p) {
    OTKD_ROLLED
    for (int64_t i = thread_id(); i < p.n; i += block_threads()) p.phi()[i] = p.mass_a(i) > 0 ? p.start_phi(i) : -kInfinity;
    OTKD_ROLLED
    for (int64_t j = thread_id(); j < p.m; j += block_threads()) {
        p.gamma()[j] = p.mass_b(j) > 0 ? p.start_gamma(j) : -kInfinity;
    }
    if (thread_id() == 0) *p.state() = {p.args.relaxation > 0 ? p.args.relaxation : 1.0, 0.0, 0, 1, 1};
}

// Smallest and largest finite cost of each row, for log_width.
template <class T>
OTKD_DEVICE void log_range_rows(const Problem<T>& p, Part part) {
    OTKD_ROLLED
    for (int64_t i = part.part * block_warps() + warp_id(); i < p.n; i += part.parts * block_warps()) {
        double low = -kInfinity, high = -kInfinity;
        OTKD_ROLLED
        for (int64_t j = lane_id(); j < p.m; j += 32) {
            const double x = p.exponent(i, j);
            low = larger(low, -x);
            high = x < kInfinity ? larger(high, x) : high;
        }
        low = warp_max(low);
        high = warp_max(high);
        if (lane_id() != 0) continue;
        p.row_mass()[i] = low;
        p.row_moved()[i] = high;
    }
}

// Whether exponentials in float do. One block, after log_range_rows and log_start.
template <class T>
OTKD_DEVICE void log_width(const Problem<T>& p, double* shared) {
    double low = -kInfinity, high = -kInfinity;
    OTKD_ROLLED
    for (int64_t i = thread_id(); i < p.n; i += block_threads()) {
        low = larger(low, p.row_mass()[i]);
        high = larger(high, p.row_moved()[i]);
    }
    const double range = block_max(low, shared) + block_max(high, shared) + given_range(p, shared);
    if (thread_id() == 0) p.state()->wide = !(range <= Limits<T>::kRange);
}

template <class T>
OTKD_DEVICE void update_row(const Problem<T>& p, int64_t i, double lse, int64_t k) {
    const double own = p.mass_a(i);
    const bool served = own > 0 && lse != -kInfinity;
    const double next =
        served ? relaxed(p.phi()[i], log(own) - p.penalty_a().lambda() * lse, p.state()->omega) : -kInfinity;
    p.phi()[i] = next;
    if (p.args.keep == Keep::all) p.template kept_u<double>(k)[i] = next;
}

template <class E, class T>
OTKD_DEVICE void log_rows(const Problem<T>& p, Part part, int64_t k) {
    if (!p.state()->running) return;
    OTKD_ROLLED
    for (int64_t i = part.part * block_warps() + warp_id(); i < p.n; i += part.parts * block_warps()) {
        RunningSum<E> sum;
        OTKD_ROLLED
        for (int64_t j = lane_id(); j < p.m; j += 32) sum.add(p.gamma()[j] - p.exponent(i, j));
        sum.over_warp();
        if (lane_id() == 0) update_row(p, i, sum.log_sum(), k);
    }
}

template <class T>
OTKD_DEVICE void update_column(const Problem<T>& p, int64_t j, double lse, int64_t k) {
    const double own = p.mass_b(j), old = p.gamma()[j];
    const bool served = own > 0 && lse != -kInfinity;
    const double next =
        served ? relaxed(old, log(own) - p.penalty_b().lambda() * lse, p.state()->omega) : -kInfinity;
    p.gamma_before()[j] = old;
    p.gamma()[j] = next;
    p.column_mass()[j] = served ? exp(next + lse) : 0.0;
    if (p.args.keep == Keep::all) p.template kept_v<double>(k)[j] = next;
}

// `shared` holds (warps, 32) tops and as many sums.
template <class E, class T>
OTKD_DEVICE void log_columns(const Problem<T>& p, Part part, int64_t k, double* shared) {
    if (!p.state()->running) return;
    E* sums = reinterpret_cast<E*>(shared + block_threads());
    OTKD_ROLLED
    for (int64_t j0 = part.part * 32; j0 < p.m; j0 += part.parts * 32) {
        const int64_t j = j0 + lane_id();
        RunningSum<E> sum;
        OTKD_ROLLED
        for (int64_t i = warp_id(); j < p.m && i < p.n; i += block_warps()) sum.add(p.phi()[i] - p.exponent(i, j));
        shared[thread_id()] = sum.top;
        sums[thread_id()] = sum.sum;
        barrier();
        if (warp_id() == 0 && j < p.m) {
            for (int w = 1; w < block_warps(); ++w) sum.join(shared[w * 32 + lane_id()], sums[w * 32 + lane_id()]);
            update_column(p, j, sum.log_sum(), k);
        }
        barrier();
    }
}

// Row sums of the plan as it stands, and sum_j P_ij C_ij.
template <class E, class T>
OTKD_DEVICE void log_plan_rows(const Problem<T>& p, Part part) {
    OTKD_ROLLED
    for (int64_t i = part.part * block_warps() + warp_id(); i < p.n; i += part.parts * block_warps()) {
        const double phi = p.phi()[i];
        double mass = 0, moved = 0;
        OTKD_ROLLED
        for (int64_t j = lane_id(); j < p.m; j += 32) {
            const double x = p.exponent(i, j), entry = exp_of(static_cast<E>(phi + p.gamma()[j] - x));
            mass += entry;
            moved += entry != 0 ? entry * x : 0.0;  // 0 times +inf is 0, NaN stays
        }
        mass = warp_sum(mass);
        moved = warp_sum(moved) * p.args.epsilon;
        if (lane_id() != 0) continue;
        p.row_mass()[i] = mass;
        p.row_moved()[i] = moved;
    }
}

// Sums of both sides of the plan whose row and column sums lie in the workspace; potentials where `write`. One block.
template <class T>
OTKD_CALL void log_sides(const Problem<T>& p, bool write, SideSums& rows, SideSums& columns, double* shared) {
    OTKD_ROLLED
    for (int side = 0; side < 2; ++side) {
        const int64_t count = side ? p.m : p.n;
        const double *potentials = side ? p.gamma() : p.phi(), *sums = side ? p.column_mass() : p.row_mass();
        const Penalty penalty = side ? p.penalty_b() : p.penalty_a();
        T* out = write ? (side ? p.args.g : p.args.f) : nullptr;
        SideSums own;
        OTKD_ROLLED
        for (int64_t k = thread_id(); k < count; k += block_threads()) {
            const double mass = side ? p.mass_b(k) : p.mass_a(k);
            own.add(mass, potentials[k], sums[k], penalty, out ? out + p.index * count + k : out);
        }
        own.over_block(shared);
        (side ? columns : rows) = own;
    }
}

OTKD_DEVICE bool auto_due(int64_t done) { return done == 9 || done % 10 == 0; }

// omega from the observed convergence (reference: _AutoRelaxation).
OTKD_DEVICE void observe(State& state, int64_t done, double error) {
    if (done == 10) {
        const double ratio = state.error_before > 0 ? smaller(error / state.error_before, 0.9999) : 0.0;
        const double best = 2 / (1 + sqrt(1 - ratio));  // rounded, so that the rounding of the errors has no part in it
        state.omega = smaller(static_cast<int>(best * 1024 + 0.5) / 1024.0, 1.95);
    } else if (done > 10 && error > state.error_before) {
        state.omega = 1;
    }
    state.error_before = error;
}

// After iteration k, with the sums of log_plan_rows: whether the loop stops, and omega. One block.
template <class T>
OTKD_DEVICE void log_control(const Problem<T>& p, int64_t k, double* shared) {
    State& state = *p.state();
    const bool running = state.running;
    barrier();
    if (!running) return;
    SideSums rows, columns;
    log_sides(p, false, rows, columns, shared);
    if (thread_id() != 0) return;
    const double error = rows.error + columns.error;
    state.ran = k + 1;
    if (p.args.relaxation == 0 && auto_due(k + 1)) observe(state, k + 1, error);
    if (p.args.tol > 0 && error <= p.args.tol) state.running = 0;
}

// Outputs and history. One block.
template <class T>
OTKD_DEVICE void log_finish(const Problem<T>& p, double* shared) {
    const int64_t ran = p.args.tol > 0 ? p.state()->ran : p.args.num_iters;
    SideSums rows, columns;
    log_sides(p, true, rows, columns, shared);
    double moved = 0;
    OTKD_ROLLED
    for (int64_t i = thread_id(); i < p.n; i += block_threads()) moved += p.row_moved()[i];
    write_scalars(p, rows, columns, block_sum(moved, shared), ran);
    close_history<double>(p, Method::log, ran);
    if (!p.history() || p.args.keep == Keep::all) return;
    const int64_t slot = p.last_slot(ran);
    OTKD_ROLLED
    for (int64_t i = thread_id(); i < p.n; i += block_threads()) p.template kept_u<double>(slot)[i] = p.phi()[i];
    OTKD_ROLLED
    for (int64_t j = thread_id(); j < p.m; j += block_threads()) {
        p.template kept_v<double>(slot)[j] = p.gamma()[j];
        if (slot == 1) p.template kept_v<double>(0)[j] = p.gamma_before()[j];
    }
}

template <class E, class T>
OTKD_DEVICE void log_sweep(const Problem<T>& p, Phase phase, Part part, int64_t k, double* shared) {
    if (phase == Phase::rows) log_rows<E>(p, part, k);
    if (phase == Phase::columns) log_columns<E>(p, part, k, shared);
    if (phase == Phase::plan_rows) log_plan_rows<E>(p, part);
}

template <class T>
OTKD_DEVICE void log_phase(const Problem<T>& p, Phase phase, Part part, int64_t k, double* shared) {
    if (phase == Phase::range) return log_range_rows(p, part);
    if (phase == Phase::control) return log_control(p, k, shared);
    if (phase == Phase::finish) return log_finish(p, shared);
    if (phase == Phase::start) {
        log_start(p);
        barrier();
        if (sizeof(T) == sizeof(float)) log_width(p, shared);
        return;
    }
    if (p.state()->wide) return log_sweep<double>(p, phase, part, k, shared);
    if constexpr (sizeof(T) == sizeof(float)) log_sweep<float>(p, phase, part, k, shared);
}

template <class T>
inline bool watches(const SinkhornArgs<T>& args, int64_t k) {
    return args.tol > 0 || (args.relaxation == 0 && (k + 1 == 9 || (k + 1) % 10 == 0));
}

// All iterations and the plan's sums by one block, after log_start and a barrier. `shared`: log_shared_bytes.
template <class E, class T>
OTKD_DEVICE void log_iterate(const Problem<T>& p, double* shared) {
    const Part all{0, 1};
    OTKD_ROLLED
    for (int64_t k = 0; k < p.args.num_iters; ++k) {
        log_rows<E>(p, all, k);
        barrier();
        log_columns<E>(p, all, k, shared);
        barrier();
        const bool watched = p.args.tol > 0 || (p.args.relaxation == 0 && auto_due(k + 1));
        if (!watched && k + 1 < p.args.num_iters) continue;
        log_plan_rows<E>(p, all);
        barrier();
        if (!watched) break;
        log_control(p, k, shared);
        barrier();
        if (!p.state()->running) break;
    }
}

// A whole solve by one block. `shared`: log_shared_bytes. A call, so that its registers are not those of the tiles.
template <class T>
OTKD_CALL void log_solve(const Batch<T>& batch, int64_t index, const T* cost, double* shared) {
    const Problem<T> p(batch, index, cost, nullptr);
    log_start(p);
    barrier();
    log_iterate<double>(p, shared);
    log_finish(p, shared);
}

inline int64_t log_shared_bytes(int threads) { return threads * 2 * int64_t{sizeof(double)}; }

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

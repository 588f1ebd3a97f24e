// Sinkhorn by a cluster, forward: on scalings of the absorbed kernel, u_i = exp(phi_i - alpha_i) and v_j = exp(gamma_j - beta_j).
//
//   lse_i = log((K v)_i) - alpha_i,   phi_i = log a_i - lambda_a lse_i;   lse_j = log((K^T u)_j) - beta_j,   gamma_j = ...
//
// alpha_i is the smallest X_ij - beta_j and beta the potentials to start from; when a scaling has moved beyond kDrift, alpha and beta become
// the potentials, and the kernel is formed anew. A sum that leaves the safe range says nothing of its logarithm: a warp makes that one anew
// in the log domain, from the cost and the potentials in memory. So every range of exponents, penalty and relaxation is served.
// What decides on the way (tol, relaxation, outputs, history) is that of sinkhorn_log.h, by the first block.
#pragma once
#include "sinkhorn_cluster.h"

namespace otkd_fast {
namespace cuda {
namespace {

// Sums that are safe; and how far a scaling may go. In float no entry of a problem is below exp(-60), so that none is lost. In double those that
// are, times scalings up to kDrift and their number, do not count beside kLow.
template <class S>
struct Absorbed;
template <>
struct Absorbed<float> {
    static constexpr double kLow = Limits<float>::kLow, kHigh = Limits<float>::kHigh, kDrift = Limits<float>::kHigh;
};
template <>
struct Absorbed<double> {
    static constexpr double kLow = Limits<double>::kLow, kHigh = Limits<double>::kHigh, kDrift = 1e60;
};

template <class T>
OTKD_CALL void control_apart(const Problem<T>& p, int64_t k, double* scratch) {
    log_control(p, k, scratch);
}
template <class T>
OTKD_CALL void finish_apart(const Problem<T>& p, double* scratch) {
    log_finish(p, scratch);
}
template <class T>
OTKD_CALL void update_row_apart(const Problem<T>& p, int64_t i, double lse, int64_t k) {
    update_row(p, i, lse, k);
}
template <class T>
OTKD_CALL void update_column_apart(const Problem<T>& p, int64_t j, double lse, int64_t k) {
    update_column(p, j, lse, k);
}
// LSE_j(gamma_j - X_ij) of row `at`, or LSE_i(phi_i - X_ij) of column `at`, by a warp. Columns are read along the cost: for few of them.
template <class T>
OTKD_CALL double log_sum_apart(const Problem<T>& p, int64_t at, bool column) {
    const double* potentials = column ? p.phi() : p.gamma();
    const int64_t count = column ? p.n : p.m;
    RunningSum<double> sum;
    OTKD_ROLLED
    for (int64_t e = lane_id(); e < count; e += 32) sum.add(potentials[e] - (column ? p.exponent(e, at) : p.exponent(at, e)));
    sum.over_warp();
    return sum.log_sum();
}

template <class T, class S>
class ClusterForward {
    const Problem<T>& p;
    const Cluster<T, S> c;
    const bool plain;
    bool drifted = false, distrust = false;  // of this thread, in this iteration

  public:
    OTKD_DEVICE ClusterForward(const Problem<T>& problem, const Slices& cut) : p(problem), c(problem, cut), plain(problem.plain()) {}

    // After decide_width.
    OTKD_DEVICE void solve() {
        c.absorb_costs([&](int j) { return p.gamma()[j]; });
        scalings_of_one();
        OTKD_ROLLED
        for (int64_t k = 0; k < p.args.num_iters; ++k) {
            rows(k);
            columns(k);
            if (c.any_flag()) absorb_potentials();
            const bool watched = p.args.tol > 0 || (p.args.relaxation == 0 && auto_due(k + 1));
            if (!watched && k + 1 < p.args.num_iters) continue;
            plan_rows();
            cluster_barrier();
            if (!watched) break;
            if (c.rank == 0) control_apart(p, k, c.scratch);
            cluster_barrier();
            if (!p.state()->running) break;
        }
        if (c.rank == 0) finish_apart(p, c.scratch);
    }

  private:
    OTKD_DEVICE static bool within(S x, double low, double high) { return x >= static_cast<S>(low) && x <= static_cast<S>(high); }
    OTKD_DEVICE static bool is_safe(S sum) { return within(sum, Absorbed<S>::kLow, Absorbed<S>::kHigh); }
    // What came of nothing, and stays so: a side without mass or without a finite cost.
    OTKD_DEVICE static bool is_dead(double absorbed, S sum) { return absorbed == -kInfinity && sum == S(0); }

    // exp(potential - absorbed); `own` and `sum` are those of a plain update, or 0.
    OTKD_DEVICE S scaling(double potential, double absorbed, double own, S sum) {
        if (potential == -kInfinity) return S(0);
        const S result = plain && sum > S(0) ? static_cast<S>(own) / sum : static_cast<S>(exp_apart(potential - absorbed));
        drifted |= !within(result, 1 / Absorbed<S>::kDrift, Absorbed<S>::kDrift);
        distrust |= !is_safe(result);
        return result;
    }

    OTKD_DEVICE void absorb_potentials() const {
        c.absorb([&](int i) { return p.phi()[i]; }, [&](int j) { return p.gamma()[j]; });
        scalings_of_one();
    }
    // Or of 0, where there is nothing.
    OTKD_DEVICE void scalings_of_one() const {
        OTKD_ROLLED
        for (int j = thread_id(); j < c.m; j += block_threads()) c.v[j] = c.beta[j] == -kInfinity ? S(0) : S(1);
        OTKD_ROLLED
        for (int r = thread_id(); r < c.rows; r += block_threads()) c.u[r] = c.alpha[r] == -kInfinity ? S(0) : S(1);
        barrier();
    }

    OTKD_DEVICE void rows(int64_t k) {
        drifted = distrust = false;
        c.template for_rows<1>([&](int, int j, S entry, S(&terms)[1]) { terms[0] = entry * c.v[j]; },
                               [&](int r, const S(&sums)[1]) { finish_row(k, r, sums[0]); });
        const bool any = barrier_any(distrust);
        if (thread_id() == 0) c.flags[kMostBlocks] = any;
    }
    OTKD_DEVICE void finish_row(int64_t k, int r, S sum) {
        const bool there = r < c.rows;
        const int64_t i = c.first_row + (there ? r : 0);
        const double own = mass_apart(p, i, false), absorbed = there ? c.alpha[r] : 0.0;
        const bool dead = is_dead(absorbed, sum);
        const bool bad = there && own > 0 && !dead && !is_safe(sum);
        double lse = dead ? -kInfinity : log_apart(static_cast<double>(sum)) - absorbed;
        if (warp_max(bad ? 1 : 0)) {
            OTKD_ROLLED
            for (int q = 0; q < kTileRows; ++q) {
                if (!shuffle(bad ? 1 : 0, q * (32 / kTileRows))) continue;
                const double exact = log_sum_apart(p, shuffle(i, q * (32 / kTileRows)), false);
                if (c.own_row() == q) lse = exact;
            }
        }
        if (!there || !c.counts()) return;
        update_row_apart(p, i, lse, k);
        drifted |= bad;
        c.u[r] = scaling(p.phi()[i], absorbed, own, bad ? S(0) : sum);
    }

    OTKD_DEVICE void columns(int64_t k) {
        c.column_partials([&](int r, int, S entry) { return entry * c.u[r]; });
        cluster_barrier();
        bool none_safe = false;
        OTKD_ROLLED
        for (int q = 0; q < c.cut.size; ++q) none_safe |= *in_block(c.flags + kMostBlocks, q) != 0;
        OTKD_ROLLED
        for (int e = 32 * warp_id(); e < c.owned; e += block_threads()) finish_columns(k, e + lane_id(), none_safe);
        c.hand_out_flag(drifted);
        cluster_barrier();
    }
    // A warp has 32 columns.
    OTKD_DEVICE void finish_columns(int64_t k, int e, bool none_safe) {
        const bool there = e < c.owned;
        const int j = c.first_column + (there ? e : 0);
        const S total = there ? c.column_total(j) : S(0);
        const double own = mass_apart(p, j, true), absorbed = c.beta[j];
        const bool dead = is_dead(absorbed, total);
        const bool bad = there && own > 0 && !dead && (none_safe || !is_safe(total));
        double lse = dead ? -kInfinity : log_apart(static_cast<double>(total)) - absorbed;
        if (warp_max(bad ? 1 : 0)) {
            OTKD_ROLLED
            for (int l = 0; l < 32; ++l) {
                if (!shuffle(bad ? 1 : 0, l)) continue;
                const double exact = log_sum_apart(p, shuffle(j, l), true);
                if (lane_id() == l) lse = exact;
            }
        }
        if (!there) return;
        update_column_apart(p, j, lse, k);
        drifted |= bad;
        c.hand_out(j, scaling(p.gamma()[j], absorbed, own, bad ? S(0) : total));
    }

    // Row sums of the plan, and what the rows move.
    OTKD_DEVICE void plan_rows() const {
        c.template for_rows<2>(
            [&](int r, int j, S entry, S(&terms)[2]) {
                terms[0] = entry * c.v[j];
                // 0 times +inf is 0, NaN stays
                terms[1] = terms[0] != S(0) ? terms[0] * static_cast<S>(c.cost(r, j)) : S(0);
            },
            [&](int r, const S(&sums)[2]) {
                if (r >= c.rows || !c.counts()) return;
                const double own = static_cast<double>(c.u[r]);
                p.row_mass()[c.first_row + r] = own * sums[0];
                p.row_moved()[c.first_row + r] = own * sums[1];
            });
    }
};

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

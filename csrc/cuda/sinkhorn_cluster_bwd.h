// Sinkhorn by a cluster, backward: the adjoint loop of sinkhorn_log_bwd.h for plain iterations, on one absorbed kernel K with the scalings of
// each step, u_i = exp(phi_i - alpha_i), v_j = exp(gamma_j - beta_j) and v'_j of the step before, from the history
//   phi_bar   = [last step] first - u K (v w)                  z = phi_bar / a
//   gamma_bar = -v' K^T (u z), that of the step before         w = gamma_bar / b
//   C_bar     = K o (u v (d_transport (1 - X) + d_dual) + (sum over the steps of u (v w)^T + (u z) v'^T) / epsilon)
// In float K is that of the forward; in double it is the last plan. <P, X> = <P, X - low> + low sum(b), since the columns are exact: with low
// the smallest X nothing large cancels in float. Where the scalings of a step are beyond what K bears, K is formed anew for each half of each
// step, and the cost's gradient is made in the log domain, from z and w.
#pragma once
#include "sinkhorn_cluster_fwd.h"
#include "sinkhorn_log_bwd.h"

namespace otkd_fast {
namespace cuda {
namespace {

// Logarithms of scalings: in float as far as sums are safe, in double such that entries that are lost do not count.
template <class S>
constexpr double kMostLog = sizeof(S) == sizeof(float) ? 57.0 : 330.0;

template <class T>
OTKD_CALL double before_apart(const Trace<T>& t, int64_t k, int j) {
    return t.before(k, j);
}
template <class T>
OTKD_CALL void cost_gradient_apart(const Trace<T>& t) {
    log_cost_gradient(t, Part{cluster_rank(), cluster_size()});
}

template <class T, class S>
class ClusterBackward {
    static constexpr int kRows = 8, kColumns = 2, kEntries = kRows * kColumns;  // of the cost's gradient, summed up at once

    const Problem<T>& p;
    const Cluster<T, S> c;
    const Trace<T> t;
    const double of_transport, of_dual;
    double low = 0;
    bool anew = false;  // K for each half of each step

  public:
    OTKD_DEVICE ClusterBackward(const Problem<T>& problem, const Slices& cut)
        : p(problem), c(problem, cut), t(problem), of_transport(problem.incoming(problem.args.grad_transport_cost)),
          of_dual(problem.incoming(problem.args.grad_regularized_cost)) {}

    // After decide_width.
    OTKD_DEVICE void run() {
        absorb();
        c.hand_out_flag(!reaches());
        cluster_barrier();
        anew = c.any_flag();
        if (anew) low = 0;
        OTKD_ROLLED
        for (int64_t half = 2 * t.steps - 1; half > 0; --half) half_step(half / 2, half % 2 == 0);
        keep_columns_of_start();
        cluster_barrier();
        if (p.grad_cost) anew ? cost_gradient_apart(t) : cost_gradient();
        if (c.rank == 0) marginals();
    }

  private:
    // What is kept of step k for column n + j or row i: v w and v', u z and u.
    OTKD_DEVICE S* kept(int64_t k, int64_t e, bool second) const {
        return reinterpret_cast<S*>((second ? p.scalings() : p.adjoints()) + k * (p.n + p.m) + e);
    }
    OTKD_DEVICE double u_of(int64_t k, int r) const { return scaling_apart(t.phi_of(k)[c.first_row + r], c.alpha[r]); }
    OTKD_DEVICE double v_of(int64_t k, int j) const { return scaling_apart(t.gamma_of(k)[j], c.beta[j]); }
    OTKD_DEVICE double v_before(int64_t k, int j) const { return scaling_apart(before_apart(t, k, j), c.beta[j]); }

    OTKD_DEVICE void absorb() {
        if constexpr (sizeof(S) == sizeof(float)) {
            double least = -kInfinity;  // of -X
            OTKD_ROLLED
            for (int i = thread_id(); i < p.n; i += block_threads()) least = larger(least, p.row_mass()[i]);
            least = block_max(least, c.scratch);
            low = least > -kInfinity ? -least : 0.0;
            c.absorb_costs([&](int j) { return mass_apart(p, j, true) > 0 ? p.start_gamma(j) : -kInfinity; });
        } else {
            absorb_step(t.steps - 1, false);
        }
    }
    // Of step k first the rows, on the plan after its column update, then the columns, on the one before; those of step 0 are constants.
    OTKD_DEVICE void half_step(int64_t k, bool after_rows) const {
        if (anew) absorb_step(k, after_rows);
        if (after_rows) return columns(k);
        if (k == t.steps - 1) {
            first();
        } else if (anew) {
            OTKD_ROLLED
            for (int j = thread_id(); j < c.m; j += block_threads()) c.v[j] = static_cast<S>(v_of(k, j) * t.w(k)[j]);
            barrier();
        }
        rows(k);
    }
    // K as the plan after the column update of step k, or after its row update.
    OTKD_DEVICE void absorb_step(int64_t k, bool after_rows) const {
        c.absorb([&](int i) { return t.phi_of(k)[i]; }, [&](int j) { return after_rows ? before_apart(t, k, j) : t.gamma_of(k)[j]; });
    }
    OTKD_DEVICE static bool far(double potential, double absorbed) {
        if (potential == -kInfinity || absorbed == -kInfinity) return false;
        return !(fabs(potential - absorbed) <= kMostLog<S>);
    }
    // Whether K bears the scalings of all steps, as far as this thread has seen.
    OTKD_DEVICE bool reaches() const {
        bool left = false;
        OTKD_ROLLED
        for (int64_t k = 0; k < t.steps; ++k) {
            OTKD_ROLLED
            for (int r = thread_id(); r < c.rows; r += block_threads()) left |= far(t.phi_of(k)[c.first_row + r], c.alpha[r]);
            OTKD_ROLLED
            for (int e = thread_id(); e < c.owned; e += block_threads()) {
                const int j = c.first_column + e;
                left |= far(t.gamma_of(k)[j], c.beta[j]) || far(before_apart(t, k, j), c.beta[j]);
            }
        }
        return !left;
    }

    OTKD_DEVICE S above(int r, int j) const { return static_cast<S>(c.exponent(r, j) - low); }
    OTKD_DEVICE void last_scalings() const {
        OTKD_ROLLED
        for (int j = thread_id(); j < c.m; j += block_threads()) c.v[j] = static_cast<S>(v_of(t.steps - 1, j));
        OTKD_ROLLED
        for (int r = thread_id(); r < c.rows; r += block_threads()) c.u[r] = static_cast<S>(u_of(t.steps - 1, r));
        barrier();
    }

    // What the outputs hand to the last potentials, and what the last step's rows need of its columns.
    OTKD_DEVICE void first() const {
        last_scalings();
        c.template for_rows<2>(
            [&](int r, int j, S entry, S(&terms)[2]) {
                terms[0] = entry * c.v[j];
                terms[1] = terms[0] != S(0) ? terms[0] * above(r, j) : S(0);
            },
            [&](int r, const S(&sums)[2]) { first_row(r, sums[0], sums[1]); });
        c.column_partials([&](int r, int j, S entry) {
            const S own = entry * c.u[r];
            return own != S(0) ? own * above(r, j) : S(0);
        });
        cluster_barrier();
        OTKD_ROLLED
        for (int e = thread_id(); e < c.owned; e += block_threads()) {
            const int j = c.first_column + e;
            const double own = v_of(t.steps - 1, j);
            p.sum_gamma()[j] = 0;
            const double bar = p.args.epsilon * (of_transport * own * c.column_total(j) + p.incoming_g(j));
            column_adjoint(t.steps - 1, j, bar, own);
        }
        cluster_barrier();
    }
    OTKD_DEVICE void first_row(int r, S mass, S moved) const {
        if (r >= c.rows || !c.counts()) return;
        const int64_t i = c.first_row + r;
        const double own = static_cast<double>(c.u[r]);
        const double bar = of_transport * own * moved + of_dual * (mass_apart(p, i, false) - own * mass) + p.incoming_f(i);
        p.first()[i] = t.phi[i] > -kInfinity ? p.args.epsilon * bar : 0.0;
        p.sum_phi()[i] = 0;
    }
    // gamma_bar of column j after step k is known: w, to the rows of all blocks with the scaling `own`.
    OTKD_DEVICE void column_adjoint(int64_t k, int j, double bar, double own) const {
        const bool used = t.gamma_of(k)[j] > -kInfinity;
        const double w = used ? bar / mass_apart(p, j, true) : 0.0;
        p.sum_gamma()[j] += used ? bar : 0.0;
        const S value = static_cast<S>(own * w);
        if (anew) {
            t.w(k)[j] = w;
        } else {
            *kept(k, p.n + j, false) = value;
        }
        c.hand_out(j, value);
    }
    OTKD_DEVICE void row_adjoint(int64_t k, int r, S sum) const {
        if (r >= c.rows || !c.counts()) return;
        const int64_t i = c.first_row + r;
        const double own = u_of(k, r);
        const bool used = t.phi_of(k)[i] > -kInfinity;
        const double bar = used ? (k == t.steps - 1 ? p.first()[i] : 0.0) - own * sum : 0.0, z = used ? bar / mass_apart(p, i, false) : 0.0;
        p.sum_phi()[i] += bar;
        c.u[r] = static_cast<S>(own * z);
        if (anew) {
            t.z(k)[i] = z;
        } else {
            *kept(k, i, false) = c.u[r];
            *kept(k, i, true) = static_cast<S>(own);
        }
    }

    OTKD_DEVICE void rows(int64_t k) const {
        c.template for_rows<1>([&](int, int j, S entry, S(&terms)[1]) { terms[0] = entry * c.v[j]; },
                               [&](int r, const S(&sums)[1]) { row_adjoint(k, r, sums[0]); });
        barrier();
    }
    OTKD_DEVICE void columns(int64_t k) const {
        c.column_partials([&](int r, int, S entry) { return entry * c.u[r]; });
        cluster_barrier();
        OTKD_ROLLED
        for (int e = thread_id(); e < c.owned; e += block_threads()) {
            const int j = c.first_column + e;
            const double own = v_before(k, j);
            if (!anew) *kept(k, p.n + j, true) = static_cast<S>(own);
            column_adjoint(k - 1, j, -own * c.column_total(j), own);
        }
        cluster_barrier();
    }
    OTKD_DEVICE void keep_columns_of_start() const {
        OTKD_ROLLED
        for (int e = thread_id(); !anew && e < c.owned; e += block_threads()) {
            const int j = c.first_column + e;
            *kept(0, p.n + j, true) = static_cast<S>(v_before(0, j));
        }
    }

    OTKD_DEVICE void cost_gradient() const {
        last_scalings();
        OTKD_ROLLED
        for (int r0 = 0; r0 < c.rows; r0 += kRows) {
            OTKD_ROLLED
            for (int j0 = thread_id(); j0 < c.m; j0 += kColumns * block_threads()) {
                S sums[kEntries];
                sum_steps(r0, j0, sums);
                OTKD_ROLLED
                for (int e = 0; e < kEntries; ++e) {
                    S own = sums[0];
                    OTKD_UNROLL
                    for (int q = 1; q < kEntries; ++q) own = q == e ? sums[q] : own;
                    write_gradient(r0 + e / kColumns, j0 + e % kColumns * block_threads(), own);
                }
            }
        }
    }
    OTKD_DEVICE void sum_steps(int r0, int j0, S (&sums)[kEntries]) const {
        OTKD_UNROLL
        for (int e = 0; e < kEntries; ++e) sums[e] = 0;
        OTKD_ROLLED
        for (int64_t k = 0; k < t.steps; ++k) {
            const double *one = p.adjoints() + k * (p.n + p.m), *other = p.scalings() + k * (p.n + p.m);
            S own_w[kColumns], own_v[kColumns];
            OTKD_UNROLL
            for (int q = 0; q < kColumns; ++q) {
                const int j = static_cast<int>(p.n) + smaller(j0 + q * block_threads(), c.m - 1);
                own_w[q] = *reinterpret_cast<const S*>(one + j);
                own_v[q] = *reinterpret_cast<const S*>(other + j);
            }
            OTKD_UNROLL
            for (int s = 0; s < kRows; ++s) {
                const int i = c.first_row + smaller(r0 + s, c.rows - 1);
                const S own_z = *reinterpret_cast<const S*>(one + i), own_u = *reinterpret_cast<const S*>(other + i);
                OTKD_UNROLL
                for (int q = 0; q < kColumns; ++q) sums[s * kColumns + q] += own_u * own_w[q] + own_z * own_v[q];
            }
        }
    }
    OTKD_DEVICE void write_gradient(int r, int j, S sum) const {
        if (r >= c.rows || j >= c.m) return;
        const S entry = r < c.held ? c.kernel[r * c.m + j] : c.formed(r, j);
        S value = 0;
        if (entry > S(0)) {  // 0 for forbidden pairs
            const S direct = static_cast<S>(of_transport) * (1 - above(r, j)) + static_cast<S>(of_dual);
            value = entry * c.u[r] * c.v[j] * direct + entry * sum * static_cast<S>(p.per_epsilon);
        }
        p.grad_cost[(c.first_row + r) * c.m + j] = static_cast<T>(value);
    }

    OTKD_DEVICE void marginals() const {
        OTKD_ROLLED
        for (int side = 0; side < 2; ++side) {
            const int count = static_cast<int>(side ? p.m : p.n), others = static_cast<int>(side ? p.n : p.m);
            double other = 0;
            OTKD_ROLLED
            for (int e = thread_id(); e < others; e += block_threads()) other += mass_apart(p, e, side == 0);
            other = block_sum(other, c.scratch);
            T* out = side ? p.args.grad_b : p.args.grad_a;
            const double *sums = side ? p.sum_gamma() : p.sum_phi(), *potentials = side ? t.gamma : t.phi;
            const double beside = side ? of_transport * low : 0.0;
            OTKD_ROLLED
            for (int e = thread_id(); out && e < count; e += block_threads()) {
                const double own = mass_apart(p, e, side != 0);
                double value = 0;
                if (own > 0) {
                    const double relative = potentials[e] - log_apart(own);
                    const double slope = of_dual != 0 && relative > -kInfinity ? of_dual * (relative - 1 + other) : 0.0;
                    value = sums[e] / own + p.args.epsilon * (beside + slope);
                }
                out[p.index * count + e] = static_cast<T>(value);
            }
        }
    }
};

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

// Sinkhorn by a cluster, backward: the adjoint loop of sinkhorn_log_bwd.h for plain iterations on one absorbed kernel K, with the scalings of each
// step, u_i = exp(phi_i - alpha_i), v_j = exp(gamma_j - beta_j) and v'_j of the step before, from the history
//   phi_bar   = [last step] first - u K (v w)           z = phi_bar / a
//   gamma_bar = -v' K^T (u z)  (of the step before)     w = gamma_bar / b
//   C_bar     = K o (u v (d_transport (1 - X) + d_dual) + (sum over the steps of u (v w)^T + (u z) v'^T) / epsilon)
// In float K is that of the forward; in double it is the last plan. <P, X> = <P, X - low> + low sum(b), since the columns are exact: with low
// the smallest X nothing large cancels in float. Where a step's scalings are beyond what K can bear, the cluster goes through the loop in the
// log domain, by the functions of sinkhorn_log_bwd.h.
#pragma once
#include "sinkhorn_cluster_fwd.h"
#include "sinkhorn_log_bwd.h"

namespace otkd_fast {
namespace cuda {
namespace {

// Logarithms of scalings: in float as far as sums are safe, in double such that entries that are lost do not count.
template <class S>
constexpr double kMostLog = sizeof(S) == sizeof(float) ? 57.0 : 330.0;

template <class T, class S>
class ClusterBackward {
    static constexpr int kRows = 8, kColumns = 2;  // entries of the cost's gradient that a thread sums up at once

    const Problem<T>& p;
    const Cluster<T, S> c;
    const Trace<T> t;
    double low = 0;

  public:
    OTKD_DEVICE ClusterBackward(const Problem<T>& problem, const Slices& cut) : p(problem), c(problem, cut), t(problem) {}

    // After decide_width.
    OTKD_DEVICE void run() {
        absorb();
        c.hand_out_flag(!reaches());
        cluster_barrier();
        if (c.any_flag()) {
            in_the_log_domain();
        } else {
            first();
            for (int64_t k = t.steps - 1; k >= 0; --k) {
                rows(k);
                if (k > 0) columns(k);
            }
            keep_columns_of_start();
            cluster_barrier();
            if (p.grad_cost) {
                last_scalings();
                cost_gradient();
            }
        }
        if (c.rank == 0) marginal_gradients(t, c.scratch, p.incoming(p.args.grad_transport_cost) * low * p.args.epsilon);
    }

  private:
    // What of column j (row r) is kept of step k: u z and u, v w and v'.
    OTKD_DEVICE S* kept(int64_t k, int64_t e, bool second) const {
        return reinterpret_cast<S*>((second ? p.scalings() : p.adjoints()) + k * (p.n + p.m) + e);
    }
    OTKD_DEVICE static double scaling(double potential, double absorbed) {
        return potential == -kInfinity || absorbed == -kInfinity ? 0.0 : exp(potential - absorbed);
    }
    OTKD_DEVICE double u_of(int64_t k, int r) const { return scaling(t.phi_of(k)[c.first_row + r], c.alpha[r]); }
    OTKD_DEVICE double v_of(int64_t k, int j) const { return scaling(t.gamma_of(k)[j], c.beta[j]); }
    OTKD_DEVICE double v_before(int64_t k, int j) const { return scaling(t.before(k, j), c.beta[j]); }

    OTKD_DEVICE void absorb() {
        if constexpr (sizeof(S) == sizeof(float)) {
            double least = -kInfinity;  // of -X
            OTKD_ROLLED
            for (int i = thread_id(); i < p.n; i += block_threads()) least = larger(least, p.row_mass()[i]);
            least = block_max(least, c.scratch);
            low = least > -kInfinity ? -least : 0.0;
            c.absorb_costs([&](int j) { return p.mass_b(j) > 0 ? p.start_gamma(j) : -kInfinity; });
        } else {
            c.absorb(t.phi, t.gamma);
        }
    }
    OTKD_DEVICE static bool far(double potential, double absorbed) {
        if (potential == -kInfinity || absorbed == -kInfinity) return false;
        return !(fabs(potential - absorbed) <= kMostLog<S>);
    }
    // Whether the scalings of all steps are such that K bears them, as far as this thread has seen.
    OTKD_DEVICE bool reaches() const {
        bool left = false;
        OTKD_ROLLED
        for (int64_t k = 0; k < t.steps; ++k) {
            OTKD_ROLLED
            for (int r = thread_id(); r < c.rows; r += block_threads()) left |= far(t.phi_of(k)[c.first_row + r], c.alpha[r]);
            OTKD_ROLLED
            for (int e = thread_id(); e < c.owned; e += block_threads()) {
                const int j = c.first_column + e;
                left |= far(t.gamma_of(k)[j], c.beta[j]) || far(t.before(k, j), c.beta[j]);
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
    OTKD_DEVICE void first() {
        const int64_t last = t.steps - 1;
        last_scalings();
        c.template for_rows<2>(
            [&](int r, int j, S entry, S(&terms)[2]) {
                terms[0] = entry * c.v[j];
                terms[1] = terms[0] != S(0) ? terms[0] * above(r, j) : S(0);
            },
            [&](int r, const S(&sums)[2]) {
                if (r >= c.rows || !c.counts()) return;
                const double own = static_cast<double>(c.u[r]);
                first_row(t, c.first_row + r, own * sums[0], own * sums[1]);
            });
        c.column_partials([&](int r, int j, S entry) {
            const S own = entry * c.u[r];
            return own != S(0) ? own * above(r, j) : S(0);
        });
        cluster_barrier();  // nobody reads v any more
        OTKD_ROLLED
        for (int e = thread_id(); e < c.owned; e += block_threads()) {
            const int j = c.first_column + e;
            const double own = v_of(last, j);
            first_column(t, j, own * c.column_total(j));
            hand_out_column(last, j, own);
        }
        cluster_barrier();
    }
    // After column_adjoint of step k.
    OTKD_DEVICE void hand_out_column(int64_t k, int j, double own) const {
        const S value = static_cast<S>(own * t.w(k)[j]);
        *kept(k, p.n + j, false) = value;
        c.hand_out(j, value);
    }

    OTKD_DEVICE void rows(int64_t k) const {
        c.template for_rows<1>([&](int, int j, S entry, S(&terms)[1]) { terms[0] = entry * c.v[j]; },
                               [&](int r, const S(&sums)[1]) {
                                   if (r >= c.rows || !c.counts()) return;
                                   const int64_t i = c.first_row + r;
                                   const double own = u_of(k, r);
                                   row_adjoint(t, k, i, own * sums[0]);
                                   c.u[r] = static_cast<S>(own * t.z(k)[i]);
                                   *kept(k, i, false) = c.u[r];
                                   *kept(k, i, true) = static_cast<S>(own);
                               });
        barrier();
    }
    OTKD_DEVICE void columns(int64_t k) const {
        c.column_partials([&](int r, int, S entry) { return entry * c.u[r]; });
        cluster_barrier();
        OTKD_ROLLED
        for (int e = thread_id(); e < c.owned; e += block_threads()) {
            const int j = c.first_column + e;
            const double own = v_before(k, j);
            *kept(k, p.n + j, true) = static_cast<S>(own);
            column_adjoint(t, k - 1, j, -own * c.column_total(j));
            hand_out_column(k - 1, j, own);
        }
        cluster_barrier();
    }
    OTKD_DEVICE void keep_columns_of_start() const {
        OTKD_ROLLED
        for (int e = thread_id(); e < c.owned; e += block_threads()) {
            const int j = c.first_column + e;
            *kept(0, p.n + j, true) = static_cast<S>(v_before(0, j));
        }
    }

    OTKD_DEVICE void cost_gradient() const {
        const int last = c.m - 1, threads = block_threads();
        OTKD_ROLLED
        for (int r0 = 0; r0 < c.rows; r0 += kRows) {
            OTKD_ROLLED
            for (int j0 = thread_id(); j0 < c.m; j0 += kColumns * threads) {
                S sums[kRows][kColumns] = {};
                OTKD_ROLLED
                for (int64_t k = 0; k < t.steps; ++k) {
                    S own_w[kColumns], own_v[kColumns];
                    OTKD_UNROLL
                    for (int q = 0; q < kColumns; ++q) {
                        const int j = smaller(j0 + q * threads, last);
                        own_w[q] = *kept(k, p.n + j, false);
                        own_v[q] = *kept(k, p.n + j, true);
                    }
                    OTKD_UNROLL
                    for (int s = 0; s < kRows; ++s) {
                        const int64_t i = c.first_row + smaller(r0 + s, c.rows - 1);
                        const S own_z = *kept(k, i, false), own_u = *kept(k, i, true);
                        OTKD_UNROLL
                        for (int q = 0; q < kColumns; ++q) sums[s][q] += own_u * own_w[q] + own_z * own_v[q];
                    }
                }
                OTKD_UNROLL
                for (int s = 0; s < kRows; ++s) {
                    OTKD_UNROLL
                    for (int q = 0; q < kColumns; ++q) write_gradient(r0 + s, j0 + q * threads, sums[s][q]);
                }
            }
        }
    }
    OTKD_DEVICE void write_gradient(int r, int j, S sum) const {
        if (r >= c.rows || j >= c.m) return;
        const int64_t i = c.first_row + r;
        const S entry = r < c.held ? c.kernel[r * c.m + j] : c.formed(r, j);
        S value = 0;
        if (entry > S(0)) {
            const S transport = static_cast<S>(p.incoming(p.args.grad_transport_cost));
            const S dual = static_cast<S>(p.incoming(p.args.grad_regularized_cost));
            value = entry * c.u[r] * c.v[j] * (transport * (1 - above(r, j)) + dual) + entry * sum * static_cast<S>(p.per_epsilon);
        }
        p.grad_cost[i * c.m + j] = static_cast<T>(value);
    }

    OTKD_DEVICE void in_the_log_domain() {
        const Part part{c.rank, c.cut.size};
        low = 0;
        first_rows(t, part);
        first_columns(t, part, c.scratch);
        cluster_barrier();
        OTKD_ROLLED
        for (int64_t k = t.steps - 1; k >= 0; --k) {
            adjoint_rows(t, part, k);
            cluster_barrier();
            adjoint_columns(t, part, k, c.scratch);
            cluster_barrier();
        }
        if (p.grad_cost) log_cost_gradient(t, part);
    }
};

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

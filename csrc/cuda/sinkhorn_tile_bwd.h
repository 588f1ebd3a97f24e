// One problem on the tile of sinkhorn_tile.h: the adjoint of the loop, for its steps t = last .. 1
//   w_j = gamma_bar_j v_j / b_j           phi_bar_i   = [t = last] first_i - u_i (K w)_i
//   z_i = phi_bar_i u_i / a_i             gamma_bar_j = -v'_j (K^T z)_j          (v' of iteration t - 1)
//   C_bar_ij += K_ij (u_i w_j + z_i v'_j) / epsilon
// w and z of the steps lie in the workspace; the sum over the steps is made at the end, kChunk rows of a warp at a time.
// <P, C> = <P, C - low> + low sum(b), since the columns are exact: with low the smallest cost nothing large cancels.
#pragma once
#include "sinkhorn_tile.h"

namespace otkd_fast {
namespace cuda {
namespace {

template <class T, int kGroups, int kRows, int kColumns>
class TileBackward {
    using Own = Tile<T, kGroups, kRows, kColumns>;
    using Memory = TileMemory<T, kColumns>;
    static constexpr int kChunk = kColumns > 1 ? 2 : 8;

    const Problem<T>& p;
    const Memory memory;
    const int n, m;
    const int64_t ran, steps;
    const bool unroll;
    Own tile;
    T low;

  public:
    OTKD_DEVICE explicit TileBackward(const Problem<T>& problem)
        : p(problem), memory(block_warps()), n(static_cast<int>(problem.n)), m(static_cast<int>(problem.m)),
          ran(static_cast<int64_t>(problem.history()[1])), steps(problem.steps(ran)),
          unroll(problem.args.gradient == Gradient::unroll) {}

    OTKD_DEVICE void run() {
        T high;
        OTKD_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            OTKD_UNROLL
            for (int r = 0; r < kRows; ++r) {
                OTKD_UNROLL
                for (int c = 0; c < kColumns; ++c) tile.k[g][r][c] = static_cast<T>(kInfinity);
            }
        }
        Own::for_entries(n, m, [&](int g, int r, int c, int i, int j) { tile.k[g][r][c] = p.cost[i * m + j]; });
        tile.cost_range(memory.scratch, low, high);
        tile.exponentiate(low, p.args.epsilon);
        double sum_phi[kGroups] = {};
        if (steps > 0) {
            for (int j = thread_id(); j < Memory::kWidth; j += block_threads()) {
                memory.mass[j] = j < m ? static_cast<T>(p.mass_b(j)) : T(0);
            }
            T first[kGroups];
            first_adjoint(first);
            adjoint_loop(first, sum_phi);
        }
        if (p.grad_cost) cost_gradient();
        if (p.args.grad_a || p.args.grad_b) marginals(sum_phi);
    }

  private:
    OTKD_DEVICE const T* u_of(int64_t k) const { return p.template kept_u<T>(unroll ? k : 1); }
    OTKD_DEVICE const T* v_of(int64_t k) const { return p.template kept_v<T>(unroll ? k : 1); }
    // v before step k; step 0, from the loop's start, only where start_of_loop has filled memory.v.
    OTKD_DEVICE T before(int64_t k, int j) const {
        if (!unroll) return p.template kept_v<T>(0)[j];
        return k > 0 ? p.template kept_v<T>(k - 1)[j] : memory.v[j];
    }
    OTKD_DEVICE T* z(int64_t k) const { return reinterpret_cast<T*>(p.adjoints()) + k * (n + m); }
    OTKD_DEVICE T* w(int64_t k) const { return z(k) + n; }

    // What the outputs hand to the last potentials: `first`, and gamma_bar into memory.sums. sum_gamma is cleared.
    OTKD_DEVICE void first_adjoint(T (&first)[kGroups]) {
        const double eps = p.args.epsilon;
        const double of_transport = p.incoming(p.args.grad_transport_cost), of_dual = p.incoming(p.args.grad_regularized_cost);
        const T *u = p.template kept_u<T>(p.last_slot(ran)), *v = p.template kept_v<T>(p.last_slot(ran));
        T y[kColumns] = {};
        OTKD_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            T mass[kRows], moved[kRows];
            OTKD_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const int i = Own::row(g, r);
                const T own = i < n ? u[i] : T(0);
                mass[r] = moved[r] = 0;
                OTKD_UNROLL
                for (int c = 0; c < kColumns; ++c) {
                    const int j = Own::column(c);
                    const T k = tile.k[g][r][c];
                    if (!(k > 0)) continue;
                    const T kc = k * (p.cost[i * m + j] - low);
                    mass[r] += k * v[j];
                    moved[r] += kc * v[j];
                    y[c] += kc * own;
                }
            }
            const T row_mass = exchange_sums(mass), row_moved = exchange_sums(moved);
            const int i = Own::own_row(g);
            first[g] = 0;
            if (i >= n || !(u[i] > 0)) continue;
            const double own = static_cast<double>(u[i]);
            first[g] = static_cast<T>(of_transport * own * row_moved + of_dual * eps * (p.mass_a(i) - own * row_mass) +
                                      eps * p.incoming_f(i));
        }
        OTKD_UNROLL
        for (int c = 0; c < kColumns; ++c) memory.partial[warp_id() * Memory::kWidth + Own::column(c)] = y[c];
        barrier();
        for (int j = thread_id(); j < m; j += block_threads()) {
            const double own = static_cast<double>(v[j]);
            memory.sums[j] = own > 0 ? static_cast<T>(of_transport * own * memory.column_sum(j) + eps * p.incoming_g(j)) : T(0);
            p.sum_gamma()[j] = 0;
        }
        barrier();
    }

    OTKD_DEVICE void adjoint_loop(const T (&first)[kGroups], double (&sum_phi)[kGroups]) {
        T slope[kGroups], s[kGroups], bar[kGroups], across[kColumns];
        OTKD_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            bar[g] = first[g];
            const int i = Own::own_row(g);
            const double own = i < n ? p.mass_a(i) : 0.0;
            slope[g] = own > 0 ? static_cast<T>(1 / own) : T(0);
        }
        for (int64_t k = steps - 1; k >= 0; --k) {
            for (int j = thread_id(); j < Memory::kWidth; j += block_threads()) {
                const bool used = j < m && memory.mass[j] > 0;
                const T own = used ? memory.sums[j] * (v_of(k)[j] / memory.mass[j]) : T(0);
                memory.v[j] = own;
                if (j < m) w(k)[j] = own;
                if (used) p.sum_gamma()[j] += memory.sums[j];
            }
            barrier();
            Own::load_columns(memory.v, across);
            tile.row_sums(across, s);
            OTKD_UNROLL
            for (int g = 0; g < kGroups; ++g) {
                const int i = Own::own_row(g);
                const T u = i < n ? u_of(k)[i] : T(0);
                const T now = bar[g] - u * s[g];
                sum_phi[g] += now;
                s[g] = now * u * slope[g];
                bar[g] = 0;
                if (i < n && Own::counts()) z(k)[i] = s[g];
            }
            tile.column_sums(s, memory.partial);
            barrier();
            // what comes before step 0 is a constant
            for (int j = thread_id(); k > 0 && j < m; j += block_threads()) memory.sums[j] = -before(k, j) * memory.column_sum(j);
        }
        barrier();
        start_of_loop();
    }
    OTKD_DEVICE void start_of_loop() {
        for (int j = thread_id(); unroll && j < m; j += block_threads()) {
            memory.v[j] = p.mass_b(j) > 0 ? static_cast<T>(exp(p.start_gamma(j))) : T(0);
        }
        barrier();
    }

    OTKD_DEVICE void cost_gradient() {
        OTKD_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            OTKD_UNROLL
            for (int r0 = 0; r0 < kRows; r0 += kChunk) gradient_rows(g, r0);
        }
    }
    // The sum over the steps for kChunk rows, then their gradient.
    OTKD_DEVICE void gradient_rows(int g, int r0) {
        const double of_transport = p.incoming(p.args.grad_transport_cost), of_dual = p.incoming(p.args.grad_regularized_cost);
        const T inverse = static_cast<T>(1 / p.args.epsilon), slope = steps > 0 ? inverse : T(0);
        const T transport = static_cast<T>(of_transport), dual = static_cast<T>(of_dual);
        const T *u = p.template kept_u<T>(p.last_slot(ran)), *v = p.template kept_v<T>(p.last_slot(ran));
        T acc[kChunk][kColumns] = {};
        OTKD_ROLLED
        for (int64_t k = 0; k < steps; ++k) {
            T own_w[kColumns], own_v[kColumns];
            OTKD_UNROLL
            for (int c = 0; c < kColumns; ++c) {
                const int j = Own::column(c);
                own_w[c] = j < m ? w(k)[j] : T(0);
                own_v[c] = j < m ? before(k, j) : T(0);
            }
            OTKD_UNROLL
            for (int r = 0; r < kChunk; ++r) {
                const int i = Own::row(g, r0 + r);
                const T own_u = i < n ? u_of(k)[i] : T(0), own_z = i < n ? z(k)[i] : T(0);
                OTKD_UNROLL
                for (int c = 0; c < kColumns; ++c) acc[r][c] += own_u * own_w[c] + own_z * own_v[c];
            }
        }
        OTKD_UNROLL
        for (int r = 0; r < kChunk; ++r) {
            const int i = Own::row(g, r0 + r);
            OTKD_UNROLL
            for (int c = 0; c < kColumns; ++c) {
                const int j = Own::column(c);
                if (i >= n || j >= m) continue;
                const T k = tile.k[g][r0 + r][c];
                T value = 0;
                if (k > 0) {
                    const T direct = transport * (1 - (p.cost[i * m + j] - low) * slope) + dual;
                    value = k * (u[i] * v[j] * direct + acc[r][c] * inverse);
                }
                p.grad_cost[i * m + j] = value;
            }
        }
    }

    OTKD_DEVICE void marginals(const double (&sum_phi)[kGroups]) {
        const double of_dual = p.incoming(p.args.grad_regularized_cost), shift = static_cast<double>(low) / p.args.epsilon;
        const double of_low = steps > 0 ? p.incoming(p.args.grad_transport_cost) * low : 0.0;
        const T *u = p.template kept_u<T>(p.last_slot(ran)), *v = p.template kept_v<T>(p.last_slot(ran));
        double mass_a = 0, mass_b = 0;
        for (int i = thread_id(); i < n; i += block_threads()) mass_a += p.mass_a(i);
        for (int j = thread_id(); j < m; j += block_threads()) mass_b += p.mass_b(j);
        mass_a = block_sum(mass_a, memory.scratch);
        mass_b = block_sum(mass_b, memory.scratch);
        OTKD_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            const int i = Own::own_row(g);
            if (!p.args.grad_a || !Own::counts() || i >= n) continue;
            const double own = p.mass_a(i), phi = log(static_cast<double>(u[i])) + shift;
            p.args.grad_a[p.index * n + i] =
                marginal_gradient<T>(own, phi, steps > 0 ? sum_phi[g] / own : 0.0, p.penalty_a(), of_dual, mass_b);
        }
        for (int j = thread_id(); p.args.grad_b && j < m; j += block_threads()) {
            const double own = p.mass_b(j), gamma = log(static_cast<double>(v[j]));
            const double by_mass = (steps > 0 ? p.sum_gamma()[j] / own : 0.0) + of_low;
            p.args.grad_b[p.index * m + j] = marginal_gradient<T>(own, gamma, by_mass, p.penalty_b(), of_dual, mass_a);
        }
    }
};

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

// The gradients of sinkhorn_scaling.h. With incoming gradients of the outputs, phi = log u, gamma = log v and bars for
// adjoints, the fixed loop backwards is, for t = T .. 1:
//   w_j = gamma_bar_j v_j / b_j                      phi_bar_i   = [t = T] first_i - u_i (K w)_i
//   z_i = phi_bar_i u_i / a_i                        gamma_bar_j = -v'_j (K^T z)_j      (v' of iteration t - 1)
//   C_bar_ij += K_ij (u_i w_j + z_i v'_j) / epsilon
// log a and log b collect the sums of phi_bar and gamma_bar. The columns of P are exact after the last update, so
// <P, C> = <P, C - base> + base sum(b): with base = min C nothing large cancels in C / epsilon.
#pragma once
#include "sinkhorn_scaling.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class Rows>
void Scaling<Rows>::load_scalings(const Problem<T>& p, const Team& team) {
    int64_t begin, end;
    const double *u = p.kept_u(args_.num_iters - 1), *v = p.kept_v(args_.num_iters - 1);
    rows_of(team, begin, end);
    for (int64_t i = begin; i < end; ++i) u_[i] = i < n_ ? static_cast<S>(u[i]) : S(0);
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; ++j) v_[j] = j < m_ ? static_cast<S>(v[j]) : S(0);
    team.barrier();
}

// Adjoints of the last potentials: what the outputs hand to phi and gamma.
template <class Rows>
void Scaling<Rows>::first_adjoint(const Problem<T>& p, const Team& team) {
    const double eps = args_.epsilon;
    const double of_transport = p.incoming(args_.grad_transport_cost), of_dual = p.incoming(args_.grad_regularized_cost);
    int64_t begin, end;
    rows_of(team, begin, end);
    S* sums = partial_ + team.rank * ld_;
    std::memset(sums, 0, ld_ * sizeof(S));
    const Vec<S> zero = {};
    base_ = rows_.shift(0);
    for (int64_t i = 1; i < n_; ++i) base_ = rows_.shift(i) < base_ ? rows_.shift(i) : base_;
    for (int64_t i = begin; i < end; ++i) phi_[i] = sum_phi_[i] = 0;
    for_blocks(begin, end < n_ ? end : n_, rows_.block(), false, [&](int64_t i0, int64_t count) {
        const S* k = rows_.kernel(i0, count);
        const Cost* row = rows_.cost(i0, count);
        for (int64_t i = i0; i < i0 + count; ++i, k += ld_, row += m_) {
            if (!(u_[i] > 0)) continue;
            Vec<S> mass = {}, moved = {};
            const Vec<S> u = splat(u_[i]);
            for (int64_t j = 0; j < ld_; j += width<S>) {
                const Vec<S> kernel = load(k + j), v = load(v_ + j);
                const Vec<S> kc = kernel > zero ? kernel * (cost_vector(row, j) - base_) : zero;
                mass += kernel * v;
                moved += kc * v;
                store(sums + j, load(sums + j) + kc * u);
            }
            double first = of_transport * u_[i] * sum<S>(moved);
            first += of_dual * eps * (static_cast<double>(a_[i]) - static_cast<double>(u_[i]) * sum<S>(mass));
            if (args_.grad_f) first += eps * args_.grad_f[p.index * n_ + i];
            phi_[i] = static_cast<S>(first);
        }
    });
    team.barrier();
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; j += width<S>) {
        store(gamma_ + j, static_cast<S>(of_transport) * load(v_ + j) * column_sum(team, j));
        for (int w = 0; w < width<S>; ++w) {
            sum_gamma_[j + w] = 0;
            if (args_.grad_g && j + w < m_ && v_[j + w] > 0) {
                gamma_[j + w] += static_cast<S>(eps * args_.grad_g[p.index * m_ + j + w]);
            }
        }
    }
    team.barrier();
}

// Fills left_ (n, 2 T) = (u, z) and right_ (2 T, m) = (w, v') of every iteration.
template <class Rows>
void Scaling<Rows>::adjoint_loop(const Problem<T>& p, const Team& team) {
    const int64_t rank2 = 2 * args_.num_iters;
    int64_t row0, row1, column0, column1;
    rows_of(team, row0, row1);
    columns_of(team, column0, column1);
    S* sums = partial_ + team.rank * ld_;
    const Vec<S> zero = {};
    for (int64_t t = args_.num_iters - 1; t >= 0; --t) {
        const double *u = p.kept_u(t), *v = p.kept_v(t), *before = t ? p.kept_v(t - 1) : nullptr;
        S *w = right_ + 2 * t * ld_, *v_before = w + ld_;
        for (int64_t j = column0; j < column1; j += width<S>) {
            const Vec<S> mass = load(b_ + j), gamma = load(gamma_ + j);
            const VecInt<S> used = mass > zero;
            store(w + j, used ? gamma * LoadAs<S, double>::part(v + j, m_ - j, S(0)) / mass : zero);
            const Vec<S> one = splat(S(1));
            store(v_before + j, used ? (before ? LoadAs<S, double>::part(before + j, m_ - j, S(0)) : one) : zero);
            for (int64_t k = j; args_.grad_b && k < j + width<S>; ++k) sum_gamma_[k] += gamma_[k];
        }
        if (small_) {
            adjoint_small(u, w, v_before, t);
            continue;
        }
        std::memset(sums, 0, ld_ * sizeof(S));
        team.barrier();
        const bool last = t == args_.num_iters - 1;
        sweep(w, sums, row0, row1, t % 2 != 0, [&](int64_t i, S s) {
            S* out = left_ + i * rank2 + 2 * t;
            out[0] = a_[i] > 0 ? static_cast<S>(u[i]) : S(0);
            const S phi = (last ? phi_[i] : S(0)) - out[0] * s;
            sum_phi_[i] += phi;
            return out[1] = a_[i] > 0 ? phi * out[0] / a_[i] : S(0);
        });
        team.barrier();
        for (int64_t j = column0; j < column1; j += width<S>) {
            store(gamma_ + j, -(load(v_before + j) * column_sum(team, j)));
        }
        team.barrier();
    }
}

// C_bar = K (u v (d_transport (1 - C / eps) + d_dual) + left right / eps); without `unroll` the plan alone.
template <class Rows>
void Scaling<Rows>::cost_gradient(const Problem<T>& p, const Team& team, bool unroll) {
    const double of_transport = p.incoming(args_.grad_transport_cost), of_dual = p.incoming(args_.grad_regularized_cost);
    int64_t begin, end;
    rows_of(team, begin, end);
    for_blocks(begin, end < n_ ? end : n_, rows_.block(), false, [&](int64_t i0, int64_t count) {
        const S* kernel = rows_.kernel(i0, count);
        const Cost* cost = rows_.cost(i0, count);
        Cost* out = rows_.gradient(i0, count);
        for (int64_t i = 0; i < count; i += kBlock) {
            gradient_rows(i0 + i, count - i < kBlock ? count - i : kBlock, kernel + i * ld_, cost + i * m_, out + i * m_,
                          of_transport, of_dual, unroll);
        }
        rows_.emit(i0, count);
    });
}

// At most kBlock rows of it, from row `i` on; left_ has its padding, so that kBlock rows are always summed.
template <class Rows>
void Scaling<Rows>::gradient_rows(int64_t i, int64_t count, const S* kernel, const Cost* cost, Cost* out,
                                  double of_transport, double of_dual, bool unroll) const {
    const int64_t rank2 = unroll ? 2 * args_.num_iters : 0;
    const S inverse = static_cast<S>(1.0 / args_.epsilon), slope = unroll ? inverse : S(0);
    const S transport = static_cast<S>(of_transport), dual = static_cast<S>(of_dual);
    const Vec<S> zero = {};
    for (int64_t j = 0; j < m_; j += 2 * width<S>) {
        Vec<S> acc[kBlock][2] = {};
        for (int64_t r2 = 0; r2 < rank2; ++r2) {
            const Vec<S> right0 = load(right_ + r2 * ld_ + j), right1 = load(right_ + r2 * ld_ + j + width<S>);
            for (int r = 0; r < kBlock; ++r) {
                const Vec<S> left = splat(left_[(i + r) * rank2 + r2]);
                acc[r][0] += left * right0;
                acc[r][1] += left * right1;
            }
        }
        for (int64_t r = 0; r < count; ++r) {
            for (int64_t c = 0, j1 = j; c < 2 && j1 < m_; ++c, j1 += width<S>) {
                const Vec<S> k = load(kernel + r * ld_ + j1);
                const Vec<S> direct = transport * (S(1) - (cost_vector(cost + r * m_, j1) - base_) * slope) + dual;
                const Vec<S> value = k * (u_[i + r] * load(v_ + j1) * direct + acc[r][c] * inverse);
                store_as(out + r * m_ + j1, k > zero ? value : zero, m_ - j1);
            }
        }
    }
}

template <class Rows>
void Scaling<Rows>::marginal_gradients(const Problem<T>& p) {
    const double of_dual = p.incoming(args_.grad_regularized_cost), eps = args_.epsilon;
    double mass_a = 0, mass_b = 0;
    for (int64_t i = 0; i < n_; ++i) mass_a += a_[i];
    for (int64_t j = 0; j < m_; ++j) mass_b += b_[j];
    const bool unroll = args_.gradient == Gradient::unroll;
    for (int64_t i = 0; args_.grad_a && i < n_; ++i) {
        const double log_u = std::log(static_cast<double>(u_[i])) + rows_.shift(i) / eps;
        double grad = of_dual != 0 ? of_dual * dual_marginal_gradient(eps, log_u, a_[i], mass_b) : 0.0;
        if (unroll && a_[i] > 0) grad += sum_phi_[i] / a_[i];
        args_.grad_a[p.index * n_ + i] = static_cast<T>(grad);
    }
    for (int64_t j = 0; args_.grad_b && j < m_; ++j) {
        const double log_v = std::log(static_cast<double>(v_[j]));
        double grad = of_dual != 0 ? of_dual * dual_marginal_gradient(eps, log_v, b_[j], mass_a) : 0.0;
        if (unroll && v_[j] > 0) grad += sum_gamma_[j] / b_[j] + p.incoming(args_.grad_transport_cost) * base_;
        args_.grad_b[p.index * m_ + j] = static_cast<T>(grad);
    }
}

template <class Rows>
void Scaling<Rows>::backward(const Problem<T>& p, const Team& team) {
    const bool unroll = args_.gradient == Gradient::unroll;
    rows_.open(p, team);
    if (!args_.kernel_ready) {
        start(p, team);
        load_scalings(p, team);
        if (small_ && unroll) transpose_kernel();
    }
    if (unroll) {
        first_adjoint(p, team);
        adjoint_loop(p, team);
    }
    if (rows_.wants_gradient()) cost_gradient(p, team, unroll);
    rows_.close(team);
    if (team.rank == 0 && (args_.grad_a || args_.grad_b)) marginal_gradients(p);
    team.barrier();
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

// The gradients of sinkhorn_scaling.h. With incoming gradients of the outputs, phi = log u, gamma = log v and bars for
// adjoints, the loop backwards is, for its steps t = T .. 1 (the last one alone for the gradient of the last step):
//   w_j = gamma_bar_j lambda_b / (K^T u)_j           phi_bar_i   = [t = T] first_i - u_i (K w)_i
//   z_i = phi_bar_i lambda_a / (K v')_i              gamma_bar_j = -v'_j (K^T z)_j      (v' of iteration t - 1)
//   C_bar_ij += K_ij (u_i w_j + z_i v'_j) / epsilon
// log a and log b collect the sums of phi_bar and gamma_bar. Without a penalty on the columns those of P are exact after
// the last update, so <P, C> = <P, C - base> + base sum(b): with base = min C nothing large cancels in C / epsilon.
#pragma once
#include "sinkhorn_scaling.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// The scalings of one step and the columns before it (null: those that the loop starts from).
template <class Rows>
struct Scaling<Rows>::Trace {
    const S *u, *v, *before;
    Trace(const Problem<T>& p, int64_t k) {
        const bool whole = p.args.gradient == Gradient::unroll;
        u = p.template kept_u<S>(whole ? k : 1);
        v = p.template kept_v<S>(whole ? k : 1);
        before = !whole ? p.template kept_v<S>(0) : k ? p.template kept_v<S>(k - 1) : nullptr;
    }
};

template <class Rows>
void Scaling<Rows>::load_scalings(const Problem<T>& p, const Team& team) {
    ran_ = p.iterations();
    steps_ = args_.gradient == Gradient::unroll ? ran_ : args_.gradient == Gradient::last_step ? 1 : 0;
    int64_t begin, end;
    const S *u = p.template kept_u<S>(p.last_slot(ran_)), *v = p.template kept_v<S>(p.last_slot(ran_));
    rows_of(team, begin, end);
    for (int64_t i = begin; i < end; ++i) {
        u_[i] = i < n_ ? u[i] : S(0);
        if (!plain_) log_u_[i] = std::log(static_cast<double>(u_[i]));
    }
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; ++j) {
        if (steps_ > 0) right_[ld_ + j] = v_[j];
        v_[j] = j < m_ ? v[j] : S(0);
        if (!plain_) log_v_[j] = std::log(static_cast<double>(v_[j]));
    }
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
    base_ = lambda_b_ == 1 ? rows_.shift(0) : S(0);
    for (int64_t i = 1; lambda_b_ == 1 && i < n_; ++i) base_ = rows_.shift(i) < base_ ? rows_.shift(i) : base_;
    for (int64_t i = begin; i < end; ++i) phi_bar_[i] = sum_phi_[i] = 0;
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
            const double target = a_[i] * p.penalty_a().kept(plain_ ? 0.0 : phi(i) - std::log(p.mass_a(i)));
            double first = of_transport * u_[i] * sum<S>(moved);
            first += of_dual * eps * (target - static_cast<double>(u_[i]) * sum<S>(mass));
            if (args_.grad_f) first += eps * args_.grad_f[p.index * n_ + i];
            phi_bar_[i] = static_cast<S>(first);
        }
    });
    team.barrier();
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; j += width<S>) {
        store(gamma_bar_ + j, static_cast<S>(of_transport) * load(v_ + j) * column_sum(team, j));
        for (int w = 0; w < width<S>; ++w) {
            sum_gamma_[j + w] = 0;
            if (args_.grad_g && j + w < m_ && v_[j + w] > 0) {
                gamma_bar_[j + w] += static_cast<S>(eps * args_.grad_g[p.index * m_ + j + w]);
            }
        }
    }
    team.barrier();
}

// Fills left_ (n, 2 T) = (u, z) and right_ (2 T, m) = (w, v') of every step.
template <class Rows>
void Scaling<Rows>::adjoint_loop(const Problem<T>& p, const Team& team) {
    int64_t row0, row1, column0, column1;
    rows_of(team, row0, row1);
    columns_of(team, column0, column1);
    const int64_t columns = column1 - column0, own_rows = (row1 < n_ ? row1 : n_) - row0;
    const double* level_a = plain_ ? nullptr : level_a_ + row0;
    const double* level_b = plain_ ? nullptr : level_b_ + column0;
    S* sums = partial_ + team.rank * ld_;
    for (int64_t i = row0; i < (row1 == n_pad_ ? n_vec_ : row1); ++i) slope_[i] = 0;
    for (int64_t k = steps_ - 1; k >= 0; --k) {
        const Trace step(p, k);
        S *w = right_ + 2 * k * ld_, *v_before = w + ld_;
        for (int64_t j = column0; j < column1; ++j) w[j] = j < m_ ? step.v[j] : S(0);
        for (int64_t j = column0; step.before && j < column1; ++j) v_before[j] = j < m_ ? step.before[j] : S(0);
        update_slopes(lambda_b_, b_ + column0, level_b, w + column0, w + column0, columns);
        for (int64_t j = column0; j < column1; ++j) w[j] *= gamma_bar_[j];
        for (int64_t j = column0; args_.grad_b && j < column1; ++j) sum_gamma_[j] += gamma_bar_[j];
        update_slopes(lambda_a_, a_ + row0, level_a, step.u + row0, slope_ + row0, own_rows);
        if (small_) {
            adjoint_small(step, k, w, v_before);
            continue;
        }
        std::memset(sums, 0, ld_ * sizeof(S));
        team.barrier();
        const bool last = k == steps_ - 1;
        sweep(rows_, ld_, w, sums, row0, row1, turned(k), [&](int64_t i, const S* s) {
            for (int64_t r = i; r < i + kBlock; ++r) {
                const S u = r < n_ ? step.u[r] : S(0), bar = (last ? phi_bar_[r] : S(0)) - u * s[r - i];
                sum_phi_[r] += bar;
                next_u_[r] = bar * slope_[r];
                left_[(r * steps_ + k) * 2] = u;
                left_[(r * steps_ + k) * 2 + 1] = next_u_[r];
            }
            return next_u_ + i;
        });
        team.barrier();
        for (int64_t j = column0; j < column1; j += width<S>) {
            store(gamma_bar_ + j, -(load(v_before + j) * column_sum(team, j)));
        }
        team.barrier();
    }
}

// C_bar = K (u v (d_transport (1 - C / eps) + d_dual) + left right / eps); where no step is differentiated the plan alone.
template <class Rows>
void Scaling<Rows>::cost_gradient(const Problem<T>& p, const Team& team) {
    const double of_transport = p.incoming(args_.grad_transport_cost), of_dual = p.incoming(args_.grad_regularized_cost);
    int64_t begin, end;
    rows_of(team, begin, end);
    for_blocks(begin, end < n_ ? end : n_, rows_.block(), false, [&](int64_t i0, int64_t count) {
        const S* kernel = rows_.kernel(i0, count);
        const Cost* cost = rows_.cost(i0, count);
        Cost* out = rows_.gradient(i0, count);
        for (int64_t i = 0; i < count; i += kBlock) {
            gradient_rows(i0 + i, count - i < kBlock ? count - i : kBlock, kernel + i * ld_, cost + i * m_, out + i * m_,
                          of_transport, of_dual);
        }
        rows_.emit(i0, count);
    });
}

// At most kBlock rows of it, from row `i` on; left_ has its padding, so that kBlock rows are always summed.
template <class Rows>
void Scaling<Rows>::gradient_rows(int64_t i, int64_t count, const S* kernel, const Cost* cost, Cost* out,
                                  double of_transport, double of_dual) const {
    const int64_t rank2 = 2 * steps_;
    const S inverse = static_cast<S>(1.0 / args_.epsilon), slope = steps_ > 0 ? inverse : S(0);
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
    const double of_dual = p.incoming(args_.grad_regularized_cost);
    const double of_base = steps_ > 0 ? p.incoming(args_.grad_transport_cost) * base_ : 0.0;
    double mass_a = 0, mass_b = 0;
    for (int64_t i = 0; i < n_; ++i) mass_a += a_[i];
    for (int64_t j = 0; j < m_; ++j) mass_b += b_[j];
    T *grad_a = args_.grad_a ? args_.grad_a + p.index * n_ : nullptr;
    T *grad_b = args_.grad_b ? args_.grad_b + p.index * m_ : nullptr;
    write_marginal_gradient(
        grad_a, n_, p.penalty_a(), of_dual, mass_b, [&](int64_t i) { return p.mass_a(i); },
        [&](int64_t i) { return phi(i); }, [&](int64_t i) { return steps_ > 0 ? sum_phi_[i] / a_[i] : 0.0; });
    write_marginal_gradient(
        grad_b, m_, p.penalty_b(), of_dual, mass_a, [&](int64_t j) { return p.mass_b(j); },
        [&](int64_t j) { return gamma(j); },
        [&](int64_t j) { return (steps_ > 0 ? sum_gamma_[j] / b_[j] : 0.0) + of_base; });
}

template <class Rows>
void Scaling<Rows>::backward(const Problem<T>& p, const Team& team) {
    rows_.open(p, team);
    start(p, team);
    load_scalings(p, team);
    if (steps_ > 0) {
        if (small_ && !args_.kernel_ready) transpose_kernel();
        first_adjoint(p, team);
        adjoint_loop(p, team);
    }
    if (rows_.wants_gradient()) cost_gradient(p, team);
    rows_.close(team);
    if (team.rank == 0 && (args_.grad_a || args_.grad_b)) marginal_gradients(p);
    team.barrier();
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

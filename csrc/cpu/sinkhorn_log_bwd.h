// The gradients of sinkhorn_log.h: the adjoint of sinkhorn_scaling_bwd.h with u K v written as one exponential. With the
// plans Q after the column update and R after the row update of a step,
//   w = gamma_bar lambda_b / (column sums of Q)      phi_bar   = [t = T] first - Q w
//   z = phi_bar lambda_a / (row sums of R)           gamma_bar = -R^T z       (of the iteration before)
//   C_bar += (Q w + R z) / epsilon
// R = Q exp(gamma' - gamma), and both are the last plan P times factors of rows and columns: where the potentials are near
// enough the factors replace the exponentials, one an entry and step in the loop and none for the cost's gradient.
#pragma once
#include "sinkhorn_log.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr double kNear = 150;  // |difference of potentials| whose factors, four of them, lose nothing that counts

// log of the sum that an update saw, in the plan after it: log scaling = level - lambda log sum.
inline double log_sum_after(double level, double log_scaling, double lambda) {
    return lambda == 1 ? level : log_scaling + (level - log_scaling) / lambda;
}

// exp(value - base) where the two are near, 0 where both are -inf; else not near.
inline double near_factor(double value, double base, bool& near) {
    if (value == base) return value == -kInfinity ? 0.0 : 1.0;
    near &= std::fabs(value - base) <= kNear;
    return std::exp(value - base);
}

// Final potentials, and those of the columns before the first and after each step, (steps + 1, ld).
template <class Costs>
void LogDomain<Costs>::load_potentials(const Problem<T>& p, const Team& team) {
    ran_ = p.iterations();
    const bool unroll = args_.gradient == Gradient::unroll;
    steps_ = unroll ? ran_ : args_.gradient == Gradient::last_step ? 1 : 0;
    int64_t begin, end;
    const double *phi = p.template kept_u<double>(p.last_slot(ran_)), *gamma = p.template kept_v<double>(p.last_slot(ran_));
    rows_of(team, begin, end);
    for (int64_t i = begin; i < end; ++i) phi_[i] = phi[i];
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; ++j) {
        if (unroll) gammas_[j] = gamma_[j];
        for (int64_t k = unroll ? 1 : 0; steps_ > 0 && k <= steps_; ++k) {
            gammas_[k * ld_ + j] = j < m_ ? p.template kept_v<double>(unroll ? k - 1 : k)[j] : -kInfinity;
        }
        gamma_[j] = j < m_ ? gamma[j] : -kInfinity;
    }
    team.barrier();
}

template <class Costs>
void LogDomain<Costs>::first_adjoint(const Problem<T>& p, const Team& team) {
    const double eps = args_.epsilon;
    const double of_transport = p.incoming(args_.grad_transport_cost), of_dual = p.incoming(args_.grad_regularized_cost);
    int64_t begin, end;
    rows_of(team, begin, end);
    double* sums = own_sums(team, 0.0);
    const V zero = {};
    for_rows(begin, end, [&](int64_t i, const Cost* cost) {
        first_[i] = sum_phi_[i] = 0;
        if (phi_[i] == -kInfinity) return;
        V mass = {}, moved = {};
        for (int64_t j = 0; j < ld_; j += width<double>) {
            const V entry = plan(cost, phi_[i], gamma_, j);
            const V product = entry != zero ? entry * exponent(cost, j) * eps : zero;
            mass += entry;
            moved += product;
            store(sums + j, load(sums + j) + product);
        }
        const double target = std::exp(log_a_[i]) * p.penalty_a().kept(phi_[i] - log_a_[i]);
        first_[i] = of_transport * sum<double>(moved) + of_dual * eps * (target - sum<double>(mass));
        if (args_.grad_f) first_[i] += eps * args_.grad_f[p.index * n_ + i];
    });
    team.barrier();
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; ++j) {
        gamma_bar_[j] = sum_gamma_[j] = 0;
        if (gamma_[j] == -kInfinity) continue;
        gamma_bar_[j] = of_transport * team_sum(team, j);
        if (args_.grad_g) gamma_bar_[j] += eps * args_.grad_g[p.index * m_ + j];
    }
    team.barrier();
}

// ratio_ = exp(columns before step k - columns after it); false where they are too far apart for it.
template <class Costs>
bool LogDomain<Costs>::column_ratios(int64_t k, int64_t begin, int64_t end) {
    const double *before = gammas_ + k * ld_, *after = before + ld_;
    bool near = true;
    for (int64_t j = begin; j < end; ++j) ratio_[j] = near_factor(before[j], after[j], near);
    return near;
}

template <class Costs>
void LogDomain<Costs>::adjoint_loop(const Problem<T>& p, const Team& team) {
    int64_t row0, row1, column0, column1;
    rows_of(team, row0, row1);
    columns_of(team, column0, column1);
    double* entries = entries_ + team.rank * ld_;
    for (int64_t k = steps_ - 1; k >= 0; --k) {
        const double *phi = phi_of(p, k), *before = gammas_ + k * ld_, *gamma = before + ld_;
        double *w = w_ + k * ld_, *z = z_ + k * n_;
        for (int64_t j = column0; j < column1; ++j) {
            const bool used = gamma[j] > -kInfinity;
            w[j] = used ? gamma_bar_[j] * lambda_b_ * std::exp(-log_sum_after(log_b_[j], gamma[j], lambda_b_)) : 0.0;
            sum_gamma_[j] += used ? gamma_bar_[j] : 0.0;
        }
        reduction_.put(team, kColumnError, column_ratios(k, column0, column1) ? 0 : 1);
        double* sums = own_sums(team, 0.0);
        team.barrier();
        const bool near = reduction_.sum(team, kColumnError) == 0;
        for_rows(row0, row1, [&](int64_t i, const Cost* cost) {
            z[i] = 0;
            if (phi[i] == -kInfinity) return;
            V total = {};
            for (int64_t j = 0; j < ld_; j += width<double>) {
                const V entry = plan(cost, phi[i], gamma, j);
                store(entries + j, entry);
                total += entry * load(w + j);
            }
            const double bar = (k == steps_ - 1 ? first_[i] : 0.0) - sum<double>(total);
            sum_phi_[i] += bar;
            z[i] = bar * lambda_a_ * std::exp(-log_sum_after(log_a_[i], phi[i], lambda_a_));
            for (int64_t j = 0; j < ld_; j += width<double>) {
                const V entry = near ? load(entries + j) * load(ratio_ + j) : plan(cost, phi[i], before, j);
                store(sums + j, load(sums + j) + entry * z[i]);
            }
        });
        team.barrier();
        for (int64_t j = column0; j < column1; ++j) gamma_bar_[j] = -team_sum(team, j);
        team.barrier();
    }
}

// betas_ = exp(columns of each moment - the last ones), near_ where all of a moment are near.
template <class Costs>
void LogDomain<Costs>::prepare_gradient(const Team& team) {
    for (int64_t k = 0; steps_ > 0 && k <= steps_; ++k) {
        if (k % team.size != team.rank) continue;
        bool near = true;
        for (int64_t j = 0; j < ld_; ++j) betas_[k * ld_ + j] = near_factor(gammas_[k * ld_ + j], gamma_[j], near);
        near_[k] = near;
    }
    team.barrier();
}

// dL/dC of one row: P (d_transport (1 - X) + d_dual) + sum over the steps of (Q w + R z) / epsilon. `alphas` is for
// exp(phi of each step - the last one), negative where only exponentials of its own will do.
template <class Costs>
void LogDomain<Costs>::gradient_row(const Problem<T>& p, int64_t i, const Cost* cost, Cost* out, double* alphas) const {
    for (int64_t k = 0; k < steps_; ++k) {
        bool near = near_[k] != 0 && near_[k + 1] != 0;
        const double phi = phi_of(p, k)[i], alpha = near_factor(phi, phi_[i], near);
        alphas[k] = near || phi == -kInfinity ? alpha : -1.0;
    }
    const double of_transport = p.incoming(args_.grad_transport_cost), of_dual = p.incoming(args_.grad_regularized_cost);
    const V zero = {}, one = splat(1.0), forbidden = splat(kInfinity);
    for (int64_t j = 0; j < m_; j += width<double>) {
        const V x = exponent(cost, j), last = exp_(phi_[i] + load(gamma_ + j) - x);
        V rest = zero;
        for (int64_t k = 0; k < steps_; ++k) {
            if (alphas[k] == 0) continue;
            const int64_t at = k * ld_ + j;
            if (!(alphas[k] < 0)) {
                rest += last * (alphas[k] * (load(betas_ + at + ld_) * load(w_ + at) + load(betas_ + at) * z_[k * n_ + i]));
            } else {
                const double phi = phi_of(p, k)[i];
                rest += exp_(phi + load(gammas_ + at + ld_) - x) * load(w_ + at);
                rest += exp_(phi + load(gammas_ + at) - x) * z_[k * n_ + i];
            }
        }
        const V slope = steps_ > 0 ? one - x : one;
        const V value = last * (of_transport * slope + of_dual) + rest * inverse_;
        store_as(out + j, x == forbidden ? zero : value, m_ - j);
    }
}

template <class Costs>
void LogDomain<Costs>::write_gradients(const Problem<T>& p, const Team& team) {
    const double of_dual = p.incoming(args_.grad_regularized_cost);
    int64_t begin, end;
    rows_of(team, begin, end);
    if (costs_.wants_gradient()) {
        double* alphas = alphas_ + team.rank * steps_;
        for_blocks(begin, end, costs_.block(), false, [&](int64_t i0, int64_t count) {
            const Cost* cost = costs_.cost(i0, count);
            Cost* out = costs_.gradient(i0, count);
            for (int64_t k = 0; k < count; ++k) gradient_row(p, i0 + k, cost + k * m_, out + k * m_, alphas);
            costs_.emit(i0, count);
        });
    }
    costs_.close(team);
    if (team.rank != 0) return;
    double mass_a = 0, mass_b = 0;
    for (int64_t i = 0; i < n_; ++i) mass_a += p.mass_a(i);
    for (int64_t j = 0; j < m_; ++j) mass_b += p.mass_b(j);
    T *grad_a = args_.grad_a ? args_.grad_a + p.index * n_ : nullptr;
    T *grad_b = args_.grad_b ? args_.grad_b + p.index * m_ : nullptr;
    write_marginal_gradient(
        grad_a, n_, p.penalty_a(), of_dual, mass_b, [&](int64_t i) { return p.mass_a(i); },
        [&](int64_t i) { return phi_[i]; }, [&](int64_t i) { return steps_ > 0 ? sum_phi_[i] / p.mass_a(i) : 0.0; });
    write_marginal_gradient(
        grad_b, m_, p.penalty_b(), of_dual, mass_a, [&](int64_t j) { return p.mass_b(j); },
        [&](int64_t j) { return gamma_[j]; }, [&](int64_t j) { return steps_ > 0 ? sum_gamma_[j] / p.mass_b(j) : 0.0; });
}

template <class Costs>
void LogDomain<Costs>::backward(const Problem<T>& p, const Team& team) {
    start(p, team);
    load_potentials(p, team);
    if (steps_ > 0) {
        first_adjoint(p, team);
        adjoint_loop(p, team);
    }
    prepare_gradient(team);
    write_gradients(p, team);
    team.barrier();
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

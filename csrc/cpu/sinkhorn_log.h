// Sinkhorn in the log domain, in double: the way that works for every cost and epsilon, two exponentials an entry and
// iteration. X = C / epsilon, phi = f / epsilon, gamma = g / epsilon; each sum is shifted by its largest term.
//   phi_i = log a_i - LSE_j(gamma_j - X_ij),   gamma_j = log b_j - LSE_i(phi_i - X_ij),   P = exp(phi + gamma - X)
// A row or column without mass, or without a finite cost to one that has mass, gets -inf and takes no part.
// The adjoint is that of sinkhorn_scaling_bwd.h with u K v written as one exponential.
#pragma once
#include "sinkhorn_rows.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <class Costs>
class LogDomain {
    using T = typename Costs::Input;
    using Cost = typename Costs::Cost;
    using Args = typename Costs::Args;
    using V = Vec<double>;

  public:
    LogDomain(const Args& args, Arena& arena, int threads, bool backward)
        : args_(args),
          costs_(args, arena, threads, backward),
          n_(args.n),
          m_(args.m),
          ld_(round_up(args.m, width<double>)),
          inverse_(1.0 / args.epsilon),
          exp_(1.0) {
        log_a_ = arena.take<double>(n_);
        phi_ = arena.take<double>(n_);
        row_sums_ = arena.take<double>(n_);
        log_b_ = arena.take<double>(ld_);
        gamma_ = arena.take<double>(ld_);
        top_ = arena.take<double>(ld_);
        column_sums_ = arena.take<double>(ld_);
        partial_ = arena.take<double>(threads * ld_);
        reduction_.slots = arena.take<double>(threads * kSlots);
        if (!backward) return;
        first_ = arena.take<double>(n_);
        sum_phi_ = arena.take<double>(n_);
        gamma_bar_ = arena.take<double>(ld_);
        sum_gamma_ = arena.take<double>(ld_);
        gammas_ = arena.take<double>((args.num_iters + 1) * ld_);
        w_ = arena.take<double>(args.num_iters * ld_);
        z_ = arena.take<double>(args.num_iters * n_);
    }

    void forward(const Problem<T>& p, const Team& team);
    void backward(const Problem<T>& p, const Team& team);

  private:
    void start(const Problem<T>& p, const Team& team);
    void row_updates(int64_t begin, int64_t end);
    void column_updates(const Team& team);
    void plan_sums(const Team& team, double& transport_cost);
    void first_adjoint(const Problem<T>& p, const Team& team);
    void adjoint_loop(const Problem<T>& p, const Team& team);
    void gradient_row(const Problem<T>& p, int64_t i, const Cost* cost, Cost* out, bool unroll) const;
    void write_gradients(const Problem<T>& p, const Team& team, bool unroll);
    void rows_of(const Team& team, int64_t& begin, int64_t& end) const {
        split(n_, 1, team.size, team.rank, begin, end);
    }
    void columns_of(const Team& team, int64_t& begin, int64_t& end) const {
        split(ld_, width<double>, team.size, team.rank, begin, end);
    }
    double* own_sums(const Team& team, double fill) const {
        double* sums = partial_ + team.rank * ld_;
        for (int64_t j = 0; j < ld_; ++j) sums[j] = fill;
        return sums;
    }
    // X of the columns from j on; 0 beyond m, where gamma is -inf.
    OTKD_INLINE V exponent(const Cost* cost, int64_t j) const { return LoadAs<double, Cost>::part(cost + j, m_ - j, 0.0) * inverse_; }
    OTKD_INLINE V plan(const Cost* cost, double phi, const double* gamma, int64_t j) const {
        return exp_(phi + load(gamma + j) - exponent(cost, j));
    }
    // Calls body(i, cost of row i) for the thread's rows [begin, end).
    template <class Body>
    OTKD_INLINE void for_rows(int64_t begin, int64_t end, Body body) {
        for_blocks(begin, end, costs_.block(), false, [&](int64_t i0, int64_t count) {
            const Cost* cost = costs_.cost(i0, count);
            for (int64_t i = i0; i < i0 + count; ++i, cost += m_) body(i, cost);
        });
    }

    const Args& args_;
    Costs costs_;
    const int64_t n_, m_, ld_;
    const double inverse_;
    const ScaledExp<double> exp_;
    double *log_a_, *phi_, *row_sums_, *log_b_, *gamma_, *top_, *column_sums_, *partial_;
    Reduction reduction_;
    double *first_ = nullptr, *sum_phi_ = nullptr, *gamma_bar_ = nullptr, *sum_gamma_ = nullptr;
    double *gammas_ = nullptr;              // (T + 1, ld): as the loop starts, then after each iteration
    double *w_ = nullptr, *z_ = nullptr;    // (T, ld) and (T, n), see adjoint_loop
};

template <class Costs>
void LogDomain<Costs>::start(const Problem<T>& p, const Team& team) {
    costs_.open(p, team);
    int64_t begin, end;
    rows_of(team, begin, end);
    for (int64_t i = begin; i < end; ++i) {
        log_a_[i] = std::log(p.mass_a(i));
        phi_[i] = log_a_[i] > -kInfinity ? 0.0 : -kInfinity;
    }
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; ++j) {
        log_b_[j] = j < m_ ? std::log(p.mass_b(j)) : -kInfinity;
        gamma_[j] = log_b_[j] > -kInfinity ? 0.0 : -kInfinity;
    }
    team.barrier();
}

template <class Costs>
void LogDomain<Costs>::row_updates(int64_t begin, int64_t end) {
    for_rows(begin, end, [&](int64_t i, const Cost* cost) {
        if (!(log_a_[i] > -kInfinity)) return;
        V best = splat(-kInfinity);
        VecInt<double> nan = {};
        for (int64_t j = 0; j < ld_; j += width<double>) {
            const V term = load(gamma_ + j) - exponent(cost, j);
            nan |= term != term;
            best = max<double>(term, best);
        }
        const double top = largest<double>(best);
        if (top == -kInfinity && !any<double>(nan)) {
            phi_[i] = -kInfinity;
            return;
        }
        V total = {};
        for (int64_t j = 0; j < ld_; j += width<double>) total += exp_(load(gamma_ + j) - exponent(cost, j) - top);
        phi_[i] = log_a_[i] - top - std::log(sum<double>(total));
    });
}

template <class Costs>
void LogDomain<Costs>::column_updates(const Team& team) {
    int64_t row0, row1, column0, column1;
    rows_of(team, row0, row1);
    columns_of(team, column0, column1);
    double* sums = own_sums(team, -kInfinity);
    for_rows(row0, row1, [&](int64_t i, const Cost* cost) {
        if (phi_[i] == -kInfinity) return;
        for (int64_t j = 0; j < ld_; j += width<double>) {
            store(sums + j, max<double>(phi_[i] - exponent(cost, j), load(sums + j)));
        }
    });
    team.barrier();
    for (int64_t j = column0; j < column1; ++j) {
        double best = partial_[j];
        for (int r = 1; r < team.size; ++r) best = partial_[r * ld_ + j] > best ? partial_[r * ld_ + j] : best;
        top_[j] = best > -kInfinity ? best : 0.0;
    }
    team.barrier();
    sums = own_sums(team, 0.0);
    for_rows(row0, row1, [&](int64_t i, const Cost* cost) {
        if (phi_[i] == -kInfinity) return;
        for (int64_t j = 0; j < ld_; j += width<double>) {
            store(sums + j, load(sums + j) + exp_(phi_[i] - exponent(cost, j) - load(top_ + j)));
        }
    });
    team.barrier();
    for (int64_t j = column0; j < column1; ++j) {
        double total = 0;
        for (int r = 0; r < team.size; ++r) total += partial_[r * ld_ + j];
        gamma_[j] = total == 0 ? -kInfinity : log_b_[j] - top_[j] - std::log(total);
    }
    team.barrier();
}

// Row sums and column sums of the plan, and <P, C>.
template <class Costs>
void LogDomain<Costs>::plan_sums(const Team& team, double& transport_cost) {
    int64_t begin, end;
    rows_of(team, begin, end);
    double* sums = own_sums(team, 0.0);
    double moved_total = 0;
    const V zero = {};
    for_rows(begin, end, [&](int64_t i, const Cost* cost) {
        V mass = {}, moved = {};
        for (int64_t j = 0; j < ld_; j += width<double>) {
            const V entry = plan(cost, phi_[i], gamma_, j);
            mass += entry;
            moved += entry != zero ? entry * exponent(cost, j) : zero;  // 0 times +inf is 0, NaN stays
            store(sums + j, load(sums + j) + entry);
        }
        row_sums_[i] = sum<double>(mass);
        moved_total += sum<double>(moved);
    });
    reduction_.put(team, 0, moved_total);
    team.barrier();
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; ++j) {
        column_sums_[j] = 0;
        for (int r = 0; r < team.size; ++r) column_sums_[j] += partial_[r * ld_ + j];
    }
    transport_cost = reduction_.sum(team, 0) * args_.epsilon;
    team.barrier();
}

template <class Costs>
void LogDomain<Costs>::forward(const Problem<T>& p, const Team& team) {
    start(p, team);
    int64_t begin, end;
    for (int64_t t = 0; t < args_.num_iters; ++t) {
        double *kept_phi = p.kept_u(t), *kept_gamma = p.kept_v(t);
        rows_of(team, begin, end);
        row_updates(begin, end);
        for (int64_t i = begin; kept_phi && i < end; ++i) kept_phi[i] = phi_[i];
        column_updates(team);
        columns_of(team, begin, end);
        for (int64_t j = begin; kept_gamma && j < end && j < m_; ++j) kept_gamma[j] = gamma_[j];
    }
    double transport_cost;
    plan_sums(team, transport_cost);
    if (team.rank == 0) {
        write_outputs(
            p, row_sums_, column_sums_, transport_cost, [&](int64_t i) { return phi_[i]; },
            [&](int64_t j) { return gamma_[j]; });
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
        first_[i] = of_transport * sum<double>(moved) + of_dual * eps * (std::exp(log_a_[i]) - sum<double>(mass));
        if (args_.grad_f) first_[i] += eps * args_.grad_f[p.index * n_ + i];
    });
    team.barrier();
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; ++j) {
        gamma_bar_[j] = sum_gamma_[j] = 0;
        if (gamma_[j] == -kInfinity) continue;
        for (int r = 0; r < team.size; ++r) gamma_bar_[j] += of_transport * partial_[r * ld_ + j];
        if (args_.grad_g) gamma_bar_[j] += eps * args_.grad_g[p.index * m_ + j];
    }
    team.barrier();
}

// Fills w and z of every iteration and sums the adjoints. Q and R the plans after the column and after the row update:
//   w = gamma_bar / b,   phi_bar = [t = T] first - Q w,   z = phi_bar / a,   gamma_bar (of t - 1) = -R^T z
template <class Costs>
void LogDomain<Costs>::adjoint_loop(const Problem<T>& p, const Team& team) {
    int64_t row0, row1, column0, column1;
    rows_of(team, row0, row1);
    columns_of(team, column0, column1);
    for (int64_t t = args_.num_iters - 1; t >= 0; --t) {
        const double *phi = p.kept_u(t), *gamma = gammas_ + (t + 1) * ld_, *before = gammas_ + t * ld_;
        double *w = w_ + t * ld_, *z = z_ + t * n_;
        for (int64_t j = column0; j < column1; ++j) {
            const bool used = gamma[j] > -kInfinity;
            w[j] = used ? gamma_bar_[j] * std::exp(-log_b_[j]) : 0.0;
            sum_gamma_[j] += used ? gamma_bar_[j] : 0.0;
        }
        double* sums = own_sums(team, 0.0);
        team.barrier();
        for_rows(row0, row1, [&](int64_t i, const Cost* cost) {
            z[i] = 0;
            if (phi[i] == -kInfinity) return;
            V total = {};
            for (int64_t j = 0; j < ld_; j += width<double>) total += plan(cost, phi[i], gamma, j) * load(w + j);
            const double bar = (t == args_.num_iters - 1 ? first_[i] : 0.0) - sum<double>(total);
            sum_phi_[i] += bar;
            z[i] = bar * std::exp(-log_a_[i]);
            for (int64_t j = 0; j < ld_; j += width<double>) {
                store(sums + j, load(sums + j) + plan(cost, phi[i], before, j) * z[i]);
            }
        });
        team.barrier();
        for (int64_t j = column0; j < column1; ++j) {
            gamma_bar_[j] = 0;
            for (int r = 0; r < team.size; ++r) gamma_bar_[j] -= partial_[r * ld_ + j];
        }
        team.barrier();
    }
}

// dL/dC of one row: P (d_transport (1 - X) + d_dual) + sum over t of (Q w + R z) / epsilon; without `unroll` the plan alone.
template <class Costs>
void LogDomain<Costs>::gradient_row(const Problem<T>& p, int64_t i, const Cost* cost, Cost* out, bool unroll) const {
    const double of_transport = p.incoming(args_.grad_transport_cost), of_dual = p.incoming(args_.grad_regularized_cost);
    const double phi_last = phi_[i];
    const V zero = {}, forbidden = splat(kInfinity);
    for (int64_t j = 0; j < m_; j += width<double>) {
        V rest = zero;
        for (int64_t t = 0; unroll && t < args_.num_iters; ++t) {
            const double phi = p.kept_u(t)[i];
            if (phi == -kInfinity) continue;
            rest += plan(cost, phi, gammas_ + (t + 1) * ld_, j) * load(w_ + t * ld_ + j);
            rest += plan(cost, phi, gammas_ + t * ld_, j) * z_[t * n_ + i];
        }
        const V x = exponent(cost, j), slope = unroll ? 1.0 - x : splat(1.0);
        const V value = plan(cost, phi_last, gamma_, j) * (of_transport * slope + of_dual) + rest * inverse_;
        store_as(out + j, x == forbidden ? zero : value, m_ - j);
    }
}

template <class Costs>
void LogDomain<Costs>::write_gradients(const Problem<T>& p, const Team& team, bool unroll) {
    const double eps = args_.epsilon, of_dual = p.incoming(args_.grad_regularized_cost);
    int64_t begin, end;
    rows_of(team, begin, end);
    if (costs_.wants_gradient()) {
        for_blocks(begin, end, costs_.block(), false, [&](int64_t i0, int64_t count) {
            const Cost* cost = costs_.cost(i0, count);
            Cost* out = costs_.gradient(i0, count);
            for (int64_t k = 0; k < count; ++k) gradient_row(p, i0 + k, cost + k * m_, out + k * m_, unroll);
            costs_.emit(i0, count);
        });
    }
    costs_.close(team);
    if (team.rank != 0) return;
    double mass_a = 0, mass_b = 0;
    for (int64_t i = 0; i < n_; ++i) mass_a += p.mass_a(i);
    for (int64_t j = 0; j < m_; ++j) mass_b += p.mass_b(j);
    for (int64_t i = 0; args_.grad_a && i < n_; ++i) {
        const double a = p.mass_a(i), dual = of_dual != 0 ? dual_marginal_gradient(eps, phi_[i], a, mass_b) : 0.0;
        args_.grad_a[p.index * n_ + i] = static_cast<T>(of_dual * dual + (unroll && a > 0 ? sum_phi_[i] / a : 0.0));
    }
    for (int64_t j = 0; args_.grad_b && j < m_; ++j) {
        const double b = p.mass_b(j), dual = of_dual != 0 ? dual_marginal_gradient(eps, gamma_[j], b, mass_a) : 0.0;
        args_.grad_b[p.index * m_ + j] = static_cast<T>(of_dual * dual + (unroll && b > 0 ? sum_gamma_[j] / b : 0.0));
    }
}

template <class Costs>
void LogDomain<Costs>::backward(const Problem<T>& p, const Team& team) {
    const bool unroll = args_.gradient == Gradient::unroll;
    start(p, team);
    int64_t begin, end;
    rows_of(team, begin, end);
    const double *phi = p.kept_u(args_.num_iters - 1), *gamma = p.kept_v(args_.num_iters - 1);
    for (int64_t i = begin; i < end; ++i) phi_[i] = phi[i];
    columns_of(team, begin, end);
    for (int64_t j = begin; unroll && j < end; ++j) {
        gammas_[j] = gamma_[j];
        for (int64_t t = 0; t < args_.num_iters; ++t) gammas_[(t + 1) * ld_ + j] = j < m_ ? p.kept_v(t)[j] : -kInfinity;
    }
    for (int64_t j = begin; j < end && j < m_; ++j) gamma_[j] = gamma[j];
    team.barrier();
    if (unroll) {
        first_adjoint(p, team);
        adjoint_loop(p, team);
    }
    write_gradients(p, team, unroll);
    team.barrier();
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

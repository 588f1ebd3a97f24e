// Sinkhorn in the log domain, in double: the way that works for every cost and epsilon. X = C / epsilon, phi = f / epsilon,
// gamma = g / epsilon:
//   phi_i = log a_i - LSE_j(gamma_j - X_ij),   gamma_j = log b_j - LSE_i(phi_i - X_ij),   P = exp(phi + gamma - X)
// An iteration takes one exponential an entry: the row of the plan as it stands, E_ij = exp(phi_i + gamma_j - X_ij), has the
// sum exp(phi_i + LSE_j), and times exp(phi_i new - phi_i) it is added to the column sums. Where a sum leaves the range
// in which nothing that counts is lost, that row, or all columns, are redone with the largest term for shift.
// A row or column without mass, or without a finite cost to one that has mass, gets -inf and takes no part.
#pragma once
#include <utility>

#include "sinkhorn_rows.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class Costs>
class LogDomain {
    using T = typename Costs::Input;
    using Cost = typename Costs::Cost;
    using Args = typename Costs::Args;
    using V = Vec<double>;

  public:
    LogDomain(const Args& args, Arena& arena, int threads, bool backward);

    void forward(const Problem<T>& p, const Team& team);
    void backward(const Problem<T>& p, const Team& team);

  private:
    // An entry lost below 1e-308 counts less than 1e-28 of a column sum: it is scaled by at most 1 / kRowLow.
    static constexpr double kRowLow = 1e-80, kRowHigh = 1e80, kColumnLow = 1e-200, kColumnHigh = 1e200;
    static constexpr double kLargest = 700;  // exponent
    enum LogSlots : int { kRowError, kColumnError, kRowsRedo = kColumnError + 2, kColumnsRedo, kTransport };
    struct RowSum {
        double mass, shift, total;
        bool served;
    };

    void start(const Problem<T>& p, const Team& team);
    void iterate(const Problem<T>& p, const Team& team);
    RowSum row_entries(const Cost* cost, double phi, double* entries) const;
    double row_pass(const Problem<T>& p, const Team& team, double omega);
    double update_column(const Problem<T>& p, int64_t j, double lse, double omega);
    void column_pass(const Problem<T>& p, const Team& team, double omega);
    void column_sums_shifted(const Team& team);
    double plan_error(const Problem<T>& p, const Team& team);
    double plan_sums(const Team& team);
    void keep_potentials(const Problem<T>& p, const Team& team, int64_t slot) const;
    void finish_history(const Problem<T>& p, const Team& team) const;
    void load_potentials(const Problem<T>& p, const Team& team);
    void first_adjoint(const Problem<T>& p, const Team& team);
    void adjoint_loop(const Problem<T>& p, const Team& team);
    bool column_ratios(int64_t k, int64_t begin, int64_t end);
    void prepare_gradient(const Team& team);
    void gradient_row(const Problem<T>& p, int64_t i, const Cost* cost, Cost* out, double* alphas) const;
    void write_gradients(const Problem<T>& p, const Team& team);
    const double* phi_of(const Problem<T>& p, int64_t k) const {
        return p.template kept_u<double>(p.args.gradient == Gradient::unroll ? k : 1);
    }
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
    double team_sum(const Team& team, int64_t j) const {
        double total = 0;
        for (int r = 0; r < team.size; ++r) total += partial_[r * ld_ + j];
        return total;
    }
    // X of the columns from j on; 0 beyond m, where gamma is -inf.
    OTKD_INLINE V exponent(const Cost* cost, int64_t j) const { return LoadAs<double, Cost>::part(cost + j, m_ - j, 0.0) * inverse_; }
    OTKD_INLINE V plan(const Cost* cost, double phi, const double* gamma, int64_t j) const {
        return exp_(phi + load(gamma + j) - exponent(cost, j));
    }
    // Calls body(i, cost of row i) for the rows [begin, end).
    template <class Body>
    OTKD_INLINE void for_rows(int64_t begin, int64_t end, Body body) {
        for_blocks(begin, end, costs_.block(), false, [&](int64_t i0, int64_t count) {
            const Cost* cost = costs_.cost(i0, count);
            for (int64_t i = i0; i < i0 + count; ++i, cost += m_) body(i, cost);
        });
    }
    static double relaxed(double old, double target, double omega) {
        return old == -kInfinity || target == -kInfinity ? target : (1 - omega) * old + omega * target;
    }

    const Args& args_;
    Costs costs_;
    const int64_t n_, m_, ld_;
    const double inverse_, lambda_a_, lambda_b_;
    const bool needs_errors_;
    const ScaledExp<double> exp_;
    double *log_a_, *phi_, *next_phi_, *row_sums_, *log_b_, *gamma_, *next_gamma_, *top_, *column_sums_, *partial_, *entries_;
    Reduction reduction_;
    int64_t ran_ = 0;
    double error_ = -1;  // of the plan where `tol` stopped the loop
    // backward, see sinkhorn_log_bwd.h
    int64_t steps_ = 0;
    double *first_ = nullptr, *sum_phi_ = nullptr, *gamma_bar_ = nullptr, *sum_gamma_ = nullptr, *ratio_ = nullptr;
    double *gammas_ = nullptr, *betas_ = nullptr, *w_ = nullptr, *z_ = nullptr, *near_ = nullptr;
    double* alphas_ = nullptr;
};

template <class Costs>
LogDomain<Costs>::LogDomain(const Args& args, Arena& arena, int threads, bool backward)
    : args_(args),
      costs_(args, arena, threads, backward),
      n_(args.n),
      m_(args.m),
      ld_(round_up(args.m, width<double>)),
      inverse_(1.0 / args.epsilon),
      lambda_a_(Penalty{args.penalty_a, args.epsilon}.lambda()),
      lambda_b_(Penalty{args.penalty_b, args.epsilon}.lambda()),
      needs_errors_(Control(args).needs_errors()),
      exp_(1.0) {
    log_a_ = arena.take<double>(n_);
    phi_ = arena.take<double>(n_);
    next_phi_ = arena.take<double>(n_);
    row_sums_ = arena.take<double>(n_);
    log_b_ = arena.take<double>(ld_);
    gamma_ = arena.take<double>(ld_);
    next_gamma_ = arena.take<double>(ld_);
    top_ = arena.take<double>(ld_);
    column_sums_ = arena.take<double>(ld_);
    partial_ = arena.take<double>(threads * ld_);
    entries_ = arena.take<double>(threads * ld_);
    reduction_.slots = arena.take<double>(threads * kSlots);
    if (!backward) return;
    const int64_t most = args.gradient == Gradient::unroll ? args.num_iters : args.gradient == Gradient::last_step;
    first_ = arena.take<double>(n_);
    sum_phi_ = arena.take<double>(n_);
    gamma_bar_ = arena.take<double>(ld_);
    sum_gamma_ = arena.take<double>(ld_);
    ratio_ = arena.take<double>(ld_);
    gammas_ = arena.take<double>((most + 1) * ld_);
    betas_ = arena.take<double>((most + 1) * ld_);
    w_ = arena.take<double>(most * ld_);
    z_ = arena.take<double>(most * n_);
    near_ = arena.take<double>(most + 1);
    alphas_ = arena.take<double>(threads * most);
}

template <class Costs>
void LogDomain<Costs>::start(const Problem<T>& p, const Team& team) {
    costs_.open(p, team);
    int64_t begin, end;
    rows_of(team, begin, end);
    for (int64_t i = begin; i < end; ++i) {
        log_a_[i] = std::log(p.mass_a(i));
        phi_[i] = log_a_[i] > -kInfinity ? p.start_phi(i) : -kInfinity;
    }
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; ++j) {
        log_b_[j] = j < m_ ? std::log(p.mass_b(j)) : -kInfinity;
        gamma_[j] = log_b_[j] > -kInfinity ? p.start_gamma(j) : -kInfinity;
    }
    team.barrier();
}

// The entries exp(shift + gamma_j - X_j) of one row and their total, with phi for shift, or where that leaves the range with
// the largest term's; `mass` is the row sum of the plan as it stands.
template <class Costs>
typename LogDomain<Costs>::RowSum LogDomain<Costs>::row_entries(const Cost* cost, double phi, double* entries) const {
    const V limit = splat(kLargest);
    V sums = {}, best = splat(-kInfinity);
    for (int64_t j = 0; j < ld_; j += width<double>) {
        const V entry = exp_(min<double>(phi + load(gamma_ + j) - exponent(cost, j), limit));
        store(entries + j, entry);
        sums += entry;
    }
    const double mass = sum<double>(sums);
    if (mass >= kRowLow && mass <= kRowHigh) return {mass, phi, mass, true};
    VecInt<double> nan = {};
    for (int64_t j = 0; j < ld_; j += width<double>) {
        const V term = load(gamma_ + j) - exponent(cost, j);
        nan |= term != term;
        best = max<double>(term, best);
    }
    const double top = largest<double>(best);
    if (top == -kInfinity && !any<double>(nan)) return {mass, phi, mass, false};
    sums = V{};
    for (int64_t j = 0; j < ld_; j += width<double>) {
        const V entry = exp_(load(gamma_ + j) - exponent(cost, j) - top);
        store(entries + j, entry);
        sums += entry;
    }
    return {mass, -top, sum<double>(sums), true};
}

// next_phi_ of the thread's rows, their part of the column sums exp(next_phi_i + gamma_j - X_ij), and into the reduction
// whether those cannot be trusted; returns the error of the rows of the plan as it stands.
template <class Costs>
double LogDomain<Costs>::row_pass(const Problem<T>& p, const Team& team, double omega) {
    int64_t begin, end;
    rows_of(team, begin, end);
    double *sums = own_sums(team, 0.0), *entries = entries_ + team.rank * ld_;
    double error = 0;
    bool redo = false;
    for_rows(begin, end, [&](int64_t i, const Cost* cost) {
        next_phi_[i] = -kInfinity;
        if (!(log_a_[i] > -kInfinity)) return;
        const RowSum row = row_entries(cost, phi_[i], entries);
        error += std::fabs(row.mass - p.mass_a(i) * p.penalty_a().kept(phi_[i] - log_a_[i]));
        if (!row.served) return;
        next_phi_[i] = relaxed(phi_[i], log_a_[i] - lambda_a_ * (std::log(row.total) - row.shift), omega);
        const double factor = std::exp(next_phi_[i] - row.shift);
        redo |= factor > kColumnHigh;
        for (int64_t j = 0; j < ld_; j += width<double>) store(sums + j, load(sums + j) + load(entries + j) * factor);
    });
    reduction_.put(team, kRowsRedo, redo ? 1 : 0);
    return error;
}

// next_gamma_ of column j from lse = LSE_i(phi_i - X_ij); returns the column's part of the marginal error.
template <class Costs>
double LogDomain<Costs>::update_column(const Problem<T>& p, int64_t j, double lse, double omega) {
    const bool served = log_b_[j] > -kInfinity && lse != -kInfinity;
    const double next = served ? relaxed(gamma_[j], log_b_[j] - lambda_b_ * lse, omega) : -kInfinity;
    next_gamma_[j] = next;
    if (!needs_errors_ || !(log_b_[j] > -kInfinity)) return 0.0;
    const double mass = served ? std::exp(next + lse) : 0.0;
    return std::fabs(mass - std::exp(log_b_[j]) * p.penalty_b().kept(next - log_b_[j]));
}

// Columns from the sums of row_pass, or where one of them is out of range all by column_sums_shifted.
template <class Costs>
void LogDomain<Costs>::column_pass(const Problem<T>& p, const Team& team, double omega) {
    int64_t begin, end;
    columns_of(team, begin, end);
    bool redo = reduction_.sum(team, kRowsRedo) > 0;
    double error = 0;
    for (int64_t j = begin; j < end; ++j) {
        const double total = team_sum(team, j);
        if (log_b_[j] > -kInfinity) redo |= !(total >= kColumnLow && total <= kColumnHigh);
        error += update_column(p, j, std::log(total) - gamma_[j], omega);
    }
    reduction_.put(team, kColumnsRedo, redo ? 1 : 0);
    team.barrier();
    if (reduction_.sum(team, kColumnsRedo) > 0) {
        column_sums_shifted(team);
        error = 0;
        for (int64_t j = begin; j < end; ++j) error += update_column(p, j, top_[j] + std::log(team_sum(team, j)), omega);
        reduction_.put(team, kColumnError + ran_ % 2, error);
        team.barrier();
        return;
    }
    reduction_.put(team, kColumnError + ran_ % 2, error);
}

// top_j = max_i (phi_i - X_ij) and the sums of exp(phi_i - X_ij - top_j), two passes.
template <class Costs>
void LogDomain<Costs>::column_sums_shifted(const Team& team) {
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
}

// Row sums and column sums of the plan, and <P, C>.
template <class Costs>
double LogDomain<Costs>::plan_sums(const Team& team) {
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
    reduction_.put(team, kTransport, moved_total);
    team.barrier();
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; ++j) column_sums_[j] = team_sum(team, j);
    const double transport_cost = reduction_.sum(team, kTransport) * args_.epsilon;
    team.barrier();
    return transport_cost;
}

// marginal_error of the plan as it stands, by a pass of its own.
template <class Costs>
double LogDomain<Costs>::plan_error(const Problem<T>& p, const Team& team) {
    plan_sums(team);
    double error = 0;
    for (int64_t i = 0; i < n_; ++i) {
        error += std::fabs(row_sums_[i] - p.mass_a(i) * p.penalty_a().kept(phi_[i] - log_a_[i]));
    }
    for (int64_t j = 0; j < m_; ++j) {
        error += std::fabs(column_sums_[j] - p.mass_b(j) * p.penalty_b().kept(gamma_[j] - log_b_[j]));
    }
    team.barrier();
    return error;
}

template <class Costs>
void LogDomain<Costs>::iterate(const Problem<T>& p, const Team& team) {
    Control control(args_);
    for (; ran_ < args_.num_iters; ++ran_) {
        if (control.due(ran_)) control.observe(ran_, plan_error(p, team));
        double error = row_pass(p, team, control.omega());
        reduction_.put(team, kRowError, error);
        team.barrier();
        if (control.watches() && ran_ > 0) {
            error = reduction_.sum(team, kRowError) + reduction_.sum(team, kColumnError + (ran_ + 1) % 2);
            if (control.stops(error)) {
                error_ = error;
                break;
            }
        }
        std::swap(phi_, next_phi_);
        column_pass(p, team, control.omega());
        std::swap(gamma_, next_gamma_);
        if (args_.keep == Keep::all) keep_potentials(p, team, ran_);
    }
    team.barrier();
}

// The potentials of the thread's own rows and columns.
template <class Costs>
void LogDomain<Costs>::keep_potentials(const Problem<T>& p, const Team& team, int64_t slot) const {
    int64_t begin, end;
    rows_of(team, begin, end);
    for (int64_t i = begin; i < end; ++i) p.template kept_u<double>(slot)[i] = phi_[i];
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end && j < m_; ++j) p.template kept_v<double>(slot)[j] = gamma_[j];
}

// What the loop has not kept on its way. next_gamma_ holds the columns before the last iteration.
template <class Costs>
void LogDomain<Costs>::finish_history(const Problem<T>& p, const Team& team) const {
    if (!p.history()) return;
    if (team.rank == 0) p.history()[1] = static_cast<double>(ran_);
    if (args_.keep == Keep::last_step) {
        int64_t begin, end;
        columns_of(team, begin, end);
        for (int64_t j = begin; j < end && j < m_; ++j) p.template kept_v<double>(0)[j] = next_gamma_[j];
    }
    if (args_.keep != Keep::all) keep_potentials(p, team, p.last_slot(ran_));
}

template <class Costs>
void LogDomain<Costs>::forward(const Problem<T>& p, const Team& team) {
    start(p, team);
    iterate(p, team);
    finish_history(p, team);
    const double transport_cost = plan_sums(team);
    if (team.rank == 0) {
        if (args_.iterations) args_.iterations[p.index] = ran_;
        write_outputs(
            p, row_sums_, column_sums_, transport_cost, error_,
            [&](int64_t i, int64_t count) { return LoadAs<double, double>::part(phi_ + i, count, 0.0); },
            [&](int64_t j, int64_t count) { return LoadAs<double, double>::part(gamma_ + j, count, 0.0); });
    }
    team.barrier();
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

#include "sinkhorn_log_bwd.h"

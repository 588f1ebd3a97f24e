// Sinkhorn on scalings: K_ij = exp((shift_i - C_ij) / epsilon) is exponentiated once, shift_i the smallest cost of
// row i; P = diag(u) K diag(v). An iteration reads each row of K once: u_i = a_i / (K v)_i, then K's row times u_i is
// added to the column sums, then v = b / (K^T u). 2 multiply-adds an entry. With penalties or over-relaxation the logarithms
// of the scalings are kept too (in double): log u_i = level_i - lambda log (K v)_i, averaged with the one before.
// The adjoint of the loop runs the same sweep backwards and ends in a product of rank 2 T for the cost.
// The caller picks the precision from the range of the exponents; sums outside [kLow, kHigh] show that the pick was
// too narrow (`in_range` false), nothing is lost silently. Rows come in blocks from a class of sinkhorn_rows.h.
#pragma once
#include <utility>

#include "sinkhorn_sweep.h"
#include "sinkhorn_updates.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

enum ScalingSlots : int { kRowError, kColumnError, kOutOfRange = kColumnError + 2, kTransport };
constexpr int64_t kSmallBytes = 40 * 1024;   // of the kernel and its transpose: they stay in the first-level cache
constexpr int64_t kTurnBytes = 1024 * 1024;  // of a kernel that no longer stays in the second-level cache

template <class Rows>
class Scaling {
    using S = typename Rows::Scalar;
    using T = typename Rows::Input;
    using Cost = typename Rows::Cost;
    using Args = typename Rows::Args;

  public:
    Scaling(const Args& args, Arena& arena, int threads, bool backward);

    // False: the range of the exponents is beyond `limit`, or sums have left the safe range.
    bool forward(const Problem<T>& p, const Team& team, double limit);
    void backward(const Problem<T>& p, const Team& team);

  private:
    struct Trace;
    void start(const Problem<T>& p, const Team& team);
    bool iterate(const Problem<T>& p, const Team& team);
    OTKD_INLINE bool update_rows(int64_t i, int64_t count, const S* sums, double omega) {
        return plain_ ? divide(a_ + i, sums, next_u_ + i, count) : update_row_logs(i, count, sums, omega);
    }
    bool update_row_logs(int64_t i, int64_t count, const S* sums, double omega);
    OTKD_INLINE bool update_columns(int64_t j, int64_t count, double omega) {
        return plain_ ? divide(b_ + j, columns_ + j, next_v_ + j, count) : update_column_logs(j, count, omega);
    }
    bool update_column_logs(int64_t j, int64_t count, double omega);
    double row_error(const Problem<T>& p, int64_t i, int64_t count, const S* sums) const;
    double column_error(const Problem<T>& p, int64_t begin, int64_t end) const;
    double plan_error(const Problem<T>& p, const Team& team, int64_t done);
    void next_rows() {
        std::swap(u_, next_u_);
        std::swap(log_u_, next_log_u_);
    }
    void keep_scalings(const Problem<T>& p, const Team& team, int64_t slot) const;
    void finish_history(const Problem<T>& p, const Team& team) const;
    double plan_rows(const Team& team);
    void transpose_kernel();
    void row_products();
    bool iterate_small(const Problem<T>& p);
    void adjoint_small(const Trace& step, int64_t k, const S* w, const S* v_before);
    void load_scalings(const Problem<T>& p, const Team& team);
    void first_adjoint(const Problem<T>& p, const Team& team);
    void adjoint_loop(const Problem<T>& p, const Team& team);
    void cost_gradient(const Problem<T>& p, const Team& team);
    void gradient_rows(int64_t i, int64_t count, const S* kernel, const Cost* cost, Cost* out, double of_transport,
                       double of_dual) const;
    void marginal_gradients(const Problem<T>& p);
    // Whether pass `k` over the kernel goes backwards.
    bool turned(int64_t k) const { return turns_ && k % 2 != 0; }
    void rows_of(const Team& team, int64_t& begin, int64_t& end) const {
        split(n_pad_, kBlock, team.size, team.rank, begin, end);
    }
    void columns_of(const Team& team, int64_t& begin, int64_t& end) const {
        split(ld_, width<S>, team.size, team.rank, begin, end);
    }
    Vec<S> column_sum(const Team& team, int64_t j) const {
        Vec<S> total = load(partial_ + j);
        for (int r = 1; r < team.size; ++r) total += load(partial_ + r * ld_ + j);
        return total;
    }
    Vec<S> cost_vector(const Cost* row, int64_t j) const {
        return j + width<S> <= m_ ? LoadAs<S, Cost>::full(row + j) : LoadAs<S, Cost>::part(row + j, m_ - j, S(0));
    }
    // Potentials / epsilon.
    double phi(int64_t i) const {
        return (plain_ ? std::log(static_cast<double>(u_[i])) : log_u_[i]) + rows_.shift(i) / args_.epsilon;
    }
    Vec<double> phis(int64_t i, int64_t count) const {
        Vec<double> shifts = {};
        for (int64_t w = 0; w < count; ++w) shifts[w] = rows_.shift(i + w);
        return log_scalings(u_, log_u_, i, count) + shifts / args_.epsilon;
    }
    Vec<double> log_scalings(const S* scalings, const double* logs, int64_t k, int64_t count) const {
        if (!plain_) return LoadAs<double, double>::part(logs + k, count, 0.0);
        const Vec<double> own = LoadAs<double, S>::part(scalings + k, count, S(1));
        return own > Vec<double>{} ? log(own) : own - kInfinity;  // 0 becomes -inf, NaN stays
    }
    double gamma(int64_t j) const { return plain_ ? std::log(static_cast<double>(v_[j])) : log_v_[j]; }

    const Args& args_;
    Rows rows_;
    const int64_t n_, m_, n_pad_, n_vec_, ld_;
    const bool small_, turns_, plain_;  // plain: scalings are mass / sum
    const double lambda_a_, lambda_b_;
    S *kernel_t_, *products_, *a_, *u_, *next_u_, *b_, *v_, *next_v_, *columns_, *partial_;
    double *level_a_, *log_u_, *next_log_u_, *level_b_, *log_v_;  // not plain: log u = level - lambda log sum
    double *row_sums_, *column_sums_;
    Reduction reduction_;
    int64_t ran_ = 0;
    // backward: the steps that are differentiated, see sinkhorn_scaling_bwd.h
    int64_t steps_ = 0;
    S *phi_bar_ = nullptr, *gamma_bar_ = nullptr, *slope_ = nullptr, *left_ = nullptr, *right_ = nullptr;
    double *sum_phi_ = nullptr, *sum_gamma_ = nullptr;
    S base_ = 0;
};

template <class Rows>
Scaling<Rows>::Scaling(const Args& args, Arena& arena, int threads, bool backward)
    : args_(args),
      rows_(args, arena, threads, backward),
      n_(args.n),
      m_(args.m),
      n_pad_(round_up(args.n, kBlock)),
      n_vec_(round_up(args.n, 2 * width<S>)),
      ld_(round_up(args.m, 2 * width<S>)),
      small_(rows_.stored() && 2 * n_ * m_ * static_cast<int64_t>(sizeof(S)) <= kSmallBytes),
      turns_(n_ * ld_ * static_cast<int64_t>(sizeof(S)) > threads * kTurnBytes),
      plain_(args.relaxation == 1 && args.penalty_a == kInfinity && args.penalty_b == kInfinity),
      lambda_a_(Penalty{args.penalty_a, args.epsilon}.lambda()),
      lambda_b_(Penalty{args.penalty_b, args.epsilon}.lambda()) {
    kernel_t_ = arena.take<S>(small_ ? m_ * n_vec_ : 0);
    products_ = arena.take<S>(small_ ? n_vec_ : 0);
    a_ = arena.take<S>(n_vec_);
    u_ = arena.take<S>(n_vec_);
    next_u_ = arena.take<S>(n_vec_);
    b_ = arena.take<S>(ld_);
    v_ = arena.take<S>(ld_);
    next_v_ = arena.take<S>(ld_);
    columns_ = arena.take<S>(ld_);
    partial_ = arena.take<S>(threads * ld_);
    level_a_ = arena.take<double>(plain_ ? 0 : n_vec_);
    log_u_ = arena.take<double>(plain_ ? 0 : n_vec_);
    next_log_u_ = arena.take<double>(plain_ ? 0 : n_vec_);
    level_b_ = arena.take<double>(plain_ ? 0 : ld_);
    log_v_ = arena.take<double>(plain_ ? 0 : ld_);
    row_sums_ = arena.take<double>(n_);
    column_sums_ = arena.take<double>(m_);
    reduction_.slots = arena.take<double>(threads * kSlots);
    if (!backward) return;
    const int64_t most = args.gradient == Gradient::unroll ? args.num_iters : args.gradient == Gradient::last_step;
    phi_bar_ = arena.take<S>(n_vec_);
    sum_phi_ = arena.take<double>(n_pad_);
    gamma_bar_ = arena.take<S>(ld_);
    sum_gamma_ = arena.take<double>(ld_);
    slope_ = arena.take<S>(n_vec_);
    left_ = arena.take<S>(n_pad_ * 2 * most);
    right_ = arena.take<S>(2 * most * ld_);
}

// Marginals, shifts, the kernel and the scalings that the loop starts from, padded with zeros.
template <class Rows>
void Scaling<Rows>::start(const Problem<T>& p, const Team& team) {
    if (!args_.kernel_ready) rows_.start(team);
    int64_t begin, end;
    rows_of(team, begin, end);
    if (team.rank == team.size - 1) end = n_vec_;
    for (int64_t i = begin; i < end; ++i) {
        const bool used = i < n_ && p.mass_a(i) > 0;
        a_[i] = i < n_ ? static_cast<S>(p.mass_a(i)) : S(0);
        if (plain_) continue;
        const double shift = i < n_ ? rows_.shift(i) / args_.epsilon : 0.0;
        level_a_[i] = used ? std::log(p.mass_a(i)) + (lambda_a_ - 1.0) * shift : -kInfinity;
        log_u_[i] = used ? p.start_phi(i) - shift : -kInfinity;
    }
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; ++j) {
        b_[j] = j < m_ ? static_cast<S>(p.mass_b(j)) : S(0);
        const bool used = b_[j] > 0;
        v_[j] = used ? S(1) : S(0);
        if (used && args_.initial_g) v_[j] = static_cast<S>(std::exp(p.start_gamma(j)));
        if (plain_) continue;
        level_b_[j] = used ? std::log(p.mass_b(j)) : -kInfinity;
        log_v_[j] = used ? p.start_gamma(j) : -kInfinity;
    }
    team.barrier();
}

// The next scalings of `count` rows from their sums K v in logarithms; false if one is out of range.
template <class Rows>
__attribute__((noinline)) bool Scaling<Rows>::update_row_logs(int64_t i, int64_t count, const S* sums, double omega) {
    return update_logs({lambda_a_, omega}, level_a_ + i, sums, log_u_ + i, next_log_u_ + i, next_u_ + i, count);
}

// Those of `count` columns from columns_.
template <class Rows>
__attribute__((noinline)) bool Scaling<Rows>::update_column_logs(int64_t j, int64_t count, double omega) {
    return update_logs({lambda_b_, omega}, level_b_ + j, columns_ + j, log_v_ + j, log_v_ + j, next_v_ + j, count);
}

// sum |(P 1)_i - target_i| of `count` rows for the sums K v of the scalings as they are.
template <class Rows>
double Scaling<Rows>::row_error(const Problem<T>& p, int64_t i, int64_t count, const S* sums) const {
    double total = 0;
    for (int64_t k = 0; k < count && i + k < n_; ++k) {
        double target = p.mass_a(i + k);
        if (p.args.penalty_a != kInfinity && target > 0) target *= p.penalty_a().kept(phi(i + k) - std::log(target));
        total += std::fabs(static_cast<double>(u_[i + k]) * sums[k] - target);
    }
    return total;
}

// The same for columns, from columns_ = K^T u.
template <class Rows>
double Scaling<Rows>::column_error(const Problem<T>& p, int64_t begin, int64_t end) const {
    double total = 0;
    for (int64_t j = begin; j < end && j < m_; ++j) {
        double target = p.mass_b(j);
        if (p.args.penalty_b != kInfinity && target > 0) target *= p.penalty_b().kept(gamma(j) - std::log(target));
        total += std::fabs(static_cast<double>(v_[j]) * columns_[j] - target);
    }
    return total;
}

// marginal_error of the plan after `done` iterations, by a pass of its own.
template <class Rows>
double Scaling<Rows>::plan_error(const Problem<T>& p, const Team& team, int64_t done) {
    int64_t row0, row1;
    rows_of(team, row0, row1);
    double error = 0;
    dot_sweep(rows_, ld_, v_, row0, row1, turned(done),
              [&](int64_t i, const S* sums) { error += row_error(p, i, kBlock, sums); });
    reduction_.put(team, kRowError, error);
    team.barrier();
    error = reduction_.sum(team, kRowError) + reduction_.sum(team, kColumnError + (done + 1) % 2);
    team.barrier();
    return error;
}

template <class Rows>
bool Scaling<Rows>::iterate(const Problem<T>& p, const Team& team) {
    if (small_) return iterate_small(p);
    int64_t row0, row1, column0, column1;
    rows_of(team, row0, row1);
    columns_of(team, column0, column1);
    S* sums = partial_ + team.rank * ld_;
    Control control(args_);
    bool in_range = true;
    for (; ran_ < args_.num_iters; ++ran_) {
        if (control.due(ran_)) control.observe(ran_, plan_error(p, team, ran_));
        const bool watching = control.watches() && ran_ > 0;
        double error = 0;
        bool in_sweep = true;
        std::memset(sums, 0, ld_ * sizeof(S));
        sweep(rows_, ld_, v_, sums, row0, row1, turned(ran_), [&](int64_t i, const S* s) {
            if (watching) error += row_error(p, i, kBlock, s);
            in_sweep &= update_rows(i, kBlock, s, control.omega());
            return next_u_ + i;
        });
        reduction_.put(team, kRowError, error);
        team.barrier();
        if (watching) {
            error = reduction_.sum(team, kRowError) + reduction_.sum(team, kColumnError + (ran_ + 1) % 2);
            if (control.stops(error)) break;
        }
        next_rows();
        in_range &= in_sweep;
        for (int64_t j = column0; j < column1; j += width<S>) store(columns_ + j, column_sum(team, j));
        in_range &= update_columns(column0, column1 - column0, control.omega());
        std::swap(v_, next_v_);
        if (control.needs_errors()) {
            reduction_.put(team, kColumnError + ran_ % 2, column_error(p, column0, column1));
        }
        if (args_.keep == Keep::all) keep_scalings(p, team, ran_);
        team.barrier();
    }
    reduction_.put(team, kOutOfRange, in_range ? 0 : 1);
    team.barrier();
    return reduction_.sum(team, kOutOfRange) == 0;
}

// The scalings of the thread's own rows and columns.
template <class Rows>
void Scaling<Rows>::keep_scalings(const Problem<T>& p, const Team& team, int64_t slot) const {
    const auto copy = [](S* kept, const S* scalings, int64_t begin, int64_t end) {
        if (begin < end) std::memcpy(kept + begin, scalings + begin, (end - begin) * sizeof(S));
    };
    int64_t begin, end;
    rows_of(team, begin, end);
    copy(p.template kept_u<S>(slot), u_, begin, end < n_ ? end : n_);
    columns_of(team, begin, end);
    copy(p.template kept_v<S>(slot), v_, begin, end < m_ ? end : m_);
}

// What the loop has not kept on its way. next_v_ holds the columns before the last iteration.
template <class Rows>
void Scaling<Rows>::finish_history(const Problem<T>& p, const Team& team) const {
    if (!p.history()) return;
    if (team.rank == 0) p.history()[1] = static_cast<double>(ran_);
    if (args_.keep == Keep::last_step) {
        int64_t begin, end;
        columns_of(team, begin, end);
        for (int64_t j = begin; j < end && j < m_; ++j) p.template kept_v<S>(0)[j] = next_v_[j];
    }
    if (args_.keep != Keep::all) keep_scalings(p, team, p.last_slot(ran_));
}

template <class Rows>
bool Scaling<Rows>::forward(const Problem<T>& p, const Team& team, double limit) {
    rows_.open(p, team);
    start(p, team);
    if (rows_.range(team) > limit || !iterate(p, team)) return false;
    finish_history(p, team);
    reduction_.put(team, kTransport, plan_rows(team));
    team.barrier();
    if (team.rank == 0) {
        if (args_.iterations) args_.iterations[p.index] = ran_;
        for (int64_t j = 0; j < m_; ++j) column_sums_[j] = static_cast<double>(v_[j]) * columns_[j];
        const double error = row_error(p, 0, n_, next_u_) + column_error(p, 0, m_);  // as the loop sees it
        write_outputs(
            p, row_sums_, column_sums_, reduction_.sum(team, kTransport), error,
            [&](int64_t i, int64_t count) { return phis(i, count); },
            [&](int64_t j, int64_t count) { return log_scalings(v_, log_v_, j, count); });
    }
    return true;
}

// Row sums of the plan, and of K v in next_u_ with the rounding of those that the loop watches; returns <P, C> of the
// thread's rows.
template <class Rows>
double Scaling<Rows>::plan_rows(const Team& team) {
    if (small_) row_products();
    int64_t begin, end;
    rows_of(team, begin, end);
    double transport_cost = 0;
    const Vec<S> zero = {};
    for_blocks(begin, end < n_ ? end : n_, rows_.block(), turned(ran_), [&](int64_t i0, int64_t count) {
        const S* k = rows_.kernel(i0, count);
        const Cost* row = rows_.cost(i0, count);
        for (int64_t i = i0; i < i0 + count; ++i, k += ld_, row += m_) {
            Vec<S> mass[2] = {}, moved[2] = {};
            for (int64_t j = 0; j < ld_; j += 2 * width<S>) {
                for (int c = 0; c < 2; ++c) {
                    const int64_t at = j + c * width<S>;
                    const Vec<S> own = load(k + at), v = load(v_ + at);
                    mass[c] += own * v;
                    moved[c] += (own > zero ? own * cost_vector(row, at) : zero) * v;
                }
            }
            next_u_[i] = small_ ? products_[i] : sum<S>(mass[0] + mass[1]);
            row_sums_[i] = static_cast<double>(u_[i]) * next_u_[i];
            transport_cost += static_cast<double>(u_[i]) * sum<S>(moved[0] + moved[1]);
        }
    });
    return transport_cost;
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

#include "sinkhorn_scaling_bwd.h"
#include "sinkhorn_scaling_small.h"

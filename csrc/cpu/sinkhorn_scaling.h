// Sinkhorn on scalings: K_ij = exp((shift_i - C_ij) / epsilon) is exponentiated once, shift_i the smallest cost of
// row i; P = diag(u) K diag(v). An iteration reads each row of K once: u_i = a_i / (K v)_i, then K's row times u_i is
// added to the column sums, then v = b / (K^T u). 2 multiply-adds an entry.
// The adjoint of the fixed loop runs the same sweep backwards and ends in a product of rank 2 T for the cost.
// The caller picks the precision from the range of the exponents; sums outside [kLow, kHigh] show that the pick was
// too narrow (`in_range` false), nothing is lost silently. Rows come in blocks from a class of sinkhorn_rows.h.
#pragma once
#include "sinkhorn_rows.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class S>
constexpr S kLow = sizeof(S) == 4 ? S(1e-25) : S(1e-200);
template <class S>
constexpr S kHigh = sizeof(S) == 4 ? S(1e25) : S(1e200);

// scaling = mass / sums where there is mass; false if a sum there is out of the safe range
template <class S>
bool divide(const S* mass, const S* sums, S* scaling, int64_t count) {
    const Vec<S> zero = {};
    VecInt<S> bad = {};
    for (int64_t j = 0; j < count; j += width<S>) {
        const Vec<S> own = load(mass + j), total = load(sums + j);
        const VecInt<S> used = own > zero;
        bad |= used & ~((total >= kLow<S>) & (total <= kHigh<S>));
        store(scaling + j, used ? own / total : zero);
    }
    return !any<S>(bad);
}

constexpr int64_t kSmallBytes = 40 * 1024;  // of the kernel and its transpose: they stay in the first-level cache

template <class Rows>
class Scaling {
    using S = typename Rows::Scalar;
    using T = typename Rows::Input;
    using Cost = typename Rows::Cost;
    using Args = typename Rows::Args;

  public:
    Scaling(const Args& args, Arena& arena, int threads, bool backward)
        : args_(args),
          rows_(args, arena, threads, backward),
          n_(args.n),
          m_(args.m),
          n_pad_(round_up(args.n, kBlock)),
          n_vec_(round_up(args.n, 2 * width<S>)),
          ld_(round_up(args.m, 2 * width<S>)),
          small_(rows_.stored() && 2 * n_ * m_ * static_cast<int64_t>(sizeof(S)) <= kSmallBytes) {
        kernel_t_ = arena.take<S>(small_ ? m_ * n_vec_ : 0);
        products_ = arena.take<S>(small_ ? n_vec_ : 0);
        a_ = arena.take<S>(n_vec_);
        u_ = arena.take<S>(n_vec_);
        b_ = arena.take<S>(ld_);
        v_ = arena.take<S>(ld_);
        columns_ = arena.take<S>(ld_);
        partial_ = arena.take<S>(threads * ld_);
        row_sums_ = arena.take<double>(n_);
        column_sums_ = arena.take<double>(m_);
        reduction_.slots = arena.take<double>(threads * kSlots);
        if (!backward) return;
        phi_ = arena.take<S>(n_vec_);
        sum_phi_ = arena.take<double>(n_pad_);
        gamma_ = arena.take<S>(ld_);
        sum_gamma_ = arena.take<double>(ld_);
        left_ = arena.take<S>(n_pad_ * 2 * args.num_iters);
        right_ = arena.take<S>(2 * args.num_iters * ld_);
    }

    // False: the range of the exponents is beyond `limit`, or sums have left the safe range.
    bool forward(const Problem<T>& p, const Team& team, double limit);
    void backward(const Problem<T>& p, const Team& team);

  private:
    void start(const Problem<T>& p, const Team& team);
    bool iterate(const Problem<T>& p, const Team& team);
    double plan_rows(const Team& team);
    void transpose_kernel();
    bool iterate_small(const Problem<T>& p);
    void adjoint_small(const double* u, const S* w, const S* v_before, int64_t t);
    void load_scalings(const Problem<T>& p, const Team& team);
    void first_adjoint(const Problem<T>& p, const Team& team);
    void adjoint_loop(const Problem<T>& p, const Team& team);
    void cost_gradient(const Problem<T>& p, const Team& team, bool unroll);
    void gradient_rows(int64_t i, int64_t count, const S* kernel, const Cost* cost, Cost* out, double of_transport,
                       double of_dual, bool unroll) const;
    void marginal_gradients(const Problem<T>& p);
    template <class Value>
    void sweep(const S* vector, S* sums, int64_t begin, int64_t end, bool reversed, Value value);
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

    const Args& args_;
    Rows rows_;
    const int64_t n_, m_, n_pad_, n_vec_, ld_;
    const bool small_;
    S *kernel_t_, *products_, *a_, *u_, *b_, *v_, *columns_, *partial_;
    double *row_sums_, *column_sums_;
    Reduction reduction_;
    S *phi_ = nullptr, *gamma_ = nullptr, *left_ = nullptr, *right_ = nullptr;
    double *sum_phi_ = nullptr, *sum_gamma_ = nullptr;
    S base_ = 0;  // the gradients see C - base, see sinkhorn_scaling_bwd.h
};

// kBlock rows of the kernel at `k`: s_r = sum_j K_rj vector_j, then sums_j += K_rj value(r, s_r).
template <class S, class Value>
OTKD_INLINE void sweep_rows(const S* k, int64_t ld, const S* vector, S* sums, Value value) {
    Vec<S> dot[kBlock][2] = {};
    for (int64_t j = 0; j < ld; j += 2 * width<S>) {
        const Vec<S> x0 = load(vector + j), x1 = load(vector + j + width<S>);
        for (int r = 0; r < kBlock; ++r) {
            dot[r][0] += load(k + r * ld + j) * x0;
            dot[r][1] += load(k + r * ld + j + width<S>) * x1;
        }
    }
    Vec<S> weight[kBlock];
    for (int r = 0; r < kBlock; ++r) weight[r] = splat<S>(value(r, sum<S>(dot[r][0] + dot[r][1])));
    for (int64_t j = 0; j < ld; j += width<S>) {
        Vec<S> total = load(k + j) * weight[0];
        for (int r = 1; r < kBlock; ++r) total += load(k + r * ld + j) * weight[r];
        store(sums + j, load(sums + j) + total);  // one short dependency from block to block
    }
}

// Rows [begin, end): s_i = sum_j K_ij vector_j; then sums_j += K_ij value(i, s_i). Sweeps take turns in their direction:
// of a kernel larger than the cache, what the last sweep read last is still there.
template <class Rows>
template <class Value>
void Scaling<Rows>::sweep(const S* vector, S* sums, int64_t begin, int64_t end, bool reversed, Value value) {
    for_blocks(begin, end, rows_.block(), reversed, [&](int64_t i0, int64_t count) {
        const S* k = rows_.kernel(i0, count);
        for (int64_t done = 0; done < count; done += kBlock) {
            const int64_t i = reversed ? count - kBlock - done : done;
            sweep_rows(k + i * ld_, ld_, vector, sums, [&](int64_t r, S s) { return value(i0 + i + r, s); });
        }
    });
}

// Marginals, shifts and the kernel, padded with zeros.
template <class Rows>
void Scaling<Rows>::start(const Problem<T>& p, const Team& team) {
    rows_.start(team);
    int64_t begin, end;
    rows_of(team, begin, end);
    for (int64_t i = begin; i < end; ++i) a_[i] = i < n_ ? static_cast<S>(p.mass_a(i)) : S(0);
    for (int64_t i = n_pad_; team.rank == 0 && i < n_vec_; ++i) a_[i] = 0;
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; ++j) {
        b_[j] = j < m_ ? static_cast<S>(p.mass_b(j)) : S(0);
        v_[j] = b_[j] > 0 ? S(1) : S(0);
    }
    team.barrier();
}

template <class Rows>
bool Scaling<Rows>::iterate(const Problem<T>& p, const Team& team) {
    if (small_) return iterate_small(p);
    int64_t row0, row1, column0, column1;
    rows_of(team, row0, row1);
    columns_of(team, column0, column1);
    S* sums = partial_ + team.rank * ld_;
    bool in_range = true;
    for (int64_t t = 0; t < args_.num_iters; ++t) {
        double *kept_u = p.kept_u(t), *kept_v = p.kept_v(t);
        std::memset(sums, 0, ld_ * sizeof(S));
        sweep(v_, sums, row0, row1, t % 2 != 0, [&](int64_t i, S s) {
            if (!(a_[i] > 0)) return u_[i] = S(0);
            in_range &= s >= kLow<S> && s <= kHigh<S>;
            return u_[i] = a_[i] / s;
        });
        for (int64_t i = row0, end = row1 < n_ ? row1 : n_; kept_u && i < end; ++i) kept_u[i] = u_[i];
        team.barrier();
        for (int64_t j = column0; j < column1; j += width<S>) store(columns_ + j, column_sum(team, j));
        in_range &= divide(b_ + column0, columns_ + column0, v_ + column0, column1 - column0);
        for (int64_t j = column0, end = column1 < m_ ? column1 : m_; kept_v && j < end; ++j) kept_v[j] = v_[j];
        team.barrier();
    }
    reduction_.put(team, 0, in_range ? 0 : 1);
    team.barrier();
    return reduction_.sum(team, 0) == 0;
}

template <class Rows>
bool Scaling<Rows>::forward(const Problem<T>& p, const Team& team, double limit) {
    rows_.open(p, team);
    start(p, team);
    if (rows_.range(team) > limit || !iterate(p, team)) return false;
    reduction_.put(team, 1, plan_rows(team));
    team.barrier();
    if (team.rank == 0) {
        for (int64_t j = 0; j < m_; ++j) column_sums_[j] = static_cast<double>(v_[j]) * columns_[j];
        write_outputs(
            p, row_sums_, column_sums_, reduction_.sum(team, 1),
            [&](int64_t i) { return std::log(static_cast<double>(u_[i])) + rows_.shift(i) / args_.epsilon; },
            [&](int64_t j) { return std::log(static_cast<double>(v_[j])); });
    }
    return true;
}

// Row sums of the plan; returns <P, C> of the thread's rows.
template <class Rows>
double Scaling<Rows>::plan_rows(const Team& team) {
    int64_t begin, end;
    rows_of(team, begin, end);
    double transport_cost = 0;
    const Vec<S> zero = {};
    for_blocks(begin, end < n_ ? end : n_, rows_.block(), false, [&](int64_t i0, int64_t count) {
        const S* k = rows_.kernel(i0, count);
        const Cost* row = rows_.cost(i0, count);
        for (int64_t i = i0; i < i0 + count; ++i, k += ld_, row += m_) {
            Vec<S> mass = {}, moved = {};
            for (int64_t j = 0; j < ld_; j += width<S>) {
                const Vec<S> kv = load(k + j) * load(v_ + j);
                const Vec<S> c = cost_vector(row, j);
                mass += kv;
                moved += kv > zero ? kv * c : zero;
            }
            row_sums_[i] = static_cast<double>(u_[i]) * sum<S>(mass);
            transport_cost += static_cast<double>(u_[i]) * sum<S>(moved);
        }
    });
    return transport_cost;
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

#include "sinkhorn_scaling_bwd.h"
#include "sinkhorn_scaling_small.h"

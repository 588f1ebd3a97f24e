// What the solvers read of a problem, a block of rows at a time, and where the cost's gradient goes. Here the cost is in
// memory; other classes with the same members may compute a block when it is asked for.
//
//   Costs:   Input, Cost           types of the inputs and of the costs
//            open(problem, team)   before anything else, by every thread: it has an object of its own
//            block()               most rows of one request, a multiple of kBlock
//            cost(i, count)        C of the rows [i, i + count), (count, m)
//            wants_gradient()      whether dL/dC is asked for
//            gradient(i, count)    memory for dL/dC of those rows, (count, m)
//            emit(i, count)        it is written
//            close(team)           all of it was
//   Rows:    a Costs, and          (rows beyond n, up to a multiple of kBlock, may be asked for: zeros)
//            start(team)           shifts and kernel of the thread's own rows; the caller's barrier comes after
//            start_plan(team, phi, gamma)   instead: the kernel is exp(phi_i + gamma_j - C_ij / epsilon), in double
//            shift(i)              the smallest cost of row i, 0 where there is none that is finite
//            kernel(i, count)      K_ij = exp((shift_i - C_ij) / epsilon), (count, ld), zeros beyond column m
//            stored()              the whole kernel lies behind kernel(0, .), whatever the block
//            range(team)           range of the exponents that nobody knew before start(), after the barrier
//
// A pointer is valid until the thread's next request of the same kind.
#pragma once
#include "sinkhorn_buffers.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class T>
class StoredCosts {
  public:
    using Input = T;
    using Cost = T;
    using Args = SinkhornArgs<T>;

    StoredCosts(const Args& args, Arena&, int, bool) : args_(args) {}
    void open(const Problem<T>& p, const Team&) {
        const int64_t entries = p.index * args_.n * args_.m;
        cost_ = args_.cost + entries;
        gradient_ = args_.grad_cost ? args_.grad_cost + entries : nullptr;
    }
    int64_t block() const { return round_up(args_.n, kBlock); }
    const T* cost(int64_t i, int64_t) const { return cost_ + i * args_.m; }
    bool wants_gradient() const { return args_.grad_cost; }
    T* gradient(int64_t i, int64_t) const { return gradient_ + i * args_.m; }
    void emit(int64_t, int64_t) const {}
    void close(const Team&) const {}

  protected:
    const Args& args_;

  private:
    const T* cost_ = nullptr;
    T* gradient_ = nullptr;
};

// The smallest of the m costs, 0 where none is finite.
template <class S, class T>
S smallest_cost(const T* cost, int64_t m) {
    constexpr S inf = std::numeric_limits<S>::infinity();
    Vec<S> lowest = splat(inf);
    for (int64_t j = 0; j < m; j += width<S>) lowest = min<S>(LoadAs<S, T>::part(cost + j, m - j, inf), lowest);
    const S low = -largest<S>(-lowest);
    return low < inf ? low : S(0);
}

// shift = the smallest of the m costs, kernel_j = exp((shift - cost_j) / epsilon), ld entries.
template <class S, class T>
S kernel_row(const T* cost, int64_t m, int64_t ld, const ScaledExp<S>& exp, S* kernel) {
    constexpr S inf = std::numeric_limits<S>::infinity();
    const S shift = smallest_cost<S, T>(cost, m);
    int64_t j = 0;
    for (; j + width<S> <= m; j += width<S>) store(kernel + j, exp(shift - LoadAs<S, T>::full(cost + j)));
    for (; j < ld; j += width<S>) {
        store(kernel + j, exp(shift - LoadAs<S, T>::part(cost + j, m - j > 0 ? m - j : 0, inf)));
    }
    return shift;
}

// kernel_j = exp(phi + gamma_j - cost_j inverse) for the m columns.
template <class T>
void plan_row(const T* cost, int64_t m, double inverse, double phi, const double* gamma, double* kernel) {
    const ScaledExp<double> exp(1.0);
    for (int64_t j = 0; j < m; j += width<double>) {
        const Vec<double> x = LoadAs<double, T>::part(cost + j, m - j, 0.0) * inverse;
        store_as(kernel + j, exp(phi + LoadAs<double, double>::part(gamma + j, m - j, 0.0) - x), m - j);
    }
}

template <class S, class T>
class StoredRows : public StoredCosts<T> {
  public:
    using Scalar = S;
    using typename StoredCosts<T>::Args;

    StoredRows(const Args& args, Arena& arena, int threads, bool backward)
        : StoredCosts<T>(args, arena, threads, backward), ld_(round_up(args.m, 2 * width<S>)), exp_(1.0 / args.epsilon) {
        kernel_ = arena.take<S>(this->block() * ld_);
        shift_ = arena.take<S>(this->block());
    }
    void start(const Team& team) {
        const int64_t n = this->args_.n, m = this->args_.m;
        int64_t begin, end;
        split(this->block(), kBlock, team.size, team.rank, begin, end);
        for (int64_t i = begin; i < end; ++i) {
            S* k = kernel_ + i * ld_;
            if (i < n) {
                shift_[i] = kernel_row<S, T>(this->cost(i, 1), m, ld_, exp_, k);
            } else {
                shift_[i] = 0;
                std::memset(k, 0, ld_ * sizeof(S));
            }
        }
    }
    void start_plan(const Team& team, const double* phi, const double* gamma) {
        const int64_t n = this->args_.n, m = this->args_.m;
        int64_t begin, end;
        split(this->block(), kBlock, team.size, team.rank, begin, end);
        for (int64_t i = begin; i < end; ++i) {
            S* k = kernel_ + i * ld_;
            shift_[i] = 0;
            std::memset(k, 0, ld_ * sizeof(S));
            if (i < n) plan_row<T>(this->cost(i, 1), m, 1.0 / this->args_.epsilon, phi[i], gamma, k);
        }
    }
    bool stored() const { return true; }
    double range(const Team&) const { return 0.0; }
    S shift(int64_t i) const { return shift_[i]; }
    const S* kernel(int64_t i, int64_t) const { return kernel_ + i * ld_; }

  private:
    const int64_t ld_;
    const ScaledExp<S> exp_;
    S *kernel_, *shift_;
};

// Calls body(i, count) for the blocks of the rows [begin, end), the last one first if `reversed`.
template <class Body>
OTKD_INLINE void for_blocks(int64_t begin, int64_t end, int64_t block, bool reversed, Body body) {
    const int64_t count = (end - begin + block - 1) / block;
    for (int64_t k = 0; k < count; ++k) {
        const int64_t i = begin + (reversed ? count - 1 - k : k) * block;
        body(i, end - i < block ? end - i : block);
    }
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

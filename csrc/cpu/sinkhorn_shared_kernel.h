// The kernel that all problems share, packed for the products of gemm.h: K_ij = exp((shift_i - C_ij) / epsilon) with shift_i
// the smallest cost of row i; and a panel at a time W = K o (C - base), base the smallest cost of all
// (0 where a marginal has a penalty). Guards of the scalings are in the units of exp(-C / eps): with them shift_i is the
// smallest cost of all where that is negative, else 0, and base is 0. Then K cannot overflow, and its entries matter no more
// than in exact arithmetic where they are far below the guards: double serves every range.
#pragma once
#include <algorithm>

#include "gemm.h"
#include "otkd_fast/sinkhorn_shared.h"
#include "sinkhorn_buffers.h"
#include "transpose.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class S, class T>
class SharedKernel {
  public:
    SharedKernel(const SinkhornSharedArgs<T>& args, Arena& arena, int threads)
        : args_(args), packing_(args.n, args.m), exp_(1.0 / args.epsilon) {
        kernel_ = arena.take<S>(packing_.entries() + kSlack);
        shift_ = arena.take<S>(packing_.n);
        reduction_.slots = arena.take<double>(threads * kSlots);
    }

    // By all threads together, each on a copy of one object. False if (max - min of the finite costs) / epsilon exceeds
    // `limit`: that bounds the exponents whatever the marginals are, and the cancellation between C / epsilon and the potentials.
    // Without `packs` shifts and base only.
    bool start(const Team& team, double limit, bool packs = true);

    const Packing& packing() const { return packing_; }
    const S* panel(int64_t row) const { return kernel_ + packing_.panel(row); }
    int64_t panel_entries() const { return kPanel * packing_.m + kSlack; }
    // The rows [row, row + rows) of one panel of W, in a panel of memory.
    void weigh(int64_t row, int64_t rows, S* panel) const;
    const S* shifts() const { return shift_; }
    S base() const { return base_; }
    bool guarded() const { return args_.guard_a > 0 || args_.guard_b > 0; }
    // What is added to the sums K v
    S row_guard() const {
        return guarded() ? static_cast<S>(args_.guard_a * std::exp(static_cast<double>(shift_[0]) / args_.epsilon)) : S(0);
    }
    S column_guard() const { return static_cast<S>(args_.guard_b); }
    // K_ij of `count` columns from j on, row-major; of a cost that is not transposed
    Vec<S> row(int64_t i, int64_t j, int64_t count) const { return exp_(shift_[i] - cost(i, j, count)); }
    // C_ij - base, 0 where it is infinite; likewise
    Vec<S> excess(int64_t i, int64_t j, int64_t count) const { return finite(cost(i, j, count) - base_); }

  private:
    static constexpr S kInf = std::numeric_limits<S>::infinity();
    static constexpr int64_t kSlack = kTile + width<S>;  // entries that whole vectors may touch behind the last one

    static constexpr int64_t kTurnedRows = (kTile + 3) / 4 * 4;             // whole tiles of a transposition
    static constexpr int64_t kTurned = kTurnedRows * (kDepth + width<T>);  // entries of a block that was transposed

    static Vec<S> finite(Vec<S> x) { return x < kInf ? x : x != x ? x : Vec<S>{}; }
    static Vec<S> load_cost(const T* cost, int64_t count) {
        return LoadAs<S, T>::part(cost, count < width<S> ? count : width<S>, kInf);
    }
    Vec<S> cost(int64_t i, int64_t j, int64_t count) const { return load_cost(args_.cost + i * args_.m + j, count); }
    // Where kTile rows from `row` on begin at `column`, and the entries from one row to the next: kDepth columns at most, put
    // into `turned` if the cost is transposed.
    const T* block(int64_t row, int64_t column, T* turned, int64_t& stride) const {
        stride = args_.cost_transposed ? kDepth + width<T> : args_.m;
        if (!args_.cost_transposed) return args_.cost + row * args_.m + column;
        const int64_t columns = std::min(kDepth, args_.m - column), rows = std::min(kTurnedRows, args_.n - row);
        transpose(args_.cost + column * args_.n + row, args_.n, turned, stride, columns, rows);
        return turned;
    }
    void row_ranges(int64_t row, S& low, S& high);
    void pack_group(int64_t row, int64_t column);
    void weigh_group(int64_t row, int64_t column, S* panel) const;

    const SinkhornSharedArgs<T>& args_;
    const Packing packing_;
    const ScaledExp<S> exp_;
    S *kernel_, *shift_;
    S base_ = 0;
    Reduction reduction_;
};

// The smallest cost of each of kTile rows becomes its shift; low and high take in the smallest and the largest finite one.
template <class S, class T>
void SharedKernel<S, T>::row_ranges(int64_t row, S& low, S& high) {
    const int64_t rows = std::min<int64_t>(kTile, args_.n - row);
    Vec<S> most = splat(-kInf);
    const auto take = [&](const T* cost, int64_t count, Vec<S>& least) {
        const Vec<S> c = load_cost(cost, count);
        least = min<S>(c, least);
        most = max<S>(c < kInf ? c : splat(-kInf), most);
    };
    const auto keep = [&](int64_t i, S least) {
        shift_[i] = least < kInf ? least : S(0);
        low = least < low ? least : low;
    };
    if (args_.cost_transposed) {
        for (int64_t r = 0; r < kTile; r += width<S>) {
            Vec<S> least = splat(kInf);
            for (int64_t j = 0; j < args_.m && r < rows; ++j) {
                take(args_.cost + j * args_.n + row + r, std::min<int64_t>(rows - r, width<S>), least);
            }
            for (int64_t w = 0; w < width<S> && r + w < kTile; ++w) keep(row + r + w, least[w]);
        }
    } else {
        for (int64_t r = 0; r < kTile; ++r) {
            Vec<S> least = splat(kInf);
            const T* cost = args_.cost + (row + r) * args_.m;
            for (int64_t j = 0; j < args_.m && r < rows; j += width<S>) take(cost + j, args_.m - j, least);
            keep(row + r, -largest<S>(-least));
        }
    }
    const S own_high = largest<S>(most);
    high = own_high > high ? own_high : high;
}

// kTile rows from `row` on, the block of columns that begins at `column`.
template <class S, class T>
void SharedKernel<S, T>::pack_group(int64_t row, int64_t column) {
    constexpr int64_t ld = kDepth + width<S>;
    S entries[kTile * ld];
    T turned[kTurned];
    int64_t stride = 0;
    const T* block = row < args_.n ? this->block(row, column, turned, stride) : nullptr;
    const int64_t depth = packing_.depth(column);
    for (int64_t r = 0; r < kTile; ++r) {
        const int64_t columns = row + r < args_.n ? args_.m - column : 0;
        for (int64_t j = 0; j < depth; j += width<S>) {
            const Vec<S> zero = {};
            const bool used = j < columns;
            const Vec<S> own = used ? exp_(shift_[row + r] - load_cost(block + r * stride + j, columns - j)) : zero;
            store(entries + r * ld + j, own);
        }
    }
    S* to = kernel_ + packing_.panel(row) + packing_.group(row, column);
    for (int64_t j = 0; j < depth; j += kTile) {
        for (int64_t r = 0; r < kTile; ++r, to += kTile) std::memcpy(to, entries + r * ld + j, kTile * sizeof(S));
    }
}

template <class S, class T>
void SharedKernel<S, T>::weigh(int64_t row, int64_t rows, S* panel) const {
    for (int64_t column = 0; column < packing_.m; column += kDepth) {
        for (int64_t i = row; i < row + rows; i += kTile) weigh_group(i, column, panel);
    }
}

template <class S, class T>
void SharedKernel<S, T>::weigh_group(int64_t row, int64_t column, S* panel) const {
    constexpr int64_t ld = kDepth + kTile + width<S>;
    S excess[kTile * ld];
    T turned[kTurned];
    int64_t stride = 0;
    const T* block = row < args_.n ? this->block(row, column, turned, stride) : nullptr;
    const int64_t depth = packing_.depth(column), group = packing_.group(row, column);
    for (int64_t r = 0; r < kTile; ++r) {
        const int64_t columns = row + r < args_.n ? args_.m - column : 0;
        for (int64_t j = 0; j < depth; j += width<S>) {
            const Vec<S> zero = {};
            const bool used = j < columns;
            store(excess + r * ld + j, used ? finite(load_cost(block + r * stride + j, columns - j) - base_) : zero);
        }
    }
    const S* kernel = this->panel(row) + group;
    S* to = panel + group;
    for (int64_t j = 0; j < depth; j += kTile) {
        for (int64_t r = 0; r < kTile; ++r, kernel += kTile, to += kTile) {
            for (int64_t w = 0; w < kTile; w += width<S>) {
                // in the order of memory: what a vector writes too much the next one writes over
                store(to + w, load(kernel + w) * load(excess + r * ld + j + w));
            }
        }
    }
}

template <class S, class T>
bool SharedKernel<S, T>::start(const Team& team, double limit, bool packs) {
    const auto pack_rows = [&](int64_t i) {
        for (int64_t j = 0; j < packing_.m && packs; j += kDepth) pack_group(i, j);
    };
    int64_t begin, end;
    split(packing_.n, kTile, team.size, team.rank, begin, end);
    S low = kInf, high = -kInf;
    for (int64_t i = begin; i < end; i += kTile) {
        row_ranges(i, low, high);
        if (!guarded()) pack_rows(i);
    }
    reduction_.put(team, 0, -low);
    reduction_.put(team, 1, high);
    team.barrier();
    double least = -reduction_.max(team, 0);
    const double most = reduction_.max(team, 1);
    if (guarded()) {
        least = least < 0 ? least : 0;
        std::fill(shift_ + begin, shift_ + end, static_cast<S>(least));
    }
    const bool constrained = args_.penalty_a == kInfinity && args_.penalty_b == kInfinity && !guarded();
    base_ = constrained && least < kInf ? static_cast<S>(least) : S(0);
    if (most > least && (most - least) / args_.epsilon > limit) return false;
    if (!guarded()) return true;
    for (int64_t i = begin; i < end; i += kTile) pack_rows(i);
    team.barrier();
    return true;
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

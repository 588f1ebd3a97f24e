// A block of problems side by side in the lanes of vectors: (size, L) arrays of their masses, scalings and sums, and the
// sweep that every pass over the shared kernel is made of.
#pragma once
#include <type_traits>

#include "sinkhorn_shared_kernel.h"
#include "transpose.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// Sums that leave this range send their problem on to a wider method.
template <class S>
constexpr S kSmallest = sizeof(S) == 4 ? S(1e-25) : S(1e-200);
template <class S>
constexpr S kLargest = sizeof(S) == 4 ? S(1e25) : S(1e200);

constexpr int64_t kMaxLanes = kMaxVectors * width<float>;

inline int64_t kept_slots(Keep keep, int64_t num_iters) {
    return keep == Keep::all ? num_iters : keep == Keep::last_step ? 2 : keep == Keep::last ? 1 : 0;
}

// Problems [first, first + count) of those that a call solves.
template <class S, class T>
struct Block {
    const SinkhornSharedArgs<T>& args;
    int64_t first, count;
    int vectors;

    int64_t lanes() const { return vectors * width<S>; }
    int64_t problem(int64_t lane) const { return args.problems ? args.problems[first + lane] : first + lane; }

    // out (size, L) = rows (batch, stride), each from its element `offset` on; 0 in lanes without a problem
    template <class E>
    void load(const E* rows, int64_t stride, int64_t size, S* out) const {
        for (int64_t lane = count; lane < lanes(); ++lane) {
            for (int64_t i = 0; i < size; ++i) out[i * lanes() + lane] = 0;
        }
        if constexpr (std::is_same_v<S, E>) {
            if (!args.problems) return transpose(rows + first * stride, stride, out, lanes(), count, size);
        }
        for (int64_t lane = 0; lane < count; ++lane) {
            const E* row = rows + problem(lane) * stride;
            for (int64_t i = 0; i < size; ++i) out[i * lanes() + lane] = static_cast<S>(row[i]);
        }
    }
    template <class E>
    void save(const S* in, int64_t stride, int64_t size, E* rows) const {
        if constexpr (std::is_same_v<S, E>) {
            if (!args.problems) return transpose(in, lanes(), rows + first * stride, stride, size, count);
        }
        for (int64_t lane = 0; lane < count; ++lane) {
            E* row = rows + problem(lane) * stride;
            for (int64_t i = 0; i < size; ++i) row[i] = static_cast<E>(in[i * lanes() + lane]);
        }
    }
    // out (size, L): the masses, 1 / size where they are not given
    void load_masses(const T* masses, int64_t size, S* out) const {
        if (masses) return load(masses, size, size, out);
        for (int64_t i = 0; i < size; ++i) {
            for (int64_t lane = 0; lane < lanes(); ++lane) {
                out[i * lanes() + lane] = lane < count ? static_cast<S>(1.0 / static_cast<double>(size)) : S(0);
            }
        }
    }
    // Where the scalings of a kept iteration lie, rows then columns, (n + m, L); null where problems are kept apart.
    S* kept(int64_t slot) const {
        if constexpr (std::is_same_v<S, T>) {
            if (args.keep == Keep::nothing) return nullptr;
            return args.blocks + (first * kept_slots(args.keep, args.num_iters) + slot * lanes()) * (args.n + args.m);
        } else {
            return nullptr;
        }
    }
};

// Calls body(row, rows) for the pieces of [begin, end) that lie in one panel.
template <class Body>
OTKD_INLINE void for_panels(int64_t begin, int64_t end, Body body) {
    for (int64_t row = begin; row < end;) {
        const int64_t next = (row / kPanel + 1) * kPanel, stop = next < end ? next : end;
        body(row, stop - row);
        row = stop;
    }
}

template <class S, class T>
class SharedSweep {
  public:
    SharedSweep(const SharedKernel<S, T>& kernel, Arena& arena, int threads, int64_t lanes)
        : kernel_(kernel), at_(kernel.packing()), lanes_(lanes), vectors_(static_cast<int>(lanes / width<S>)) {
        sums_ = arena.take<S>(threads * at_.m * lanes);
        panel_ = arena.take<S>(threads * kPanel * lanes);
        weighted_ = arena.take<S>(threads * kernel.panel_entries());
    }

  protected:
    void rows_of(const Team& team, int64_t& begin, int64_t& end) const {
        split(at_.n, kTile, team.size, team.rank, begin, end);
    }
    void columns_of(const Team& team, int64_t& begin, int64_t& end) const {
        split(at_.m, 1, team.size, team.rank, begin, end);
    }
    S* own_panel(const Team& team) const { return panel_ + team.rank * kPanel * lanes_; }
    S* own_weighted(const Team& team) const { return weighted_ + team.rank * kernel_.panel_entries(); }
    S* own_sums(const Team& team) const { return sums_ + team.rank * at_.m * lanes_; }

    // out (rows, L) = the rows of a panel of K or W times x
    void times(const S* panel, int64_t row, int64_t rows, const S* x, S* out) const {
        if (vectors_ == 1) return rows_times<S, 1>(panel, at_, row, rows, x, out);
        rows_times<S, 2>(panel, at_, row, rows, x, out);
    }
    // out (m, L) = or += the transpose of the rows of a panel times x
    void transposed_times(const S* panel, int64_t row, int64_t rows, const S* x, S* out, bool add) const {
        if (vectors_ == 1) return rows_transposed_times<S, 1>(panel, at_, row, rows, x, out, add);
        rows_transposed_times<S, 2>(panel, at_, row, rows, x, out, add);
    }
    // One read of K: for each panel s = K x, step(row, rows, s) makes the operand of the transpose of it in place,
    // sums (m, L) += K^T s.
    template <class Step>
    void sweep(const Team& team, const S* x, Step step) const {
        int64_t begin, end;
        rows_of(team, begin, end);
        S *s = own_panel(team), *sums = own_sums(team);
        for_panels(begin, end, [&](int64_t row, int64_t rows) {
            times(kernel_.panel(row), row, rows, x, s);
            step(row, rows, s);
            transposed_times(kernel_.panel(row), row, rows, s, sums, row > begin);
        });
        finish_sums(team, begin == end);
    }
    // After it, the sums of all threads are in those of the first; every thread added up its own columns.
    void finish_sums(const Team& team, bool none) const {
        S* sums = own_sums(team);
        if (none) std::memset(sums, 0, at_.m * lanes_ * sizeof(S));
        if (team.size == 1) return;
        team.barrier();
        int64_t begin, end;
        columns_of(team, begin, end);
        for (int r = 1; r < team.size; ++r) {
            const S* other = sums_ + r * at_.m * lanes_;
            for (int64_t k = begin * lanes_; k < end * lanes_; k += width<S>) {
                store(sums_ + k, load(sums_ + k) + load(other + k));
            }
        }
    }

    const SharedKernel<S, T>& kernel_;
    const Packing& at_;
    const int64_t lanes_;
    const int vectors_;
    S *sums_, *panel_, *weighted_;  // each thread: K^T u (m, L), a panel of sums or operands (kPanel, L), a panel of W
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

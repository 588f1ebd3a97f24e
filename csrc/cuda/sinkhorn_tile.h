// Sinkhorn on scalings with the kernel in registers: K_ij = exp((low - C_ij) / epsilon), low the smallest cost;
// P = diag(u) K diag(v), u = a / (K v), v = b / (K^T u). One block solves one problem: no iteration touches global memory
// but for the history.
//
// A warp holds kGroups x kRows rows, a lane kColumns of their columns (32 apart). Row sums go over the warp by an exchange in
// which half of the rows is handed over at each step (kRows - 1 + 5 - log2(kRows) shuffles in place of 5 kRows), after
// which a lane owns one row of each group. Column sums go over shared memory. Two barriers and 2 multiply-adds an entry
// and iteration. Sums are made in a fixed order.
//
// Scalings serve where the exponents allow: range of the costs over epsilon, plus the log range of the marginals and of
// the potentials to start from, at most 60 (float) or 600 (double). Else, and where a sum leaves the safe range on the way, the
// caller goes on in the log domain.
#pragma once
#include "sinkhorn_range.h"

namespace otkd_fast {
namespace cuda {
namespace {

// Sums over the warp of kRows values a lane; the result is that of row lane / (32 / kRows).
template <int kRows, int kOffset = 16, class S>
OTKD_DEVICE S exchange_sums(const S (&x)[kRows]) {
    if constexpr (kRows > 1) {
        const bool upper = lane_id() & kOffset;
        S half[kRows / 2];
        OTKD_UNROLL
        for (int r = 0; r < kRows / 2; ++r) {
            const S sent = upper ? x[r] : x[r + kRows / 2], own = upper ? x[r + kRows / 2] : x[r];
            half[r] = own + shuffle_xor(sent, kOffset);
        }
        return exchange_sums<kRows / 2, kOffset / 2>(half);
    } else {
        S sum = x[0];
        OTKD_UNROLL
        for (int offset = kOffset; offset > 0; offset /= 2) sum += shuffle_xor(sum, offset);
        return sum;
    }
}

// The shared memory of a block, by its number of warps.
template <class S, int kColumns>
struct TileMemory {
    static constexpr int kWidth = 32 * kColumns;
    S *partial, *v, *sums, *mass;  // (warps, kWidth), then (kWidth,) each
    double* scratch;               // (32,)
    OTKD_DEVICE explicit TileMemory(int warps) {
        scratch = reinterpret_cast<double*>(shared_memory());
        partial = reinterpret_cast<S*>(scratch + 32);
        v = partial + warps * kWidth;
        sums = v + kWidth;
        mass = sums + kWidth;
    }
    static int64_t bytes(int warps) { return 32 * int64_t{sizeof(double)} + (warps + 3) * kWidth * int64_t{sizeof(S)}; }
    // Column sums from those of the warps. All threads; between two barriers.
    OTKD_DEVICE S column_sum(int j) const {
        S total = partial[j];
        for (int w = 1; w < block_warps(); ++w) total += partial[w * kWidth + j];
        return total;
    }
};

// The rows and columns of one thread.
template <class S, int kGroups, int kRows, int kColumns>
struct Tile {
    static constexpr int kLanes = 32 / kRows;  // that own the same row after an exchange
    S k[kGroups][kRows][kColumns];

    OTKD_DEVICE static int row(int g, int r) { return (warp_id() * kGroups + g) * kRows + r; }
    OTKD_DEVICE static int own_row(int g) { return row(g, lane_id() / kLanes); }
    OTKD_DEVICE static bool counts() { return lane_id() % kLanes == 0; }  // one lane a row
    OTKD_DEVICE static int column(int c) { return lane_id() + 32 * c; }
    OTKD_DEVICE static S of_row(S own, int r) { return shuffle(own, r * kLanes); }

    // (K v) of the rows that the lane owns.
    OTKD_DEVICE void row_sums(const S (&v)[kColumns], S (&own)[kGroups]) const {
        OTKD_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            S x[kRows];
            OTKD_UNROLL
            for (int r = 0; r < kRows; ++r) {
                x[r] = 0;
                OTKD_UNROLL
                for (int c = 0; c < kColumns; ++c) x[r] += k[g][r][c] * v[c];
            }
            own[g] = exchange_sums(x);
        }
    }
    // The warp's part of K^T u into `partial`.
    OTKD_DEVICE void column_sums(const S (&own)[kGroups], S* partial) const {
        S y[kColumns] = {};
        OTKD_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            OTKD_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const S u = of_row(own[g], r);
                OTKD_UNROLL
                for (int c = 0; c < kColumns; ++c) y[c] += k[g][r][c] * u;
            }
        }
        OTKD_UNROLL
        for (int c = 0; c < kColumns; ++c) partial[warp_id() * 32 * kColumns + column(c)] = y[c];
    }
    OTKD_DEVICE static void load_columns(const S* shared, S (&v)[kColumns]) {
        OTKD_UNROLL
        for (int c = 0; c < kColumns; ++c) v[c] = shared[column(c)];
    }
    // Calls body(g, r, c, i, j) for every entry inside (n, m).
    template <class Body>
    OTKD_DEVICE static void for_entries(int n, int m, Body body) {
        OTKD_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            OTKD_UNROLL
            for (int r = 0; r < kRows; ++r) {
                OTKD_UNROLL
                for (int c = 0; c < kColumns; ++c) {
                    if (row(g, r) < n && column(c) < m) body(g, r, c, row(g, r), column(c));
                }
            }
        }
    }
    // From costs in k to the kernel; entries outside of (n, m) are 0.
    OTKD_DEVICE void exponentiate(S low, double epsilon) {
        const S inverse = static_cast<S>(1.0 / epsilon);
        OTKD_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            OTKD_UNROLL
            for (int r = 0; r < kRows; ++r) {
                OTKD_UNROLL
                for (int c = 0; c < kColumns; ++c) k[g][r][c] = exp_of((low - k[g][r][c]) * inverse);
            }
        }
    }
    // Smallest and largest finite cost; 0 and 0 without any.
    OTKD_DEVICE void cost_range(double* scratch, S& low, S& high) const {
        S least = static_cast<S>(kInfinity), most = static_cast<S>(-kInfinity);
        OTKD_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            OTKD_UNROLL
            for (int r = 0; r < kRows; ++r) {
                OTKD_UNROLL
                for (int c = 0; c < kColumns; ++c) {
                    least = smaller(k[g][r][c], least);
                    most = k[g][r][c] < static_cast<S>(kInfinity) ? larger(k[g][r][c], most) : most;
                }
            }
        }
        low = static_cast<S>(-block_max(-static_cast<double>(least), scratch));
        high = static_cast<S>(block_max(static_cast<double>(most), scratch));
        if (!(low <= high)) low = high = 0;
    }
};

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

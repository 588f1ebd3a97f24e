// Products of one packed matrix K (n, m) and its transpose with blocks of vectors in lanes: X (rows, L) holds L problems
// side by side, a row after the other, L one or two vectors. A register tile of kTile rows of K (or columns, for the
// transpose) times L takes one broadcast an entry of K and one multiply-add a vector; nothing is summed across lanes.
//
// Packed layout: panels of kPanel rows; in a panel blocks of kDepth columns; in a block groups of kTile rows; in a group
// square tiles of kTile x kTile entries, row by row. The product and the one with the transpose read the same memory: a
// block of X (kDepth, L) stays in the first-level cache for the first, a panel of X (kPanel, L) for the second, the panel
// of K in the second level between the two. Sums run over kDepth columns or a panel's rows in registers and are then added
// up.
#pragma once
#include "simd.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr int kTile = OTKD_VECTOR_BYTES == 64 ? 10 : 5;  // 2 kTile accumulators and 3 operands in 32 or 16 registers
constexpr int64_t kPanel = 100;
constexpr int64_t kDepth = 200;
constexpr int kMaxVectors = 2;  // of lanes
constexpr int kAhead = 40;      // columns by which a group is fetched ahead

inline int64_t padded(int64_t size) { return (size + kTile - 1) / kTile * kTile; }

// Where things are in a packed matrix of n x m entries.
struct Packing {
    int64_t n, m;  // multiples of kTile
    Packing(int64_t rows, int64_t columns) : n(padded(rows)), m(padded(columns)) {}
    int64_t entries() const { return n * m; }
    int64_t depth(int64_t column) const { return m - column < kDepth ? m - column : kDepth; }
    // The panel that `row` lies in.
    int64_t panel(int64_t row) const { return row / kPanel * kPanel * m; }
    // In its panel, the group of kTile rows from `row` on in the block of columns that begins at `column`.
    int64_t group(int64_t row, int64_t column) const {
        const int64_t first = row / kPanel * kPanel, rows = n - first < kPanel ? n - first : kPanel;
        return column * rows + (row - first) * depth(column);
    }
};

template <class S, int kVectors>
OTKD_INLINE void store_tile(S* out, const Vec<S> (&acc)[kTile][kVectors], bool add) {
    for (int r = 0; r < kTile; ++r) {
        for (int c = 0; c < kVectors; ++c) {
            S* to = out + (r * kVectors + c) * width<S>;
            store(to, add ? load(to) + acc[r][c] : acc[r][c]);
        }
    }
}

// out (kTile, L) = or += k x, k one group: depth / kTile tiles, x (depth, L)
template <class S, int kVectors>
OTKD_INLINE void group_times(const S* k, int64_t depth, const S* x, S* out, bool add) {
    Vec<S> acc[kTile][kVectors] = {};
    for (int64_t j = 0; j < depth; j += kTile, k += kTile * kTile) {
        for (int i = 0; i < kTile; ++i, x += kVectors * width<S>) {
            __builtin_prefetch(k + (kAhead + i) * kTile, 0, 3);
            Vec<S> operand[kVectors];
            for (int c = 0; c < kVectors; ++c) operand[c] = load(x + c * width<S>);
            for (int r = 0; r < kTile; ++r) {
                const Vec<S> factor = splat(k[r * kTile + i]);
                for (int c = 0; c < kVectors; ++c) acc[r][c] += factor * operand[c];
            }
        }
    }
    store_tile<S, kVectors>(out, acc, add);
}

// out (kTile, L) = or += k^T x, k one tile of each of `groups` groups that are `stride` entries apart, x (groups kTile, L)
template <class S, int kVectors>
OTKD_INLINE void group_transposed_times(const S* k, int64_t stride, int64_t groups, const S* x, S* out, bool add) {
    Vec<S> acc[kTile][kVectors] = {};
    for (int64_t g = 0; g < groups; ++g, k += stride) {
        for (int r = 0; r < kTile; ++r, x += kVectors * width<S>) {
            Vec<S> operand[kVectors];
            for (int c = 0; c < kVectors; ++c) operand[c] = load(x + c * width<S>);
            for (int q = 0; q < kTile; ++q) {
                const Vec<S> factor = splat(k[r * kTile + q]);
                for (int c = 0; c < kVectors; ++c) acc[q][c] += factor * operand[c];
            }
        }
    }
    store_tile<S, kVectors>(out, acc, add);
}

// out (rows, L) = K x for the rows [row, row + rows) of one panel, multiples of kTile; x (m, L)
template <class S, int kVectors>
void rows_times(const S* panel, const Packing& at, int64_t row, int64_t rows, const S* x, S* out) {
    constexpr int64_t lanes = kVectors * width<S>;
    for (int64_t column = 0; column < at.m; column += kDepth) {
        for (int64_t r = 0; r < rows; r += kTile) {
            const S* k = panel + at.group(row + r, column);
            group_times<S, kVectors>(k, at.depth(column), x + column * lanes, out + r * lanes, column > 0);
        }
    }
}

// out (m, L) = or += K^T x for the rows [row, row + rows) of one panel; x (rows, L)
template <class S, int kVectors>
void rows_transposed_times(const S* panel, const Packing& at, int64_t row, int64_t rows, const S* x, S* out, bool add) {
    constexpr int64_t lanes = kVectors * width<S>;
    for (int64_t column = 0; column < at.m; column += kDepth) {
        const S* k = panel + at.group(row, column);
        const int64_t depth = at.depth(column);
        for (int64_t j = 0; j < depth; j += kTile) {
            S* to = out + (column + j) * lanes;
            group_transposed_times<S, kVectors>(k + j * kTile, depth * kTile, rows / kTile, x, to, add);
        }
    }
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

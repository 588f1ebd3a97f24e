// Sums over the problems of a block of products of a row and a column vector, for the cost's gradient: a product of rank L
// whose long sides are the rows and the columns of the cost.
#pragma once
#include "gemm.h"
#include "transpose.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// Entries from one row of such a sum to the next: the m columns in whole register tiles.
template <class S>
int64_t outer_stride(int64_t m) {
    constexpr int64_t columns = kMaxVectors * width<S>;
    return (m + columns - 1) / columns * columns;
}

// The transposed operand (L, outer_stride) of a right side (m, L): columns [begin, end).
template <class S>
void transpose_columns(const S* right, int64_t lanes, int64_t begin, int64_t end, int64_t stride, S* transposed) {
    transpose(right + begin * lanes, lanes, transposed + begin, stride, end - begin, lanes);
}

// One tile of kTile rows and kMaxVectors vectors of columns: acc += left right^T
template <class S>
OTKD_INLINE void outer_tile(const S* left, const S* right, int64_t stride, int64_t lanes, Vec<S> (&acc)[kTile][kMaxVectors]) {
    for (int64_t lane = 0; lane < lanes; ++lane, right += stride) {
        Vec<S> operand[kMaxVectors];
        for (int c = 0; c < kMaxVectors; ++c) operand[c] = load(right + c * width<S>);
        for (int r = 0; r < kTile; ++r) {
            const Vec<S> factor = splat(left[r * lanes + lane]);
            for (int c = 0; c < kMaxVectors; ++c) acc[r][c] += factor * operand[c];
        }
    }
}

// Rows [begin, end), multiples of kTile, of sum (n, stride) += weight(i, j) (left right^T + left2 right2^T)_ij; left, left2
// (n, L), right, right2 (L, stride); left2 may be null; weight gives the factors of a vector of columns.
template <class S, class Weight>
void add_outer(int64_t begin, int64_t end, int64_t stride, int64_t lanes, const S* left, const S* right, const S* left2,
               const S* right2, S* sum, Weight weight) {
    for (int64_t i = begin; i < end; i += kTile) {
        for (int64_t j = 0; j < stride; j += kMaxVectors * width<S>) {
            Vec<S> acc[kTile][kMaxVectors] = {};
            outer_tile<S>(left + i * lanes, right + j, stride, lanes, acc);
            if (left2) outer_tile<S>(left2 + i * lanes, right2 + j, stride, lanes, acc);
            for (int r = 0; r < kTile; ++r) {
                for (int c = 0; c < kMaxVectors; ++c) {
                    const int64_t column = j + c * width<S>;
                    S* to = sum + (i + r) * stride + column;
                    store(to, load(to) + weight(i + r, column, acc[r][c]));
                }
            }
        }
    }
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

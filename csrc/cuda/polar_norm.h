// What both ways of polar.cu need of a matrix before and after the steps: its size, and an inner product.
#pragma once
#include "runtime.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr double kNormMargin = 1.001;  // for the rounding of a norm

// Exponent e such that 2^-e largest is in [0.5, 1).
OTKD_DEVICE int exponent_above(double largest) { return ilogb(largest) + 1; }

// max |x_k| by the block, the same in all threads; NaN where an entry is not finite.
template <class T>
OTKD_DEVICE double largest_magnitude(const T* x, int64_t count, double* scratch) {
    double best = 0;
    bool bad = false;
    for (int64_t k = thread_id(); k < count; k += block_threads()) {
        const double size = fabs(static_cast<double>(x[k]));
        bad |= !(size < kInfinity);
        best = larger(size, best);
    }
    best = block_max(best, scratch);
    return barrier_any(bad) ? kNaN : best;
}

// An upper bound of |X|, X (n, m) with rows of `ld`: by its largest row and column sums, or by the sum of its squares.
template <class T>
OTKD_DEVICE double norm_bound(const T* x, int64_t n, int64_t m, int64_t ld, double* scratch) {
    double top_row = 0, top_column = 0, squares = 0;
    for (int64_t i = warp_id(); i < n; i += block_warps()) {
        T sum = 0;
        double square = 0;
        for (int64_t j = lane_id(); j < m; j += 32) {
            const T entry = x[i * ld + j];
            sum += entry < 0 ? -entry : entry;
            square += static_cast<double>(entry * entry);
        }
        top_row = larger(top_row, static_cast<double>(warp_sum(sum)));
        squares += square;
    }
    for (int64_t j = thread_id(); j < m; j += block_threads()) {
        T sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += x[i * ld + j] < 0 ? -x[i * ld + j] : x[i * ld + j];
        top_column = larger(top_column, static_cast<double>(sum));
    }
    top_row = block_max(top_row, scratch);
    top_column = block_max(top_column, scratch);
    squares = block_sum(squares, scratch);
    return kNormMargin * sqrt(smaller(top_row * top_column, squares));
}

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

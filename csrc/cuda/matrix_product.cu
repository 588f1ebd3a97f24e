// Products of a batch of matrices, any size and strides, in the full precision of the type (float, double).
//
// A block has a tile of 64 x 64, a thread 4 x 4 of it; 16 of the depth at a time go through shared memory. 2 n m k operations,
// n m k / 32 elements read. Sums of each 16 are added up: equal terms round to one side, more so the more are in a row. A^T A comes out
// exactly symmetric: both entries are the same sum of the same products.
#include "matrix_product.h"

#include "runtime.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kTile = 64, kStage = 16, kThreads = 256, kLine = kTile + 1;

// to (kStage, kLine): entries of `kTile` lines from `first` on, lines and depth `line` and `depth` elements apart; 0 beyond the ends.
template <class T>
OTKD_DEVICE void stage(const T* from, int64_t line, int64_t depth, int64_t first, int64_t lines, int64_t begin, int64_t end, T* to) {
    OTKD_ROLLED
    for (int e = thread_id(); e < kTile * kStage; e += kThreads) {
        const int r = depth == 1 ? e / kStage : e % kTile, k = depth == 1 ? e % kStage : e / kTile;  // along what is contiguous
        const bool inside = first + r < lines && begin + k < end;
        to[k * kLine + r] = inside ? from[(first + r) * line + (begin + k) * depth] : T(0);
    }
}

template <class T>
OTKD_DEVICE T finished(const ProductArgs<T>& args, int64_t index, int64_t i, int64_t j, T sum) {
    T value = static_cast<T>(args.alpha) * sum;
    if (args.exponents) value = ldexp(value, args.exponents[2 * index + args.of_sum]);
    if (args.c) {
        T other = static_cast<T>(args.beta) * args.c[(index * args.n + i) * args.m + j];
        if (args.exponents) other = ldexp(other, args.exponents[2 * index + args.of_c]);
        value += other;
    }
    if (args.row) value += args.row[index * args.m + j];
    return i == j ? value + static_cast<T>(args.diagonal) : value;
}

template <class T>
OTKD_KERNEL(kThreads, 16 / sizeof(T)) product_tile(OTKD_CONSTANT ProductArgs<T> args) {
    T* left = reinterpret_cast<T*>(shared_memory());  // (kStage, kLine)
    T* right = left + kStage * kLine;
    const uint32_t columns = (args.m + kTile - 1) / kTile, rows = (args.n + kTile - 1) / kTile, block = block_id();
    const int64_t j0 = block % columns * int64_t{kTile}, i0 = block / columns % rows * int64_t{kTile};
    const int64_t index = block / columns / rows;
    if (args.steps && args.steps[index] <= args.step) return;
    const T *a = args.a + index * args.a_batch, *b = args.b + index * args.b_batch;
    const int tx = thread_id() % 16, ty = thread_id() / 16;
    T total[4][4] = {};
    for (int64_t k0 = 0; k0 < args.k; k0 += kStage) {
        stage(a, args.a_row, args.a_depth, i0, args.n, k0, args.k, left);
        stage(b, args.b_column, args.b_depth, j0, args.m, k0, args.k, right);
        barrier();
        T part[4][4] = {};
        OTKD_UNROLL
        for (int k = 0; k < kStage; ++k) {
            T own[4], other[4];
            OTKD_UNROLL
            for (int r = 0; r < 4; ++r) {
                own[r] = left[k * kLine + ty + 16 * r];
                other[r] = right[k * kLine + tx + 16 * r];
            }
            OTKD_UNROLL
            for (int r = 0; r < 4; ++r) {
                OTKD_UNROLL
                for (int c = 0; c < 4; ++c) part[r][c] += own[r] * other[c];
            }
        }
        barrier();
        OTKD_UNROLL
        for (int r = 0; r < 4; ++r) {
            OTKD_UNROLL
            for (int c = 0; c < 4; ++c) total[r][c] += part[r][c];
        }
    }
    OTKD_UNROLL
    for (int r = 0; r < 4; ++r) {
        OTKD_UNROLL
        for (int c = 0; c < 4; ++c) {
            const int64_t i = i0 + ty + 16 * r, j = j0 + tx + 16 * c;
            if (i < args.n && j < args.m) args.out[(index * args.n + i) * args.m + j] = finished(args, index, i, j, total[r][c]);
        }
    }
}

}  // namespace

template <class T>
void matrix_product(const ProductArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    const int64_t blocks = args.batch * ceil_div(args.n, kTile) * ceil_div(args.m, kTile);
    launch("product_tile", product_tile<T>, blocks, kThreads, 2 * kStage * kLine * int64_t{sizeof(T)}, target, args);
}

template void matrix_product(const ProductArgs<float>&, const Target&);
template void matrix_product(const ProductArgs<double>&, const Target&);

}  // namespace cuda
}  // namespace otkd_fast

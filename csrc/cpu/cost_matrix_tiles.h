// Register tiles of the pairwise costs and of their gradients, for every kernel that forms costs from rows.
#pragma once
#include "rows.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8, kGradRows = 4;
#else
constexpr int kRows = 4, kGradRows = 2;
#endif
constexpr int64_t kGroup = 4;        // panels of depth that a task of the backward takes together
constexpr int64_t kGradBlock = 256;  // rows of a packed panel of the other operand: 32 KiB

// acc[r][c] += sum over depth of |x - y| or (x - y)^2; `packed` is (depth, 2 vectors)
template <class T, bool kL1>
OTKD_INLINE void accumulate_tile(const T* const (&x)[kRows], const T* packed, int64_t depth, Vec<T> (&acc)[kRows][2]) {
    constexpr int panel = 2 * width<T>;
    for (int64_t k = 0; k < depth; ++k) {
        const Vec<T> y0 = load(packed + k * panel), y1 = load(packed + k * panel + width<T>);
        for (int r = 0; r < kRows; ++r) {
            const Vec<T> xv = splat(x[r][k]);
            const Vec<T> d0 = xv - y0, d1 = xv - y1;
            acc[r][0] += kL1 ? abs<T>(d0) : d0 * d0;
            acc[r][1] += kL1 ? abs<T>(d1) : d1 * d1;
        }
    }
}

// One side of a backward: out_i = sum_j w(i, j) phi(a_i - b_j), phi = sign (l1) or the identity.
template <class T>
struct Side {
    const T *a, *b;  // (na, d), (nb, d)
    const T* w;      // (na, nb)
    T* out;          // (na, d)
    int64_t na, nb, d;
    bool add;        // to what `out` holds
};

// Lanes in use of vector v in a panel of `columns` entries of depth.
template <class T>
OTKD_INLINE int64_t lanes(int64_t columns, int v) {
    const int64_t left = columns - v * width<T>;
    return left < width<T> ? left : int64_t{width<T>};
}

// Adds rows [j0, j0 + block) of b, packed as (block, kVectors vectors), to rows [i, i + rows) of `out`, depth k0 on.
template <class T, bool kL1, int kVectors>
void tile_bwd(const Side<T>& side, const T* packed, int64_t k0, int64_t columns, int64_t i, int rows, int64_t j0,
              int64_t block) {
    Vec<T> a[kGradRows][kVectors], acc[kGradRows][kVectors] = {};
    const T* w[kGradRows];
    for (int r = 0; r < kGradRows; ++r) {
        const int64_t row = i + (r < rows ? r : rows - 1);
        w[r] = side.w + row * side.nb + j0;
        for (int v = 0; v < kVectors; ++v) {
            a[r][v] = load_up_to(side.a + row * side.d + k0 + v * width<T>, lanes<T>(columns, v), T(0));
        }
    }
    for (int64_t j = 0; j < block; ++j) {
        Vec<T> b[kVectors];
        for (int v = 0; v < kVectors; ++v) b[v] = load(packed + (j * kVectors + v) * width<T>);
        for (int r = 0; r < kGradRows; ++r) {
            const Vec<T> weight = splat(w[r][j]);
            for (int v = 0; v < kVectors; ++v) {
                const Vec<T> gap = a[r][v] - b[v];
                acc[r][v] += weight * (kL1 ? sign<T>(gap) : gap);
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < kVectors; ++v) {
            const int64_t count = lanes<T>(columns, v);
            T* out = side.out + (i + r) * side.d + k0 + v * width<T>;
            store_up_to(out, j0 || side.add ? load_up_to(out, count, T(0)) + acc[r][v] : acc[r][v], count);
        }
    }
}

// Rows [begin, end) of `out`, the kGroup panels of depth from k0: the weights of a tile serve all of them from cache.
template <class T, bool kL1>
void group_bwd(const Side<T>& side, int64_t k0, int64_t begin, int64_t end) {
    constexpr int64_t panel = 2 * width<T>;
    const int64_t k1 = k0 + kGroup * panel < side.d ? k0 + kGroup * panel : side.d;
    alignas(64) T packed[kGroup][kGradBlock * panel];
    for (int64_t j0 = 0; j0 < side.nb; j0 += kGradBlock) {
        const int64_t block = side.nb - j0 < kGradBlock ? side.nb - j0 : kGradBlock;
        for (int64_t k = k0; k < k1; k += panel) {
            T* out = packed[(k - k0) / panel];
            for (int64_t j = 0; j < block; ++j) {
                for (int v = 0; v < 2 && k + v * width<T> < k1; ++v, out += width<T>) {
                    store(out, load_up_to(side.b + (j0 + j) * side.d + k + v * width<T>, lanes<T>(k1 - k, v), T(0)));
                }
            }
        }
        for (int64_t i = begin; i < end; i += kGradRows) {
            const int rows = end - i < kGradRows ? static_cast<int>(end - i) : kGradRows;
            for (int64_t k = k0; k < k1; k += panel) {
                const T* own = packed[(k - k0) / panel];
                if (k1 - k > width<T>) {
                    tile_bwd<T, kL1, 2>(side, own, k, k1 - k, i, rows, j0, block);
                } else {
                    tile_bwd<T, kL1, 1>(side, own, k, k1 - k, i, rows, j0, block);
                }
            }
        }
    }
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

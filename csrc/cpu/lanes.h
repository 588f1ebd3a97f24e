// Small matrices side by side, one in each lane of a vector: entry (i, j) of all of them is one vector. No column is padded, no
// product transposes anything, and a NaN stays in its lane.
#pragma once
#include <type_traits>

#include "lane_memory.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// Register tiles of products: kLaneRows by kLaneColumns vectors.
#if defined(__AVX512F__)
constexpr int kLaneRows = 4, kLaneColumns = 4;
#else
constexpr int kLaneRows = 2, kLaneColumns = 4;
#endif

// A matrix in every lane, rows one after the other.
template <class T>
struct Lanes {
    T* data;
    int64_t columns;
    T* at(int64_t i, int64_t j) const { return data + (i * columns + j) * width<T>; }
    Vec<T> get(int64_t i, int64_t j) const { return load(at(i, j)); }
    void set(int64_t i, int64_t j, Vec<T> v) const { store(at(i, j), v); }
};

// `count` matrices of `entries` entries, `stride` apart, into lanes; lanes beyond get zeros.
template <class T>
void load_lanes(const T* in, int64_t stride, int64_t count, int64_t entries, T* out) {
    if (count == width<T>) {
        const T* places[width<T>];
        for (int l = 0; l < width<T>; ++l) places[l] = in + l * stride;
        gather<width<T>>(places, entries, out);
        return;
    }
    for (int64_t k = 0; k < entries; ++k) store(out + k * width<T>, Vec<T>{});
    transpose(in, stride, out, int64_t{width<T>}, count, entries);
}

template <class T>
void store_lanes(const T* in, int64_t stride, int64_t count, int64_t entries, T* out) {
    T* places[width<T>];
    for (int64_t l = 0; l < count; ++l) places[l] = out + l * stride;
    scatter<width<T>>(in, count, entries, places);
}

// Calls body with the number of rows (or columns) of a tile as a constant.
template <int kMost, class Body>
OTKD_INLINE void with_count(int64_t count, const Body& body) {
    if constexpr (kMost > 1) {
        if (count < kMost) return with_count<kMost - 1>(count, body);
    }
    body(std::integral_constant<int, kMost>{});
}

// finish(sum, i, j) of entries [i, i + kRows) x [j, j + kColumns) of A^T B (kTransposeA) or A B; depth is at least 1.
template <class T, bool kTransposeA, int kRows, int kColumns, class Finish>
OTKD_INLINE void lane_tile(const Lanes<T>& a, const Lanes<T>& b, int64_t i, int64_t j, int64_t depth, const Finish& finish) {
    constexpr int64_t vector = width<T>;
    const int64_t row_step = kTransposeA ? vector : a.columns * vector, depth_step = kTransposeA ? a.columns * vector : vector;
    const T* left = kTransposeA ? a.at(0, i) : a.at(i, 0);
    const T* right = b.at(0, j);
    Vec<T> acc[kRows][kColumns];
    for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kColumns; ++c) acc[r][c] = Vec<T>{};
    }
    int64_t k = 0;
    do {
        Vec<T> row[kColumns];
        for (int c = 0; c < kColumns; ++c) row[c] = load(right + c * vector);
        for (int r = 0; r < kRows; ++r) {
            const Vec<T> factor = load(left + r * row_step);
            for (int c = 0; c < kColumns; ++c) acc[r][c] += factor * row[c];
        }
        left += depth_step;
        right += b.columns * vector;
    } while (++k < depth);
    for (int r = 0; r < kRows; ++r) {
        for (int c = 0; c < kColumns; ++c) finish(acc[r][c], i + r, j + c);
    }
}

// C = A B, (rows, columns); finish(sum, i, j) gives what is stored. C is none of the operands.
template <class T, class Finish>
void multiply(const Lanes<T>& a, const Lanes<T>& b, const Lanes<T>& c, int64_t rows, int64_t columns, int64_t depth,
              const Finish& finish) {
    const auto put = [&](Vec<T> sum, int64_t i, int64_t j) { c.set(i, j, finish(sum, i, j)); };
    for (int64_t i = 0; i < rows; i += kLaneRows) {
        with_count<kLaneRows>(rows - i, [&](auto r) {
            for (int64_t j = 0; j < columns; j += kLaneColumns) {
                with_count<kLaneColumns>(columns - j, [&](auto s) {
                    lane_tile<T, false, decltype(r)::value, decltype(s)::value>(a, b, i, j, depth, put);
                });
            }
        });
    }
}

// C = A^T B where that is symmetric, (size, size): the tiles that touch the lower triangle, mirrored.
template <class T, class Finish>
void multiply_symmetric(const Lanes<T>& a, const Lanes<T>& b, const Lanes<T>& c, int64_t size, int64_t depth,
                        const Finish& finish) {
    const auto put = [&](Vec<T> sum, int64_t i, int64_t j) {
        const Vec<T> value = finish(sum, i, j);
        c.set(i, j, value);
        c.set(j, i, value);
    };
    for (int64_t i = 0; i < size; i += kLaneRows) {
        with_count<kLaneRows>(size - i, [&](auto r) {
            for (int64_t j = 0; j < i + r; j += kLaneColumns) {
                with_count<kLaneColumns>(size - j, [&](auto s) {
                    lane_tile<T, true, decltype(r)::value, decltype(s)::value>(a, b, i, j, depth, put);
                });
            }
        });
    }
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

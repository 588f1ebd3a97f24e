// Transposition of a dense block, strides in elements. With AVX a vector of a column is made of the 128-bit lanes of its rows:
// the rows are loaded a lane each, so that what is left to do stays within lanes, and every store is a whole vector.
#pragma once
#include "simd.h"

namespace otkd_fast {
namespace OTKD_ISA {

// out (4, 4) = in (4, 4)^T; in registers where the compiler can.
template <class T>
OTKD_INLINE void transpose_4x4(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
    typedef T V4 __attribute__((vector_size(4 * sizeof(T))));
    V4 r[4];
    for (int k = 0; k < 4; ++k) std::memcpy(&r[k], in + k * in_stride, sizeof(V4));
    const V4 a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    const V4 c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
    r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
    r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
    for (int k = 0; k < 4; ++k) std::memcpy(out + k * out_stride, &r[k], sizeof(V4));
    return;
#endif
#endif
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) out[j * out_stride + i] = in[i * in_stride + j];
    }
}

// Columns of a tile: the entries of a 128-bit lane. Tiles are width<T> rows high.
template <class T>
constexpr int kTileColumns = 16 / static_cast<int>(sizeof(T));

#if defined(__AVX2__)
constexpr bool kWideTranspose = true;

#if defined(__AVX512F__)
using Floats = __m512;
using Doubles = __m512d;
OTKD_INLINE Floats low(Floats a, Floats b) { return _mm512_unpacklo_ps(a, b); }
OTKD_INLINE Floats high(Floats a, Floats b) { return _mm512_unpackhi_ps(a, b); }
OTKD_INLINE Doubles low(Doubles a, Doubles b) { return _mm512_unpacklo_pd(a, b); }
OTKD_INLINE Doubles high(Doubles a, Doubles b) { return _mm512_unpackhi_pd(a, b); }
OTKD_INLINE Floats lanes_of(const float* p, int64_t step) {
    Floats v = _mm512_castps128_ps512(_mm_loadu_ps(p));
    v = _mm512_insertf32x4(v, _mm_loadu_ps(p + step), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 2 * step), 2);
    return _mm512_insertf32x4(v, _mm_loadu_ps(p + 3 * step), 3);
}
OTKD_INLINE Doubles lanes_of(const double* p, int64_t step) {
    Doubles v = _mm512_castpd128_pd512(_mm_loadu_pd(p));
    v = _mm512_insertf64x2(v, _mm_loadu_pd(p + step), 1);
    v = _mm512_insertf64x2(v, _mm_loadu_pd(p + 2 * step), 2);
    return _mm512_insertf64x2(v, _mm_loadu_pd(p + 3 * step), 3);
}
#else
using Floats = __m256;
using Doubles = __m256d;
OTKD_INLINE Floats low(Floats a, Floats b) { return _mm256_unpacklo_ps(a, b); }
OTKD_INLINE Floats high(Floats a, Floats b) { return _mm256_unpackhi_ps(a, b); }
OTKD_INLINE Doubles low(Doubles a, Doubles b) { return _mm256_unpacklo_pd(a, b); }
OTKD_INLINE Doubles high(Doubles a, Doubles b) { return _mm256_unpackhi_pd(a, b); }
OTKD_INLINE Floats lanes_of(const float* p, int64_t step) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + step), 1);
}
OTKD_INLINE Doubles lanes_of(const double* p, int64_t step) {
    return _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(p)), _mm_loadu_pd(p + step), 1);
}
#endif

OTKD_INLINE void transpose_tile(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
    Floats r[4];
    for (int k = 0; k < 4; ++k) r[k] = lanes_of(in + k * in_stride, 4 * in_stride);
    const auto a = (Doubles)low(r[0], r[1]), b = (Doubles)high(r[0], r[1]);
    const auto c = (Doubles)low(r[2], r[3]), d = (Doubles)high(r[2], r[3]);
    store(out, (Vec<float>)low(a, c));
    store(out + out_stride, (Vec<float>)high(a, c));
    store(out + 2 * out_stride, (Vec<float>)low(b, d));
    store(out + 3 * out_stride, (Vec<float>)high(b, d));
}
OTKD_INLINE void transpose_tile(const double* in, int64_t in_stride, double* out, int64_t out_stride) {
    const Doubles a = lanes_of(in, 2 * in_stride), b = lanes_of(in + in_stride, 2 * in_stride);
    store(out, (Vec<double>)low(a, b));
    store(out + out_stride, (Vec<double>)high(a, b));
}
#else
constexpr bool kWideTranspose = false;
template <class T>
void transpose_tile(const T*, int64_t, T*, int64_t) {}
#endif

// out (columns, rows) = in (rows, columns)^T.
template <class T>
void transpose(const T* in, int64_t in_stride, T* out, int64_t out_stride, int64_t rows, int64_t columns) {
    int64_t i = 0;
    const int64_t tiled = columns / kTileColumns<T> * kTileColumns<T>;
    for (; kWideTranspose && i + width<T> <= rows; i += width<T>) {
        for (int64_t j = 0; j < tiled; j += kTileColumns<T>) {
            transpose_tile(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
        }
        for (int64_t j = tiled; j < columns; ++j) {
            for (int k = 0; k < width<T>; ++k) out[j * out_stride + i + k] = in[(i + k) * in_stride + j];
        }
    }
    for (; i + 4 <= rows; i += 4) {
        int64_t j = 0;
        for (; j + 4 <= columns; j += 4) transpose_4x4(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
        for (; j < columns; ++j) {
            for (int k = 0; k < 4; ++k) out[j * out_stride + i + k] = in[(i + k) * in_stride + j];
        }
    }
    for (; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) out[j * out_stride + i] = in[i * in_stride + j];
    }
}

}  // namespace OTKD_ISA
}  // namespace otkd_fast

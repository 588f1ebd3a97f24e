// Between the memory of many small problems and vectors that hold an entry of each: entry e of lane l lies at
// lanes[e * kLanes + l].
#pragma once
#include <type_traits>

#include "transpose.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// out[column][row] of four rows at in[0] .. in[3], four columns each; columns `stride` apart.
template <class T>
OTKD_INLINE void transpose_rows(const T* const* in, int64_t at, T* out, int64_t stride) {
    T block[16];
    for (int k = 0; k < 4; ++k) std::memcpy(block + 4 * k, in[k] + at, 4 * sizeof(T));
    transpose_4x4(block, 4, out, stride);
}

template <class T>
OTKD_INLINE void transpose_columns(const T* in, int64_t stride, T* const* out, int64_t at) {
    T block[16];
    transpose_4x4(in, stride, block, 4);
    for (int k = 0; k < 4; ++k) std::memcpy(out[k] + at, block + 4 * k, 4 * sizeof(T));
}

#if defined(__AVX512F__)
// The four vectors at r as four by four blocks of floats, each transposed.
OTKD_INLINE void transpose_blocks(__m512* r) {
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1])), low23 = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1])), high23 = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
    r[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    r[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    r[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    r[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
}

// Entries [at, at + 4) of 16 places into four vectors, `stride` apart.
OTKD_INLINE void gather_block(const float* const* in, int64_t at, float* lanes, int64_t stride) {
    __m512 r[4];
    for (int k = 0; k < 4; ++k) {
        r[k] = _mm512_castps128_ps512(_mm_loadu_ps(in[k] + at));
        r[k] = _mm512_insertf32x4(r[k], _mm_loadu_ps(in[4 + k] + at), 1);
        r[k] = _mm512_insertf32x4(r[k], _mm_loadu_ps(in[8 + k] + at), 2);
        r[k] = _mm512_insertf32x4(r[k], _mm_loadu_ps(in[12 + k] + at), 3);
    }
    transpose_blocks(r);
    for (int k = 0; k < 4; ++k) _mm512_storeu_ps(lanes + k * stride, r[k]);
}

OTKD_INLINE void scatter_block(const float* lanes, int64_t stride, float* const* out, int64_t at) {
    __m512 r[4];
    for (int k = 0; k < 4; ++k) r[k] = _mm512_loadu_ps(lanes + k * stride);
    transpose_blocks(r);
    for (int k = 0; k < 4; ++k) {
        _mm_storeu_ps(out[k] + at, _mm512_castps512_ps128(r[k]));
        _mm_storeu_ps(out[4 + k] + at, _mm512_extractf32x4_ps(r[k], 1));
        _mm_storeu_ps(out[8 + k] + at, _mm512_extractf32x4_ps(r[k], 2));
        _mm_storeu_ps(out[12 + k] + at, _mm512_extractf32x4_ps(r[k], 3));
    }
}

// r (16, 16) transposed.
OTKD_INLINE void transpose_square(__m512* r) {
    for (int k = 0; k < 16; k += 4) transpose_blocks(r + k);  // r[4 q + c], block p: entry 4 p + c of the rows from 4 q on
    for (int c = 0; c < 4; ++c) {
        const __m512 low01 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x44), high01 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xEE);
        const __m512 low23 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x44);
        const __m512 high23 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xEE);
        r[c] = _mm512_shuffle_f32x4(low01, low23, 0x88);
        r[4 + c] = _mm512_shuffle_f32x4(low01, low23, 0xDD);
        r[8 + c] = _mm512_shuffle_f32x4(high01, high23, 0x88);
        r[12 + c] = _mm512_shuffle_f32x4(high01, high23, 0xDD);
    }
}

// Entries [at, at + 16) of 16 places.
OTKD_INLINE void gather_square(const float* const* in, int64_t at, float* lanes, int64_t stride) {
    __m512 r[16];
    for (int k = 0; k < 16; ++k) r[k] = _mm512_loadu_ps(in[k] + at);
    transpose_square(r);
    for (int k = 0; k < 16; ++k) _mm512_storeu_ps(lanes + k * stride, r[k]);
}

OTKD_INLINE void scatter_square(const float* lanes, int64_t stride, float* const* out, int64_t at) {
    __m512 r[16];
    for (int k = 0; k < 16; ++k) r[k] = _mm512_loadu_ps(lanes + k * stride);
    transpose_square(r);
    for (int k = 0; k < 16; ++k) _mm512_storeu_ps(out[k] + at, r[k]);
}
#endif

// `entries` entries from each of kLanes places.
template <int64_t kLanes, class S, class T>
void gather(const T* const* in, int64_t entries, S* lanes) {
    int64_t e = 0;
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, float> && std::is_same_v<T, float> && kLanes % 16 == 0) {
        for (; e + 16 <= entries; e += 16) {
            for (int64_t l = 0; l < kLanes; l += 16) gather_square(in + l, e, lanes + e * kLanes + l, kLanes);
        }
        for (; e + 4 <= entries; e += 4) {
            for (int64_t l = 0; l < kLanes; l += 16) gather_block(in + l, e, lanes + e * kLanes + l, kLanes);
        }
    }
#endif
    if constexpr (sizeof(S) == sizeof(T) && kLanes % 4 == 0) {
        for (; e + 4 <= entries; e += 4) {
            for (int64_t l = 0; l < kLanes; l += 4) transpose_rows(in + l, e, lanes + e * kLanes + l, kLanes);
        }
    }
    for (; e < entries; ++e) {
        for (int64_t l = 0; l < kLanes; ++l) lanes[e * kLanes + l] = static_cast<S>(in[l][e]);
    }
}

// The first `count` lanes to as many places, `entries` entries each.
template <int64_t kLanes, class S, class T>
void scatter(const S* lanes, int64_t count, int64_t entries, T* const* out) {
    int64_t e = 0;
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<S, float> && std::is_same_v<T, float>) {
        for (; count == kLanes && kLanes % 16 == 0 && e + 16 <= entries; e += 16) {
            for (int64_t l = 0; l < kLanes; l += 16) scatter_square(lanes + e * kLanes + l, kLanes, out + l, e);
        }
    }
#endif
    if constexpr (sizeof(S) == sizeof(T)) {
        for (; e + 4 <= entries; e += 4) {
            int64_t l = 0;
#if defined(__AVX512F__)
            if constexpr (std::is_same_v<S, float>) {
                for (; l + 16 <= count; l += 16) scatter_block(lanes + e * kLanes + l, kLanes, out + l, e);
            }
#endif
            for (; l + 4 <= count; l += 4) transpose_columns(lanes + e * kLanes + l, kLanes, out + l, e);
            for (; l < count; ++l) {
                for (int64_t k = e; k < e + 4; ++k) out[l][k] = lanes[k * kLanes + l];
            }
        }
    }
    for (; e < entries; ++e) {
        for (int64_t l = 0; l < count; ++l) out[l][e] = static_cast<T>(lanes[e * kLanes + l]);
    }
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

// Between the memory of many small problems and vectors that hold an entry of each: entry e of lane l lies at
// lanes[e * kLanes + l].
#pragma once
#include "simd.h"

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

// `entries` entries from each of kLanes places.
template <int64_t kLanes, class S, class T>
void gather(const T* const* in, int64_t entries, S* lanes) {
    int64_t e = 0;
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
    if constexpr (sizeof(S) == sizeof(T)) {
        for (; e + 4 <= entries; e += 4) {
            int64_t l = 0;
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

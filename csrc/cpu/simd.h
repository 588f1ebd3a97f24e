// Vectors of one instruction set, written with the compiler's portable vector types (GCC, Clang).
// Each source that includes this is compiled once per instruction set; everything lives in the namespace
// OTKD_ISA (baseline, avx2, avx512), so that no function of one set is ever linked into another.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 on its own AVX-512 header
#endif
#define OTKD_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define OTKD_VECTOR_BYTES 32
#else
#define OTKD_VECTOR_BYTES 16
#endif
#define OTKD_INLINE inline __attribute__((always_inline))

namespace otkd_fast {
namespace OTKD_ISA {

template <class T>
struct IntOf;
template <>
struct IntOf<float> {
    using type = int32_t;
};
template <>
struct IntOf<double> {
    using type = int64_t;
};

template <class T>
struct Simd {
    using Int = typename IntOf<T>::type;
    typedef T V __attribute__((vector_size(OTKD_VECTOR_BYTES)));
    typedef Int I __attribute__((vector_size(OTKD_VECTOR_BYTES)));
    static constexpr int width = OTKD_VECTOR_BYTES / sizeof(T);
};
template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using VecInt = typename Simd<T>::I;
template <class T>
constexpr int width = Simd<T>::width;

template <class T>
OTKD_INLINE Vec<T> load(const T* p) {
    Vec<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class T>
OTKD_INLINE void store(T* p, Vec<T> v) {
    std::memcpy(p, &v, sizeof v);
}

template <class T>
OTKD_INLINE Vec<T> splat(T x) {
    return x - Vec<T>{};  // x - 0 is x for every x, 0 + x is not for -0: this one becomes a broadcast
}

// Lanes [0, count) from memory, the others `fill`; count at most a vector, never beyond it read.
template <class T>
OTKD_INLINE Vec<T> load_part(const T* p, int64_t count, T fill) {
    Vec<T> v = splat(fill);
    for (int64_t i = 0; i < count; ++i) v[i] = p[i];
    return v;
}

// Lanes [0, count) to memory.
template <class T>
OTKD_INLINE void store_part(T* p, Vec<T> v, int64_t count) {
    for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

#if defined(__AVX512F__)
template <>
OTKD_INLINE Vec<float> load_part<float>(const float* p, int64_t count, float fill) {
    return (Vec<float>)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>((1u << count) - 1), p);
}
template <>
OTKD_INLINE Vec<double> load_part<double>(const double* p, int64_t count, double fill) {
    return (Vec<double>)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>((1u << count) - 1), p);
}
template <>
OTKD_INLINE void store_part<float>(float* p, Vec<float> v, int64_t count) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
}
template <>
OTKD_INLINE void store_part<double>(double* p, Vec<double> v, int64_t count) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), (__m512d)v);
}
#endif

template <class T>
OTKD_INLINE Vec<T> abs(Vec<T> v) {
    using Int = typename Simd<T>::Int;
    return (Vec<T>)((VecInt<T>)v & std::numeric_limits<Int>::max());
}

template <class T>
OTKD_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
    return a > b ? a : b;
}

template <class T>
OTKD_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
    return a < b ? a : b;
}

// sign(d), with sign(0) = 0.
template <class T>
OTKD_INLINE Vec<T> sign(Vec<T> d) {
    const Vec<T> one = splat(T(1)), zero = {};
    return (d > zero ? one : zero) - (d < zero ? one : zero);
}

#if defined(__AVX512F__)
// One table look-up by class of value. Classes from the lowest four bits up: quiet NaN, signalling NaN, zero, +1,
// -inf, +inf, negative, positive; answers: 1 = the value itself, 8 = +0, 9 = -1, 10 = +1.
constexpr unsigned kSignTable = 0xA9A9A811u;
OTKD_INLINE __m512 sign512(__m512 d) {
    return _mm512_fixupimm_ps(d, d, _mm512_set1_epi32(static_cast<int>(kSignTable)), 0);
}
OTKD_INLINE __m512d sign512(__m512d d) {
    return _mm512_fixupimm_pd(d, d, _mm512_set1_epi64(static_cast<long long>(kSignTable)), 0);
}
template <>
OTKD_INLINE Vec<float> sign<float>(Vec<float> d) {
    return (Vec<float>)sign512((__m512)d);
}
template <>
OTKD_INLINE Vec<double> sign<double>(Vec<double> d) {
    return (Vec<double>)sign512((__m512d)d);
}
#endif

template <class T>
OTKD_INLINE T sum(Vec<T> v) {
    T lanes[width<T>];
    store(lanes, v);
    for (int half = width<T> / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}
#if defined(__AVX512F__)
template <>
OTKD_INLINE float sum<float>(Vec<float> v) {
    return _mm512_reduce_add_ps((__m512)v);
}
template <>
OTKD_INLINE double sum<double>(Vec<double> v) {
    return _mm512_reduce_add_pd((__m512d)v);
}
#endif

template <class T>
OTKD_INLINE T largest(Vec<T> v) {
    T result = v[0];
    for (int i = 1; i < width<T>; ++i) result = v[i] > result ? v[i] : result;
    return result;
}

#if defined(__AVX512F__)
template <>
OTKD_INLINE float largest<float>(Vec<float> v) {
    return _mm512_reduce_max_ps((__m512)v);
}
template <>
OTKD_INLINE double largest<double>(Vec<double> v) {
    return _mm512_reduce_max_pd((__m512d)v);
}
#endif

// out (columns, rows) = in (rows, columns)^T, strides in elements; 4 x 4 blocks in registers where the compiler can.
template <class T>
void transpose(const T* in, int64_t in_stride, T* out, int64_t out_stride, int64_t rows, int64_t columns) {
    int64_t i = 0;
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
    typedef T V4 __attribute__((vector_size(4 * sizeof(T))));
    for (; i + 4 <= rows; i += 4) {
        int64_t j = 0;
        for (; j + 4 <= columns; j += 4) {
            V4 r[4];
            for (int k = 0; k < 4; ++k) std::memcpy(&r[k], in + (i + k) * in_stride + j, sizeof(V4));
            const V4 a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
            const V4 c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
            r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
            r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
            r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
            r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
            for (int k = 0; k < 4; ++k) std::memcpy(out + (j + k) * out_stride + i, &r[k], sizeof(V4));
        }
        for (; j < columns; ++j) {
            for (int k = 0; k < 4; ++k) out[j * out_stride + i + k] = in[(i + k) * in_stride + j];
        }
    }
#endif
#endif
    for (; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) out[j * out_stride + i] = in[i * in_stride + j];
    }
}

template <class T>
OTKD_INLINE bool any(VecInt<T> mask) {
    typename Simd<T>::Int bits = 0;
    for (int i = 0; i < width<T>; ++i) bits |= mask[i];
    return bits != 0;
}

// exp(scale * d) for a scale held as log2(e) * scale = hi + lo: the product is rounded once, so the result
// keeps full relative accuracy down to the underflow. Below the smallest normal number it is 0; NaN stays NaN.
template <class T>
struct ScaledExp {
    T hi, lo, lowest;
    explicit ScaledExp(double scale) {
        constexpr double log2e = 1.4426950408889634, log2e_rest = 2.0355273740931033e-17;
        const double c = scale * log2e;
        hi = static_cast<T>(c);
        lo = static_cast<T>((c - static_cast<double>(hi)) + (std::fma(scale, log2e, -c) + scale * log2e_rest));
        lowest = static_cast<T>((std::numeric_limits<T>::min_exponent - 1) / c);
    }
    Vec<T> operator()(Vec<T> d) const;
};

template <>
OTKD_INLINE Vec<float> ScaledExp<float>::operator()(Vec<float> d) const {
    const VecInt<float> underflow = d < lowest;
    d = underflow ? splat(lowest) : d;
    const Vec<float> shifted = d * hi + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
    const Vec<float> whole = shifted - 12582912.0f;
    const Vec<float> r = d * lo + (d * hi - whole);  // in [-0.5, 0.5]
    Vec<float> p = splat(1.5461444698569129e-4f);     // 2^r, minimax, relative error 2e-9
    p = p * r + 1.3400428170e-3f;
    p = p * r + 9.6180566785e-3f;
    p = p * r + 5.5503272267e-2f;
    p = p * r + 2.4022650923e-1f;
    p = p * r + 6.9314720670e-1f;
    p = p * r + 1.0f;
    const VecInt<float> bits = ((VecInt<float>)shifted << 23) + (VecInt<float>)p;  // times 2^whole
    return (Vec<float>)(~underflow & bits);
}

template <>
OTKD_INLINE Vec<double> ScaledExp<double>::operator()(Vec<double> d) const {
    const VecInt<double> underflow = d < lowest;
    d = underflow ? splat(lowest) : d;
    const Vec<double> shifted = d * hi + 6755399441055744.0;  // 1.5 * 2^52
    const Vec<double> whole = shifted - 6755399441055744.0;
    const Vec<double> r = d * lo + (d * hi - whole);
    Vec<double> p = splat(2.5733568308756891e-11);  // 2^r, minimax, relative error 4e-20
    p = p * r + 4.4566753410492059e-10;
    p = p * r + 7.0548943863483480e-9;
    p = p * r + 1.0178051192960649e-7;
    p = p * r + 1.3215486815999977e-6;
    p = p * r + 1.5252733856293466e-5;
    p = p * r + 1.5403530393362756e-4;
    p = p * r + 1.3333558146390353e-3;
    p = p * r + 9.6181291076284831e-3;
    p = p * r + 5.5504108664821699e-2;
    p = p * r + 2.4022650695910071e-1;
    p = p * r + 6.9314718055994531e-1;
    p = p * r + 1.0;
    const VecInt<double> bits = ((VecInt<double>)shifted << 52) + (VecInt<double>)p;
    return (Vec<double>)(~underflow & bits);
}

// log x for normal x > 0: x = 2^e m with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m - 1) / (m + 1)). Anything else: no
// meaning, but no trap.
OTKD_INLINE Vec<double> log(Vec<double> x) {
    constexpr double ln2_hi = 0x1.62e42fefa38p-1, ln2_lo = 0x1.ef35793c7673p-45;
    constexpr int64_t sqrt_half = 0x3fe6a09e667f3bcd, mantissa = (int64_t{1} << 52) - 1;
    const VecInt<double> above = (VecInt<double>)x - sqrt_half;  // its exponent field is e, also for negative e
    const VecInt<double> bits = (above & mantissa) + sqrt_half;
    const Vec<double> m = (Vec<double>)bits;
    const Vec<double> e = (Vec<double>)((above >> 52) + 0x4338000000000000) - 6755399441055744.0;  // + 1.5 * 2^52
    const Vec<double> t = (m - 1.0) / (m + 1.0), square = t * t;  // |t| < 0.172
    Vec<double> p = splat(1.0 / 23);
    for (int k = 21; k >= 3; k -= 2) p = p * square + 1.0 / k;
    return e * ln2_hi + (2 * t + (2 * t * square * p + e * ln2_lo));
}

}  // namespace OTKD_ISA
}  // namespace otkd_fast

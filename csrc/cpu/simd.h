// Vectors of one instruction set, written with the compiler's portable vector types (GCC, Clang).
// Each source that includes this is compiled once per instruction set; everything lives in the namespace
// OTKD_ISA (baseline, avx2, avx512), so that no function of one set is ever linked into another.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
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
    return x - Vec<T>{};  // a broadcast: x - 0 is x for every x, 0 + x is not (-0)
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

template <class T>
OTKD_INLINE Vec<T> sqrt(Vec<T> v) {
    for (int i = 0; i < width<T>; ++i) v[i] = std::sqrt(v[i]);
    return v;
}

#if defined(__AVX512F__)
template <>
OTKD_INLINE Vec<float> sqrt<float>(Vec<float> v) {
    return (Vec<float>)_mm512_sqrt_ps((__m512)v);
}
template <>
OTKD_INLINE Vec<double> sqrt<double>(Vec<double> v) {
    return (Vec<double>)_mm512_sqrt_pd((__m512d)v);
}
#elif defined(__AVX2__)
template <>
OTKD_INLINE Vec<float> sqrt<float>(Vec<float> v) {
    return (Vec<float>)_mm256_sqrt_ps((__m256)v);
}
template <>
OTKD_INLINE Vec<double> sqrt<double>(Vec<double> v) {
    return (Vec<double>)_mm256_sqrt_pd((__m256d)v);
}
#endif

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

// Whether a lane is one of the first `count`.
template <class T>
OTKD_INLINE VecInt<T> first_lanes(int64_t count) {
    VecInt<T> lane;
    for (int l = 0; l < width<T>; ++l) lane[l] = l;
    return lane < static_cast<typename Simd<T>::Int>(count);
}

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

template <class T>
OTKD_INLINE bool any(VecInt<T> mask) {
    typename Simd<T>::Int bits = 0;
    for (int i = 0; i < width<T>; ++i) bits |= mask[i];
    return bits != 0;
}

#if defined(__AVX512F__)
template <>
OTKD_INLINE bool any<float>(VecInt<float> mask) {
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
}
template <>
OTKD_INLINE bool any<double>(VecInt<double> mask) {
    return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
}
#endif

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

// 1 / x; x = 0 and infinite x may give NaN.
template <class T>
OTKD_INLINE Vec<T> reciprocal(Vec<T> x) {
    return T(1) / x;
}
#if defined(__AVX512F__)
template <>
OTKD_INLINE Vec<float> reciprocal<float>(Vec<float> x) {
    const Vec<float> y = (Vec<float>)_mm512_rcp14_ps((__m512)x);  // 14 bits, then one step of Newton
    return y + y * (1.0f - x * y);
}
#endif

// y / x, error about one unit in the last place; x = 0 and infinite x may give NaN.
template <class T>
OTKD_INLINE Vec<T> quotient(Vec<T> y, Vec<T> x) {
    return y / x;
}
#if defined(__AVX512F__)
template <>
OTKD_INLINE Vec<float> quotient<float>(Vec<float> y, Vec<float> x) {
    const Vec<float> inverse = (Vec<float>)_mm512_rcp14_ps((__m512)x), first = y * inverse;  // one step of Newton
    return first + first * (1.0f - x * inverse);
}
#endif

// 1 / sqrt(x), error about one unit in the last place; x = 0 and infinite x may give NaN.
template <class T>
OTKD_INLINE Vec<T> reciprocal_sqrt(Vec<T> x) {
    return T(1) / sqrt<T>(x);
}
#if defined(__AVX512F__)
template <>
OTKD_INLINE Vec<float> reciprocal_sqrt<float>(Vec<float> x) {
    const Vec<float> y = (Vec<float>)_mm512_rsqrt14_ps((__m512)x);  // 14 bits, then one step of Newton
    return y + y * (0.5f - 0.5f * x * y * y);
}
#endif

// log(x) for x > 0, error about one unit in the last place (the scheme of fdlibm); what it gives elsewhere means nothing.
#if defined(__AVX512F__)
OTKD_INLINE Vec<float> log(Vec<float> x) {
    const __m512 mantissa = _mm512_getmant_ps((__m512)x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    const Vec<float> k = (Vec<float>)_mm512_getexp_ps((__m512)x) - (Vec<float>)_mm512_getexp_ps(mantissa);
    const Vec<float> f = (Vec<float>)mantissa - 1.0f;  // in [-1/4, 1/2)
    const Vec<float> s = f * reciprocal<float>(2.0f + f), z = s * s, half = 0.5f * f * f;
    Vec<float> p = splat(0.23749062419f);
    p = p * z + 0.28532651067f;
    p = p * z + 0.40000313520f;
    p = p * z + 0.66666668653f;
    return k * 6.9313812256e-01f - ((half - (s * (half + z * p) + k * 9.0580006145e-06f)) - f);
}
#else
OTKD_INLINE Vec<float> log(Vec<float> x) {
    const VecInt<float> subnormal = x < std::numeric_limits<float>::min();
    const Vec<float> normal = subnormal ? x * 33554432.0f : x;  // 2^25
    const VecInt<float> bits = (VecInt<float>)normal;
    const VecInt<float> exponent = (bits - 0x3F3504F3) >> 23;           // of x / sqrt(1/2)
    const Vec<float> f = (Vec<float>)(bits - (exponent << 23)) - 1.0f;  // in [sqrt(1/2) - 1, sqrt(2) - 1)
    Vec<float> k = (Vec<float>)(exponent + 0x4B400000) - 12582912.0f;
    k = subnormal ? k - 25.0f : k;
    const Vec<float> s = f * reciprocal<float>(2.0f + f), z = s * s, half = 0.5f * f * f;
    Vec<float> p = splat(0.24279078841f);
    p = p * z + 0.28498786688f;
    p = p * z + 0.40000972152f;
    p = p * z + 0.66666662693f;
    return k * 6.9313812256e-01f - ((half - (s * (half + z * p) + k * 9.0580006145e-06f)) - f);
}

#endif

OTKD_INLINE Vec<double> log(Vec<double> x) {
    const VecInt<double> subnormal = x < std::numeric_limits<double>::min();
    const Vec<double> normal = subnormal ? x * 18014398509481984.0 : x;  // 2^54
    const VecInt<double> bits = (VecInt<double>)normal;
    const VecInt<double> exponent = (bits - 0x3FE6A09E667F3BCDLL) >> 52;  // of x / sqrt(1/2)
    const Vec<double> f = (Vec<double>)(bits - (exponent << 52)) - 1.0;   // in [sqrt(1/2) - 1, sqrt(2) - 1)
    Vec<double> k = (Vec<double>)(exponent + 0x4338000000000000LL) - 6755399441055744.0;
    k = subnormal ? k - 54.0 : k;
    const Vec<double> s = f / (2.0 + f), z = s * s, half = 0.5 * f * f;
    Vec<double> p = splat(1.479819860511658591e-01);
    p = p * z + 1.531383769920937332e-01;
    p = p * z + 1.818357216161805012e-01;
    p = p * z + 2.222219843214978396e-01;
    p = p * z + 2.857142874366239149e-01;
    p = p * z + 3.999999999940941908e-01;
    p = p * z + 6.666666666666735130e-01;
    return k * 6.93147180369123816490e-01 - ((half - (s * (half + z * p) + k * 1.90821492927058770002e-10)) - f);
}

// While it lives, results below the smallest normal number are 0: on x86-64 each of them costs a hundred times a sum.
class FlushSubnormals {
  public:
#if defined(__x86_64__)
    FlushSubnormals() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8000); }
    ~FlushSubnormals() { __builtin_ia32_ldmxcsr(before_); }

  private:
    unsigned before_;
#endif
};

}  // namespace OTKD_ISA
}  // namespace otkd_fast

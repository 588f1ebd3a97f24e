// Sizes of entries, and exact scaling by powers of two, so that no square overflows or vanishes.
#pragma once
#include "rows.h"
#include "simd.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// The bits of |v|: ordered as the numbers are, infinity above them and NaN above infinity.
template <class T>
OTKD_INLINE VecInt<T> magnitude_bits(Vec<T> v) {
    return (VecInt<T>)v & std::numeric_limits<typename Simd<T>::Int>::max();
}

// max |x|; NaN if there is one.
template <class T>
T largest_magnitude(const T* in, int64_t count) {
    VecInt<T> best = {};
    for_vectors<T>(0, count, [&](int64_t k, int64_t lanes) {
        const VecInt<T> bits = magnitude_bits<T>(load_up_to(in + k, lanes, T(0)));
        best = bits > best ? bits : best;
    });
    typename Simd<T>::Int top = 0;
    for (int i = 0; i < width<T>; ++i) top = best[i] > top ? best[i] : top;
    T result;
    std::memcpy(&result, &top, sizeof result);
    return result;
}

// x -> x * 2^exponent as two exact factors, each in range whatever the exponent.
template <class T>
struct PowerOfTwo {
    T first, second;
    explicit PowerOfTwo(int exponent)
        : first(std::ldexp(T(1), exponent / 2)), second(std::ldexp(T(1), exponent - exponent / 2)) {}
};

// 2^k in every lane, 0 below the normal numbers and infinity above them.
template <class T>
OTKD_INLINE Vec<T> powers_of_two(VecInt<T> k) {
    constexpr typename Simd<T>::Int bias = std::numeric_limits<T>::max_exponent - 1, top = 2 * bias + 1;
    VecInt<T> biased = k + bias;
    biased = biased < 0 ? VecInt<T>{} : biased > top ? VecInt<T>{} + top : biased;
    return (Vec<T>)(biased << (std::numeric_limits<T>::digits - 1));
}

// Exponent e such that 2^-e |x| is in [0.5, 1) for the largest |x|; 0 where that is 0 or not finite.
template <class T>
int exponent_of(T largest) {
    return largest > 0 && std::isfinite(largest) ? std::ilogb(largest) + 1 : 0;
}

// 2^exponent sum_k a_k b_k, products of scaled a and b summed in double.
template <class T>
double inner_product(const T* a, const T* b, int64_t count, int exponent) {
    constexpr int kLanes = 16;
    const PowerOfTwo<T> scale(-exponent);
    double lanes[kLanes] = {};
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) {
        for (int l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(a[k + l] * scale.first * scale.second) * b[k + l];
    }
    for (int l = 0; k < count; ++k, ++l) lanes[l] += static_cast<double>(a[k] * scale.first * scale.second) * b[k];
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    }
    return std::ldexp(lanes[0], exponent);
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

// Rewriting the rows of an operand before its cost matrix, and carrying a gradient back through that:
// softmax at a temperature, and exact power-of-two scaling to a norm in [1, 2) for the cosine.
#pragma once
#include "simd.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr int64_t kSumBlock = 1024;  // lanes are summed in blocks of this many elements, blocks in double

// Calls body(k, count) for each vector of [begin, end), count being its number of lanes in use.
template <class T, class Body>
OTKD_INLINE void for_vectors(int64_t begin, int64_t end, Body body) {
    int64_t k = begin;
    for (; k + width<T> <= end; k += width<T>) body(k, int64_t{width<T>});
    if (k < end) body(k, end - k);
}

template <class T>
OTKD_INLINE Vec<T> load_up_to(const T* p, int64_t count, T fill) {
    return count == width<T> ? load(p) : load_part(p, count, fill);
}

template <class T>
OTKD_INLINE void store_up_to(T* p, Vec<T> v, int64_t count) {
    count == width<T> ? store(p, v) : store_part(p, v, count);
}

template <class T>
T row_max(const T* in, int64_t d) {
    const T lowest = -std::numeric_limits<T>::infinity();
    Vec<T> best = splat(lowest);
    for_vectors<T>(0, d, [&](int64_t k, int64_t count) { best = max<T>(load_up_to(in + k, count, lowest), best); });
    return largest<T>(best);
}

// out = softmax(in / temperature), (d,)
template <class T>
void softmax_row(const T* in, T* out, int64_t d, double temperature) {
    const T top = row_max(in, d), lowest = -std::numeric_limits<T>::infinity();
    const ScaledExp<T> exp(1.0 / temperature);
    double total = 0;
    for (int64_t k0 = 0; k0 < d; k0 += kSumBlock) {
        Vec<T> part = {};
        for_vectors<T>(k0, k0 + kSumBlock < d ? k0 + kSumBlock : d, [&](int64_t k, int64_t count) {
            const Vec<T> e = exp(load_up_to(in + k, count, lowest) - top);  // 0 in the lanes that are not used
            store_up_to(out + k, e, count);
            part += e;
        });
        total += sum<T>(part);
    }
    const T inverse = static_cast<T>(1.0 / total);
    for_vectors<T>(0, d, [&](int64_t k, int64_t count) {
        store_up_to(out + k, load_up_to(out + k, count, T(0)) * inverse, count);
    });
}

// grad_logits = p * (grad_p - <grad_p, p>) / temperature, in place on grad, (d,)
template <class T>
void softmax_row_bwd(const T* p, T* grad, int64_t d, double temperature) {
    double dot = 0;
    for (int64_t k0 = 0; k0 < d; k0 += kSumBlock) {
        Vec<T> part = {};
        for_vectors<T>(k0, k0 + kSumBlock < d ? k0 + kSumBlock : d, [&](int64_t k, int64_t count) {
            part += load_up_to(grad + k, count, T(0)) * load_up_to(p + k, count, T(0));
        });
        dot += sum<T>(part);
    }
    const T shift = static_cast<T>(dot), scale = static_cast<T>(1.0 / temperature);
    for_vectors<T>(0, d, [&](int64_t k, int64_t count) {
        const Vec<T> g = load_up_to(grad + k, count, T(0)), own = load_up_to(p + k, count, T(0));
        store_up_to(grad + k, own * (g - shift) * scale, count);
    });
}

// out = in * 2^-e with |out| in [1, 2): the scaling is exact, so differences of scaled rows lose nothing.
// norm = |out| (0 for a zero row), scale = 2^-e.
template <class T>
void scale_row(const T* in, T* out, int64_t d, double& norm, double& scale) {
    T largest_entry = 0;
    for (int64_t k = 0; k < d; ++k) largest_entry = std::fabs(in[k]) > largest_entry ? std::fabs(in[k]) : largest_entry;
    scale = largest_entry > 0 && std::isfinite(largest_entry) ? std::ldexp(1.0, -std::ilogb(largest_entry)) : 1.0;
    double squares = 0;
    for (int64_t k = 0; k < d; ++k) squares += (in[k] * scale) * (in[k] * scale);
    norm = std::sqrt(squares);
    if (norm > 0 && std::isfinite(norm)) {
        const double fix = std::ldexp(1.0, -std::ilogb(norm));
        scale *= fix;
        norm *= fix;
    }
    for (int64_t k = 0; k < d; ++k) out[k] = static_cast<T>(in[k] * scale);
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

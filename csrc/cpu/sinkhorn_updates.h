// How scalings follow from the sums of the other side, many at once.
//   constraint, no relaxation:  scaling = mass / sum
//   else, in logarithms:        log scaling = (1 - omega) (log scaling before) + omega (level - lambda log sum)
#pragma once
#include "sinkhorn_buffers.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// sums that lose nothing, by the scalars that they are computed in
template <class S>
constexpr S kLow = sizeof(S) == 4 ? S(1e-25) : S(1e-200);
template <class S>
constexpr S kHigh = sizeof(S) == 4 ? S(1e25) : S(1e200);
template <class S>
constexpr double kLargestLog = sizeof(S) == 4 ? 80.0 : 690.0;  // of a scaling, either way

template <class S, class V>
OTKD_INLINE bool divide_by(const S* mass, const S* sums, S* scaling, int64_t count) {
    constexpr int64_t lanes = sizeof(V) / sizeof(S);
    decltype(V{} > V{}) bad = {};
    for (int64_t k = 0; k < count; k += lanes) {
        V own, total;
        std::memcpy(&own, mass + k, sizeof own);
        std::memcpy(&total, sums + k, sizeof total);
        const auto used = own > V{};
        bad |= used & ~((total >= kLow<S>)&(total <= kHigh<S>));
        const V quotient = used ? own / total : V{};
        std::memcpy(scaling + k, &quotient, sizeof quotient);
    }
    if constexpr (lanes == width<S>) {
        return !any<S>(bad);
    } else {
        bool good = true;
        for (int64_t lane = 0; lane < lanes; ++lane) good &= !bad[lane];
        return good;
    }
}

// scaling = mass / sum where there is mass; false if a sum there is out of the safe range. `count` is a multiple of the
// width, or kBlock.
template <class S>
OTKD_INLINE bool divide(const S* mass, const S* sums, S* scaling, int64_t count) {
    typedef S Block __attribute__((vector_size(kBlock * sizeof(S))));
    return count == kBlock ? divide_by<S, Block>(mass, sums, scaling, count)
                           : divide_by<S, Vec<S>>(mass, sums, scaling, count);
}

struct Step {
    double lambda, omega;
};

// The same in logarithms; level is -inf without mass. `before` and `log_scaling` may be the same.
template <class S>
bool update_logs(const Step& step, const double* level, const S* sums, const double* before, double* log_scaling,
                 S* scaling, int64_t count) {
    const ScaledExp<double> exp(1.0);
    const Vec<double> none = splat(-kInfinity), limit = splat(kLargestLog<S>);
    VecInt<double> bad = {};
    for (int64_t k = 0; k < count; k += width<double>) {
        const int64_t rest = count - k;
        const Vec<double> target = LoadAs<double, double>::part(level + k, rest, -kInfinity);
        const Vec<double> old = LoadAs<double, double>::part(before + k, rest, 0.0);
        const Vec<double> total = LoadAs<double, S>::part(sums + k, rest, S(1));
        const VecInt<double> used = target > none;
        const Vec<double> value = (1 - step.omega) * old + step.omega * (target - step.lambda * log(total));
        bad |= used & ~((total >= splat<double>(kLow<S>)) & (total <= splat<double>(kHigh<S>)) & (abs<double>(value) <= limit));
        const Vec<double> next = used ? value : none;
        store_as(log_scaling + k, next, rest);
        store_as(scaling + k, exp(min<double>(next, limit)), rest);
    }
    return !any<double>(bad);
}

// lambda / sum, which the adjoint needs, from the scaling that the sum led to: scaling / mass, or with penalties
// lambda exp((log scaling - level) / lambda).
template <class S>
void update_slopes(double lambda, const S* mass, const double* level, const S* scaling, S* slope, int64_t count) {
    const ScaledExp<double> exp(1.0 / lambda);
    for (int64_t k = 0; lambda != 1 && k < count; k += width<double>) {
        const Vec<double> own = LoadAs<double, S>::part(scaling + k, count - k, S(0));
        const Vec<double> value = lambda * exp(log(own) - LoadAs<double, double>::part(level + k, count - k, 0.0));
        store_as(slope + k, own > splat(0.0) ? value : splat(0.0), count - k);
    }
    for (int64_t k = 0; lambda == 1 && k < count; k += width<S>) {
        const Vec<S> own = LoadAs<S, S>::part(mass + k, count - k, S(0));
        const Vec<S> value = LoadAs<S, S>::part(scaling + k, count - k, S(0)) / own;
        store_as(slope + k, own > splat(S(0)) ? value : splat(S(0)), count - k);
    }
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

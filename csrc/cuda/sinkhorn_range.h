// How far the exponents of a problem reach, and how far they may for scalings.
#pragma once
#include "sinkhorn_problem.h"

namespace otkd_fast {
namespace cuda {
namespace {

template <class S>
struct Limits;
template <>
struct Limits<float> {
    static constexpr double kRange = 60, kLow = 1e-25, kHigh = 1e25;
};
template <>
struct Limits<double> {
    static constexpr double kRange = 600, kLow = 1e-200, kHigh = 1e200;
};

template <class S>
OTKD_DEVICE bool safe(S sum) {
    return sum >= static_cast<S>(Limits<S>::kLow) && sum <= static_cast<S>(Limits<S>::kHigh);
}

// log(largest / smallest) of the masses > 0, over the block.
template <class T>
OTKD_DEVICE double log_range(const T* masses, int64_t count, double* scratch) {
    double least = -kInfinity, most = -kInfinity;  // logarithms, the first negative
    OTKD_ROLLED
    for (int64_t i = thread_id(); i < count; i += block_threads()) {
        if (!(masses[i] > 0)) continue;
        const double own = log(static_cast<double>(masses[i]));
        least = larger(least, -own);
        most = larger(most, own);
    }
    const double range = block_max(least, scratch) + block_max(most, scratch);
    return range > 0 ? range : 0.0;
}

// The exponents that the marginals and the potentials to start from add to the range of the costs.
template <class T>
OTKD_DEVICE double given_range(const Problem<T>& p, double* scratch) {
    double range = 0;
    if (p.args.a) range += log_range(p.args.a + p.index * p.n, p.n, scratch);
    if (p.args.b) range += log_range(p.args.b + p.index * p.m, p.m, scratch);
    if (!p.args.initial_g) return range;
    double low = 0, high = 0;
    OTKD_ROLLED
    for (int64_t j = thread_id(); j < p.m; j += block_threads()) {
        low = larger(low, -p.start_gamma(j));
        high = larger(high, p.start_gamma(j));
    }
    return range + block_max(low, scratch) + block_max(high, scratch);
}

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

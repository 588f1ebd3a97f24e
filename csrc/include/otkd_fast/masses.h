// The check of the marginals that every solve makes: entries >= 0, totals > 0 and finite, and the same on both sides.
// One pass, whatever the strides. A `false` names nothing: the caller then looks for what is wrong.
#pragma once
#include <cmath>
#include <cstdint>

namespace otkd_fast {

// Masses of a batch: problem p, atom i at data[p * batch_stride + i * stride]; null: uniform, total 1.
template <class T>
struct MassView {
    const T* data;
    int64_t size, batch_stride, stride;
};

// The total of a problem; NaN if an entry is negative or NaN.
template <class T>
double total_mass(const MassView<T>& masses, int64_t problem) {
    if (!masses.data) return 1.0;
    constexpr int kLanes = 8;
    const T* row = masses.data + problem * masses.batch_stride;
    double sums[kLanes] = {};
    T least[kLanes] = {};
    int64_t i = 0;
    if (masses.stride == 1) {
        for (; i + kLanes <= masses.size; i += kLanes) {
            for (int k = 0; k < kLanes; ++k) {
                sums[k] += row[i + k];
                least[k] = row[i + k] < least[k] ? row[i + k] : least[k];  // NaN shows in the sum
            }
        }
    }
    for (; i < masses.size; ++i) {
        sums[0] += row[i * masses.stride];
        least[0] = row[i * masses.stride] < least[0] ? row[i * masses.stride] : least[0];
    }
    double total = 0;
    bool negative = false;
    for (int k = 0; k < kLanes; ++k) {
        total += sums[k];
        negative |= least[k] < 0;
    }
    return negative ? NAN : total;
}

template <class T>
bool masses_right(const MassView<T>& a, const MassView<T>& b, int64_t batch, double tolerance) {
    for (int64_t problem = 0; problem < batch; ++problem) {
        const double total_a = total_mass(a, problem), total_b = total_mass(b, problem);
        // everything is written so that NaN fails
        if (!(total_a > 0 && total_b > 0 && total_a < INFINITY && total_b < INFINITY)) return false;
        if (!(std::fabs(total_a - total_b) <= tolerance * (total_a < total_b ? total_a : total_b))) return false;
    }
    return true;
}

}  // namespace otkd_fast

#include "otkd_fast/masses.h"

#include <cmath>
#include <limits>

namespace otkd_fast {
namespace {

// Sum of `count` masses, in double; `good` turns false at one that is negative or NaN.
template <class T>
double total(const T* masses, int64_t count, bool& good) {
    constexpr int kParts = 4;
    double parts[kParts] = {};
    int wrong = 0;
    int64_t k = 0;
    for (; k + kParts <= count; k += kParts) {
        for (int p = 0; p < kParts; ++p) {
            parts[p] += masses[k + p];
            wrong |= !(masses[k + p] >= 0);
        }
    }
    for (; k < count; ++k) {
        parts[0] += masses[k];
        wrong |= !(masses[k] >= 0);
    }
    good &= !wrong;
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

}  // namespace

template <class T>
bool masses_right(const T* a, const T* b, int64_t batch, int64_t n, int64_t m, double tolerance) {
    bool good = true;
    for (int64_t k = 0; good && k < batch; ++k) {
        const double total_a = a ? total(a + k * n, n, good) : 1.0, total_b = b ? total(b + k * m, m, good) : 1.0;
        good &= total_a > 0 && total_a <= std::numeric_limits<T>::max();
        good &= std::fabs(total_b - total_a) <= tolerance * total_a;
    }
    return good;
}

template bool masses_right(const float*, const float*, int64_t, int64_t, int64_t, double);
template bool masses_right(const double*, const double*, int64_t, int64_t, int64_t, double);

}  // namespace otkd_fast

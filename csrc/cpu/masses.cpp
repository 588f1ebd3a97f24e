#include "otkd_fast/masses.h"

#include <cmath>
#include <limits>

namespace otkd_fast {
namespace {

typedef double Pair __attribute__((vector_size(16)));

template <class T>
inline Pair pair_at(const T* masses) {
    return Pair{static_cast<double>(masses[0]), static_cast<double>(masses[1])};
}

inline Pair lesser(Pair x, Pair y) { return x < y ? x : y; }

// Sum of `count` masses, in double; NaN where one of them is. `least` becomes the smallest of all that were seen.
template <class T>
inline double total(const T* masses, int64_t count, Pair& least) {
    Pair parts[2] = {};
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
        const Pair x = pair_at(masses + k), y = pair_at(masses + k + 2);
        parts[0] += x;
        parts[1] += y;
        least = lesser(lesser(x, y), least);
    }
    const Pair sums = parts[0] + parts[1];
    double sum = sums[0] + sums[1];
    for (; k < count; ++k) {
        sum += masses[k];
        least[0] = masses[k] < least[0] ? masses[k] : least[0];
    }
    return sum;
}

template <class T>
bool right(double a, double b, double tolerance) {
    return (a > 0) & (a <= std::numeric_limits<T>::max()) & (std::fabs(b - a) <= tolerance * a);
}

}  // namespace

template <class T>
bool masses_right(const Masses<T>& a, const Masses<T>& b, int64_t batch, double tolerance) {
    Pair least = {};
    bool good = true;
    for (int64_t k = 0; k < batch; ++k) {
        const double total_a = a.data ? total(a.data + k * a.stride, a.size, least) : 1.0;
        const double total_b = b.data ? total(b.data + k * b.stride, b.size, least) : 1.0;
        good &= right<T>(total_a, total_b, tolerance);
    }
    return good && least[0] >= 0 && least[1] >= 0;
}

template bool masses_right(const Masses<float>&, const Masses<float>&, int64_t, double);
template bool masses_right(const Masses<double>&, const Masses<double>&, int64_t, double);

}  // namespace otkd_fast

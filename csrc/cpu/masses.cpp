// The check of masses. Small rows are turned, so that a vector holds an element of many rows and no sum runs across lanes;
// of longer ones each is summed by itself, in double. A few loads and additions an element.
#include "otkd_fast/masses.h"

#include <cmath>

#include "sinkhorn_buffers.h"
#include "transpose.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr int64_t kSmallRow = 32;  // sums of so many are exact enough in float for tolerances of 1e-5 and more

// Totals of the rows [first, first + width); `least` takes in every mass.
template <class T>
Vec<T> small_totals(const Masses<T>& rows, int64_t first, Vec<T>& least) {
    if (!rows.data) return splat(T(1));
    T turned[kSmallRow * width<T>];
    transpose(rows.data + first * rows.stride, rows.stride, turned, int64_t{width<T>}, int64_t{width<T>}, rows.size);
    Vec<T> total = {};
    for (int64_t k = 0; k < rows.size; ++k) {
        const Vec<T> mass = load(turned + k * width<T>);
        total += mass;
        least = min<T>(mass, least);
    }
    return total;
}

// Total of one row.
template <class T>
double row_total(const Masses<T>& rows, int64_t row, Vec<double>& least) {
    if (!rows.data) return 1.0;
    const T* masses = rows.data + row * rows.stride;
    Vec<double> parts[2] = {};
    int64_t k = 0;
    for (; k + 2 * width<double> <= rows.size; k += 2 * width<double>) {
        for (int p = 0; p < 2; ++p) {
            const Vec<double> mass = LoadAs<double, T>::full(masses + k + p * width<double>);
            parts[p] += mass;
            least = min<double>(mass, least);
        }
    }
    for (; k < rows.size; k += width<double>) {
        const Vec<double> mass = LoadAs<double, T>::part(masses + k, rows.size - k, 0.0);
        parts[0] += mass;
        least = min<double>(mass, least);
    }
    return sum<double>(parts[0] + parts[1]);
}

template <class T>
bool right(const Masses<T>& a, const Masses<T>& b, int64_t batch, double tolerance) {
    constexpr T most = std::numeric_limits<T>::max();
    int64_t row = 0;
    if (a.size <= kSmallRow && b.size <= kSmallRow) {
        const Vec<T> limit = splat(static_cast<T>(tolerance)), zero = {};
        Vec<T> least = {};
        VecInt<T> good = zero == zero;
        for (; row + width<T> <= batch; row += width<T>) {
            const Vec<T> total_a = small_totals(a, row, least), total_b = small_totals(b, row, least);
            good &= (total_a > zero) & (total_a <= splat(most)) & (abs<T>(total_b - total_a) <= limit * total_a);
        }
        if (any<T>(~good) || any<T>(least < zero)) return false;
    }
    Vec<double> least = {};
    bool good = true;
    for (; row < batch; ++row) {
        const double total_a = row_total(a, row, least), total_b = row_total(b, row, least);
        good &= (total_a > 0) & (total_a <= most) & (std::fabs(total_b - total_a) <= tolerance * total_a);
    }
    return good && !any<double>(least < Vec<double>{});
}

}  // namespace

bool masses_right(const Masses<float>& a, const Masses<float>& b, int64_t batch, double tolerance) {
    return right(a, b, batch, tolerance);
}
bool masses_right(const Masses<double>& a, const Masses<double>& b, int64_t batch, double tolerance) {
    return right(a, b, batch, tolerance);
}

}  // namespace OTKD_ISA
}  // namespace otkd_fast

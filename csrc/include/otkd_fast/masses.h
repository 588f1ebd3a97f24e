// The check of every call that takes masses: it costs as much as a small solve if tensor operations do it.
#pragma once
#include <cstdint>

namespace otkd_fast {

// (batch, size), rows `stride` apart; null: a total of 1 for each.
template <class T>
struct Masses {
    const T* data;
    int64_t size, stride;
};

// Whether all masses are >= 0, all totals positive and finite, and those of a and b equal to within `tolerance`, relative; one
// of the two may be null.
template <class T>
bool masses_right(const Masses<T>& a, const Masses<T>& b, int64_t batch, double tolerance);

}  // namespace otkd_fast

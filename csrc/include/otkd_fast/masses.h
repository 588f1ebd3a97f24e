// The check of every call that takes masses: it costs as much as a small solve if tensor operations do it.
#pragma once
#include <cstdint>

namespace otkd_fast {

// Whether all masses are >= 0, all totals positive and finite, and those of a (batch, n) and b (batch, m) equal to within
// `tolerance`, relative; one of the two may be null: totals of 1. Contiguous.
template <class T>
bool masses_right(const T* a, const T* b, int64_t batch, int64_t n, int64_t m, double tolerance);

}  // namespace otkd_fast

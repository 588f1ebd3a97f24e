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
#define OTKD_FAST_DECLARE_MASSES(ISA)                                                                          \
    namespace ISA {                                                                                            \
    bool masses_right(const Masses<float>& a, const Masses<float>& b, int64_t batch, double tolerance);        \
    bool masses_right(const Masses<double>& a, const Masses<double>& b, int64_t batch, double tolerance);      \
    }
OTKD_FAST_DECLARE_MASSES(baseline)
OTKD_FAST_DECLARE_MASSES(avx2)
OTKD_FAST_DECLARE_MASSES(avx512)

}  // namespace otkd_fast

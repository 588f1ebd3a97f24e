// Polar factors and nuclear norms of a batch of matrices, on the CPU. Everything contiguous.
#pragma once
#include <cstdint>

namespace otkd_fast {

template <class T>
struct PolarArgs {
    const T* matrix;  // (batch, n, m)
    T* polar;         // (batch, n, m)
    T* nuclear_norm;  // (batch,)
    unsigned char* workspace;  // polar_workspace_bytes bytes, 64-byte aligned
    int64_t batch, n, m;
    int steps;  // of the schedule, from its end; 0: all of it
    int threads;
};

#define OTKD_FAST_DECLARE_POLAR(ISA)                            \
    namespace ISA {                                             \
    void polar_fwd(const PolarArgs<float>&);                    \
    void polar_fwd(const PolarArgs<double>&);                   \
    int64_t polar_workspace_bytes(const PolarArgs<float>&);     \
    int64_t polar_workspace_bytes(const PolarArgs<double>&);    \
    }
OTKD_FAST_DECLARE_POLAR(baseline)
OTKD_FAST_DECLARE_POLAR(avx2)
OTKD_FAST_DECLARE_POLAR(avx512)

}  // namespace otkd_fast

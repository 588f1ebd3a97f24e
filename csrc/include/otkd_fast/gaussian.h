// Squared 2-Wasserstein distances between the Gaussians fitted to two samples, with gradients, on the CPU. Everything contiguous.
#pragma once
#include <cstdint>

namespace otkd_fast {

template <class T>
struct GaussianSamplesArgs {
    const T* x;  // (batch, n, d)
    const T* y;  // (batch, m, d)
    T* value;    // (batch,)
    T* grad_x;   // (batch, n, d) for an incoming 1, or null
    T* grad_y;   // (batch, m, d), or null
    unsigned char* workspace;  // gaussian_samples_workspace_bytes bytes, 64-byte aligned
    int64_t batch, n, m, d;
    bool unbiased;  // covariances divide by n - 1 and m - 1
    int threads;
};

// Squared Bures distances between covariances, with gradients; CUDA only.
template <class T>
struct BuresArgs {
    const T *a, *b;  // (batch, d, d), their symmetric parts count
    T* value;        // (batch,)
    T *grad_a, *grad_b;  // (batch, d, d) for an incoming 1, symmetric, or null
    unsigned char* workspace;
    int64_t batch, d;
};

#define OTKD_FAST_DECLARE_GAUSSIAN(ISA)                                            \
    namespace ISA {                                                                \
    void gaussian_samples(const GaussianSamplesArgs<float>&);                      \
    void gaussian_samples(const GaussianSamplesArgs<double>&);                     \
    int64_t gaussian_samples_workspace_bytes(const GaussianSamplesArgs<float>&);   \
    int64_t gaussian_samples_workspace_bytes(const GaussianSamplesArgs<double>&);  \
    }
OTKD_FAST_DECLARE_GAUSSIAN(baseline)
OTKD_FAST_DECLARE_GAUSSIAN(avx2)
OTKD_FAST_DECLARE_GAUSSIAN(avx512)

}  // namespace otkd_fast

// Square roots of a batch of symmetric positive semidefinite matrices and their adjoint, on the CPU. Everything contiguous.
#pragma once
#include <cstdint>

namespace otkd_fast {

enum class SqrtmAlgorithm : int { jacobi = 0, polar = 1, tridiagonal = 2 };

template <class T>
struct SqrtmArgs {
    const T* matrix;  // (batch, d, d), its symmetric part counts; forward only
    T* root;          // (batch, d, d); read by the backward
    T* aux;           // (batch, sqrtm_aux_size); read by the backward
    unsigned char* unsolved;   // (batch,): 1 where the caller has to compute the result from eigenvalues: forward, A indefinite or
                               // (polar, inverse) singular; backward, A singular but not 0
    unsigned char* workspace;  // sqrtm_workspace_bytes bytes, 64-byte aligned
    int64_t batch, d;
    bool inverse;     // the root of the inverse
    SqrtmAlgorithm algorithm;
    int threads;
    // backward only
    const T* grad_root;  // (batch, d, d)
    T* grad_matrix;      // (batch, d, d), symmetric
};

enum class Definiteness : int { definite = 0, semidefinite = 1, indefinite = 2 };

// Elements of aux a matrix. jacobi: eigenvectors in rows, then the square roots of their eigenvalues. tridiagonal: the same, with a minus
// where the eigenvalue is at the level of rounding, and infinity in the first root where the matrix was left unsolved. polar: an upper bound of the
// largest eigenvalue of A^(1/2) and a lower bound of the smallest, 0 where A is not definite.
inline int64_t sqrtm_aux_size(SqrtmAlgorithm algorithm, int64_t d) {
    return algorithm == SqrtmAlgorithm::polar ? 2 : (d + 1) * d;
}

#define OTKD_FAST_DECLARE_SQRTM(ISA)                                        \
    namespace ISA {                                                         \
    void sqrtm_fwd(const SqrtmArgs<float>&);                                \
    void sqrtm_fwd(const SqrtmArgs<double>&);                               \
    void sqrtm_bwd(const SqrtmArgs<float>&);                                \
    void sqrtm_bwd(const SqrtmArgs<double>&);                               \
    int64_t sqrtm_workspace_bytes(const SqrtmArgs<float>&, bool backward);  \
    int64_t sqrtm_workspace_bytes(const SqrtmArgs<double>&, bool backward); \
    }
OTKD_FAST_DECLARE_SQRTM(baseline)
OTKD_FAST_DECLARE_SQRTM(avx2)
OTKD_FAST_DECLARE_SQRTM(avx512)

}  // namespace otkd_fast

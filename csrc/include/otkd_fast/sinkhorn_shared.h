// Sinkhorn with one cost (n, m) for a batch of marginals, on the CPU: rows are updated first, then columns (columns first:
// hand over the transposed problem). Everything contiguous. A null marginal is uniform.
#pragma once
#include <cstdint>

#include "otkd_fast/sinkhorn.h"

namespace otkd_fast {

template <class T>
struct SinkhornSharedArgs {
    const T* cost;              // (n, m), +inf allowed
    bool cost_transposed;       // it is (m, n) in memory; not where its gradient is wanted
    const T* a;                 // (batch, n) or null
    const T* b;                 // (batch, m) or null
    const T* initial_f;         // (batch, n) or null
    const T* initial_g;         // (batch, m) or null
    const int64_t* problems;    // (count,) indices of the problems to solve, rising; null: all
    unsigned char* workspace;   // sinkhorn_shared_workspace_bytes bytes, 64-byte aligned
    int64_t batch, n, m, count, num_iters;
    Method method;              // scaling_float or scaling_double
    Keep keep;
    double epsilon, tol, relaxation, penalty_a, penalty_b;
    double guard_a, guard_b;    // u = a / (K v + guard_a), v = b / (K^T u + guard_b); not 0 only in plain iterations
    int threads;
    T* blocks;                  // history of problems that are solved all together in the type of T; see below
    double* apart;              // history of the others, null where there are none
    int64_t apart_stride;       // doubles from one problem to the next
    int64_t* iterations;        // (batch,) that each problem ran; read by the backward
    const double* methods;      // (batch,) of the backward: how each problem was solved, those of another method are skipped
    // forward
    int64_t* left;              // (count,) gets the problems that left the range of the method
    T* transport_cost;          // (batch,)
    T* regularized_cost;        // (batch,)
    T* f;                       // (batch, n)
    T* g;                       // (batch, m)
    T* marginal_error;          // (batch,)
    // backward, incoming gradients may be null (zero), outgoing ones null where not wanted
    Gradient gradient;
    const T *grad_transport_cost, *grad_regularized_cost, *grad_f, *grad_g;
    T* grad_cost;               // (n, m), the sum over the problems is added to it
    T *grad_a, *grad_b;         // (batch, n), (batch, m)
};

// History of the problems that are solved all together: for each block of L problems (64 bytes of T or two times that; the
// last block may be smaller) and each kept iteration the scalings of rows and columns, (n + m, L). Scalings are those of
// the kernel without the masses, P = diag(a x) K diag(b y); 1 / (K v) where a penalty damps the update and the backward
// wants the iterations. Of problems that are solved apart, in float64 for float32 input: (kept, n + m) in `apart`.
constexpr int64_t kSharedLanes = 16;  // `blocks` has room for the batch rounded up to this many problems

#define OTKD_FAST_DECLARE_SINKHORN_SHARED(ISA)                                                \
    namespace ISA {                                                                           \
    int64_t sinkhorn_shared_fwd(const SinkhornSharedArgs<float>&);                            \
    int64_t sinkhorn_shared_fwd(const SinkhornSharedArgs<double>&);                           \
    void sinkhorn_shared_bwd(const SinkhornSharedArgs<float>&);                               \
    void sinkhorn_shared_bwd(const SinkhornSharedArgs<double>&);                              \
    int64_t sinkhorn_shared_workspace_bytes(const SinkhornSharedArgs<float>&, bool backward); \
    int64_t sinkhorn_shared_workspace_bytes(const SinkhornSharedArgs<double>&, bool backward); \
    }
OTKD_FAST_DECLARE_SINKHORN_SHARED(baseline)
OTKD_FAST_DECLARE_SINKHORN_SHARED(avx2)
OTKD_FAST_DECLARE_SINKHORN_SHARED(avx512)

}  // namespace otkd_fast

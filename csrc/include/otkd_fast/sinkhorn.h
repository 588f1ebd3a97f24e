// Sinkhorn on a dense cost, on the CPU: rows are updated first, then columns (columns first: hand over the
// transposed problem). Everything contiguous. A null marginal is uniform.
#pragma once
#include <cstdint>

namespace otkd_fast {

enum class Gradient : int { unroll = 0, envelope = 1, detach = 2 };

template <class T>
struct SinkhornArgs {
    const T* cost;     // (batch, n, m), +inf allowed
    const T* a;        // (batch, n) or null
    const T* b;        // (batch, m) or null
    double* history;   // (batch, history_stride) or null; see below
    unsigned char* workspace;  // sinkhorn_workspace_bytes bytes, 64-byte aligned
    int64_t batch, n, m, num_iters;
    int64_t kept;      // iterations kept in history: 0, 1 (the last) or num_iters
    double epsilon;
    int threads;
    // forward, each may be null
    T* transport_cost;    // (batch,)
    T* regularized_cost;  // (batch,)
    T* f;                 // (batch, n)
    T* g;                 // (batch, m)
    T* marginal_error;    // (batch,)
    // backward, incoming gradients may be null (zero), outgoing ones null where not wanted
    bool kernel_ready;  // the workspace is as the forward of this very problem left it (batch 1)
    Gradient gradient;
    const T *grad_transport_cost, *grad_regularized_cost, *grad_f, *grad_g;
    T *grad_cost, *grad_a, *grad_b;
};

// History of one problem, 1 + kept * (n + m) doubles: how it was solved (Method), then for each kept iteration the row and
// the column scalings, or in the log domain their logarithms.
enum class Method : int { scaling_float = 0, scaling_double = 1, log = 2 };

#define OTKD_FAST_DECLARE_SINKHORN(ISA)                                           \
    namespace ISA {                                                               \
    void sinkhorn_fwd(const SinkhornArgs<float>&);                                \
    void sinkhorn_fwd(const SinkhornArgs<double>&);                               \
    void sinkhorn_bwd(const SinkhornArgs<float>&);                                \
    void sinkhorn_bwd(const SinkhornArgs<double>&);                               \
    int64_t sinkhorn_workspace_bytes(const SinkhornArgs<float>&, bool backward);  \
    int64_t sinkhorn_workspace_bytes(const SinkhornArgs<double>&, bool backward); \
    }
OTKD_FAST_DECLARE_SINKHORN(baseline)
OTKD_FAST_DECLARE_SINKHORN(avx2)
OTKD_FAST_DECLARE_SINKHORN(avx512)

}  // namespace otkd_fast

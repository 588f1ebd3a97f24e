// Sinkhorn on a dense cost, on the CPU: rows are updated first, then columns (columns first: hand over the
// transposed problem). Everything contiguous. A null marginal is uniform.
#pragma once
#include <cstdint>
#include <limits>

namespace otkd_fast {

enum class Gradient : int { unroll = 0, envelope = 1, detach = 2, last_step = 3, implicit = 4 };

// What the history holds: nothing; the last scalings; those of every iteration; the last ones and those before them.
enum class Keep : int { nothing = 0, last = 1, all = 2, last_step = 3 };

template <class T>
struct SinkhornArgs {
    const T* cost;             // (batch, n, m), +inf allowed
    const T* a;                // (batch, n) or null
    const T* b;                // (batch, m) or null
    const T* initial_f;        // (batch, n) or null: zeros; what is not finite counts as 0
    const T* initial_g;        // (batch, m) or null
    double* history;           // (batch, history_stride) or null; see below
    unsigned char* workspace;  // sinkhorn_workspace_bytes bytes, 64-byte aligned
    int64_t batch, n, m, num_iters;
    Keep keep;
    bool together;  // the batch is many small problems, which share vectors; see many_small()
    double epsilon;
    double tol = 0;         // 0: num_iters iterations; else a problem stops when its marginal error is at most this
    double relaxation = 1;  // 0: chosen on the way
    double penalty_a = std::numeric_limits<double>::infinity();  // infinity: a constraint
    double penalty_b = std::numeric_limits<double>::infinity();
    int threads;
    // forward, each may be null
    T* transport_cost;    // (batch,)
    T* regularized_cost;  // (batch,)
    T* f;                 // (batch, n)
    T* g;                 // (batch, m)
    T* marginal_error;    // (batch,)
    int64_t* iterations;  // (batch,) that ran
    // backward, incoming gradients may be null (zero), outgoing ones null where not wanted
    bool kernel_ready;  // the workspace is as the forward of this very problem left it (batch 1)
    Gradient gradient;
    const T *grad_transport_cost, *grad_regularized_cost, *grad_f, *grad_g;
    T *grad_cost, *grad_a, *grad_b;
    // where `together`: elements from the masses of one problem to those of the next; 0: n, m
    int64_t a_stride, b_stride;
};

// History of one problem, in doubles: how it was solved (Method), the iterations that ran, then slots of n row and m column
// scalings. They are floats (and take half of the place) with scaling_float, logarithms with log. One slot for Keep::last,
// num_iters for Keep::all, but none where problems are solved together: their backward runs the loop again; two for
// Keep::last_step: before the last iteration (the columns count) and after it.
enum class Method : int { scaling_float = 0, scaling_double = 1, log = 2 };
constexpr int64_t kHistoryHeader = 2;

template <class T>
int64_t history_stride(const SinkhornArgs<T>& args) {
    const int64_t slots[] = {0, 1, args.together ? 0 : args.num_iters, 2};
    return kHistoryHeader + slots[static_cast<int>(args.keep)] * (args.n + args.m);
}

constexpr int64_t kSmallSide = 32, kFewProblems = 4;

// Whether a batch of these problems is solved many at a time, one in each lane of the vectors. The same rule as in
// ops/sinkhorn.py, which allocates the history.
template <class T>
bool many_small(const SinkhornArgs<T>& args) {
    return args.batch >= kFewProblems && args.n <= kSmallSide && args.m <= kSmallSide &&
           args.penalty_a == std::numeric_limits<double>::infinity() &&
           args.penalty_b == std::numeric_limits<double>::infinity();
}

// Problems of different sizes, packed one after the other; batch is their number, n and m are those of all together. The
// history of problem k starts where those before it end.
template <class T>
struct SinkhornRaggedArgs : SinkhornArgs<T> {
    const int64_t* row_offsets;     // (batch + 1,)
    const int64_t* column_offsets;  // (batch + 1,)
    int64_t entries;                // of all costs; on a device, which checks the offsets itself
};

#define OTKD_FAST_DECLARE_SINKHORN(ISA)                                           \
    namespace ISA {                                                               \
    void sinkhorn_fwd(const SinkhornArgs<float>&);                                \
    void sinkhorn_fwd(const SinkhornArgs<double>&);                               \
    void sinkhorn_bwd(const SinkhornArgs<float>&);                                \
    void sinkhorn_bwd(const SinkhornArgs<double>&);                               \
    int64_t sinkhorn_workspace_bytes(const SinkhornArgs<float>&, bool backward);  \
    int64_t sinkhorn_workspace_bytes(const SinkhornArgs<double>&, bool backward); \
    void sinkhorn_ragged_fwd(const SinkhornRaggedArgs<float>&);                   \
    void sinkhorn_ragged_fwd(const SinkhornRaggedArgs<double>&);                  \
    void sinkhorn_ragged_bwd(const SinkhornRaggedArgs<float>&);                   \
    void sinkhorn_ragged_bwd(const SinkhornRaggedArgs<double>&);                  \
    int64_t sinkhorn_ragged_workspace_bytes(const SinkhornRaggedArgs<float>&, bool backward);  \
    int64_t sinkhorn_ragged_workspace_bytes(const SinkhornRaggedArgs<double>&, bool backward); \
    }
OTKD_FAST_DECLARE_SINKHORN(baseline)
OTKD_FAST_DECLARE_SINKHORN(avx2)
OTKD_FAST_DECLARE_SINKHORN(avx512)

}  // namespace otkd_fast

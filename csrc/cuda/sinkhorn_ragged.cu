// Sinkhorn on packed problems of different sizes, forward and backward (reference/sinkhorn_ragged.py), float and double.
//
// A block solves a problem, as sinkhorn.cu does those of one size. The host does not know the sizes: each kernel is launched for all problems,
// and a block leaves at once where the problem is not one of its own: n <= 64, m <= 32 on 8 warps, in float n, m <= 128 on 16, both with the kernel
// in registers; larger ones in the log domain, one exponential an entry and half-iteration (backward: in double). Sizes and places are computed by the
// block, which then has its problem as a batch of one, in shared memory. A problem whose offsets do not fit the tensors gets NaN.
#include "otkd_fast/cuda.h"

#include "ragged.h"
#include "sinkhorn_shapes.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kLargeThreads = 512, kTransposeThreads = 256;

template <class T>
struct PackedBatch {
    SinkhornRaggedArgs<T> args;
    int64_t kept, working;  // doubles of history and of workspace for a row or a column, beside the headers
    int64_t steps;          // that the backward differentiates at most
    int64_t solver_bytes;   // of shared memory, before the block's own batch
};

constexpr int64_t kWorkHeader = 8;

template <class S>
OTKD_DEVICE S* moved(S* pointer, int64_t by) {
    return pointer ? pointer + by : pointer;
}

// The problem of this block as a batch of one, in shared memory; null, and NaN as values, where its offsets do not fit. All threads.
template <class T>
OTKD_DEVICE const Batch<T>* own_batch(const PackedBatch<T>& all, const Packed& place) {
    const int64_t k = block_id();
    const int64_t before = entries_before(all.args.row_offsets, all.args.column_offsets, k, reinterpret_cast<int64_t*>(shared_memory()));
    if (!place.inside(all.args.n, all.args.m, before, all.args.entries)) {
        for (T* value : {all.args.transport_cost, all.args.regularized_cost, all.args.marginal_error}) {
            if (value && thread_id() == 0) value[k] = static_cast<T>(kNaN);
        }
        return nullptr;
    }
    Batch<T>& own = *reinterpret_cast<Batch<T>*>(shared_memory() + all.solver_bytes);
    if (thread_id() == 0) {
        SinkhornArgs<T> one = all.args;
        one.batch = 1;
        one.n = place.rows();
        one.m = place.columns();
        one.cost += before;
        one.grad_cost = moved(one.grad_cost, before);
        one.a = moved(one.a, place.r0);
        one.initial_f = moved(one.initial_f, place.r0);
        one.f = moved(one.f, place.r0);
        one.grad_f = moved(one.grad_f, place.r0);
        one.grad_a = moved(one.grad_a, place.r0);
        one.b = moved(one.b, place.c0);
        one.initial_g = moved(one.initial_g, place.c0);
        one.g = moved(one.g, place.c0);
        one.grad_g = moved(one.grad_g, place.c0);
        one.grad_b = moved(one.grad_b, place.c0);
        one.transport_cost = moved(one.transport_cost, k);
        one.regularized_cost = moved(one.regularized_cost, k);
        one.marginal_error = moved(one.marginal_error, k);
        one.iterations = moved(one.iterations, k);
        one.grad_transport_cost = moved(one.grad_transport_cost, k);
        one.grad_regularized_cost = moved(one.grad_regularized_cost, k);
        one.history = moved(one.history, k * kHistoryHeader + all.kept * (place.r0 + place.c0));
        one.workspace += (k * kWorkHeader + all.working * (place.r0 + place.c0)) * int64_t{sizeof(double)};
        own = {one, 0, kHistoryHeader + all.kept * (one.n + one.m), 0, all.steps};
    }
    barrier();
    return &own;
}

// Nothing can be served where there are no rows or no columns.
template <class T>
OTKD_DEVICE void solve_empty(const Problem<T>& p, bool backward, double* shared) {
    const bool rows = p.n > 0;
    const int64_t count = rows ? p.n : p.m;
    const double penalty = rows ? p.args.penalty_a : p.args.penalty_b;
    const double price = penalty < kInfinity ? penalty : 0.0;  // of one unit of mass that is given up
    if (backward) {
        T* grad = rows ? p.args.grad_a : p.args.grad_b;
        const double slope = p.incoming(p.args.grad_regularized_cost) * price;
        for (int64_t k = thread_id(); grad && k < count; k += block_threads()) {
            grad[k] = (rows ? p.mass_a(k) : p.mass_b(k)) > 0 ? static_cast<T>(slope) : T(0);
        }
        return;
    }
    T* potential = rows ? p.args.f : p.args.g;
    double total = 0;
    for (int64_t k = thread_id(); k < count; k += block_threads()) {
        total += rows ? p.mass_a(k) : p.mass_b(k);
        if (potential) potential[k] = static_cast<T>(-kInfinity);
    }
    total = block_sum(total, shared);
    double* history = p.history();
    for (int64_t k = thread_id(); history && k < p.batch.history_stride; k += block_threads()) history[k] = 0;
    if (thread_id() != 0) return;
    if (p.args.transport_cost) p.args.transport_cost[0] = 0;
    if (p.args.regularized_cost) p.args.regularized_cost[0] = static_cast<T>(price * total);
    if (p.args.marginal_error) p.args.marginal_error[0] = static_cast<T>(penalty < kInfinity ? 0.0 : total);
    if (p.args.iterations) p.args.iterations[0] = 0;
}

template <class S>
OTKD_DEVICE bool holds(int64_t n, int64_t m) {
    return n <= S::kThreads / 32 * S::kGroups * S::kRows && m <= 32 * S::kColumns;
}
// Whether a problem is one of those of tile S.
template <class T, class S>
OTKD_DEVICE bool belongs(const PackedBatch<T>& all, const Packed& place) {
    const int64_t n = place.rows(), m = place.columns();
    if (!place.inside(all.args.n, all.args.m) || n == 0 || m == 0 || !holds<S>(n, m)) return false;
    return std::is_same_v<S, Narrow> || !holds<Narrow>(n, m);
}

// In double the larger tile is left out: its code would be a tenth of a wheel.
template <class T>
constexpr bool kHasMiddle = sizeof(T) == sizeof(float);
template <class T>
OTKD_DEVICE bool belongs_to_a_tile(const PackedBatch<T>& all, const Packed& place) {
    return belongs<T, Narrow>(all, place) || (kHasMiddle<T> && belongs<T, Middle<T>>(all, place));
}

template <class T, class S>
OTKD_KERNEL(S::kThreads, 1) solve_packed(OTKD_CONSTANT PackedBatch<T> all) {
    const Packed place(all.args.row_offsets, all.args.column_offsets, block_id());
    if (!belongs<T, S>(all, place)) return;
    const Batch<T>* own = own_batch(all, place);
    if (!own) return;
    const Problem<T> p(*own, 0);
    if (TileForward<T, S::kGroups, S::kRows, S::kColumns>::solve(p)) return;
    barrier();
    log_solve(*own, 0, p.cost, reinterpret_cast<double*>(shared_memory()));
}

template <class T, class S>
OTKD_KERNEL(S::kThreads, 1) differentiate_packed(OTKD_CONSTANT PackedBatch<T> all) {
    const Packed place(all.args.row_offsets, all.args.column_offsets, block_id());
    if (!belongs<T, S>(all, place)) return;
    const Batch<T>* own = own_batch(all, place);
    if (!own) return;
    const Problem<T> p(*own, 0);
    if (p.history()[0] == static_cast<int>(Method::log)) {
        log_backward(*own, 0, p.cost, p.grad_cost, reinterpret_cast<double*>(shared_memory()));
        return;
    }
    TileBackward<T, S::kGroups, S::kRows, S::kColumns>(p).run();
}

// Problems beyond the tiles, and those without rows or columns.
template <class T>
OTKD_KERNEL(kLargeThreads, 1) solve_packed_large(OTKD_CONSTANT PackedBatch<T> all) {
    const Packed place(all.args.row_offsets, all.args.column_offsets, block_id());
    if (belongs_to_a_tile(all, place)) return;
    const Batch<T>* own = own_batch(all, place);
    if (!own) return;
    const Problem<T> p(*own, 0);
    double* shared = reinterpret_cast<double*>(shared_memory());
    if (p.n == 0 || p.m == 0) return solve_empty(p, false, shared);
    log_range_rows(p, Part{0, 1});
    log_start(p);
    barrier();
    log_width(p, shared);
    barrier();
    if (sizeof(T) == sizeof(double) || p.state()->wide) log_iterate<double>(p, shared);
    else log_iterate<float>(p, shared);
    log_finish(p, shared);
}

template <class T>
OTKD_KERNEL(kLargeThreads, 1) differentiate_packed_large(OTKD_CONSTANT PackedBatch<T> all) {
    const Packed place(all.args.row_offsets, all.args.column_offsets, block_id());
    if (belongs_to_a_tile(all, place)) return;
    const Batch<T>* own = own_batch(all, place);
    if (!own) return;
    const Problem<T> p(*own, 0);
    double* shared = reinterpret_cast<double*>(shared_memory());
    if (p.n == 0 || p.m == 0) return solve_empty(p, true, shared);
    log_backward(*own, 0, p.cost, p.grad_cost, shared);
}

// out: the matrices (n_k, m_k) of `in`, each as (m_k, n_k).
template <class T>
OTKD_KERNEL(kTransposeThreads) transpose_packed(const T* in, T* out, const int64_t* row_offsets, const int64_t* column_offsets, int64_t entries) {
    const Packed place(row_offsets, column_offsets, block_id());
    const int64_t start = entries_before(row_offsets, column_offsets, block_id(), reinterpret_cast<int64_t*>(shared_memory()));
    const int64_t n = place.rows(), m = place.columns();
    if (!place.inside(place.r1, place.c1, start, entries)) return;
    for (int64_t e = thread_id(); e < n * m; e += kTransposeThreads) out[start + e] = in[start + e % n * m + e / n];
}

template <class T>
PackedBatch<T> make_packed(const SinkhornRaggedArgs<T>& args, bool backward) {
    const int64_t most = args.gradient == Gradient::unroll ? args.num_iters : args.gradient == Gradient::last_step;
    const int64_t steps = backward ? most : 0;
    SinkhornArgs<T> line = args;
    line.n = 1;
    line.m = 0;
    line.together = false;
    PackedBatch<T> all{args, history_stride(line) - kHistoryHeader, Problem<T>::doubles(1, 0, steps, backward) - kWorkHeader, steps, 0};
    all.args.together = false;
    return all;
}

// Launches `kernel` for all problems, with `bytes` of shared memory for the solver.
template <class T>
void launch_packed(const char* name, void (*kernel)(const PackedBatch<T>), PackedBatch<T> all, int threads, int64_t bytes, const Target& target) {
    all.solver_bytes = round_up(bytes, 16);
    launch(name, kernel, all.args.batch, threads, all.solver_bytes + int64_t{sizeof(Batch<T>)}, target, all);
}

}  // namespace

template <class T>
int64_t sinkhorn_ragged_workspace_bytes(const SinkhornRaggedArgs<T>& args, bool backward) {
    const PackedBatch<T> all = make_packed(args, backward);
    return (args.batch * kWorkHeader + all.working * (args.n + args.m)) * int64_t{sizeof(double)};
}

template <class T>
void sinkhorn_ragged_fwd(const SinkhornRaggedArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    const PackedBatch<T> all = make_packed(args, false);
    launch_packed<T>("solve_packed", solve_packed<T, Narrow>, all, Narrow::kThreads, tile_shared_bytes<Narrow, T>(Narrow::kThreads / 32), target);
    if constexpr (kHasMiddle<T>) {
        using M = Middle<T>;
        launch_packed<T>("solve_packed", solve_packed<T, M>, all, M::kThreads, tile_shared_bytes<M, T>(M::kThreads / 32), target);
    }
    launch_packed<T>("solve_packed_large", solve_packed_large<T>, all, kLargeThreads, log_shared_bytes(kLargeThreads), target);
}

template <class T>
void sinkhorn_ragged_bwd(const SinkhornRaggedArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    const PackedBatch<T> all = make_packed(args, true);
    launch_packed<T>("differentiate_packed", differentiate_packed<T, Narrow>, all, Narrow::kThreads,
                     tile_shared_bytes<Narrow, T>(Narrow::kThreads / 32), target);
    if constexpr (kHasMiddle<T>) {
        using M = Middle<T>;
        launch_packed<T>("differentiate_packed", differentiate_packed<T, M>, all, M::kThreads, tile_shared_bytes<M, T>(M::kThreads / 32), target);
    }
    launch_packed<T>("differentiate_packed_large", differentiate_packed_large<T>, all, kLargeThreads, log_shared_bytes(kLargeThreads), target);
}

template <class T>
void transpose_ragged(const T* in, T* out, const int64_t* row_offsets, const int64_t* column_offsets, int64_t problems, int64_t entries,
                      const Target& target) {
    const DeviceGuard guard(target);
    launch("transpose_packed", transpose_packed<T>, problems, kTransposeThreads, 32 * int64_t{sizeof(int64_t)}, target, in, out, row_offsets,
           column_offsets, entries);
}

#define OTKD_INSTANTIATE(T)                                                                     \
    template int64_t sinkhorn_ragged_workspace_bytes(const SinkhornRaggedArgs<T>&, bool);          \
    template void sinkhorn_ragged_fwd(const SinkhornRaggedArgs<T>&, const Target&);                \
    template void sinkhorn_ragged_bwd(const SinkhornRaggedArgs<T>&, const Target&);                \
    template void transpose_ragged(const T*, T*, const int64_t*, const int64_t*, int64_t, int64_t, const Target&);
OTKD_INSTANTIATE(float)
OTKD_INSTANTIATE(double)
#undef OTKD_INSTANTIATE

}  // namespace cuda
}  // namespace otkd_fast

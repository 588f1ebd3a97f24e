// Sinkhorn beyond the tiles of sinkhorn.cu, n and m up to 1024: a cluster of 2 to 16 blocks a problem, one launch for all iterations and outputs
// (reference/sinkhorn.py), float and double; rows are updated first. Another for the adjoint loop of plain iterations and all gradients.
// What they compute: sinkhorn_cluster_fwd.h, sinkhorn_cluster_bwd.h.
//
// Each block has n / size rows of the absorbed kernel in its shared memory; half of an iteration stays in the block, the other exchanges one
// partial sum a column and block through distributed shared memory. 2 n m multiply-adds an iteration, the cost is read once.
// Architectures 90 and later; whether the device runs such a cluster is asked of it. Body and launch are there for all: the kernels
// of earlier architectures are empty, and never launched.
#include "otkd_fast/cuda.h"

#include "sinkhorn_cluster_bwd.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int64_t kFewestRows = 16;

template <class T>
OTKD_KERNEL(kClusterThreads, 1) solve_cluster(OTKD_CONSTANT Batch<T> batch, OTKD_CONSTANT Slices cut) {
#if OTKD_CLUSTERS
    const Problem<T> p(batch, static_cast<uint32_t>(block_id()) / static_cast<uint32_t>(cut.size));
    decide_width(p, true);
    if constexpr (sizeof(T) == sizeof(float)) {
        if (!p.state()->wide) return ClusterForward<T, float>(p, cut).solve();
    }
    ClusterForward<T, double>(p, cut).solve();
#endif
}

template <class T>
OTKD_KERNEL(kClusterThreads, 1) differentiate_cluster(OTKD_CONSTANT Batch<T> batch, OTKD_CONSTANT Slices cut) {
#if OTKD_CLUSTERS
    const Problem<T> p(batch, static_cast<uint32_t>(block_id()) / static_cast<uint32_t>(cut.size));
    decide_width(p, false);
    if constexpr (sizeof(T) == sizeof(float)) {
        if (!p.state()->wide) return ClusterBackward<T, float>(p, cut).run();
    }
    ClusterBackward<T, double>(p, cut).run();
#endif
}

// As many threads as columns, or a half, if those are too many.
inline int cluster_threads(int64_t m) {
    const int64_t columns = ceil_div(m, ceil_div(m, kClusterThreads));
    return static_cast<int>(larger<int64_t>(round_up(columns, 32), 128));
}

// The cut for clusters of `size` blocks, with as much of the shared memory as it can use.
template <class T>
Slices cut_in(int size, int64_t n, int64_t m, int64_t shared_limit) {
    const int rows = static_cast<int>(ceil_div(n, size)), columns = static_cast<int>(ceil_div(m, size));
    Slices cut{size, rows, columns, 0};
    const int64_t whole = Cluster<T, double>::vector_bytes(cut, static_cast<int>(m), cluster_threads(m)) + rows * m * int64_t{sizeof(double)};
    cut.bytes = static_cast<int>(smaller(whole, shared_limit));
    return cut;
}
template <class T>
int rows_held(const Slices& cut, int64_t m) {
    return Cluster<T, T>::rows_held(cut, static_cast<int>(m), cluster_threads(m));
}

// The smallest cluster that holds a problem; a larger one, as long as the device is not full; else the largest one, if it holds three
// quarters. Size 0: none serves.
template <class T, class... P>
Slices choose_cut(void (*kernel)(P...), const SinkhornArgs<T>& args, const Target& target) {
    Slices best{};
    if (larger(args.n, args.m) > kMostOfCluster || larger(args.n, args.m) < kFewestOfCluster) return best;
    const int64_t limit = shared_memory_limit(target), processors = processor_count(target);
    bool holds = false;
    for (int size = 2; size <= kMostBlocks && size <= args.n; size *= 2) {
        if (holds && (args.batch * size > processors || args.n < size * kFewestRows)) break;
        const Slices cut = cut_in<T>(size, args.n, args.m, limit);
        const int held = rows_held<T>(cut, args.m);
        if (4 * held < 3 * cut.rows) continue;
        if (!admits(kernel, Grid(args.batch * size, size), cluster_threads(args.m), cut.bytes, target)) break;
        best = cut;
        holds = held == cut.rows;
    }
    return best;
}

}  // namespace

template <class T>
bool sinkhorn_cluster_fwd(const SinkhornArgs<T>& args, bool shared_cost, const Target& target) {
    const Slices cut = choose_cut(solve_cluster<T>, args, target);
    if (cut.size == 0) return false;
    launch("solve_cluster", solve_cluster<T>, Grid(args.batch * cut.size, cut.size), cluster_threads(args.m), cut.bytes, target,
           make_large_batch(args, shared_cost, false), cut);
    return true;
}

// Without steps to differentiate (envelope, detach) there is nothing to iterate; penalties go through the log domain.
template <class T>
bool sinkhorn_cluster_bwd(const SinkhornArgs<T>& args, bool shared_cost, const Target& target) {
    const Batch<T> batch = make_large_batch(args, shared_cost, true);
    if (batch.steps == 0 || args.penalty_a != kInfinity || args.penalty_b != kInfinity) return false;
    const Slices cut = choose_cut(differentiate_cluster<T>, args, target);
    if (cut.size == 0) return false;
    launch("differentiate_cluster", differentiate_cluster<T>, Grid(args.batch * cut.size, cut.size), cluster_threads(args.m), cut.bytes,
           target, batch, cut);
    return true;
}

#define OTKD_INSTANTIATE(T)                                                         \
    template bool sinkhorn_cluster_fwd(const SinkhornArgs<T>&, bool, const Target&); \
    template bool sinkhorn_cluster_bwd(const SinkhornArgs<T>&, bool, const Target&);
OTKD_INSTANTIATE(float)
OTKD_INSTANTIATE(double)
#undef OTKD_INSTANTIATE

}  // namespace cuda
}  // namespace otkd_fast

// Sinkhorn iterations, forward and backward (reference/sinkhorn.py), float and double; rows are updated first.
//
//   f_i = eps log a_i - eps LSE_j((g_j - C_ij) / eps),   g_j = eps log b_j - eps LSE_i((f_i - C_ij) / eps),   T times
//
// n, m <= 192 (float) or 128 (double): one launch, a block a problem, all iterations and outputs: on scalings with the
// kernel in registers (sinkhorn_tile.h), or, as the block finds out, in the log domain (sinkhorn_log.h). Beyond, up to about
// 1000: one launch, a cluster of blocks a problem, where the device has clusters (sinkhorn_cluster.cu). Else: the log
// domain, a launch a half-iteration, `parts` blocks a problem; reads the cost once in each.
// Tile shapes (warps x rows x columns): n <= 16, m <= 32: one warp (float); n <= 64, m <= 32: up to 8 warps of 8 rows; 128 x 128: 16 warps of
// 8 rows (double: 8 of 16); 192 x 192: 12 warps of 16 rows.
#include "otkd_fast/cuda.h"

#include "sinkhorn_shapes.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kPhaseThreads = 256, kMostParts = 4096;

template <class T, class S>
OTKD_KERNEL(S::kThreads, 1) solve_tile(OTKD_CONSTANT Batch<T> batch) {
    const Problem<T> p(batch, block_id());
    if (TileForward<T, S::kGroups, S::kRows, S::kColumns>::solve(p)) return;
    barrier();
    log_solve(batch, p.index, p.cost, reinterpret_cast<double*>(shared_memory()));
}

template <class T, class S>
OTKD_KERNEL(S::kThreads, 1) differentiate_tile(OTKD_CONSTANT Batch<T> batch) {
    const Problem<T> p(batch, block_id());
    if (p.history()[0] == static_cast<int>(Method::log)) {
        log_backward(batch, p.index, p.cost, p.grad_cost, reinterpret_cast<double*>(shared_memory()));
        return;
    }
    TileBackward<T, S::kGroups, S::kRows, S::kColumns>(p).run();
}

template <class T>
OTKD_KERNEL(kPhaseThreads) run_phase(OTKD_CONSTANT Batch<T> batch, Phase phase, int64_t k, int parts) {
    const uint32_t block = block_id(), index = block / static_cast<uint32_t>(parts);
    const Problem<T> p(batch, index);
    log_phase(p, phase, Part{block % static_cast<uint32_t>(parts), parts}, k, reinterpret_cast<double*>(shared_memory()));
}

template <class T>
OTKD_KERNEL(kPhaseThreads) run_backward_phase(OTKD_CONSTANT Batch<T> batch, BackwardPhase phase, int64_t k, int parts) {
    const uint32_t block = block_id(), index = block / static_cast<uint32_t>(parts);
    const Problem<T> p(batch, index);
    log_backward_phase(p, phase, Part{block % static_cast<uint32_t>(parts), parts}, k,
                       reinterpret_cast<double*>(shared_memory()));
}

// Calls body(Shape{}) with the smallest tile that holds the problems; false: none does.
template <class T, class Body>
bool with_shape(int64_t n, int64_t m, Body body) {
    if constexpr (sizeof(T) == sizeof(float)) {
        if (Tiny::fits(n, m)) return body(Tiny{}), true;
    }
    if (Narrow::fits(n, m)) return body(Narrow{}), true;
    if (Middle<T>::fits(n, m)) return body(Middle<T>{}), true;
    if constexpr (sizeof(T) == sizeof(float)) {
        if (Wide::fits(n, m)) return body(Wide{}), true;
    }
    return false;
}

// Launches of the large problems.
template <class T>
struct Phases {
    const Batch<T>& batch;
    const Target& target;
    int parts;

    Phases(const Batch<T>& all, const Target& where) : batch(all), target(where) {
        const int64_t wanted = larger(ceil_div(all.args.n, kPhaseThreads / 32), ceil_div(all.args.m, 32));
        parts = static_cast<int>(smaller(wanted, larger<int64_t>(kMostParts / all.args.batch, 1)));
    }
    void run(Phase phase, int64_t k, int share) const {
        launch("run_phase", run_phase<T>, batch.args.batch * share, kPhaseThreads, log_shared_bytes(kPhaseThreads), target,
               batch, phase, k, share);
    }
    void run(BackwardPhase phase, int64_t k, int share) const {
        launch("run_backward_phase", run_backward_phase<T>, batch.args.batch * share, kPhaseThreads,
               log_shared_bytes(kPhaseThreads), target, batch, phase, k, share);
    }
};

template <class T>
void forward_phases(const Batch<T>& batch, const Target& target) {
    const Phases<T> phases(batch, target);
    if (sizeof(T) == sizeof(float)) phases.run(Phase::range, 0, phases.parts);
    phases.run(Phase::start, 0, 1);
    for (int64_t k = 0; k < batch.args.num_iters; ++k) {
        phases.run(Phase::rows, k, phases.parts);
        phases.run(Phase::columns, k, phases.parts);
        if (!watches(batch.args, k)) continue;
        phases.run(Phase::plan_rows, k, phases.parts);
        phases.run(Phase::control, k, 1);
    }
    phases.run(Phase::plan_rows, 0, phases.parts);
    phases.run(Phase::finish, 0, 1);
}

template <class T>
void backward_phases(const Batch<T>& batch, const Target& target) {
    const Phases<T> phases(batch, target);
    if (batch.steps > 0) {
        phases.run(BackwardPhase::first_rows, 0, phases.parts);
        phases.run(BackwardPhase::first_columns, 0, phases.parts);
    }
    for (int64_t k = batch.steps - 1; k >= 0; --k) {
        phases.run(BackwardPhase::rows, k, phases.parts);
        if (k > 0) phases.run(BackwardPhase::columns, k, phases.parts);
    }
    if (batch.args.grad_cost) phases.run(BackwardPhase::cost, 0, phases.parts);
    if (batch.args.grad_a || batch.args.grad_b) phases.run(BackwardPhase::marginals, 0, 1);
}

}  // namespace

template <class T>
int64_t sinkhorn_workspace_bytes(const SinkhornArgs<T>& args, bool backward) {
    return args.batch * make_large_batch(args, false, backward).workspace_stride * int64_t{sizeof(double)};
}

template <class T>
void sinkhorn_fwd(const SinkhornArgs<T>& args, bool shared_cost, const Target& target) {
    const DeviceGuard guard(target);
    const Batch<T> batch = make_large_batch(args, shared_cost, false);
    const bool small = with_shape<T>(args.n, args.m, [&](auto shape) {
        using S = decltype(shape);
        const int warps = S::warps(args.n);
        launch("solve_tile", solve_tile<T, S>, args.batch, 32 * warps, tile_shared_bytes<S, T>(warps), target, batch);
    });
    if (!small && !sinkhorn_cluster_fwd(args, shared_cost, target)) forward_phases(batch, target);
}

template <class T>
void sinkhorn_bwd(const SinkhornArgs<T>& args, bool shared_cost, const Target& target) {
    const DeviceGuard guard(target);
    const Batch<T> batch = make_large_batch(args, shared_cost, true);
    const bool small = with_shape<T>(args.n, args.m, [&](auto shape) {
        using S = decltype(shape);
        const int warps = S::warps(args.n);
        launch("differentiate_tile", differentiate_tile<T, S>, args.batch, 32 * warps, tile_shared_bytes<S, T>(warps), target,
               batch);
    });
    if (!small && !sinkhorn_cluster_bwd(args, shared_cost, target)) backward_phases(batch, target);
}

#define OTKD_INSTANTIATE(T)                                                 \
    template int64_t sinkhorn_workspace_bytes(const SinkhornArgs<T>&, bool); \
    template void sinkhorn_fwd(const SinkhornArgs<T>&, bool, const Target&); \
    template void sinkhorn_bwd(const SinkhornArgs<T>&, bool, const Target&);
OTKD_INSTANTIATE(float)
OTKD_INSTANTIATE(double)
#undef OTKD_INSTANTIATE

}  // namespace cuda
}  // namespace otkd_fast

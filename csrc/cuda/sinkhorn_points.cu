// Sinkhorn between points without a cost matrix, forward and backward (reference/sinkhorn.py, sinkhorn_points); rows are updated first.
//
//   f_i = eps log a_i - eps LSE_j((g_j - C_ij) / eps),   C_ij = metric(x_i, y_j), computed again in every sweep
//
// A half-iteration is one sweep over tiles of 32 x 64 costs (sinkhorn_points_sweep.h): 2 d operations (l1: 3 d) and 1.25 exponentials an
// entry, (n + m) d / 32 elements read; then a launch that joins the pieces of each row. Small problems, and many of them: a
// block a problem, all iterations in one launch. Backward: the adjoint loop in as many sweeps, T (n + m) numbers kept, then a launch an
// operand for its gradient (sinkhorn_points_gradient.h). Memory O((n + m) (d + T)); cosine rewrites the rows.
#include "otkd_fast/cuda.h"

#include "sinkhorn_points_gradient.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kJoinThreads = 128;
constexpr int64_t kBlocksOfASweep = 528, kTilesOfAPiece = 128;      // 8192 terms of a sum in float at most
constexpr int64_t kTilesInOne = 4, kManyProblems = 128, kTilesOfMany = 32;  // of a problem that a block solves by itself

template <class T>
OTKD_KERNEL(kJoinThreads) points_join(OTKD_CONSTANT PointBatch<T> all, Step step, int64_t k, int parts) {
    const uint32_t block = static_cast<uint32_t>(block_id()), part = block % static_cast<uint32_t>(parts);
    join_sweep(all, block / static_cast<uint32_t>(parts), step, k, part * int64_t{kJoinThreads} + thread_id(), parts * int64_t{kJoinThreads});
}

enum class Once : int { begin, control, finish, marginals };  // what a block does for a problem by itself

template <class T>
OTKD_DEVICE void run_once(const PointBatch<T>& all, int64_t index, Once what, int64_t k) {
    const Problem<T> p(all.batch, index, nullptr, nullptr);
    double* shared = reinterpret_cast<double*>(shared_memory());
    if (what == Once::begin) begin_points(p, shared);
    if (what == Once::control) log_control(p, k, shared);
    if (what == Once::finish) finish_points(p, shared);
    if (what == Once::marginals) marginal_gradients(Trace<T>(p), shared);
}

template <class T>
OTKD_KERNEL(kJoinThreads) points_once(OTKD_CONSTANT PointBatch<T> all, Once what, int64_t k) {
    run_once(all, block_id(), what, k);
}

// A step of one problem by one block. Ends with a barrier.
template <class T>
OTKD_DEVICE void block_step(const PointBatch<T>& all, int64_t index, Step step, int64_t k) {
    const int64_t own = flipped(step) ? all.batch.args.m : all.batch.args.n;
    for (int64_t tile = 0; tile * kOwn < own; ++tile) {
        run_sweep(all, index, step, k, tile, 0);
        barrier();
    }
    join_sweep(all, index, step, k, thread_id(), block_threads());
    barrier();
}

template <class T>
OTKD_DEVICE void block_forward(const PointBatch<T>& all, int64_t index) {
    const SinkhornArgs<T>& args = all.batch.args;
    const Problem<T> p(all.batch, index, nullptr, nullptr);
    if (sizeof(T) == sizeof(float)) block_step(all, index, Step::range, 0);
    run_once(all, index, Once::begin, 0);
    barrier();
    for (int64_t k = 0; k < args.num_iters && p.state()->running; ++k) {
        block_step(all, index, Step::rows, k);
        block_step(all, index, Step::columns, k);
        if (!(args.tol > 0 || (args.relaxation == 0 && auto_due(k + 1)))) continue;
        block_step(all, index, Step::plan_rows, k);
        run_once(all, index, Once::control, k);
        barrier();
    }
    block_step(all, index, Step::plan_rows, -1);
    run_once(all, index, Once::finish, 0);
}

template <class T>
OTKD_DEVICE void block_backward(const PointBatch<T>& all, int64_t index) {
    block_step(all, index, Step::first_rows, 0);
    block_step(all, index, Step::first_columns, 0);
    for (int64_t k = all.batch.steps - 1; k >= 0; --k) {
        block_step(all, index, Step::adjoint_rows, k);
        block_step(all, index, Step::adjoint_columns, k);
    }
    run_once(all, index, Once::marginals, 0);
}

enum class Work : int { sweep, forward, backward };

// One step of every problem, blocks by problem, tile and piece; or all of a problem by its block. One kernel, so that there is one sweep.
template <class T>
OTKD_KERNEL(kPointThreads, sizeof(T) == sizeof(float) ? 3 : 2) points_block(OTKD_CONSTANT PointBatch<T> all, Work work, Step step, int64_t k) {
    const uint32_t block = static_cast<uint32_t>(block_id());
    if (work == Work::forward) return block_forward(all, block);
    if (work == Work::backward) return block_backward(all, block);
    const uint32_t pieces = static_cast<uint32_t>(all.pieces(flipped(step)));
    const uint32_t tiles = static_cast<uint32_t>(((flipped(step) ? all.batch.args.m : all.batch.args.n) + kOwn - 1) / kOwn);
    run_sweep(all, block / pieces / tiles, step, k, block / pieces % tiles, block % pieces);
}

// The gradients of the points of those problems whose sums were in S; blocks by problem and tile.
template <class T, class S>
OTKD_KERNEL(kPointThreads, sizeof(S) == sizeof(float) ? 3 : 2) points_gradient(OTKD_CONSTANT PointBatch<T> all, bool flip, T* grad) {
    const uint32_t tiles = static_cast<uint32_t>(((flip ? all.batch.args.m : all.batch.args.n) + kOwn - 1) / kOwn);
    const uint32_t block = static_cast<uint32_t>(block_id());
    const Problem<T> p(all.batch, block / tiles, nullptr, nullptr);
    if (was_wide(p) == (sizeof(S) == sizeof(double))) solve_gradient<S>(all, Trace<T>(p), flip, block % tiles * int64_t{kOwn}, grad);
}

// How many tiles of the others a block of a sweep takes, and how many pieces that makes.
void cut(int64_t batch, int64_t own, int64_t others, bool in_one, int64_t& tiles_a_piece, int64_t& pieces) {
    const int64_t tiles = ceil_div(others, kOther), blocks = batch * ceil_div(own, kOwn);
    const int64_t wanted = smaller(tiles, larger(ceil_div(kBlocksOfASweep, larger<int64_t>(blocks, 1)), ceil_div(tiles, kTilesOfAPiece)));
    tiles_a_piece = in_one ? tiles : ceil_div(tiles, wanted);
    pieces = ceil_div(tiles, tiles_a_piece);
}

// The workspace laid out; with a null one the pointers mean nothing.
template <class T>
PointBatch<T> make_points(const SinkhornPointsArgs<T>& args, bool backward, int64_t& bytes) {
    PointBatch<T> all;
    all.batch = make_batch<T>(args, false, backward);
    all.longest = larger(args.n, args.m);
    const int64_t tiles = larger(ceil_div(args.n, kOwn) * ceil_div(args.m, kOther), ceil_div(args.m, kOwn) * ceil_div(args.n, kOther));
    all.in_one = tiles <= kTilesInOne || (args.batch >= kManyProblems && tiles <= kTilesOfMany);
    cut(args.batch, args.n, args.m, all.in_one, all.row_tiles_a_piece, all.row_pieces);
    cut(args.batch, args.m, args.n, all.in_one, all.column_tiles_a_piece, all.column_pieces);
    unsigned char* base = args.workspace;
    const int64_t solve = round_up(args.batch * all.batch.workspace_stride * int64_t{sizeof(double)}, 64);
    const int64_t sums = round_up(args.batch * all.most_pieces() * 2 * all.longest * int64_t{sizeof(double)}, 64);
    all.partial = base ? reinterpret_cast<double*>(base + solve) : nullptr;
    CostMatrixArgs<T> rows{};
    rows.x = args.x;
    rows.y = args.y;
    rows.workspace = base ? reinterpret_cast<T*>(base + solve + sums) : nullptr;
    rows.batch = args.batch;
    rows.n = args.n;
    rows.m = args.m;
    rows.d = args.d;
    rows.x_batch_stride = args.n * args.d;
    rows.y_batch_stride = args.m * args.d;
    rows.metric = args.metric;
    bytes = solve + sums + make_plan(rows, all.points, false);
    return all;
}

template <class T>
struct Launches {
    const PointBatch<T>& all;
    const Target& target;
    static constexpr int64_t kSweepShared = kSweepValues * int64_t{sizeof(double)}, kOnceShared = 64 * int64_t{sizeof(double)};

    void block(int64_t blocks, Work work, Step what = Step::range, int64_t k = 0) const {
        launch("points_block", points_block<T>, blocks, kPointThreads, kSweepShared, target, all, work, what, k);
    }
    void step(Step what, int64_t k) const {
        const SinkhornArgs<T>& args = all.batch.args;
        const bool flip = flipped(what);
        const int64_t own = flip ? args.m : args.n, parts = smaller<int64_t>(ceil_div(own, kJoinThreads), 1024);
        block(args.batch * ceil_div(own, kOwn) * all.pieces(flip), Work::sweep, what, k);
        launch("points_join", points_join<T>, args.batch * parts, kJoinThreads, 0, target, all, what, k, static_cast<int>(parts));
    }
    void once(Once what, int64_t k) const {
        launch("points_once", points_once<T>, all.batch.args.batch, kJoinThreads, kOnceShared, target, all, what, k);
    }
    void forward() const {
        const SinkhornArgs<T>& args = all.batch.args;
        if (sizeof(T) == sizeof(float)) step(Step::range, 0);
        once(Once::begin, 0);
        for (int64_t k = 0; k < args.num_iters; ++k) {
            step(Step::rows, k);
            step(Step::columns, k);
            if (!watches(args, k)) continue;
            step(Step::plan_rows, k);
            once(Once::control, k);
        }
        step(Step::plan_rows, -1);
        once(Once::finish, 0);
    }
    void backward() const {
        if (all.batch.steps > 0) {
            step(Step::first_rows, 0);
            step(Step::first_columns, 0);
        }
        for (int64_t k = all.batch.steps - 1; k >= 0; --k) {
            step(Step::adjoint_rows, k);
            if (k > 0) step(Step::adjoint_columns, k);
        }
        if (all.batch.args.grad_a || all.batch.args.grad_b) once(Once::marginals, 0);
    }
    template <class S>
    void gradient_in(int64_t blocks, bool flip, T* grad) const {
        launch("points_gradient", points_gradient<T, S>, blocks, kPointThreads, kGradientShared * int64_t{sizeof(S)}, target, all, flip,
               grad);
    }
    void gradient(bool flip, T* grad) const {
        if (!grad) return;
        const int64_t tiles = ceil_div(flip ? all.batch.args.m : all.batch.args.n, kOwn);
        gradient_in<double>(all.batch.args.batch * tiles, flip, grad);
        if constexpr (sizeof(T) == sizeof(float)) gradient_in<float>(all.batch.args.batch * tiles, flip, grad);
    }
};

}  // namespace

template <class T>
int64_t sinkhorn_points_workspace_bytes(const SinkhornPointsArgs<T>& args, bool backward) {
    int64_t bytes;
    make_points(args, backward, bytes);
    return bytes;
}

template <class T>
void sinkhorn_points_fwd(const SinkhornPointsArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    int64_t bytes;
    const PointBatch<T> all = make_points(args, false, bytes);
    const Launches<T> launches{all, target};
    prepare_rows(all.points, target);
    if (!all.in_one) return launches.forward();
    launches.block(args.batch, Work::forward);
}

template <class T>
void sinkhorn_points_bwd(const SinkhornPointsArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    int64_t bytes;
    const PointBatch<T> all = make_points(args, true, bytes);
    const Launches<T> launches{all, target};
    prepare_rows(all.points, target);
    if (!all.in_one) {
        launches.backward();
    } else if (all.batch.steps > 0 || args.grad_a || args.grad_b) {
        launches.block(args.batch, Work::backward);
    }
    launches.gradient(false, args.grad_x);
    launches.gradient(true, args.grad_y);
}

#define OTKD_INSTANTIATE(T)                                                               \
    template int64_t sinkhorn_points_workspace_bytes(const SinkhornPointsArgs<T>&, bool); \
    template void sinkhorn_points_fwd(const SinkhornPointsArgs<T>&, const Target&);       \
    template void sinkhorn_points_bwd(const SinkhornPointsArgs<T>&, const Target&);
OTKD_INSTANTIATE(float)
OTKD_INSTANTIATE(double)
#undef OTKD_INSTANTIATE

}  // namespace cuda
}  // namespace otkd_fast

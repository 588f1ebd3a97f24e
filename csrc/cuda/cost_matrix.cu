// Pairwise cost matrices, forward and backward (reference/cost_matrix.py), float and double.
//
//   l1           C_ij = sum_k |x_ik - y_jk|
//   sqeuclidean  C_ij = sum_k (x_ik - y_jk)^2,   l2: its root
//   cosine       C_ij = (|x_i - y_j|^2 - (|x_i| - |y_j|)^2) / (2 |x_i| |y_j|), rows scaled by powers of two before
//
// Differences are formed before they are squared or summed: near-coincident rows keep full relative accuracy. Sums run over
// blocks of kSumDepth entries, then over blocks. Rows are rewritten (softmax, scaled) into the workspace by a block each.
// Forward: a block has a tile of 64 x 64 costs, a thread 4 x 4; 2 or 3 operations a term, (n + m) d / 64 reads of a row.
// Few tiles and long rows: the depth is split over blocks, whose sums a second kernel adds in order.
// Backward: a block has 32 rows x 64 entries of one operand's gradient and goes through all rows of the other.
#include "cost_matrix_tile.h"

namespace otkd_fast {
namespace cuda {
namespace {

template <class T, bool kL1>
OTKD_KERNEL(kThreads) cost_tile(OTKD_CONSTANT Plan<T> plan) {
    const CostMatrixArgs<T>& args = plan.args;
    const uint32_t columns = (args.m + kTile - 1) / kTile, rows = (args.n + kTile - 1) / kTile;
    uint32_t rest = block_id();  // 32 bits: 64-bit division is a call
    const int64_t j0 = rest % columns * int64_t{kTile}, i0 = (rest /= columns) % rows * int64_t{kTile};
    const int64_t split = (rest /= rows) % static_cast<uint32_t>(plan.splits);
    const int64_t index = rest / static_cast<uint32_t>(plan.splits);
    const int64_t begin = split * plan.depth, end = smaller(begin + plan.depth, args.d);
    T total[4][4] = {};
    tile_sums<T, kL1>(plan.x + index * plan.x_stride, plan.y + index * plan.y_stride, args.d, i0, args.n, j0, args.m, begin, end,
                      reinterpret_cast<T*>(shared_memory()), total);
    T* out = plan.splits > 1 ? plan.partial + (split * args.batch + index) * args.n * args.m
                             : args.cost + index * args.n * args.m;
    OTKD_UNROLL
    for (int r = 0; r < 4; ++r) {
        OTKD_UNROLL
        for (int c = 0; c < 4; ++c) {
            const int64_t i = i0 + thread_id() / 16 + 16 * r, j = j0 + thread_id() % 16 + 16 * c;
            if (i >= args.n || j >= args.m) continue;
            out[i * args.m + j] = plan.splits > 1 ? total[r][c] : finished(plan, index, i, j, total[r][c]);
        }
    }
}

template <class T>
OTKD_KERNEL(kThreads) add_splits(OTKD_CONSTANT Plan<T> plan) {
    const CostMatrixArgs<T>& args = plan.args;
    const int64_t entries = args.batch * args.n * args.m, at = block_id() * kThreads + thread_id();
    if (at >= entries) return;
    T total = 0;
    for (int64_t split = 0; split < plan.splits; ++split) total += plan.partial[split * entries + at];
    args.cost[at] = finished(plan, at / (args.n * args.m), at / args.m % args.n, at % args.m, total);
}

template <class T, bool kL1>
OTKD_KERNEL(kThreads, 2) gradient_tile(OTKD_CONSTANT Plan<T> plan, bool of_y) {
    const CostMatrixArgs<T>& args = plan.args;
    const uint32_t depths = (args.d + kGradDepth - 1) / kGradDepth, rows = ((of_y ? args.m : args.n) + kGradRows - 1) / kGradRows;
    const uint32_t block = block_id();
    const int64_t index = block / depths / rows;
    const Window window{0, args.n, 0, args.m, index * args.n * args.m};
    gradient_rows<T, kL1>(plan, window, index, of_y, block / depths % rows * int64_t{kGradRows}, block % depths * int64_t{kGradDepth},
                          reinterpret_cast<T*>(shared_memory()));
}

template <class T>
OTKD_KERNEL(kRowThreads) rows_backward(OTKD_CONSTANT Plan<T> plan) {
    const CostMatrixArgs<T>& args = plan.args;
    const int64_t rows = args.n + args.m, index = block_id() / rows;
    const Window window{0, args.n, 0, args.m, index * args.n * args.m};
    row_backward(plan, window, index, block_id() % rows, reinterpret_cast<double*>(shared_memory()));
}

template <class T>
void gradient_of(const Plan<T>& plan, bool of_y, const Target& target) {
    const CostMatrixArgs<T>& args = plan.args;
    if (!(of_y ? args.grad_y : args.grad_x)) return;
    const int64_t blocks = args.batch * ceil_div(of_y ? args.m : args.n, kGradRows) * ceil_div(args.d, kGradDepth);
    const int64_t shared = kGradientValues * int64_t{sizeof(T)};
    const bool l1 = args.metric == Metric::l1;
    launch("gradient_tile", l1 ? gradient_tile<T, true> : gradient_tile<T, false>, blocks, kThreads, shared, target, plan, of_y);
}

}  // namespace

template <class T>
int64_t cost_matrix_workspace_bytes(const CostMatrixArgs<T>& args) {
    Plan<T> plan;
    return make_plan(args, plan);
}

template <class T>
void cost_matrix_fwd(const CostMatrixArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    Plan<T> plan;
    make_plan(args, plan);
    prepare_rows(plan, target);
    const int64_t blocks = args.batch * plan.splits * ceil_div(args.n, kTile) * ceil_div(args.m, kTile);
    const int64_t shared = kTileValues * int64_t{sizeof(T)};
    const bool l1 = args.metric == Metric::l1;
    launch("cost_tile", l1 ? cost_tile<T, true> : cost_tile<T, false>, blocks, kThreads, shared, target, plan);
    if (plan.splits == 1) return;
    launch("add_splits", add_splits<T>, ceil_div(args.batch * args.n * args.m, kThreads), kThreads, 0, target, plan);
}

template <class T>
void cost_matrix_bwd(const CostMatrixArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    Plan<T> plan;
    make_plan(args, plan);
    prepare_rows(plan, target);
    gradient_of(plan, false, target);
    gradient_of(plan, true, target);
    if (!rewrites(args)) return;
    launch("rows_backward", rows_backward<T>, args.batch * (args.n + args.m), kRowThreads, kScratch, target, plan);
}

#define OTKD_INSTANTIATE(T)                                              \
    template int64_t cost_matrix_workspace_bytes(const CostMatrixArgs<T>&); \
    template void cost_matrix_fwd(const CostMatrixArgs<T>&, const Target&); \
    template void cost_matrix_bwd(const CostMatrixArgs<T>&, const Target&);
OTKD_INSTANTIATE(float)
OTKD_INSTANTIATE(double)
#undef OTKD_INSTANTIATE

}  // namespace cuda
}  // namespace otkd_fast

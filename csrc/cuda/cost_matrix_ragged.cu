// Cost matrices between the packed points of each problem, and their gradients (reference/cost_matrix.py), float and double.
//
// The tiles of cost_matrix.cu on a part of all rows: the operands are one x (N, d) and one y (M, d), the results the blocks on the diagonal
// of their costs, packed. The host does not know the sizes: `parts` blocks share a problem and take its tiles in turn.
#include "cost_matrix_tile.h"
#include "otkd_fast/ragged.h"
#include "ragged.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int64_t kMostParts = 64;

template <class T>
struct PackedPlan {
    Plan<T> plan;  // of one problem with all rows
    const int64_t *row_offsets, *column_offsets;
    int64_t entries;
    int parts;
};

// Empty where the offsets do not fit the tensors.
template <class T>
OTKD_DEVICE Window window_of(const PackedPlan<T>& all, int64_t k) {
    const Packed place(all.row_offsets, all.column_offsets, k);
    const int64_t start = entries_before(all.row_offsets, all.column_offsets, k, reinterpret_cast<int64_t*>(shared_memory()));
    if (!place.inside(all.plan.args.n, all.plan.args.m, start, all.entries)) return {0, 0, 0, 0, 0};
    return {place.r0, place.r1, place.c0, place.c1, start};
}

template <class T, bool kL1>
OTKD_KERNEL(kThreads, 8 / sizeof(T)) cost_packed(OTKD_CONSTANT PackedPlan<T> all) {
    const uint32_t parts = all.parts, block = block_id();
    const Window window = window_of(all, block / parts);
    const int64_t columns = (window.c1 - window.c0 + kTile - 1) / kTile, tiles = columns * ((window.r1 - window.r0 + kTile - 1) / kTile);
    for (int64_t tile = block % parts; tile < tiles; tile += parts) {
        const int64_t i0 = window.r0 + tile / columns * kTile, j0 = window.c0 + tile % columns * kTile;
        T total[4][4] = {};
        tile_sums<T, kL1>(all.plan.x, all.plan.y, all.plan.args.d, i0, window.r1, j0, window.c1, 0, all.plan.args.d,
                          reinterpret_cast<T*>(shared_memory()), total);
        OTKD_UNROLL
        for (int r = 0; r < 4; ++r) {
            OTKD_UNROLL
            for (int c = 0; c < 4; ++c) {
                const int64_t i = i0 + thread_id() / 16 + 16 * r, j = j0 + thread_id() % 16 + 16 * c;
                if (i >= window.r1 || j >= window.c1) continue;
                all.plan.args.cost[window.at(i, j)] = finished(all.plan, 0, i, j, total[r][c]);
            }
        }
    }
}

template <class T, bool kL1>
OTKD_KERNEL(kThreads, 8 / sizeof(T)) gradient_packed(OTKD_CONSTANT PackedPlan<T> all, bool of_y) {
    const uint32_t parts = all.parts, block = block_id();
    const Window window = window_of(all, block / parts);
    const int64_t begin = of_y ? window.c0 : window.r0, rows = of_y ? window.c1 - window.c0 : window.r1 - window.r0;
    const int64_t depths = (all.plan.args.d + kGradDepth - 1) / kGradDepth, tiles = depths * ((rows + kGradRows - 1) / kGradRows);
    for (int64_t tile = block % parts; tile < tiles; tile += parts) {
        gradient_rows<T, kL1>(all.plan, window, 0, of_y, begin + tile / depths * kGradRows, tile % depths * kGradDepth,
                              reinterpret_cast<T*>(shared_memory()));
    }
}

// The problem with this row: the last one that begins at or before it.
OTKD_DEVICE int64_t problem_of(const int64_t* offsets, int64_t problems, int64_t row) {
    int64_t low = 0, high = problems;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (offsets[middle] <= row ? low : high) = middle;
    }
    return low;
}

template <class T>
OTKD_KERNEL(kRowThreads) rows_backward_packed(OTKD_CONSTANT PackedPlan<T> all, int64_t problems) {
    const int64_t row = block_id(), n = all.plan.args.n;
    const int64_t k = row < n ? problem_of(all.row_offsets, problems, row) : problem_of(all.column_offsets, problems, row - n);
    row_backward(all.plan, window_of(all, k), 0, row, reinterpret_cast<double*>(shared_memory()));
}

template <class T>
int64_t make_packed(const CostMatrixRaggedArgs<T>& args, int64_t entries, PackedPlan<T>& all) {
    CostMatrixArgs<T> one = args;
    one.batch = 1;
    const int64_t problems = larger<int64_t>(args.batch, 1);
    all.row_offsets = args.row_offsets;
    all.column_offsets = args.column_offsets;
    all.entries = entries;
    all.parts = static_cast<int>(smaller(1 + ceil_div(entries, problems * kTile * kTile), kMostParts));
    return make_plan(one, all.plan, false);
}

constexpr int64_t shared_bytes(int64_t values) { return values < kScratch ? kScratch : values; }

template <class T>
void gradient_of(const PackedPlan<T>& all, int64_t problems, bool of_y, const Target& target) {
    const CostMatrixArgs<T>& args = all.plan.args;
    if (!(of_y ? args.grad_y : args.grad_x)) return;
    const bool l1 = args.metric == Metric::l1;
    launch("gradient_packed", l1 ? gradient_packed<T, true> : gradient_packed<T, false>, problems * all.parts, kThreads,
           shared_bytes(kGradientValues * int64_t{sizeof(T)}), target, all, of_y);
}

}  // namespace

template <class T>
int64_t cost_matrix_ragged_workspace_bytes(const CostMatrixRaggedArgs<T>& args, int64_t entries) {
    PackedPlan<T> all;
    return make_packed(args, entries, all);
}

template <class T>
void cost_matrix_ragged_fwd(const CostMatrixRaggedArgs<T>& args, int64_t entries, const Target& target) {
    const DeviceGuard guard(target);
    PackedPlan<T> all;
    make_packed(args, entries, all);
    prepare_rows(all.plan, target);
    const bool l1 = args.metric == Metric::l1;
    launch("cost_packed", l1 ? cost_packed<T, true> : cost_packed<T, false>, args.batch * all.parts, kThreads,
           shared_bytes(kTileValues * int64_t{sizeof(T)}), target, all);
}

template <class T>
void cost_matrix_ragged_bwd(const CostMatrixRaggedArgs<T>& args, int64_t entries, const Target& target) {
    const DeviceGuard guard(target);
    PackedPlan<T> all;
    make_packed(args, entries, all);
    prepare_rows(all.plan, target);
    gradient_of(all, args.batch, false, target);
    gradient_of(all, args.batch, true, target);
    if (!rewrites(all.plan.args)) return;
    launch("rows_backward_packed", rows_backward_packed<T>, args.n + args.m, kRowThreads, kScratch, target, all, args.batch);
}

#define OTKD_INSTANTIATE(T)                                                                                \
    template int64_t cost_matrix_ragged_workspace_bytes(const CostMatrixRaggedArgs<T>&, int64_t);             \
    template void cost_matrix_ragged_fwd(const CostMatrixRaggedArgs<T>&, int64_t, const Target&); \
    template void cost_matrix_ragged_bwd(const CostMatrixRaggedArgs<T>&, int64_t, const Target&);
OTKD_INSTANTIATE(float)
OTKD_INSTANTIATE(double)
#undef OTKD_INSTANTIATE

}  // namespace cuda
}  // namespace otkd_fast

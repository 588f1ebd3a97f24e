// SinKD's batch-wise loss and its gradient (reference/sinkd.py): softmax, L1 cost, Sinkhorn rows first, <P, C>, and the
// gradient for an incoming 1, times `scale`.
//
// float, n, m <= 128, d <= 1024, as far as shared memory holds the costs: one launch, a block a problem, value and gradient
// together (sinkd_tile.h); no (n, m) tensor in global memory. Else the kernels of cost_matrix.cu and sinkhorn.cu one after the
// other on the call's workspace: any size, any epsilon.
#include "otkd_fast/sinkd.h"

#include "otkd_fast/cuda.h"
#include "sinkd_tile.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kFillThreads = 128;
constexpr int64_t kLongestRow = 1024;  // of a problem that one block solves

// values *= scale where `multiply`, else values = scale
template <class T>
OTKD_KERNEL(kFillThreads) scale_values(T* values, int64_t count, double scale, bool multiply) {
    const int64_t k = block_id() * block_threads() + thread_id();
    if (k < count) values[k] = static_cast<T>(multiply ? values[k] * scale : scale);
}

// The calls and the pieces of memory that they share; with a null workspace it only counts.
template <class T>
struct Pieces {
    CostMatrixArgs<T> cost{};
    SinkhornArgs<T> solve{};
    T *grad_cost = nullptr, *incoming = nullptr;
    int64_t bytes = 0;

    Pieces(const SinkdArgs<T>& args, bool fused) {
        const bool backward = args.grad_rows || args.grad_columns;
        cost.x = args.rows;
        cost.y = args.columns;
        cost.batch = solve.batch = args.batch;
        cost.n = solve.n = args.n;
        cost.m = solve.m = args.m;
        cost.d = args.d;
        cost.x_batch_stride = args.n * args.d;
        cost.y_batch_stride = args.m * args.d;
        cost.metric = Metric::l1;
        cost.temperature_x = args.temperature_rows;
        cost.temperature_y = args.temperature_columns;
        solve.a = args.weights_rows;
        solve.b = args.weights_columns;
        solve.epsilon = args.epsilon;
        solve.num_iters = args.num_iters;
        solve.keep = backward ? Keep::all : Keep::nothing;
        solve.gradient = Gradient::unroll;
        solve.transport_cost = args.transport_cost;
        const int64_t entries = args.batch * args.n * args.m;
        if (!fused) {
            cost.workspace = take<T>(args, cost_matrix_workspace_bytes(cost) / int64_t{sizeof(T)});
            cost.cost = take<T>(args, entries);
        }
        solve.cost = cost.cost;
        if (backward) {
            if (!fused) grad_cost = take<T>(args, entries);
            incoming = take<T>(args, args.batch);
            solve.history = take<double>(args, args.batch * history_stride(solve));
        }
        const int64_t forward_bytes = sinkhorn_workspace_bytes(solve, false);
        solve.workspace = take<unsigned char>(
            args, backward ? larger(forward_bytes, sinkhorn_workspace_bytes(solve, true)) : forward_bytes);
    }

    template <class S>
    S* take(const SinkdArgs<T>& args, int64_t count) {
        S* piece = args.workspace ? reinterpret_cast<S*>(args.workspace + bytes) : nullptr;
        bytes += round_up(count * int64_t{sizeof(S)}, 64);
        return piece;
    }
};

template <class T>
OTKD_KERNEL(Middle<T>::kThreads, 1) sinkd_tile(OTKD_CONSTANT SinkdArgs<T> args, OTKD_CONSTANT Batch<T> solve, int64_t solver_bytes) {
    SinkdTile<T, Middle<T>>(args, solve, block_id(), solver_bytes).run();
}

template <class T>
bool fits_a_block(const SinkdArgs<T>& args, const Target& target) {
    if constexpr (sizeof(T) == sizeof(double)) {
        return false;  // rare: not worth a twentieth of the wheel
    } else {
        if (!Middle<T>::fits(args.n, args.m) || args.d > kLongestRow) return false;
        return SinkdTile<T, Middle<T>>::shared_bytes(args.n, args.m) <= shared_memory_limit(target);
    }
}

template <class T>
void in_one_launch(const SinkdArgs<T>& args, const Target& target) {
    Pieces<T> pieces(args, true);
    const bool backward = args.grad_rows || args.grad_columns;
    if (backward) pieces.solve.grad_transport_cost = pieces.incoming;
    const int warps = Middle<T>::warps(args.n);
    launch("sinkd_tile", sinkd_tile<T>, args.batch, 32 * warps, SinkdTile<T, Middle<T>>::shared_bytes(args.n, args.m), target,
           args, make_batch(pieces.solve, false, backward), tile_shared_bytes<Middle<T>, T>(warps));
}

template <class T>
void in_pieces(const SinkdArgs<T>& args, const Target& target) {
    Pieces<T> pieces(args, false);
    const int64_t blocks = ceil_div(args.batch, kFillThreads);
    cost_matrix_fwd(pieces.cost, target);
    sinkhorn_fwd(pieces.solve, false, target);
    if (args.scale != 1) {
        launch("scale_values", scale_values<T>, blocks, kFillThreads, 0, target, args.transport_cost, args.batch, args.scale,
               true);
    }
    if (!args.grad_rows && !args.grad_columns) return;
    launch("scale_values", scale_values<T>, blocks, kFillThreads, 0, target, pieces.incoming, args.batch, args.scale, false);
    pieces.solve.grad_transport_cost = pieces.incoming;
    pieces.solve.grad_cost = pieces.grad_cost;
    sinkhorn_bwd(pieces.solve, false, target);
    pieces.cost.rows_ready = true;
    pieces.cost.grad_cost = pieces.grad_cost;
    pieces.cost.grad_x = args.grad_rows;
    pieces.cost.grad_y = args.grad_columns;
    cost_matrix_bwd(pieces.cost, target);
}

}  // namespace

template <class T>
int64_t sinkd_workspace_bytes(const SinkdArgs<T>& args, const Target& target) {
    return Pieces<T>(args, fits_a_block(args, target)).bytes;
}

template <class T>
void sinkd_value_and_grad(const SinkdArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    if constexpr (sizeof(T) == sizeof(float)) {
        if (fits_a_block(args, target)) return in_one_launch(args, target);
    }
    in_pieces(args, target);
}

#define OTKD_INSTANTIATE(T)                                       \
    template int64_t sinkd_workspace_bytes(const SinkdArgs<T>&, const Target&); \
    template void sinkd_value_and_grad(const SinkdArgs<T>&, const Target&);
OTKD_INSTANTIATE(float)
OTKD_INSTANTIATE(double)
#undef OTKD_INSTANTIATE

}  // namespace cuda
}  // namespace otkd_fast

// SinKD's batch-wise loss and its gradient, one call (reference/sinkd.py): the kernels of cost_matrix.cpp and
// sinkhorn.cpp one after the other on memory of the call's own. The incoming gradient is 1.
// Doing both at once saves the second softmax, the history's way through memory and a second call.
#include "otkd_fast/sinkd.h"

#include <algorithm>

#include "otkd_fast/dispatch.h"

namespace otkd_fast {
namespace {

// The two calls and the pieces of memory that they share; with a null workspace it only counts.
template <class T>
struct Plan {
    CostMatrixArgs<T> cost{};
    SinkhornArgs<T> solve{};
    T *grad_cost = nullptr, *incoming = nullptr;
    int64_t bytes = 0;

    explicit Plan(const SinkdArgs<T>& args) {
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
        cost.threads = solve.threads = args.threads;
        solve.a = args.weights_rows;
        solve.b = args.weights_columns;
        solve.epsilon = args.epsilon;
        solve.num_iters = args.num_iters;
        solve.keep = backward ? Keep::all : Keep::nothing;
        solve.gradient = Gradient::unroll;
        solve.together = many_small(solve);
        solve.transport_cost = args.transport_cost;
        const int64_t entries = args.batch * args.n * args.m;
        cost.workspace = take<T>(args, cost_matrix_workspace(cost, backward));
        cost.cost = take<T>(args, entries);
        solve.cost = cost.cost;
        if (backward) {
            grad_cost = take<T>(args, entries);
            incoming = take<T>(args, args.batch);
            solve.history = take<double>(args, args.batch * history_stride(solve));
        }
        const auto bytes_of = kernels().of<T>().sinkhorn_workspace_bytes;
        solve.workspace = take<unsigned char>(args, std::max(bytes_of(solve, false), backward ? bytes_of(solve, true) : 0));
    }

    template <class S>
    S* take(const SinkdArgs<T>& args, int64_t count) {
        S* piece = args.workspace ? reinterpret_cast<S*>(args.workspace + bytes) : nullptr;
        bytes += (count * static_cast<int64_t>(sizeof(S)) + 63) / 64 * 64;
        return piece;
    }
};

}  // namespace

template <class T>
int64_t sinkd_workspace_bytes(const SinkdArgs<T>& args) {
    return Plan<T>(args).bytes;
}

template <class T>
void sinkd_value_and_grad(const SinkdArgs<T>& args) {
    const KernelsOf<T>& run = kernels().of<T>();
    Plan<T> plan(args);
    run.cost_matrix_fwd(plan.cost);
    run.sinkhorn_fwd(plan.solve);
    for (int64_t index = 0; index < args.batch; ++index) args.transport_cost[index] *= static_cast<T>(args.scale);
    if (!args.grad_rows && !args.grad_columns) return;
    std::fill(plan.incoming, plan.incoming + args.batch, static_cast<T>(args.scale));
    plan.solve.grad_transport_cost = plan.incoming;
    plan.solve.grad_cost = plan.grad_cost;
    plan.solve.kernel_ready = args.batch == 1;
    run.sinkhorn_bwd(plan.solve);
    plan.cost.rows_ready = true;
    plan.cost.grad_cost = plan.grad_cost;
    plan.cost.grad_x = args.grad_rows;
    plan.cost.grad_y = args.grad_columns;
    run.cost_matrix_bwd(plan.cost);
}

template int64_t sinkd_workspace_bytes(const SinkdArgs<float>&);
template int64_t sinkd_workspace_bytes(const SinkdArgs<double>&);
template void sinkd_value_and_grad(const SinkdArgs<float>&);
template void sinkd_value_and_grad(const SinkdArgs<double>&);

}  // namespace otkd_fast

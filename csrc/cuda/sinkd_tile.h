// SinKD by one block a problem: logits in, loss and gradients out. The costs lie in shared memory; the solver of
// sinkhorn_shapes.h reads them there, and its gradient takes their place.
//
// Softmax: largest logit and sum of each row first, then the probabilities whenever a row is staged. Costs: kStage entries of all
// rows are staged at a time, the tile's thread adds its entries. Gradient of a row: half a warp has kStage entries of it, goes
// through the rows across, and adds the row's <gradient, p> on the way; a last pass goes through the softmax.
#pragma once
#include "otkd_fast/sinkd.h"
#include "sinkhorn_shapes.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kStage = 16, kStageWidth = kStage + 1;

template <class T, class S>
class SinkdTile {
    using Own = Tile<T, S::kGroups, S::kRows, S::kColumns>;
    static constexpr int kHalves = 2;  // of a warp

    const SinkdArgs<T>& args;
    const Batch<T>& batch;
    const int64_t index, d;
    const int n, m;
    double* dots;            // (n + m,)
    T *top, *inverse;        // (n + m,) of the softmax
    T *rows, *columns, *cost;  // (n, kStageWidth), (m, kStageWidth), (n, m)

  public:
    static int64_t shared_bytes(int64_t n, int64_t m) {
        const int warps = S::warps(n);
        return tile_shared_bytes<S, T>(warps) + (n + m) * 8 + ((n + m) * (2 + kStageWidth) + n * m) * int64_t{sizeof(T)};
    }

    OTKD_DEVICE SinkdTile(const SinkdArgs<T>& call, const Batch<T>& solve, int64_t at, int64_t solver_bytes)
        : args(call), batch(solve), index(at), d(call.d), n(static_cast<int>(call.n)), m(static_cast<int>(call.m)) {
        dots = reinterpret_cast<double*>(shared_memory() + solver_bytes);
        top = reinterpret_cast<T*>(dots + n + m);
        inverse = top + n + m;
        rows = inverse + n + m;
        columns = rows + n * kStageWidth;
        cost = columns + m * kStageWidth;
    }

    OTKD_DEVICE void run() {
        row_statistics();
        fill_costs();
        double* shared = reinterpret_cast<double*>(shared_memory());
        const Problem<T> p(batch, index, cost, cost);
        const bool on_tile = TileForward<T, S::kGroups, S::kRows, S::kColumns>::solve(p);
        barrier();
        if (!on_tile) log_solve(batch, index, static_cast<const T*>(cost), shared);
        if (thread_id() == 0) {
            args.transport_cost[index] = static_cast<T>(args.transport_cost[index] * args.scale);
            if (batch.args.grad_transport_cost) {
                const_cast<T*>(batch.args.grad_transport_cost)[index] = static_cast<T>(args.scale);
            }
        }
        if (!args.grad_rows && !args.grad_columns) return;
        barrier();
        if (on_tile) {
            TileBackward<T, S::kGroups, S::kRows, S::kColumns>(p).run();
        } else {
            log_backward(batch, index, static_cast<const T*>(cost), cost, shared);
        }
        for (int r = thread_id(); r < n + m; r += block_threads()) dots[r] = 0;
        barrier();
        gradients();
    }

  private:
    OTKD_DEVICE const T* logits(int r) const {
        return r < n ? args.rows + (index * n + r) * d : args.columns + (index * m + r - n) * d;
    }
    OTKD_DEVICE double temperature(int r) const { return r < n ? args.temperature_rows : args.temperature_columns; }
    OTKD_DEVICE T inverse_temperature(int r) const { return static_cast<T>(1 / temperature(r)); }
    OTKD_DEVICE T probability(int r, int64_t k) const {
        const T logit = logits(r)[k];
        return temperature(r) > 0 ? exp_of((logit - top[r]) * inverse_temperature(r)) * inverse[r] : logit;
    }

    OTKD_DEVICE void row_statistics() {
        for (int r = warp_id(); r < n + m; r += block_warps()) {
            if (!(temperature(r) > 0)) continue;
            const T* z = logits(r);
            T best = static_cast<T>(-kInfinity);
            for (int64_t k = lane_id(); k < d; k += 32) best = larger(z[k], best);
            best = warp_max(best);
            double total = 0;
            for (int64_t k = lane_id(); k < d; k += 32) total += exp_of((z[k] - best) * inverse_temperature(r));
            total = warp_sum(total);
            if (lane_id() != 0) continue;
            top[r] = best;
            inverse[r] = static_cast<T>(1 / total);  // NaN if a logit is
        }
        barrier();
    }

    // The entries [k0, k0 + kStage) of all rows; 0 beyond d. Between two barriers.
    OTKD_DEVICE void stage(int64_t k0) {
        for (int e = thread_id(); e < (n + m) * kStage; e += block_threads()) {
            const int r = e / kStage, k = e % kStage;
            rows[r * kStageWidth + k] = k0 + k < d ? probability(r, k0 + k) : T(0);  // the columns follow the rows
        }
    }

    OTKD_DEVICE void fill_costs() {
        T total[S::kGroups][S::kRows][S::kColumns] = {};
        for (int64_t k0 = 0; k0 < d; k0 += kStage) {
            stage(k0);
            barrier();
            OTKD_ROLLED
            for (int k = 0; k < kStage; ++k) {
                T other[S::kColumns];
                OTKD_UNROLL
                for (int c = 0; c < S::kColumns; ++c) {
                    other[c] = Own::column(c) < m ? columns[Own::column(c) * kStageWidth + k] : T(0);
                }
                OTKD_UNROLL
                for (int g = 0; g < S::kGroups; ++g) {
                    OTKD_UNROLL
                    for (int r = 0; r < S::kRows; ++r) {
                        const T own = Own::row(g, r) < n ? rows[Own::row(g, r) * kStageWidth + k] : T(0);
                        OTKD_UNROLL
                        for (int c = 0; c < S::kColumns; ++c) {
                            const T delta = own - other[c];
                            total[g][r][c] += delta < 0 ? -delta : delta;
                        }
                    }
                }
            }
            barrier();
        }
        Own::for_entries(n, m, [&](int g, int r, int c, int i, int j) { cost[i * m + j] = total[g][r][c]; });
        barrier();
    }

    // sum over the rows across of weight * sign(own - other), for one entry of one row.
    OTKD_DEVICE T signed_sum(int r, int k) const {
        const bool is_row = r < n;
        const T own = rows[r * kStageWidth + k], *across = (is_row ? columns : rows) + k;
        const T* weights = is_row ? cost + r * m : cost + (r - n);
        const int count = is_row ? m : n, stride = is_row ? 1 : m;
        T total = 0;
        for (int j = 0; j < count; ++j) {
            const T delta = own - across[j * kStageWidth], w = weights[j * stride];
            total += delta > 0 ? w : delta < 0 ? -w : delta;
        }
        return total;
    }
    OTKD_DEVICE T* output(int r) const {
        T* grads = r < n ? args.grad_rows : args.grad_columns;
        return grads ? grads + (r < n ? index * n + r : index * m + r - n) * d : nullptr;
    }

    OTKD_DEVICE void gradients() {
        const int k = lane_id() % kStage, half = lane_id() / kStage;
        const int step = kHalves * block_warps();
        for (int64_t k0 = 0; k0 < d; k0 += kStage) {
            stage(k0);
            barrier();
            for (int r0 = kHalves * warp_id(); r0 < n + m; r0 += step) {
                const int r = r0 + half;
                const bool inside = r < n + m && k0 + k < d && output(r);
                const T grad = inside ? signed_sum(r, k) : T(0);
                double dot = inside ? static_cast<double>(grad) * rows[r * kStageWidth + k] : 0.0;
                OTKD_UNROLL
                for (int offset = kStage / 2; offset > 0; offset /= 2) dot += shuffle_xor(dot, offset);
                if (inside) output(r)[k0 + k] = grad;
                if (r < n + m && k == 0) dots[r] += dot;
            }
            barrier();
        }
        for (int r = warp_id(); r < n + m; r += block_warps()) {
            if (!(temperature(r) > 0) || !output(r)) continue;
            const T shift = static_cast<T>(dots[r]), scale = inverse_temperature(r);
            for (int64_t at = lane_id(); at < d; at += 32) {
                output(r)[at] = probability(r, at) * (output(r)[at] - shift) * scale;
            }
        }
    }
};

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

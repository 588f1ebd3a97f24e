// dL/dC of sinkhorn_points.cu, a tile at a time, as in sinkhorn_log_bwd.h:
//   P (d_transport (1 - X) + d_dual) + sum over the steps of (Q w + R z) / epsilon,   2 exponentials an entry and step
// The potentials and adjoints of two steps at a time go through shared memory.
#pragma once
#include "point_gradient.h"
#include "sinkhorn_points_sweep.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kStepsAtOnce = 2, kPoints = kOwn + kOther, kStepValues = 4 * kPoints;
constexpr int kGradientShared = kStageValues + kWeightValues + kStepsAtOnce * kStepValues;  // of S

// What step k has of one point: the logarithms of Q and R without the costs, in base 2, and the factors of Q and R. `k` the number of
// steps: of the plan.
template <class S>
struct StepItem {
    S q, r, by_q, by_r;
};
template <class S, class T>
OTKD_DEVICE StepItem<S> step_item(const Trace<T>& t, int64_t k, bool column, int64_t i) {
    const Problem<T>& p = t.p;
    if (i >= (column ? p.m : p.n)) return {static_cast<S>(-kInfinity), static_cast<S>(-kInfinity), S(0), S(0)};
    if (k == t.steps) {
        const S level = static_cast<S>((column ? t.gamma[i] : t.phi[i]) * kLog2E);
        return {level, level, S(1), S(1)};
    }
    if (column) {
        return {static_cast<S>(t.gamma_of(k)[i] * kLog2E), static_cast<S>(t.before(k, i) * kLog2E), static_cast<S>(t.w(k)[i]), S(1)};
    }
    const S level = static_cast<S>(t.phi_of(k)[i] * kLog2E);
    return {level, level, S(1), static_cast<S>(t.z(k)[i])};
}

template <class S, class T>
struct SolveGradient {
    const Trace<T>& t;
    bool flip;
    int64_t i0;
    S transport, dual, slope, inverse, per_epsilon;
    S* items;  // (kStepsAtOnce, 4, kPoints)

    OTKD_DEVICE SolveGradient(const Trace<T>& trace, bool flipped, int64_t first, S* shared)
        : t(trace), flip(flipped), i0(first), transport(static_cast<S>(t.p.incoming(t.p.args.grad_transport_cost))),
          dual(static_cast<S>(t.p.incoming(t.p.args.grad_regularized_cost))), slope(t.steps > 0 ? S(1) : S(0)),
          inverse(static_cast<S>(kLog2E / t.p.args.epsilon)), per_epsilon(static_cast<S>(1 / t.p.args.epsilon)), items(shared) {}

    OTKD_DEVICE void stage_items(int64_t last, int64_t j0) const {
        for (int e = thread_id(); e < kStepsAtOnce * kPoints; e += kPointThreads) {
            const int s = e / kPoints, at = e % kPoints;
            if (last - s < 0) continue;
            const StepItem<S> item = step_item<S>(t, last - s, (at < kOwn) == flip, at < kOwn ? i0 + at : j0 + at - kOwn);
            S* to = items + s * kStepValues + at;
            to[0] = item.q;
            to[kPoints] = item.r;
            to[2 * kPoints] = item.by_q;
            to[3 * kPoints] = item.by_r;
        }
    }
    OTKD_DEVICE void add_step(const S* from, const S (&cost)[4][4], bool of_plan, S (&by)[4][4]) const {
        const S *own = from + own_of_thread(), *other = from + kOwn + other_of_thread();
        const Four<S> q = four(own), r = four(own + kPoints), by_q = four(own + 2 * kPoints), by_r = four(own + 3 * kPoints);
        const Four<S> q2 = four(other), r2 = four(other + kPoints), by_q2 = four(other + 2 * kPoints), by_r2 = four(other + 3 * kPoints);
        OTKD_UNROLL
        for (int i = 0; i < 4; ++i) {
            OTKD_UNROLL
            for (int j = 0; j < 4; ++j) {
                const S x = cost[i][j] * inverse, first = exp2_of(q.v[i] - x + q2.v[j]);
                if (of_plan) {
                    by[i][j] = first * (transport * (1 - cost[i][j] * per_epsilon * slope) + dual);
                } else {
                    const S second = exp2_of(r.v[i] - x + r2.v[j]);
                    by[i][j] += (first * (by_q.v[i] * by_q2.v[j]) + second * (by_r.v[i] * by_r2.v[j])) * per_epsilon;
                }
            }
        }
    }
    OTKD_DEVICE void operator()(const S (&cost)[4][4], int64_t j0, S*, S (&by)[4][4]) const {
        for (int64_t last = t.steps; last >= 0; last -= kStepsAtOnce) {
            barrier();
            stage_items(last, j0);
            barrier();
            for (int s = 0; s < kStepsAtOnce && last - s >= 0; ++s) add_step(items + s * kStepValues, cost, last - s == t.steps, by);
        }
        OTKD_UNROLL
        for (int i = 0; i < 4; ++i) {
            OTKD_UNROLL
            for (int j = 0; j < 4; ++j) by[i][j] = cost[i][j] == static_cast<S>(kInfinity) ? S(0) : by[i][j];
        }
    }
};

template <class S, class T>
OTKD_DEVICE void solve_gradient(const PointBatch<T>& all, const Trace<T>& trace, bool flip, int64_t i0, T* grad) {
    S* shared = reinterpret_cast<S*>(shared_memory());
    const Clouds<T> points(all.points, trace.p.index, flip);
    const double* scales = points.metric != Metric::cosine ? nullptr
                                                           : all.points.scales + trace.p.index * (trace.p.n + trace.p.m) + (flip ? trace.p.n : 0);
    const SolveGradient<S, T> gradient(trace, flip, i0, shared + kStageValues + kWeightValues);
    point_gradient(points, i0, scales, shared, grad + trace.p.index * points.count * points.d, gradient);
}

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

// P v for the plan between points P_ij = exp((f_i + g_j - C_ij) / epsilon), and its gradient by the points; float and double.
//
// A block has 32 rows x 64 columns of the result and goes through the tiles of the plan (point_tile.h): 2 d operations (l1: 3 d), one
// exponential and a multiply-add a column for an entry; v is read n / 32 times. Gradient: dL/dC_ij = -P_ij <o_i, v_j> / epsilon for
// an incoming gradient o, a tile at a time, and from there as point_gradient.h. No (n, m) memory.
#include "otkd_fast/cuda.h"

#include "point_gradient.h"

namespace otkd_fast {
namespace cuda {
namespace {

template <class T>
struct Application {
    PlanApplyArgs<T> args;
    Plan<T> points;
};

// The logarithms of a plan's tile without its costs, in base 2.
template <class T>
struct PlanTile {
    const T *own, *other;  // potentials
    int64_t i0, count, others;
    T epsilon, inverse;

    OTKD_DEVICE PlanTile(const Application<T>& all, int64_t index, bool flip, int64_t first)
        : i0(first), count(flip ? all.args.m : all.args.n), others(flip ? all.args.n : all.args.m),
          epsilon(static_cast<T>(all.args.epsilon)), inverse(static_cast<T>(kLog2E / all.args.epsilon)) {
        const T *f = all.args.f + index * all.args.n, *g = all.args.g + index * all.args.m;
        own = flip ? g : f;
        other = flip ? f : g;
    }
    OTKD_DEVICE void entries(const T (&cost)[4][4], int64_t j0, T (&plan)[4][4]) const {
        OTKD_UNROLL
        for (int c = 0; c < 4; ++c) {
            const int64_t j = j0 + other_of_thread() + c;
            const T level = j < others ? other[j] : static_cast<T>(-kInfinity);
            OTKD_UNROLL
            for (int r = 0; r < 4; ++r) {
                const int64_t i = i0 + own_of_thread() + r;
                plan[r][c] = i < count ? exp2_of((own[i] - cost[r][c] + level) * inverse) : T(0);
            }
        }
    }
};

template <class T>
OTKD_KERNEL(kPointThreads, sizeof(T) == sizeof(float) ? 3 : 2) plan_product(OTKD_CONSTANT Application<T> all) {
    const PlanApplyArgs<T>& args = all.args;
    const uint32_t tiles = static_cast<uint32_t>((args.n + kOwn - 1) / kOwn), chunks = static_cast<uint32_t>((args.columns + kOther - 1) / kOther);
    const uint32_t block = static_cast<uint32_t>(block_id());
    const int64_t index = block / chunks / tiles, i0 = block / chunks % tiles * int64_t{kOwn}, k0 = block % chunks * int64_t{kOther};
    T *stage = reinterpret_cast<T*>(shared_memory()), *weights = stage + kStageValues;
    const Clouds<T> points(all.points, index, false);
    const PlanTile<T> plan(all, index, false, i0);
    const T* v = args.v + index * args.m * args.columns;
    T total[4][4] = {};
    for (int64_t j0 = 0; j0 < args.m; j0 += kOther) {
        T cost[4][4], entry[4][4], part[4][4] = {};
        tile_costs(points, i0, j0, stage, cost);
        plan.entries(cost, j0, entry);
        store_weights(entry, weights);
        barrier();
        for (int b0 = 0; b0 < kOther && j0 + b0 < args.m; b0 += kFeatures) {
            OTKD_UNROLL_4
            for (int e = thread_id(); e < kFeatures * kOther; e += kPointThreads) {
                const int b = e / kOther, k = e % kOther;
                const bool inside = j0 + b0 + b < args.m && k0 + k < args.columns;
                stage[b * kOtherLine + k] = inside ? v[(j0 + b0 + b) * args.columns + k0 + k] : T(0);
            }
            barrier();
            const int count = static_cast<int>(smaller<int64_t>(kFeatures, args.m - j0 - b0));
            OTKD_ROLLED
            for (int b = 0; b < count; ++b) {
                const Four<T> w = four(weights + (b0 + b) * kOwnLine + own_of_thread()), other = four(stage + b * kOtherLine + other_of_thread());
                OTKD_UNROLL
                for (int r = 0; r < 4; ++r) {
                    OTKD_UNROLL
                    for (int c = 0; c < 4; ++c) part[r][c] += w.v[r] * other.v[c];
                }
            }
            barrier();
        }
        OTKD_UNROLL
        for (int r = 0; r < 4; ++r) {
            OTKD_UNROLL
            for (int c = 0; c < 4; ++c) total[r][c] += part[r][c];
        }
    }
    OTKD_UNROLL
    for (int r = 0; r < 4; ++r) {
        OTKD_UNROLL
        for (int c = 0; c < 4; ++c) {
            const int64_t i = i0 + own_of_thread() + r, k = k0 + other_of_thread() + c;
            if (i < args.n && k < args.columns) args.out[(index * args.n + i) * args.columns + k] = total[r][c];
        }
    }
}

template <class T>
struct ApplyGradient {
    PlanTile<T> plan;
    const T *own, *other;  // (count, columns), (others, columns): the incoming gradient and v, or v and that
    int64_t columns;

    OTKD_DEVICE void operator()(const T (&cost)[4][4], int64_t j0, T* stage, T (&by)[4][4]) const {
        T product[4][4];
        const Rows<T> ours{own, plan.count, columns}, theirs{other, plan.others, columns};
        point_sums<Form::product>(ours, theirs, columns, plan.i0, j0, stage, product);
        plan.entries(cost, j0, by);
        OTKD_UNROLL
        for (int r = 0; r < 4; ++r) {
            OTKD_UNROLL
            for (int c = 0; c < 4; ++c) by[r][c] = by[r][c] != 0 ? -by[r][c] * product[r][c] / plan.epsilon : T(0);
        }
    }
};

template <class T>
OTKD_KERNEL(kPointThreads) plan_gradient(OTKD_CONSTANT Application<T> all, bool flip, T* grad) {
    const PlanApplyArgs<T>& args = all.args;
    const uint32_t tiles = static_cast<uint32_t>(((flip ? args.m : args.n) + kOwn - 1) / kOwn), block = static_cast<uint32_t>(block_id());
    const int64_t index = block / tiles, i0 = block % tiles * int64_t{kOwn};
    const Clouds<T> points(all.points, index, flip);
    const T *o = args.grad_out + index * args.n * args.columns, *v = args.v + index * args.m * args.columns;
    const ApplyGradient<T> gradient{PlanTile<T>(all, index, flip, i0), flip ? v : o, flip ? o : v, args.columns};
    const double* scales = points.metric != Metric::cosine ? nullptr : all.points.scales + index * (args.n + args.m) + (flip ? args.n : 0);
    point_gradient(points, i0, scales, reinterpret_cast<T*>(shared_memory()), grad + index * points.count * points.d, gradient);
}

// The workspace has the rows that the cosine rewrites.
template <class T>
Application<T> make_application(const PlanApplyArgs<T>& args, int64_t& bytes) {
    Application<T> all;
    all.args = args;
    CostMatrixArgs<T> rows{};
    rows.x = args.x;
    rows.y = args.y;
    rows.workspace = reinterpret_cast<T*>(args.workspace);
    rows.batch = args.batch;
    rows.n = args.n;
    rows.m = args.m;
    rows.d = args.d;
    rows.x_batch_stride = args.n * args.d;
    rows.y_batch_stride = args.m * args.d;
    rows.metric = args.metric;
    bytes = make_plan(rows, all.points, false);
    return all;
}

template <class T>
constexpr int64_t kShared = (kStageValues + kWeightValues) * int64_t{sizeof(T)};

}  // namespace

template <class T>
int64_t plan_apply_workspace_bytes(const PlanApplyArgs<T>& args) {
    int64_t bytes;
    make_application(args, bytes);
    return bytes;
}

template <class T>
void plan_apply(const PlanApplyArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    int64_t bytes;
    const Application<T> all = make_application(args, bytes);
    prepare_rows(all.points, target);
    const int64_t blocks = args.batch * ceil_div(args.n, kOwn) * ceil_div(args.columns, kOther);
    launch("plan_product", plan_product<T>, blocks, kPointThreads, kShared<T>, target, all);
}

template <class T>
void plan_apply_bwd(const PlanApplyArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    int64_t bytes;
    const Application<T> all = make_application(args, bytes);
    prepare_rows(all.points, target);
    for (bool flip : {false, true}) {
        T* grad = flip ? args.grad_y : args.grad_x;
        const int64_t blocks = grad ? args.batch * ceil_div(flip ? args.m : args.n, kOwn) : 0;
        launch("plan_gradient", plan_gradient<T>, blocks, kPointThreads, kShared<T>, target, all, flip, grad);
    }
}

#define OTKD_INSTANTIATE(T)                                                 \
    template int64_t plan_apply_workspace_bytes(const PlanApplyArgs<T>&);   \
    template void plan_apply(const PlanApplyArgs<T>&, const Target&);       \
    template void plan_apply_bwd(const PlanApplyArgs<T>&, const Target&);
OTKD_INSTANTIATE(float)
OTKD_INSTANTIATE(double)
#undef OTKD_INSTANTIATE

}  // namespace cuda
}  // namespace otkd_fast

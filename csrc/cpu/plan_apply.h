// out = P v, P_ij = exp((f_i + g_j - C_ij) / epsilon), for costs between points: a block of rows of P at a time.
// 2 d operations (3 d for l1), one exponential and `columns` multiply-adds an entry.
// By the points, for an incoming gradient o of out: dL/dC_ij = -P_ij <o_i, v_j> / epsilon, a block at a time too.
#pragma once
#include "otkd_fast/sinkhorn_points.h"
#include "point_tiles.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class T>
class PlanApply {
  public:
    PlanApply(const PlanApplyArgs<T>& args, Arena& arena, int threads, bool backward)
        : args_(args),
          tiles_({args.x, args.y, args.n, args.m, args.d, args.metric}, arena, threads, backward && args.need_x,
                 backward && args.need_y),
          ld_(round_up(args.m, width<T>)),
          tile_(round_up(tiles_.block(), kBlock)),
          exp_(1.0 / args.epsilon) {
        columns_ = arena.take<T>(args.columns * ld_);
        g_ = arena.take<T>(ld_);
        plan_ = arena.take<T>(threads * tile_ * ld_);
        if (!backward) return;
        cost_ = arena.take<T>(threads * tile_ * args.m);
        gradient_ = arena.take<T>(threads * tile_ * args.m);
    }

    void forward(int64_t index, const Team& team) {
        T* plan = plan_ + team.rank * tile_ * ld_;
        for_row_blocks(index, team, [&](int64_t i, int64_t count) {
            tiles_.for_costs(i, count, [&](int64_t r, int64_t j, Vec<T> cost) { store_plan(index, i, r, j, cost, plan); });
            T* out = args_.out + (index * args_.n + i) * args_.columns;
            for (int64_t r = 0; r < count; r += kBlock) multiply(plan + r * ld_, count - r, out + r * args_.columns);
        });
        team.barrier();
    }

    void backward(int64_t index, const Team& team) {
        T* plan = plan_ + team.rank * tile_ * ld_;
        T *cost = cost_ + team.rank * tile_ * args_.m, *gradient = gradient_ + team.rank * tile_ * args_.m;
        T* grad_x = args_.grad_x ? args_.grad_x + index * args_.n * args_.d : nullptr;
        for_row_blocks(index, team, [&](int64_t i, int64_t count) {
            tiles_.for_costs(i, count, [&](int64_t r, int64_t j, Vec<T> c) {
                store_plan(index, i, r, j, c, plan);
                store_as(cost + r * args_.m + j, c, args_.m - j);
            });
            const T* grad_out = args_.grad_out + (index * args_.n + i) * args_.columns;
            for (int64_t r = 0; r < count; ++r) {
                cost_gradient(grad_out + r * args_.columns, plan + r * ld_, gradient + r * args_.m);
            }
            tiles_.emit(i, count, gradient, cost, grad_x);
        });
        tiles_.close(team, args_.grad_y ? args_.grad_y + index * args_.m * args_.d : nullptr);
    }

  private:
    // Calls body(i, count) for the thread's rows of problem `index`.
    template <class Body>
    void for_row_blocks(int64_t index, const Team& team, Body body) {
        tiles_.open(index, team);
        load_columns(index, team);
        team.barrier();
        int64_t begin, end;
        split(args_.n, kBlock, team.size, team.rank, begin, end);
        for (int64_t i = begin; i < end; i += tiles_.block()) body(i, end - i < tiles_.block() ? end - i : tiles_.block());
    }
    OTKD_INLINE void store_plan(int64_t index, int64_t i, int64_t r, int64_t j, Vec<T> cost, T* plan) const {
        store(plan + r * ld_ + j, exp_((args_.f[index * args_.n + i + r] - cost) + load(g_ + j)));
    }
    // v transposed, and g, both padded: beyond m the plan is 0.
    void load_columns(int64_t index, const Team& team) {
        int64_t begin, end;
        split(ld_, width<T>, team.size, team.rank, begin, end);
        for (int64_t j = begin; j < end; ++j) {
            const bool used = j < args_.m;
            g_[j] = used ? args_.g[index * args_.m + j] : -std::numeric_limits<T>::infinity();
            for (int64_t c = 0; c < args_.columns; ++c) {
                columns_[c * ld_ + j] = used ? args_.v[(index * args_.m + j) * args_.columns + c] : T(0);
            }
        }
    }
    // Up to kBlock rows of the plan times every column; rows beyond `count` are read (the tile has them) and dropped.
    void multiply(const T* plan, int64_t count, T* out) const {
        for (int64_t c = 0; c < args_.columns; ++c) {
            Vec<T> dot[kBlock] = {};
            const T* column = columns_ + c * ld_;
            for (int64_t j = 0; j < ld_; j += width<T>) {
                const Vec<T> v = load(column + j);
                for (int r = 0; r < kBlock; ++r) dot[r] += load(plan + r * ld_ + j) * v;
            }
            for (int r = 0; r < kBlock && r < count; ++r) out[r * args_.columns + c] = sum<T>(dot[r]);
        }
    }
    // A row of dL/dC; o (columns,) is the incoming gradient.
    void cost_gradient(const T* o, const T* plan, T* gradient) const {
        const T inverse = static_cast<T>(-1.0 / args_.epsilon);
        for (int64_t j = 0; j < args_.m; j += width<T>) {
            Vec<T> product = {};
            for (int64_t c = 0; c < args_.columns; ++c) product += o[c] * load(columns_ + c * ld_ + j);
            store_as(gradient + j, load(plan + j) * product * inverse, args_.m - j);
        }
    }

    const PlanApplyArgs<T>& args_;
    PointTiles<T, T> tiles_;
    const int64_t ld_, tile_;  // rows of a tile
    const ScaledExp<T> exp_;
    T *columns_, *g_, *plan_, *cost_ = nullptr, *gradient_ = nullptr;
};

template <class T>
int apply_threads(const PlanApplyArgs<T>& args) {
    constexpr int64_t parallel_work = 1000 * 1000;
    return args.batch * args.n * args.m * (args.d + args.columns) < parallel_work ? 1 : args.threads;
}

template <class T>
int64_t apply_bytes(const PlanApplyArgs<T>& args, bool backward) {
    Arena arena{nullptr};
    PlanApply<T>(args, arena, apply_threads(args), backward);
    return arena.used;
}

template <class T>
void apply(const PlanApplyArgs<T>& args, bool backward) {
    const int threads = apply_threads(args);
    parallel(threads, [&](const Team& team) {
        Arena arena{args.workspace};
        PlanApply<T> product(args, arena, threads, backward);
        for (int64_t index = 0; index < args.batch; ++index) {
            backward ? product.backward(index, team) : product.forward(index, team);
        }
    });
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

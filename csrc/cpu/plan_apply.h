// out = P v, P_ij = exp((f_i + g_j - C_ij) / epsilon), for costs between points: a block of rows of P at a time.
// 2 d operations (3 d for l1), one exponential and `columns` multiply-adds an entry.
#pragma once
#include "otkd_fast/sinkhorn_points.h"
#include "point_tiles.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class T>
class PlanApply {
  public:
    PlanApply(const PlanApplyArgs<T>& args, Arena& arena)
        : args_(args),
          tiles_({args.x, args.y, args.n, args.m, args.d, args.x_batch_stride, args.y_batch_stride, args.metric}, arena,
                 args.threads, false, false),
          ld_(round_up(args.m, width<T>)),
          exp_(1.0 / args.epsilon) {
        columns_ = arena.take<T>(args.columns * ld_);
        g_ = arena.take<T>(ld_);
        plan_ = arena.take<T>(args.threads * round_up(tiles_.block(), kBlock) * ld_);
    }

    void run(int64_t index, const Team& team) {
        tiles_.open(index, team);
        load_columns(index, team);
        team.barrier();
        int64_t begin, end;
        split(args_.n, kBlock, team.size, team.rank, begin, end);
        T* plan = plan_ + team.rank * round_up(tiles_.block(), kBlock) * ld_;
        const T* f = args_.f + index * args_.n;
        for (int64_t i = begin; i < end; i += tiles_.block()) {
            const int64_t count = end - i < tiles_.block() ? end - i : tiles_.block();
            tiles_.for_costs(i, count, [&](int64_t r, int64_t j, Vec<T> cost) {
                store(plan + r * ld_ + j, exp_((f[i + r] - cost) + load(g_ + j)));
            });
            for (int64_t r = 0; r < count; r += kBlock) {
                multiply(plan + r * ld_, count - r, args_.out + (index * args_.n + i + r) * args_.columns);
            }
        }
        team.barrier();
    }

  private:
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

    const PlanApplyArgs<T>& args_;
    PointTiles<T, T> tiles_;
    const int64_t ld_;
    const ScaledExp<T> exp_;
    T *columns_, *g_, *plan_;
};

template <class T>
int64_t apply_bytes(const PlanApplyArgs<T>& args) {
    Arena arena{nullptr};
    PlanApply<T>(args, arena);
    return arena.used;
}

template <class T>
void apply(const PlanApplyArgs<T>& args) {
    constexpr int64_t parallel_work = 1000 * 1000;
    const bool small = args.batch * args.n * args.m * (args.d + args.columns) < parallel_work;
    parallel(small ? 1 : args.threads, [&](const Team& team) {
        Arena arena{args.workspace};
        PlanApply<T> product(args, arena);
        for (int64_t index = 0; index < args.batch; ++index) product.run(index, team);
    });
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

// The classes of sinkhorn_rows.h for costs between points, computed when a block is asked for. With `stored` the kernel
// (on scalings) or the costs (in the log domain) are kept while the iterations run.
#pragma once
#include "otkd_fast/sinkhorn_points.h"
#include "point_tiles.h"
#include "sinkhorn_rows.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// Costs in S of points in T.
template <class S, class T>
class PointCosts {
  public:
    using Input = T;
    using Cost = S;
    using Args = SinkhornPointsArgs<T>;

    PointCosts(const Args& args, Arena& arena, int threads, bool backward)
        : PointCosts(args, arena, threads, backward, args.stored) {}

    void open(const Problem<T>& p, const Team& team) {
        index_ = p.index;
        tiles_.open(p.index, team);
        cost_tile_ = cost_ + (keeps_ ? 0 : team.rank * tiles_.block() * args_.m);
        gradient_tile_ = gradient_ + team.rank * tiles_.block() * args_.m;
        tile_begin_ = -1;
        if (!keeps_) return;
        int64_t begin, end;
        split(args_.n, kBlock, team.size, team.rank, begin, end);
        for_blocks(begin, end, block(), false, [&](int64_t i, int64_t count) {
            tiles_.costs(i, count, cost_ + i * args_.m);
        });
        team.barrier();
    }
    int64_t block() const { return tiles_.block(); }
    const S* cost(int64_t i, int64_t count) {
        if (keeps_) return cost_ + i * args_.m;
        if (tile_begin_ != i) tiles_.costs(i, count, cost_tile_);
        tile_begin_ = i;
        return cost_tile_;
    }
    bool wants_gradient() const { return args_.need_x || args_.need_y; }
    S* gradient(int64_t, int64_t) const { return gradient_tile_; }
    void emit(int64_t i, int64_t count) {
        const bool reads_cost = args_.metric == Metric::l2 || args_.metric == Metric::cosine;
        tiles_.emit(i, count, gradient_tile_, reads_cost ? cost(i, count) : nullptr, grad_x());
    }
    void close(const Team& team) {
        if (wants_gradient()) tiles_.close(team, args_.grad_y ? args_.grad_y + index_ * args_.m * args_.d : nullptr);
    }

  protected:
    PointCosts(const Args& args, Arena& arena, int threads, bool backward, bool keeps)
        : args_(args),
          keeps_(keeps),
          tiles_({args.x, args.y, args.n, args.m, args.d, args.metric}, arena, threads, backward && args.need_x,
                 backward && args.need_y) {
        cost_ = arena.take<S>((keeps ? args.n : threads * block()) * args.m);
        if (backward && wants_gradient()) gradient_ = arena.take<S>(threads * block() * args.m);
    }

    const Args& args_;

  private:
    T* grad_x() const { return args_.grad_x ? args_.grad_x + index_ * args_.n * args_.d : nullptr; }

    const bool keeps_;

  protected:
    PointTiles<S, T> tiles_;

  private:
    S *cost_ = nullptr, *gradient_ = nullptr, *cost_tile_ = nullptr, *gradient_tile_ = nullptr;
    int64_t index_ = 0, tile_begin_ = -1;  // the block whose costs cost_tile_ holds
};

template <class S, class T>
class PointRows : public PointCosts<S, T> {
    using Base = PointCosts<S, T>;

  public:
    using Scalar = S;
    using typename Base::Args;

    PointRows(const Args& args, Arena& arena, int threads, bool backward)
        : Base(args, arena, threads, backward, false),
          one_pass_(backward && (args.gradient == Gradient::envelope || args.gradient == Gradient::detach) &&
                    this->wants_gradient()),
          stored_(args.stored && !one_pass_),
          ld_(round_up(args.m, 2 * width<S>)),
          exp_(1.0 / args.epsilon) {
        kernel_ = arena.take<S>((stored_ ? round_up(args.n, kBlock) : threads * this->block()) * ld_);
        shift_ = arena.take<S>(round_up(args.n, kBlock));
        spread_.slots = arena.take<double>(threads * kSlots);
    }

    bool stored() const { return stored_; }

    // Shifts, the range of the costs, and the kernel where it is stored. A gradient at given scalings needs each block only
    // once: everything then happens when it is asked for.
    void start(const Team& team) {
        kernel_tile_ = kernel_ + (stored_ ? 0 : team.rank * this->block() * ld_);
        if (one_pass_) return;
        int64_t begin, end;
        split(round_up(this->args_.n, kBlock), kBlock, team.size, team.rank, begin, end);
        Vec<S> high = splat(-std::numeric_limits<S>::infinity());
        S low = std::numeric_limits<S>::infinity();
        for_blocks(begin, end, this->block(), false, [&](int64_t i, int64_t count) {
            const int64_t served = this->args_.n - i < count ? this->args_.n - i : count;
            const S* cost = this->cost(i, served);
            high = max<S>(highest(cost, served * this->args_.m), high);
            for (int64_t r = 0; r < count; ++r) {
                shift_[i + r] = r < served ? start_row(cost + r * this->args_.m, kernel_ + (i + r) * ld_) : S(0);
                if (r < served) low = shift_[i + r] < low ? shift_[i + r] : low;
                if (r >= served && stored_) std::memset(kernel_ + (i + r) * ld_, 0, ld_ * sizeof(S));
            }
        });
        spread_.put(team, 0, -static_cast<double>(low));
        spread_.put(team, 1, largest<S>(high));
    }
    // The kernel is the plan, exp(phi_i + gamma_j - C_ij / epsilon).
    void start_plan(const Team& team, const double* phi, const double* gamma) {
        phi_ = phi;
        gamma_ = gamma;
        kernel_tile_ = kernel_ + (stored_ ? 0 : team.rank * this->block() * ld_);
        int64_t begin, end;
        split(round_up(this->args_.n, kBlock), kBlock, team.size, team.rank, begin, end);
        for (int64_t i = begin; i < end; ++i) shift_[i] = 0;
        if (!stored_) return;
        for_blocks(begin, end, this->block(), false, [&](int64_t i, int64_t count) { fill(i, count, kernel_ + i * ld_); });
    }
    // (max C - min C) / epsilon, after the barrier that follows start().
    double range(const Team& team) const {
        const double spread = spread_.max(team, 1) + spread_.max(team, 0);
        return spread > 0 ? spread / this->args_.epsilon : 0.0;
    }
    S shift(int64_t i) const { return shift_[i]; }

    const S* kernel(int64_t i, int64_t count) {
        if (stored_) return kernel_ + i * ld_;
        fill(i, count, kernel_tile_);
        return kernel_tile_;
    }

  private:
    // The largest finite of the costs.
    static Vec<S> highest(const S* cost, int64_t count) {
        const Vec<S> none = splat(-std::numeric_limits<S>::infinity());
        const S inf = std::numeric_limits<S>::infinity();
        Vec<S> high = none;
        for_vectors<S>(0, count, [&](int64_t k, int64_t lanes_used) {
            const Vec<S> c = load_up_to(cost + k, lanes_used, inf);
            high = max<S>(c < inf ? c : none, high);
        });
        return high;
    }
    // The shift of a row, and its kernel where it is stored.
    S start_row(const S* cost, S* kernel) const {
        if (stored_) return kernel_row<S, S>(cost, this->args_.m, ld_, exp_, kernel);
        return smallest_cost<S, S>(cost, this->args_.m);
    }
    // The kernel of the rows [i, i + count), zeros beyond row n.
    void fill(int64_t i, int64_t count, S* kernel) {
        const int64_t m = this->args_.m, served = this->args_.n - i < count ? this->args_.n - i : count;
        if (one_pass_) {
            const S* cost = this->cost(i, served);
            for (int64_t r = 0; r < served; ++r) shift_[i + r] = kernel_row<S, S>(cost + r * m, m, ld_, exp_, kernel + r * ld_);
        } else {
            this->tiles_.for_costs(i, served, [&](int64_t r, int64_t j, Vec<S> cost) { store(kernel + r * ld_ + j, cost); });
            for (int64_t r = 0; r < served; ++r) exponentiate(i + r, kernel + r * ld_);
        }
        std::memset(kernel + served * ld_, 0, (count - served) * ld_ * sizeof(S));
    }
    // A row of costs in place.
    void exponentiate(int64_t i, S* row) const {
        const int64_t m = this->args_.m;
        if (phi_) {
            if constexpr (sizeof(S) == sizeof(double)) plan_row<S>(row, m, 1.0 / this->args_.epsilon, phi_[i], gamma_, row);
        } else {
            const S shift = shift_[i];
            for (int64_t j = 0; j < m; j += width<S>) store(row + j, exp_(shift - load(row + j)));
        }
        for (int64_t j = m; j < ld_; ++j) row[j] = 0;
    }

    const bool one_pass_, stored_;
    const int64_t ld_;
    const ScaledExp<S> exp_;
    S *kernel_ = nullptr, *shift_ = nullptr, *kernel_tile_ = nullptr;
    const double *phi_ = nullptr, *gamma_ = nullptr;  // of start_plan
    Reduction spread_;
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

// Sinkhorn between points without a cost matrix, forward and backward (reference/sinkhorn_points.py), and the product of
// the plan with a vector or a matrix.
//
// The solvers are those of sinkhorn.cpp. Each sweep computes the costs of a block of rows (point_tiles.h: differences
// first, never a matrix product), exponentiates them in registers, and uses the block for both half-iterations while it is
// in the cache: 2 d operations (3 d for l1) and one exponential an entry and iteration. The backward hands the gradient
// of the block straight on to the points. With `stored` the kernel is kept from its first computation on.
// Float points whose exponents need double are converted first, so that the exponents are exact.
// Memory: the scalings, y once more, a block a thread, the gradient of y a thread; with `stored` n m numbers.
#include "otkd_fast/sinkhorn_points.h"

#include "plan_apply.h"
#include "sinkhorn_points_rows.h"
#include "sinkhorn_solver.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

struct Points {
    template <class T>
    using Args = SinkhornPointsArgs<T>;
    template <class T>
    using Costs = PointCosts<double, T>;
    template <class S, class T>
    using Rows = PointRows<S, T>;
    static constexpr bool kRangeFirst = false;
};

}  // namespace

void sinkhorn_points_fwd(const SinkhornPointsArgs<float>& args) { run_solver<Points, float>(args, false); }
void sinkhorn_points_fwd(const SinkhornPointsArgs<double>& args) { run_solver<Points, double>(args, false); }
void sinkhorn_points_bwd(const SinkhornPointsArgs<float>& args) { run_solver<Points, float>(args, true); }
void sinkhorn_points_bwd(const SinkhornPointsArgs<double>& args) { run_solver<Points, double>(args, true); }
int64_t sinkhorn_points_workspace_bytes(const SinkhornPointsArgs<float>& args, bool backward) {
    return solver_workspace_bytes<Points, float>(args, backward);
}
int64_t sinkhorn_points_workspace_bytes(const SinkhornPointsArgs<double>& args, bool backward) {
    return solver_workspace_bytes<Points, double>(args, backward);
}

void plan_apply(const PlanApplyArgs<float>& args) { apply(args, false); }
void plan_apply(const PlanApplyArgs<double>& args) { apply(args, false); }
void plan_apply_bwd(const PlanApplyArgs<float>& args) { apply(args, true); }
void plan_apply_bwd(const PlanApplyArgs<double>& args) { apply(args, true); }
int64_t plan_apply_workspace_bytes(const PlanApplyArgs<float>& args, bool backward) { return apply_bytes(args, backward); }
int64_t plan_apply_workspace_bytes(const PlanApplyArgs<double>& args, bool backward) { return apply_bytes(args, backward); }

}  // namespace OTKD_ISA
}  // namespace otkd_fast

// Polar factors of a batch of matrices, and their nuclear norms (reference/polar.py).
//
//   K = U diag(s) V^T:   P = U p(diag(s)) V^T,   nuclear_norm = <K, P>,   p(s) = 1 for s > lowest |K|, p(0) = 0
//
// p is a composition of odd quintics (polar_schedule.h) on K / bound(|K|), then one cubic step, which squares the error of p
// and so that of <K, P>, summed in double. K is scaled by a power of two first: no size of K overflows or vanishes.
// Only products: 2 k m^2 (n + (n + m) / 2) operations for k steps, n >= m (a wide K is transposed as it is read).
// Two ways: matrices up to kLaneSize where they fill half a vector, one a lane (lanes.h); others by panels (panels.h), a matrix a thread, those that do not
// come out even and single ones by all threads together. The bits do not depend on the number of threads.
#include "otkd_fast/polar.h"

#include "polar_solve.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr int64_t kParallelWork = 500 * 1000;  // multiply-adds, about 10 us of one thread

// Small calls run on the calling thread: waking a second one costs more than it saves.
template <class T>
int useful_threads(const PolarArgs<T>& args, const PolarShape<T>& s, const PolarSchedule& schedule) {
    return 2 * args.batch * schedule.count * s.n * s.m * s.m < kParallelWork ? 1 : args.threads;
}

template <class T>
void fwd(const PolarArgs<T>& args) {
    const PolarShape<T> s(args);
    const PolarSchedule schedule = polar_schedule<T>(args.steps);
    const int64_t bytes = bytes_a_thread(s);
    parallel(useful_threads(args, s, schedule), [&](const Team& team) {
        Arena own{args.workspace + team.rank * bytes};
        if (s.in_lanes) {
            const LanePolarIteration<T> it = lane_iteration(s, own);
            for (int64_t begin = team.rank * width<T>; begin < args.batch; begin += team.size * width<T>) {
                solve_lanes(args, schedule, s, it, begin, args.batch - begin < width<T> ? args.batch - begin : width<T>);
            }
            return;
        }
        const PolarIteration<T> it = panel_iteration(s, own);
        const int64_t apart = args.batch / team.size * team.size;
        for (int64_t index = team.rank; index < apart; index += team.size) {
            solve_panels(args, schedule, s, it, index, Team{0, 1, nullptr});
        }
        team.barrier();
        Arena common{args.workspace};
        const PolarIteration<T> shared = panel_iteration(s, common);
        for (int64_t index = apart; index < args.batch; ++index) solve_panels(args, schedule, s, shared, index, team);
    });
}

}  // namespace

void polar_fwd(const PolarArgs<float>& args) { fwd(args); }
void polar_fwd(const PolarArgs<double>& args) { fwd(args); }
int64_t polar_workspace_bytes(const PolarArgs<float>& args) { return args.threads * bytes_a_thread(PolarShape<float>(args)); }
int64_t polar_workspace_bytes(const PolarArgs<double>& args) { return args.threads * bytes_a_thread(PolarShape<double>(args)); }

}  // namespace OTKD_ISA
}  // namespace otkd_fast

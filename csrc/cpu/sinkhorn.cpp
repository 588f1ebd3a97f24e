// Sinkhorn iterations on a dense cost, forward and backward (reference/sinkhorn.py).
//
//   f_i = eps log a_i - eps LSE_j((g_j - C_ij) / eps),   g_j = eps log b_j - eps LSE_i((f_i - C_ij) / eps),   T times
//
// How one problem is solved depends on the range of its exponents, (max C - min C) / eps plus the log range of the
// marginals: up to 60 on float scalings, up to 600 on double scalings, beyond that in the log domain in double.
// Sums that leave the safe range on the way move the problem on to the next method. All three give the result of
// the log-domain loop to rounding. Batches run a problem a thread; a single large problem is shared by the threads.
#include "otkd_fast/sinkhorn.h"

#include <algorithm>
#include <type_traits>

#include "otkd_fast/threads.h"
#include "sinkhorn_buffers.h"
#include "sinkhorn_log.h"
#include "sinkhorn_scaling.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr double kFloatRange = 60, kDoubleRange = 600;
constexpr int64_t kTeamEntries = 512 * 512;     // from this size on threads share one problem
constexpr int64_t kParallelWork = 1000 * 1000;  // entries times iterations below which one thread is quicker

// (max - min of the finite costs) / epsilon plus the log range of both marginals. The range over the whole matrix
// bounds the exponents, and the cancellation between C / epsilon and the potentials in the gradient.
template <class T>
double exponent_range(const Problem<T>& p, const Team& team, Reduction& reduction) {
    const SinkhornArgs<T>& args = p.args;
    const T inf = std::numeric_limits<T>::infinity();
    int64_t begin, end;
    split(args.n * args.m, width<T>, team.size, team.rank, begin, end);
    Vec<T> low = splat(inf), high = splat(-inf);
    for (int64_t k = begin; k < end; k += width<T>) {
        const Vec<T> c = k + width<T> <= end ? load(p.cost() + k) : load_part(p.cost() + k, end - k, inf);
        low = min<T>(c, low);
        high = max<T>(c < inf ? c : splat(-inf), high);
    }
    reduction.put(team, 2, -static_cast<double>(-largest<T>(-low)));
    reduction.put(team, 3, largest<T>(high));
    team.barrier();
    const double spread = reduction.max(team, 3) + reduction.max(team, 2);
    double range = spread > 0 ? spread / args.epsilon : 0.0;
    const T* marginals[2] = {args.a ? args.a + p.index * args.n : nullptr, args.b ? args.b + p.index * args.m : nullptr};
    for (int side = 0; side < 2; ++side) {
        if (!marginals[side]) continue;
        T least = inf, most = 0;
        for (int64_t i = 0; i < (side ? args.m : args.n); ++i) {
            const T mass = marginals[side][i];
            if (mass > 0 && mass < least) least = mass;
            if (mass > most) most = mass;
        }
        if (most > 0) range += std::log(static_cast<double>(most) / static_cast<double>(least));
    }
    return range;
}

template <class T>
struct Solver {
    const SinkhornArgs<T>& args;
    bool backward;
    int threads;  // that share one problem

    template <class Method>
    int64_t bytes() const {
        Arena arena{nullptr};
        Method(args, arena, threads, backward);
        return arena.used;
    }
    // Workspace of one problem: a reduction for the range, then the widest method.
    int64_t bytes_a_problem() const {
        int64_t most = bytes<LogDomain<T>>();
        most = std::max(most, bytes<Scaling<double, T>>());
        if (sizeof(T) == sizeof(float)) most = std::max(most, bytes<Scaling<float, T>>());
        return round_up(threads * kSlots * static_cast<int64_t>(sizeof(double)), 64) + most;
    }

    void run(int64_t index, const Team& team, unsigned char* memory) const {
        const Problem<T> p{args, index};
        Arena arena{memory};
        Reduction reduction{arena.take<double>(threads * kSlots)};
        const Arena rest = arena;
        if (backward) {
            const Method method = static_cast<Method>(static_cast<int>(p.history()[0]));
            if (method == Method::log) return solve<LogDomain<T>>(p, team, rest);
            if (method == Method::scaling_double) return solve<Scaling<double, T>>(p, team, rest);
            if constexpr (sizeof(T) == sizeof(float)) solve<Scaling<float, T>>(p, team, rest);
            return;
        }
        const double range = exponent_range(p, team, reduction);
        Method used = Method::log;
        if (sizeof(T) == sizeof(float) && range <= kFloatRange && attempt<Scaling<float, T>>(p, team, rest)) {
            used = Method::scaling_float;
        } else if (range <= kDoubleRange && attempt<Scaling<double, T>>(p, team, rest)) {
            used = Method::scaling_double;
        } else {
            Arena mine = rest;
            LogDomain<T>(args, mine, threads, false).forward(p, team);
        }
        team.barrier();
        if (team.rank == 0 && p.history()) p.history()[0] = static_cast<int>(used);
    }

    template <class S>
    bool attempt(const Problem<T>& p, const Team& team, Arena arena) const {
        if constexpr (std::is_same_v<S, Scaling<float, double>>) {
            return false;
        } else {
            return S(args, arena, threads, false).forward(p, team);
        }
    }
    template <class S>
    void solve(const Problem<T>& p, const Team& team, Arena arena) const {
        S(args, arena, threads, true).backward(p, team);
    }
};

// Threads that share one problem, and threads that take a problem each; one of the two is 1.
template <class T>
void plan_threads(const SinkhornArgs<T>& args, int& together, int& apart) {
    together = apart = 1;
    if (args.threads <= 1) return;
    if (args.n * args.m >= kTeamEntries && args.batch < args.threads) {
        together = args.threads;
    } else if (args.batch > 1 && args.batch * args.n * args.m * args.num_iters >= kParallelWork) {
        apart = static_cast<int>(std::min<int64_t>(args.threads, args.batch));
    }
}

template <class T>
void run(const SinkhornArgs<T>& args, bool backward) {
    int together, apart;
    plan_threads(args, together, apart);
    const Solver<T> solver{args, backward, together};
    const int64_t bytes = solver.bytes_a_problem();
    parallel(together * apart, [&](const Team& team) {
        if (together > 1) {
            if (team.size > together) return;
            for (int64_t index = 0; index < args.batch; ++index) solver.run(index, team, args.workspace);
            return;
        }
        Team::Shared alone;
        int64_t begin, end;
        split(args.batch, 1, team.size, team.rank, begin, end);
        for (int64_t index = begin; index < end; ++index) {
            solver.run(index, Team{0, 1, &alone}, args.workspace + team.rank * bytes);
        }
    });
}

template <class T>
int64_t workspace_bytes(const SinkhornArgs<T>& args, bool backward) {
    int together, apart;
    plan_threads(args, together, apart);
    return apart * Solver<T>{args, backward, together}.bytes_a_problem();
}

}  // namespace

void sinkhorn_fwd(const SinkhornArgs<float>& args) { run(args, false); }
void sinkhorn_fwd(const SinkhornArgs<double>& args) { run(args, false); }
void sinkhorn_bwd(const SinkhornArgs<float>& args) { run(args, true); }
void sinkhorn_bwd(const SinkhornArgs<double>& args) { run(args, true); }
int64_t sinkhorn_workspace_bytes(const SinkhornArgs<float>& args, bool backward) { return workspace_bytes(args, backward); }
int64_t sinkhorn_workspace_bytes(const SinkhornArgs<double>& args, bool backward) { return workspace_bytes(args, backward); }

}  // namespace OTKD_ISA
}  // namespace otkd_fast

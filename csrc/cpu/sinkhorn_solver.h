// The choice between the ways of solving, and the threads: what every op on Sinkhorn problems shares, wherever its costs
// come from. `Source` names the classes (sinkhorn_rows.h) that read a problem:
//   Args<T>, Costs<T> of the log domain, Rows<S, T> of the scalings
//   kRangeFirst  whether the range of the costs is cheap to tell beforehand, else Rows tell it with their kernel
#pragma once
#include <algorithm>
#include <type_traits>

#include "sinkhorn_implicit.h"
#include "sinkhorn_log.h"
#include "sinkhorn_scaling.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr double kFloatRange = 60, kDoubleRange = 600;
constexpr int64_t kTeamEntries = 512 * 512;     // from this size on threads share one problem
constexpr int64_t kParallelWork = 1000 * 1000;  // entries times iterations below which one thread is quicker

struct Stored {
    template <class T>
    using Args = SinkhornArgs<T>;
    template <class T>
    using Costs = StoredCosts<T>;
    template <class S, class T>
    using Rows = StoredRows<S, T>;
    static constexpr bool kRangeFirst = true;
};

// log(largest / smallest) of the masses > 0; 0 without any
template <class T>
double log_range(const T* masses, int64_t count) {
    T least = std::numeric_limits<T>::infinity(), most = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (masses[i] > 0 && masses[i] < least) least = masses[i];
        if (masses[i] > most) most = masses[i];
    }
    return most > 0 ? std::log(static_cast<double>(most) / static_cast<double>(least)) : 0.0;
}

// max - min of the finite potentials, over epsilon
template <class T>
double potential_range(const T* potential, int64_t count, double epsilon) {
    double low = 0, high = 0;  // those that are not finite start at 0
    for (int64_t i = 0; i < count; ++i) {
        if (!std::isfinite(potential[i])) continue;
        low = potential[i] < low ? potential[i] : low;
        high = potential[i] > high ? potential[i] : high;
    }
    return (high - low) / epsilon;
}

// The log range of both marginals and the range of given potentials.
template <class T>
double given_range(const Problem<T>& p) {
    const SinkhornArgs<T>& args = p.args;
    double range = 0;
    if (args.a) range += log_range(args.a + p.index * args.n, args.n);
    if (args.b) range += log_range(args.b + p.index * args.m, args.m);
    if (args.initial_g) range += potential_range(args.initial_g + p.index * args.m, args.m, args.epsilon);
    if (args.initial_f && args.relaxation != 1) {
        range += potential_range(args.initial_f + p.index * args.n, args.n, args.epsilon);
    }
    return range;
}

// (max - min of the finite costs) / epsilon. The range over the whole matrix bounds the exponents, and the cancellation
// between C / epsilon and the potentials in the gradient.
template <class Costs, class T = typename Costs::Input>
double cost_range(const Problem<T>& p, Costs costs, const Team& team, Reduction& reduction) {
    const SinkhornArgs<T>& args = p.args;
    const T inf = std::numeric_limits<T>::infinity();
    int64_t begin, end;
    split(args.n, kBlock, team.size, team.rank, begin, end);
    Vec<T> low = splat(inf), high = splat(-inf);
    costs.open(p, team);
    for_blocks(begin, end, costs.block(), false, [&](int64_t i, int64_t count) {
        const T* cost = costs.cost(i, count);
        const int64_t entries = count * args.m;
        for (int64_t k = 0; k < entries; k += width<T>) {
            const Vec<T> c = k + width<T> <= entries ? load(cost + k) : load_part(cost + k, entries - k, inf);
            low = min<T>(c, low);
            high = max<T>(c < inf ? c : splat(-inf), high);
        }
    });
    reduction.put(team, 2, -static_cast<double>(-largest<T>(-low)));
    reduction.put(team, 3, largest<T>(high));
    team.barrier();
    const double spread = reduction.max(team, 3) + reduction.max(team, 2);
    return spread > 0 ? spread / args.epsilon : 0.0;
}

template <class Source, class T>
struct Solver {
    using Args = typename Source::template Args<T>;
    using Costs = typename Source::template Costs<T>;
    template <class S>
    using Scalings = Scaling<typename Source::template Rows<S, T>>;
    using Log = LogDomain<Costs>;
    using Linear = Implicit<typename Source::template Rows<double, T>>;

    const Args& args;
    bool backward;
    int threads;  // that share one problem

    template <class Way, class... Rest>
    int64_t bytes(Rest... rest) const {
        Arena arena{nullptr};
        Way(args, arena, threads, rest...);
        return arena.used;
    }
    // Workspace of one problem: a reduction and the costs' own memory for the range, then the widest method.
    int64_t bytes_a_problem() const {
        Arena arena{nullptr};
        arena.take<double>(threads * kSlots);
        if constexpr (Source::kRangeFirst) Costs(args, arena, threads, backward);
        if (implicit()) return arena.used + bytes<Linear>();
        int64_t most = std::max(bytes<Log>(backward), bytes<Scalings<double>>(backward));
        if constexpr (sizeof(T) == sizeof(float)) most = std::max(most, bytes<Scalings<float>>(backward));
        return arena.used + most;
    }

    bool implicit() const { return backward && args.gradient == Gradient::implicit; }

    void run(int64_t index, const Team& team, unsigned char* memory) const {
        const Problem<T> p{args, index};
        Arena arena{memory};
        Reduction reduction{arena.take<double>(threads * kSlots)};
        if (backward) {
            solve_backward(p, team, arena);
            return;
        }
        double range = given_range(p);
        if constexpr (Source::kRangeFirst) {
            range += cost_range(p, Costs(args, arena, threads, false), team, reduction);
        }
        Method used = Method::log;
        if (sizeof(T) == sizeof(float) && attempt<float>(p, team, arena, kFloatRange - range)) {
            used = Method::scaling_float;
        } else if (attempt<double>(p, team, arena, kDoubleRange - range)) {
            used = Method::scaling_double;
        } else {
            Arena mine = arena;
            Log(args, mine, threads, false).forward(p, team);
        }
        team.barrier();
        if (team.rank == 0 && p.history()) close_history(p, used);
    }

    // The header's method, and zeros where nothing was kept: the result is the same in every bit.
    void close_history(const Problem<T>& p, Method used) const {
        unsigned char* slots = reinterpret_cast<unsigned char*>(p.history() + kHistoryHeader);
        const int64_t scalar = used == Method::scaling_float ? sizeof(float) : sizeof(double);
        const int64_t filled = (p.last_slot(p.iterations()) + 1) * (args.n + args.m) * scalar;
        const int64_t all = (history_stride(args) - kHistoryHeader) * static_cast<int64_t>(sizeof(double));
        std::memset(slots + filled, 0, all - filled);
        if (args.keep == Keep::last_step) std::memset(slots, 0, args.n * scalar);
        p.history()[0] = static_cast<int>(used);
    }

    template <class S>
    bool attempt(const Problem<T>& p, const Team& team, Arena arena, double limit) const {
        if constexpr (sizeof(S) < sizeof(T)) {
            return false;
        } else {
            if (limit < 0) return false;
            const bool solved = Scalings<S>(args, arena, threads, false).forward(p, team, limit);
            team.barrier();  // the next method uses the same memory
            return solved;
        }
    }

    void solve_backward(const Problem<T>& p, const Team& team, Arena arena) const {
        if (implicit()) return Linear(args, arena, threads).backward(p, team);
        const Method method = static_cast<Method>(static_cast<int>(p.history()[0]));
        if (method == Method::log) return Log(args, arena, threads, true).backward(p, team);
        if (method == Method::scaling_double) return Scalings<double>(args, arena, threads, true).backward(p, team);
        if constexpr (sizeof(T) == sizeof(float)) Scalings<float>(args, arena, threads, true).backward(p, team);
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

template <class Source, class T>
void run_solver(const typename Source::template Args<T>& args, bool backward) {
    int together, apart;
    plan_threads<T>(args, together, apart);
    const Solver<Source, T> solver{args, backward, together};
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

template <class Source, class T>
int64_t solver_workspace_bytes(const typename Source::template Args<T>& args, bool backward) {
    int together, apart;
    plan_threads<T>(args, together, apart);
    return apart * Solver<Source, T>{args, backward, together}.bytes_a_problem();
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

// Many problems: the order in which they are solved, the threads, and who solves each. Small ones in groups, one in each lane
// (sinkhorn_lanes.h), in the precision of the costs and then, those beyond its range, in double; what remains by itself
// (sinkhorn_solver.h). A large problem that would keep one thread busy when the others have finished is shared by all.
#pragma once
#include <algorithm>
#include <atomic>

#include "sinkhorn_lanes.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr double kLaneFloatRange = 60, kLaneDoubleRange = 600;
constexpr int64_t kSharedEntries = 512 * 512;       // from this size on threads may share a problem
constexpr int64_t kThreadsWork = 1000 * 1000;       // entries times iterations below which one thread is quicker
constexpr int64_t kManyEntries = 64;                // up to this size a group has kManyVectors vectors of problems, else one
constexpr int kManyVectors = 4;
constexpr int64_t kMostLanes = kManyVectors * OTKD_VECTOR_BYTES / 4;

inline bool is_small(int64_t n, int64_t m) { return n <= kSmallSide && m <= kSmallSide; }
inline bool is_empty(const Place& place) { return place.n == 0 || place.m == 0; }
// Problems of a group are of n in one multiple of this.
inline int64_t bucket(int64_t n) { return round_up(n, 4); }

// The costs of a problem without rows or columns: nothing can be served.
template <class T>
void solve_empty(const SinkhornArgs<T>& one, bool backward) {
    const bool rows = one.n > 0;
    const int64_t count = rows ? one.n : one.m;
    const T* mass = rows ? one.a : one.b;
    const double penalty = rows ? one.penalty_a : one.penalty_b;
    const double price = penalty < kInfinity ? penalty : 0.0;  // of one unit of mass that is given up
    if (backward) {
        T* grad = rows ? one.grad_a : one.grad_b;
        const double of_dual = one.grad_regularized_cost ? static_cast<double>(one.grad_regularized_cost[0]) : 0.0;
        for (int64_t k = 0; grad && k < count; ++k) grad[k] = mass[k] > 0 ? static_cast<T>(of_dual * price) : T(0);
        return;
    }
    T* potential = rows ? one.f : one.g;
    double total = 0;
    for (int64_t k = 0; k < count; ++k) {
        total += mass[k];
        if (potential) potential[k] = -std::numeric_limits<T>::infinity();
    }
    if (one.transport_cost) one.transport_cost[0] = 0;
    if (one.regularized_cost) one.regularized_cost[0] = static_cast<T>(price * total);
    if (one.marginal_error) one.marginal_error[0] = static_cast<T>(penalty < kInfinity ? 0.0 : total);
    if (one.iterations) one.iterations[0] = 0;
}

template <class T>
class Many {
  public:
    Many(const SinkhornArgs<T>& args, bool backward)
        : args_(args), backward_(backward), infinite_(args.penalty_a == kInfinity && args.penalty_b == kInfinity) {}

    bool in_lanes() const {
        return infinite_ && args_.relaxation == 1 && !(backward_ && args_.gradient == Gradient::implicit);
    }
    // The latency of one vector of problems hides behind the work of the others, as long as their kernels fit in the cache.
    static int vectors(int64_t n, int64_t m) { return bucket(n) * m <= kManyEntries ? kManyVectors : 1; }
    // Problems of a group.
    static int64_t lanes(int64_t n, int64_t m) { return vectors(n, m) * width<T>; }

    // Memory for one problem by itself, or for a group of problems of these sizes.
    int64_t bytes_alone(int64_t n, int64_t m, int threads) const {
        SinkhornArgs<T> one = problem_at(args_, Place{n, m, 0, 0, 0, 0, 0, 0});
        one.together = false;
        return round_up(history_again(one) * static_cast<int64_t>(sizeof(double)), 64) + solve_one_bytes(one, backward_, threads);
    }
    int64_t bytes_together(int64_t n, int64_t m) const {
        int64_t most = bytes_alone(n, m, 1);
        if (!in_lanes()) return most;
        const auto add = [&](auto type, auto count) {
            Arena arena{nullptr};
            LaneGroup<decltype(type), T, decltype(count)::value>(args_, Places{}, 0, n, m, arena, backward_);
            most = std::max(most, arena.used);
        };
        const std::integral_constant<int, 1> one;
        const std::integral_constant<int, kManyVectors> many;
        vectors(n, m) > 1 ? add(T{}, many) : add(T{}, one);
        if (sizeof(T) == sizeof(float)) vectors(n, m) > 1 ? add(double{}, many) : add(double{}, one);
        return most;
    }

    // Problems of one task: a group, or fewer than make one.
    void run(const Places& places, int64_t count, unsigned char* memory) const {
        const Place first = places[0];
        if (!is_small(first.n, first.m) || is_empty(first) || !in_lanes() || count < kFewProblems) {
            for (int64_t k = 0; k < count; ++k) alone(places[k], 1, Team{0, 1, nullptr}, memory);
            return;
        }
        int64_t n = first.n, m = first.m;
        for (int64_t k = 1; places.listed() && k < count; ++k) {
            n = std::max(n, places[k].n);
            m = std::max(m, places[k].m);
        }
        vectors(n, m) > 1 ? run_lanes<kManyVectors>(places, count, n, m, memory) : run_lanes<1>(places, count, n, m, memory);
    }

    void alone(const Place& place, int threads, const Team& team, unsigned char* memory) const {
        SinkhornArgs<T> one = problem_at(args_, place);
        const bool again = args_.keep == Keep::all && infinite_ && is_small(place.n, place.m);
        one.together = false;
        if (is_empty(place)) {
            if (team.rank == 0) solve_empty(one, backward_);
            if (team.rank == 0 && one.history && !backward_) clear(one.history, place.history_size);
            return;
        }
        if (!again) return solve_one(one, backward_, threads, team, memory);
        double *history = reinterpret_cast<double*>(memory), *const header = one.history;
        memory += round_up(history_again(one) * static_cast<int64_t>(sizeof(double)), 64);
        if (!backward_) {
            one.keep = Keep::last;
            one.history = header ? history : nullptr;
            solve_one(one, false, threads, team, memory);
            if (!header) return;
            clear(header, place.history_size);
            std::copy(history, history + kHistoryHeader, header);
            return;
        }
        one.num_iters = static_cast<int64_t>(one.history[1]);
        one.tol = 0;
        one.history = history;
        SinkhornArgs<T> forward = one;
        forward.transport_cost = forward.regularized_cost = forward.f = forward.g = forward.marginal_error = nullptr;
        forward.iterations = nullptr;
        solve_one(forward, false, threads, team, memory);
        solve_one(one, true, threads, team, memory);
    }

  private:
    static void clear(double* history, int64_t count) { std::fill(history, history + count, 0.0); }
    // Doubles of history for a small problem of which only the header is kept: the backward runs the loop again.
    int64_t history_again(SinkhornArgs<T> one) const {
        if (args_.keep != Keep::all || !infinite_ || !is_small(one.n, one.m)) return 0;
        if (!backward_) one.keep = Keep::last;
        return history_stride(one);
    }

    template <class S, int kVectors>
    void group(const Places& places, int64_t count, int64_t n, int64_t m, double limit, unsigned char* memory, bool* solved) const {
        Arena arena{memory};
        LaneGroup<S, T, kVectors> lanes(args_, places, count, n, m, arena, backward_);
        backward_ ? lanes.backward(solved) : lanes.forward(limit, solved);
    }

    template <int kVectors>
    void run_lanes(const Places& places, int64_t count, int64_t n, int64_t m, unsigned char* memory) const {
        bool solved[kMostLanes];
        Place rest[kMostLanes], last[kMostLanes];
        int64_t remaining = 0, alone_count = 0;
        group<T, kVectors>(places, count, n, m, sizeof(T) == sizeof(float) ? kLaneFloatRange : kLaneDoubleRange, memory, solved);
        for (int64_t k = 0; k < count; ++k) {
            if (!solved[k]) rest[remaining++] = places[k];
        }
        constexpr int64_t most = LaneGroup<double, T, kVectors>::kLanes;
        for (int64_t k = 0; k < remaining; k += most) {
            const int64_t some = std::min(most, remaining - k);
            std::fill(solved, solved + some, false);
            if (sizeof(T) == sizeof(float) && 2 * some >= kFewProblems) {
                group<double, kVectors>(Places{rest + k, {}}, some, n, m, kLaneDoubleRange, memory, solved);
            }
            for (int64_t l = 0; l < some; ++l) {
                if (!solved[l]) last[alone_count++] = rest[k + l];
            }
        }
        for (int64_t k = 0; k < alone_count; ++k) alone(last[k], 1, Team{0, 1, nullptr}, memory);
    }

    const SinkhornArgs<T>& args_;
    const bool backward_, infinite_;
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

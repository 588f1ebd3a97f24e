// Memory and team plumbing that the two ways of solving share.
#pragma once
#include "otkd_fast/sinkhorn.h"
#include "otkd_fast/threads.h"
#include "simd.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr int kBlock = 4;  // rows that a sweep takes together

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Hands out 64-byte aligned pieces of the workspace; with a null base it only counts.
struct Arena {
    unsigned char* base;
    int64_t used = 0;
    template <class S>
    S* take(int64_t count) {
        S* piece = base ? reinterpret_cast<S*>(base + used) : nullptr;
        used += round_up(count * static_cast<int64_t>(sizeof(S)), 64);
        return piece;
    }
};

// One problem of the batch.
template <class T>
struct Problem {
    const SinkhornArgs<T>& args;
    int64_t index;
    double mass_a(int64_t i) const { return args.a ? args.a[index * args.n + i] : 1.0 / static_cast<double>(args.n); }
    double mass_b(int64_t j) const { return args.b ? args.b[index * args.m + j] : 1.0 / static_cast<double>(args.m); }
    double* history() const {
        return args.history ? args.history + index * (1 + args.kept * (args.n + args.m)) : nullptr;
    }
    // Row and column part of the history of iteration `t`, null where it is not kept.
    double* kept_u(int64_t t) const {
        const int64_t slot = t - (args.num_iters - args.kept);
        return args.history && slot >= 0 ? history() + 1 + slot * (args.n + args.m) : nullptr;
    }
    double* kept_v(int64_t t) const {
        double* u = kept_u(t);
        return u ? u + args.n : nullptr;
    }
    double incoming(const T* grads) const { return grads ? static_cast<double>(grads[index]) : 0.0; }
};

// Loads one vector of S from T, converting between float and double where they differ.
template <class S, class T>
struct LoadAs {
    static OTKD_INLINE Vec<S> full(const T* p) {
        if constexpr (sizeof(S) == sizeof(T)) {
            return load(p);
        } else {
            typedef T Other __attribute__((vector_size(width<S> * sizeof(T))));
            Other other;
            std::memcpy(&other, p, sizeof other);
            return __builtin_convertvector(other, Vec<S>);
        }
    }
    // Lanes [0, count), the others `fill`.
    static OTKD_INLINE Vec<S> part(const T* p, int64_t count, S fill) {
        if (count >= width<S>) return full(p);
        Vec<S> v = splat(fill);
        for (int64_t i = 0; i < count; ++i) v[i] = static_cast<S>(p[i]);
        return v;
    }
};

// The first `count` lanes (at most all) to memory, converted where the types differ.
template <class T, class V>
OTKD_INLINE void store_as(T* p, V v, int64_t count) {
    constexpr int64_t lanes = sizeof(V) / sizeof(v[0]);
    if (sizeof(v[0]) == sizeof(T) && count >= lanes) {
        std::memcpy(p, &v, sizeof v);
    } else {
        for (int64_t w = 0; w < lanes && w < count; ++w) p[w] = static_cast<T>(v[w]);
    }
}

// Sums over the team: every thread adds its share to its own slot, all meet, every thread reads the totals.
constexpr int kSlots = 8;
struct Reduction {
    double* slots;  // (team, kSlots)
    void put(const Team& team, int slot, double value) { slots[team.rank * kSlots + slot] = value; }
    double sum(const Team& team, int slot) const {
        double total = 0;
        for (int r = 0; r < team.size; ++r) total += slots[r * kSlots + slot];
        return total;
    }
    double max(const Team& team, int slot) const {
        double best = slots[slot];
        for (int r = 1; r < team.size; ++r) {
            const double other = slots[r * kSlots + slot];
            best = other > best ? other : best;
        }
        return best;
    }
};

// transport_cost, regularized_cost and marginal_error from the row sums of the plan, its column sums and <P, C>;
// `log_u`, `log_v` are potentials / epsilon. One thread.
template <class T, class LogU, class LogV>
void write_outputs(const Problem<T>& p, const double* row_sums, const double* column_sums, double transport_cost,
                   LogU log_u, LogV log_v) {
    const SinkhornArgs<T>& args = p.args;
    const double eps = args.epsilon;
    double error = 0, total = 0, mass_a = 0, mass_b = 0, dual = 0;
    const bool potentials = args.f || args.g || args.regularized_cost;
    for (int64_t i = 0; i < args.n; ++i) {
        const double a = p.mass_a(i), phi = potentials ? log_u(i) : 0.0;
        error += std::fabs(row_sums[i] - a);
        mass_a += a;
        if (args.f) args.f[p.index * args.n + i] = static_cast<T>(eps * phi);
        if (args.regularized_cost && a > 0 && std::isfinite(phi)) dual += a * eps * (phi - std::log(a));
    }
    for (int64_t j = 0; j < args.m; ++j) {
        const double b = p.mass_b(j), gamma = potentials ? log_v(j) : 0.0;
        error += std::fabs(column_sums[j] - b);
        mass_b += b;
        total += column_sums[j];
        if (args.g) args.g[p.index * args.m + j] = static_cast<T>(eps * gamma);
        if (args.regularized_cost && b > 0 && std::isfinite(gamma)) dual += b * eps * (gamma - std::log(b));
    }
    const double nan_mass = 0 * (mass_a + mass_b);  // a mass that is NaN took no part: say so in the result
    if (args.transport_cost) args.transport_cost[p.index] = static_cast<T>(transport_cost + nan_mass);
    if (args.regularized_cost) args.regularized_cost[p.index] = static_cast<T>(dual + eps * (mass_a * mass_b - total));
    if (args.marginal_error) args.marginal_error[p.index] = static_cast<T>(error);
}

// The part of a marginal's gradient that the regularized cost has in its formula: f - eps (log a + 1) + eps sum(b).
inline double dual_marginal_gradient(double eps, double log_scaling, double mass, double other_total) {
    if (!(mass > 0) || !std::isfinite(log_scaling)) return 0.0;
    return eps * (log_scaling - std::log(mass) - 1.0 + other_total);
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

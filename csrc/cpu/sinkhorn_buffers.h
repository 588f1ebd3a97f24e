// What the ways of solving share: one problem of a batch, its pieces of memory, sums over a team, and the outputs.
#pragma once
#include <type_traits>

#include "otkd_fast/sinkhorn.h"
#include "otkd_fast/threads.h"
#include "simd.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr int kBlock = 4;  // rows that a sweep takes together
constexpr double kInfinity = std::numeric_limits<double>::infinity();

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

// A penalty rho on a marginal; infinite for a constraint.
struct Penalty {
    double rho, epsilon;
    bool constraint() const { return rho == kInfinity; }
    double lambda() const { return constraint() ? 1.0 : rho / (rho + epsilon); }
    // exp(-f' / rho), the part of a mass that a plan is to move; `relative` is f' / epsilon. A mass that cannot be served
    // (relative -inf) is given up, unless it is a constraint.
    double kept(double relative) const {
        if (constraint()) return 1.0;
        return relative > -kInfinity ? std::exp(-relative * epsilon / rho) : 0.0;
    }
    // The dual value of one unit of mass: f', or rho (1 - exp(-f' / rho)).
    double value(double relative) const {
        if (constraint()) return relative > -kInfinity ? epsilon * relative : 0.0;
        return relative > -kInfinity ? -rho * std::expm1(-relative * epsilon / rho) : rho;
    }
    // Its derivative by the mass, where the potential is fixed: f' = f - epsilon log mass.
    double slope(double relative, double other_total) const {
        if (constraint()) return relative > -kInfinity ? epsilon * (relative - 1.0 + other_total) : 0.0;
        return value(relative) - epsilon * kept(relative) + epsilon * other_total;
    }
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
        if (count <= 0) return splat(fill);
        if constexpr (std::is_same_v<S, T>) {
            return load_part(p, count, fill);
        } else {
            Vec<S> v = splat(fill);
#if defined(__AVX512F__)
            if constexpr (std::is_same_v<S, double>) {
                const auto mask = static_cast<__mmask8>((1u << count) - 1);
                return (Vec<S>)_mm512_mask_cvtps_pd((__m512d)v, mask, _mm256_maskz_loadu_ps(mask, p));
            }
#endif
            for (int64_t i = 0; i < count; ++i) v[i] = static_cast<S>(p[i]);
            return v;
        }
    }
};

// The first `count` lanes (at most all) to memory, converted where the types differ.
template <class T, class V>
OTKD_INLINE void store_as(T* p, V v, int64_t count) {
    constexpr int64_t lanes = sizeof(V) / sizeof(v[0]);
    if (sizeof(v[0]) == sizeof(T) && count >= lanes) {
        std::memcpy(p, &v, sizeof v);
    } else if constexpr (std::is_same_v<V, Vec<T>>) {
        if (count > 0) store_part(p, v, count);
    } else {
        for (int64_t w = 0; w < lanes && w < count; ++w) p[w] = static_cast<T>(v[w]);
    }
}

// One problem of the batch.
template <class T>
struct Problem {
    const SinkhornArgs<T>& args;
    int64_t index;
    double mass_a(int64_t i) const { return args.a ? args.a[index * args.n + i] : 1.0 / static_cast<double>(args.n); }
    double mass_b(int64_t j) const { return args.b ? args.b[index * args.m + j] : 1.0 / static_cast<double>(args.m); }
    // Masses from i on in the first `count` lanes, 0 in the others.
    Vec<double> masses_a(int64_t i, int64_t count) const { return masses(args.a, args.n, i, count); }
    Vec<double> masses_b(int64_t j, int64_t count) const { return masses(args.b, args.m, j, count); }
    // Potentials / epsilon as the loop starts, where there is mass.
    double start_phi(int64_t i) const { return start(args.initial_f, index * args.n + i); }
    double start_gamma(int64_t j) const { return start(args.initial_g, index * args.m + j); }
    Penalty penalty_a() const { return {args.penalty_a, args.epsilon}; }
    Penalty penalty_b() const { return {args.penalty_b, args.epsilon}; }
    double* history() const { return args.history ? args.history + index * history_stride(args) : nullptr; }
    int64_t iterations() const { return static_cast<int64_t>(history()[1]); }
    template <class S>
    S* kept_u(int64_t slot) const {
        return reinterpret_cast<S*>(history() + kHistoryHeader) + slot * (args.n + args.m);
    }
    template <class S>
    S* kept_v(int64_t slot) const {
        return kept_u<S>(slot) + args.n;
    }
    // The slot of the last scalings, of `ran` iterations.
    int64_t last_slot(int64_t ran) const {
        return args.keep == Keep::all ? ran - 1 : args.keep == Keep::last_step ? 1 : 0;
    }
    double incoming(const T* grads) const { return grads ? static_cast<double>(grads[index]) : 0.0; }

  private:
    Vec<double> masses(const T* given, int64_t size, int64_t k, int64_t count) const {
        if (given) return LoadAs<double, T>::part(given + index * size + k, count, 0.0);
        Vec<double> same = {};
        for (int64_t w = 0; w < width<double> && w < count; ++w) same[w] = 1.0 / static_cast<double>(size);
        return same;
    }
    double start(const T* potential, int64_t k) const {
        return potential && std::isfinite(potential[k]) ? potential[k] / args.epsilon : 0.0;
    }
};

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

// One side of the outputs: its potential, and its part of marginal_error and of the dual value. `masses` and `log_scalings`
// give a vector from an index on, of so many lanes.
struct SideOutputs {
    double error = 0, mass = 0, dual = 0;
    template <class T, class Masses, class Logs>
    SideOutputs(int64_t count, const Penalty& penalty, const double* sums, T* potential, bool wants_dual, Masses masses,
                Logs log_scalings) {
        const bool potentials = potential || wants_dual || !penalty.constraint();
        const bool relatives = wants_dual || !penalty.constraint();
        const Vec<double> zero = {};
        Vec<double> errors = {}, total = {}, duals = {};
        for (int64_t k = 0; k < count; k += width<double>) {
            const int64_t some = count - k < width<double> ? count - k : width<double>;
            const Vec<double> own = masses(k, some), phi = potentials ? log_scalings(k, some) : zero;
            const Vec<double> relative = relatives && any<double>(own > zero) ? phi - log(own) : zero;
            Vec<double> target = own, value = relative > -kInfinity ? penalty.epsilon * relative : zero;
            for (int64_t w = 0; !penalty.constraint() && w < some; ++w) {
                target[w] = own[w] > 0 ? own[w] * penalty.kept(relative[w]) : own[w];
                value[w] = penalty.value(relative[w]);
            }
            errors += abs<double>(LoadAs<double, double>::part(sums + k, some, 0.0) - target);
            total += own;
            if (potential) store_as(potential + k, penalty.epsilon * phi, some);
            if (wants_dual) duals += own > zero ? own * value : zero;
        }
        error = sum<double>(errors);
        mass = sum<double>(total);
        dual = sum<double>(duals);
    }
};

// The outputs of a problem from the row sums of the plan, its column sums and <P, C>; `log_u`, `log_v` give vectors of
// potentials / epsilon. One thread. `error` is the marginal error where it is known already, else negative.
template <class T, class LogU, class LogV>
void write_outputs(const Problem<T>& p, const double* row_sums, const double* column_sums, double transport_cost,
                   double error, LogU log_u, LogV log_v) {
    const SinkhornArgs<T>& args = p.args;
    const bool dual = args.regularized_cost;
    T *f = args.f ? args.f + p.index * args.n : nullptr, *g = args.g ? args.g + p.index * args.m : nullptr;
    const SideOutputs rows(args.n, p.penalty_a(), row_sums, f, dual, [&](int64_t i, int64_t some) { return p.masses_a(i, some); }, log_u);
    const SideOutputs columns(args.m, p.penalty_b(), column_sums, g, dual, [&](int64_t j, int64_t some) { return p.masses_b(j, some); }, log_v);
    double total = 0;
    for (int64_t j = 0; j < args.m; ++j) total += column_sums[j];
    const double nan_mass = 0 * (rows.mass + columns.mass);  // a mass that is NaN took no part: say so in the result
    if (args.transport_cost) args.transport_cost[p.index] = static_cast<T>(transport_cost + nan_mass);
    if (dual) {
        const double value = rows.dual + columns.dual + args.epsilon * (rows.mass * columns.mass - total);
        args.regularized_cost[p.index] = static_cast<T>(value);
    }
    if (args.marginal_error) {
        args.marginal_error[p.index] = static_cast<T>(error >= 0 ? error : rows.error + columns.error);
    }
}

// Gradients of the marginals: `by_mass` through the loop, plus the part that the dual value has in its formula.
template <class T, class Mass, class Log, class ByMass>
void write_marginal_gradient(T* out, int64_t count, const Penalty& penalty, double of_dual, double other_total,
                             Mass mass_of, Log log_scaling, ByMass by_mass) {
    for (int64_t k = 0; out && k < count; ++k) {
        const double own = mass_of(k);
        double grad = 0;
        if (own > 0) {
            grad = by_mass(k);
            if (of_dual != 0) grad += of_dual * penalty.slope(log_scaling(k) - std::log(own), other_total);
        }
        out[k] = static_cast<T>(grad);
    }
}

// The decisions of a loop; every thread of a team has its own and feeds it the same errors.
class Control {
  public:
    Control() = default;
    template <class Args>
    explicit Control(const Args& args)
        : tol_(args.tol), omega_(args.relaxation > 0 ? args.relaxation : 1.0), automatic_(args.relaxation == 0) {}

    double omega() const { return omega_; }
    bool watches() const { return tol_ > 0; }  // the error of every iteration is wanted
    bool needs_errors() const { return tol_ > 0 || automatic_; }
    bool stops(double error) const { return error <= tol_; }
    // Whether the next iteration wants the error after `done` ones first.
    bool due(int64_t done) const { return automatic_ && (done == kPeriod - 1 || (done > 0 && done % kPeriod == 0)); }
    void observe(int64_t done, double error) {
        if (done == kPeriod) {
            const double ratio = before_ > 0 ? error / before_ : 0.0;
            const double best = 2 / (1 + std::sqrt(1 - (ratio < 0.9999 ? ratio : 0.9999)));
            const double omega = std::floor(best * 1024 + 0.5) / 1024;  // without the rounding of the errors
            omega_ = omega < 1.95 ? omega : 1.95;
        } else if (done > kPeriod && error > before_) {
            omega_ = 1;
        }
        before_ = error;
    }

  private:
    static constexpr int64_t kPeriod = 10;
    double tol_ = 0, omega_ = 1, before_ = 0;
    bool automatic_ = false;
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

// The forward of sinkhorn_lanes.h: the loop with a stop, and the outputs.
#pragma once
#include "sinkhorn_lanes.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// After `done` iterations whose plans have these errors: the lanes that go on. False: none.
template <class S, class T, int kVectors>
bool LaneGroup<S, T, kVectors>::stop(Mask* active, const V* errors, int64_t done) {
    bool going = false;
    for (int g = 0; g < kVectors; ++g) {
        const Mask stopped = active[g] & (errors[g] <= splat(static_cast<S>(args_.tol)));
        errors_[g] = stopped ? errors[g] : errors_[g];
        active[g] &= ~stopped;
        for (int w = 0; w < kWidth && any<S>(stopped); ++w) {
            if (stopped[w]) ran_[g * kWidth + w] = done;
        }
        going |= any<S>(active[g]);
    }
    return going;
}

// The loop with `tol`: a lane that has stopped stands still.
template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::iterate_watching() {
    Mask active[kVectors];
    V column_errors[kVectors], low[kVectors], high[kVectors];
    for (int g = 0; g < kVectors; ++g) {
        low[g] = high[g] = splat(S(1));
        active[g] = low[g] == low[g];
    }
    for (int64_t t = 0; t < args_.num_iters; ++t) {
        V errors[kVectors];
        for (int g = 0; g < kVectors; ++g) errors[g] = column_errors[g];
        product<false>(v_, nullptr, [&](int64_t i, int g, V sum) {
            const int64_t at = i * kLanes + g * kWidth;
            if (t > 0) errors[g] += abs<S>(load(u_ + at) * sum - load(a_ + at));
            store(sums_ + at, sum + load(unused_a_ + at));
        });
        if (t > 0 && !stop(active, errors, t)) break;
        for (int64_t i = 0; i < n_; ++i) {
            for (int g = 0; g < kVectors; ++g) {
                const int64_t at = i * kLanes + g * kWidth;
                const V total = active[g] ? load(sums_ + at) : splat(S(1));
                low[g] = min<S>(total, low[g]);
                high[g] = max<S>(total, high[g]);
                store(u_ + at, active[g] ? quotient<S>(load(a_ + at), total) : load(u_ + at));
            }
        }
        for (int g = 0; g < kVectors; ++g) column_errors[g] = V{};
        product<true>(u_, nullptr, [&](int64_t j, int g, V sum) {
            const int64_t at = j * kLanes + g * kWidth;
            const V total = active[g] ? sum + load(unused_b_ + at) : splat(S(1)), old = load(v_ + at);
            low[g] = min<S>(total, low[g]);
            high[g] = max<S>(total, high[g]);
            store(before_ + at, active[g] ? old : load(before_ + at));
            const V next = active[g] ? quotient<S>(load(b_ + at), total) : old;
            store(v_ + at, next);
            column_errors[g] += abs<S>(next * sum - load(b_ + at));
        });
    }
    for (int g = 0; g < kVectors; ++g) {
        low_[g] = low[g];
        high_[g] = high[g];
    }
}

template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::write_scalar(const V* values, T* out) const {
    S lanes[kLanes];
    for (int g = 0; g < kVectors; ++g) store(lanes + g * kWidth, values[g]);
    if (!out) return;
    if (!places_.listed()) out += places_.first.index;
    for (int64_t l = 0; l < count_; ++l) out[places_.listed() ? places_[l].index : l] = static_cast<T>(lanes[l]);
}

// Potentials of one side, and what it adds to the dual value: sum of mass (f - epsilon log mass). `shift` may be null.
template <class S, class T, int kVectors>
typename LaneGroup<S, T, kVectors>::V LaneGroup<S, T, kVectors>::write_side(int64_t count, const S* mass, const S* scaling,
                                                                           const S* shift, S* potential, int g) const {
    const V zero = {}, epsilon = splat(static_cast<S>(args_.epsilon)), none = splat(-std::numeric_limits<S>::infinity());
    V dual = zero;
    for (int64_t k = g * kWidth; k < count * kLanes; k += kLanes) {
        const V own = load(mass + k), scale = load(scaling + k);
        const V value = log(scale) * epsilon + (shift ? load(shift + k) : zero);
        const V relative = value - epsilon * log(own);
        store(potential + k, scale > zero ? value : none);
        dual += (own > zero) & (scale > zero) ? own * relative : zero;
    }
    return dual;
}

// Of row i: its part of <P, C> and of the marginal error. kFinite: no cost is infinite.
template <class S, class T, int kVectors>
template <bool kFinite>
OTKD_INLINE void LaneGroup<S, T, kVectors>::row_outputs(int64_t i, V* transport, V* error) const {
    const V zero = {};
    V mass[kVectors] = {}, moved[kVectors] = {};
    for (int64_t j = 0; j < m_; ++j) {
        for (int g = 0; g < kVectors; ++g) {
            const int64_t at = (i * m_ + j) * kLanes + g * kWidth;
            const V kv = load(kernel_ + at) * load(v_ + j * kLanes + g * kWidth), moving = kv * load(cost_ + at);
            mass[g] += kv;
            moved[g] += kFinite ? moving : (kv > zero ? moving : zero);
        }
    }
    for (int g = 0; g < kVectors; ++g) {
        const int64_t at = i * kLanes + g * kWidth;
        const V u = load(u_ + at);
        transport[g] += u * moved[g];
        error[g] += abs<S>(u * mass[g] - load(a_ + at));
    }
}

// From u_ and v_. sums_ takes the potentials.
template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::outputs() {
    const V zero = {}, epsilon = splat(static_cast<S>(args_.epsilon));
    V transport[kVectors] = {}, dual[kVectors], error[kVectors] = {}, total[kVectors] = {};
    product<true>(u_, nullptr, [&](int64_t j, int g, V sum) {
        const int64_t at = j * kLanes + g * kWidth;
        const V moved = load(v_ + at) * sum;
        total[g] += moved;
        error[g] += abs<S>(moved - load(b_ + at));
    });
    for (int64_t i = 0; i < n_; ++i) {
        finite_ ? row_outputs<true>(i, transport, error) : row_outputs<false>(i, transport, error);
    }
    for (int g = 0; g < kVectors; ++g) {
        V mass_a = zero, mass_b = zero;
        for (int64_t i = 0; i < n_; ++i) mass_a += load(a_ + i * kLanes + g * kWidth);
        for (int64_t j = 0; j < m_; ++j) mass_b += load(b_ + j * kLanes + g * kWidth);
        error[g] = errors_[g] >= zero ? errors_[g] : error[g];
        dual[g] = write_side(n_, a_, u_, shift_, sums_, g) + write_side(m_, b_, v_, nullptr, sums_ + n_ * kLanes, g) +
                  epsilon * (mass_a * mass_b - total[g]);
    }
    write_scalar(transport, args_.transport_cost);
    write_scalar(dual, args_.regularized_cost);
    write_scalar(error, args_.marginal_error);
    if (args_.f) {
        put<T>(sums_, n_, [&](const Place& p) { return args_.f + p.rows; }, [](const Place& p) { return p.n; });
    }
    if (args_.g) {
        put<T>(sums_ + n_ * kLanes, m_, [&](const Place& p) { return args_.g + p.columns; }, [](const Place& p) { return p.m; });
    }
    for (int64_t l = 0; args_.iterations && l < count_; ++l) {
        args_.iterations[places_.listed() ? places_[l].index : places_.first.index + l] = ran_[l];
    }
}

// The header; unless the backward runs the loop again, the last scalings, and those before them for the gradient of the last
// step; zeros elsewhere.
template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::write_history(Keep keep) const {
    const auto slots = [&](const Place& p) { return reinterpret_cast<S*>(args_.history + p.history + kHistoryHeader); };
    for (int64_t l = 0; l < count_; ++l) {
        double* history = args_.history + places_[l].history;
        std::memset(history, 0, places_[l].history_size * sizeof(double));
        history[0] = static_cast<int>(kMethod);
        history[1] = static_cast<double>(ran_[l]);
    }
    if (keep == Keep::all) return;
    const int64_t slot = keep == Keep::last_step ? 1 : 0;
    const auto rows = [](const Place& p) { return p.n; };
    const auto columns = [](const Place& p) { return p.m; };
    put<S>(u_, n_, [&](const Place& p) { return slots(p) + slot * (p.n + p.m); }, rows);
    put<S>(v_, m_, [&](const Place& p) { return slots(p) + slot * (p.n + p.m) + p.n; }, columns);
    if (slot) put<S>(before_, m_, [&](const Place& p) { return slots(p) + p.n; }, columns);
}

template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::forward(double limit, bool* solved) {
    load_problems();
    V range[kVectors];
    Mask good[kVectors];
    ranges(range);
    bool some = false;
    for (int g = 0; g < kVectors; ++g) {
        good[g] = range[g] <= splat(static_cast<S>(limit));
        some |= any<S>(good[g]);
        errors_[g] = splat(S(-1));
    }
    for (int64_t l = 0; l < kLanes; ++l) ran_[l] = args_.num_iters;
    for (int64_t l = 0; !some && l < count_; ++l) solved[l] = false;
    if (!some) return;
    args_.tol > 0 ? iterate_watching() : iterate(args_.num_iters, nullptr);
    for (int g = 0; g < kVectors; ++g) {
        V sum = {};
        for (int64_t j = 0; j < m_; ++j) sum += load(v_ + j * kLanes + g * kWidth);
        good[g] &= (safe_lanes_[g] | ((low_[g] >= splat(kLow<S>)) & (high_[g] <= splat(kHigh<S>)))) & (sum == sum);
    }
    outputs();
    if (args_.history) write_history(args_.keep);
    typename Simd<S>::Int lanes[kLanes];
    std::memcpy(lanes, good, sizeof good);
    for (int64_t l = 0; l < count_; ++l) solved[l] = lanes[l] != 0;
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

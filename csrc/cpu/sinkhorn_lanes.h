// The scaling loop of sinkhorn_scaling.h for many small problems at once, one in each lane: entry (i, j) of all of them is one
// or two vectors, sums run down the lanes, and nothing is padded to a vector. Plain iterations without penalties. A smaller
// problem of a group is filled up with forbidden pairs and rows and columns without mass.
// An iteration: 2 n m multiply-adds and n + m quotients a vector. K, C and the vectors stay in the caches. Unused rows and
// columns have sums from 1 on, so that nothing is divided by 0.
// A problem whose exponents are beyond `limit`, or whose sums leave the safe range, is reported as not solved.
#pragma once
#include "lane_memory.h"
#include "lanes.h"
#include "sinkhorn_buffers.h"
#include "sinkhorn_places.h"
#include "sinkhorn_updates.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class S, class T, int kVectors>
class LaneGroup {
    using V = Vec<S>;
    using Mask = VecInt<S>;
    static constexpr int64_t kWidth = width<S>;
    static constexpr int kRows = 8 / kVectors;  // of a product, in registers together
    static constexpr int64_t kStepBlock = 4;    // steps of the adjoint whose part of the cost's gradient is added together

  public:
    static constexpr int64_t kLanes = kVectors * kWidth;
    static constexpr Method kMethod = sizeof(S) == sizeof(float) ? Method::scaling_float : Method::scaling_double;

    // For `count` problems of at most n rows and m columns.
    LaneGroup(const SinkhornArgs<T>& args, const Places& places, int64_t count, int64_t n, int64_t m, Arena& arena,
              bool backward);

    // solved[l]: whether the results of places[l] are there.
    void forward(double limit, bool* solved);
    void backward(bool* solved);

  private:
    template <class From, class Length>
    void get(From from, Length length, int64_t entries, T padding, S* lanes) const;
    template <class Out, class To, class Length>
    void put(const S* lanes, int64_t entries, To to, Length length) const;
    void fill(S value, S* lanes, int64_t entries) const {
        for (int64_t k = 0; k < entries * kLanes; ++k) lanes[k] = value;
    }
    void load_problems();
    void load_masses(const T* masses, bool rows, S* mass, S* unused);
    void start_columns();
    void start_kernel();
    void ranges(V* range);
    template <bool kTransposed, class Finish>
    OTKD_INLINE void product(const S* x, const S* start, const Finish& finish) const;
    template <bool kSafe>
    void iterate(int64_t steps, S* trace);
    void iterate(int64_t steps, S* trace) { safe_ ? iterate<true>(steps, trace) : iterate<false>(steps, trace); }
    void iterate_watching();
    bool stop(Mask* active, const V* errors, int64_t done);
    template <bool kFinite>
    OTKD_INLINE void row_outputs(int64_t i, V* transport, V* error) const;
    void outputs();
    V write_side(int64_t count, const S* mass, const S* scaling, const S* shift, S* potential, int g) const;
    void write_scalar(const V* values, T* out) const;
    void write_history(Keep keep) const;
    // backward, sinkhorn_lanes_bwd.h
    void iterate_again();
    void last_scalings();
    void first_adjoint();
    void invert_masses();
    template <bool kAll>
    void adjoint_step(int64_t k);
    template <class Body>
    OTKD_INLINE void for_tiles(const Body& body) const;
    void add_steps(int64_t first, int64_t last);
    void cost_gradient();
    void marginal_gradients();
    void incoming(const T* grads, V* values) const;
    S* trace_u(int64_t k) const { return trace_ + k * (n_ + m_) * kLanes; }
    S* trace_v(int64_t k) const { return trace_u(k) + n_ * kLanes; }
    S* adjoint_z(int64_t k) const { return adjoint_ + k % kStepBlock * (n_ + m_) * kLanes; }
    S* adjoint_w(int64_t k) const { return adjoint_z(k) + n_ * kLanes; }
    const S* before(int64_t k) const { return k > 0 ? trace_v(k - 1) : start_; }

    const SinkhornArgs<T>& args_;
    const Places& places_;
    const int64_t count_, n_, m_;
    bool uniform_ = true;  // all are (n, m)
    bool finite_ = true;   // all costs are
    bool safe_ = true;     // no sum can leave the safe range, in any lane
    S *cost_, *kernel_, *a_, *unused_a_, *b_, *unused_b_, *shift_, *u_, *v_, *start_, *before_, *sums_;
    V low_[kVectors], high_[kVectors], lowest_[kVectors], highest_[kVectors];
    Mask safe_lanes_[kVectors];
    int64_t ran_[kLanes] = {};
    V errors_[kVectors];  // of the plan where `tol` stopped the loop, else negative
    int64_t steps_ = 0;   // that are differentiated
    V of_transport_[kVectors], of_dual_[kVectors], base_[kVectors], lane_steps_[kVectors];
    S *trace_ = nullptr, *adjoint_ = nullptr, *bar_ = nullptr, *phi_bar_ = nullptr, *gamma_bar_ = nullptr, *sum_phi_ = nullptr,
      *sum_gamma_ = nullptr;
};

template <class S, class T, int kVectors>
LaneGroup<S, T, kVectors>::LaneGroup(const SinkhornArgs<T>& args, const Places& places, int64_t count, int64_t n, int64_t m,
                                     Arena& arena, bool backward)
    : args_(args), places_(places), count_(count), n_(n), m_(m) {
    for (S** matrix : {&cost_, &kernel_}) *matrix = arena.take<S>(n * m * kLanes);
    for (S** rows : {&a_, &unused_a_, &shift_, &u_}) *rows = arena.take<S>(n * kLanes);
    for (S** columns : {&b_, &unused_b_, &v_, &start_, &before_}) *columns = arena.take<S>(m * kLanes);
    sums_ = arena.take<S>((n + m) * kLanes);
    if (!backward) return;
    const int64_t most = args.gradient == Gradient::unroll ? args.num_iters : args.gradient == Gradient::last_step;
    trace_ = arena.take<S>(most * (n + m) * kLanes);
    adjoint_ = arena.take<S>(kStepBlock * (n + m) * kLanes);
    bar_ = arena.take<S>(n * m * kLanes);
    for (S** rows : {&phi_bar_, &sum_phi_}) *rows = arena.take<S>(n * kLanes);
    for (S** columns : {&gamma_bar_, &sum_gamma_}) *columns = arena.take<S>(m * kLanes);
}

// length(place) entries from from(place) of each problem, `padding` up to `entries`. Lanes beyond the last problem repeat it.
template <class S, class T, int kVectors>
template <class From, class Length>
void LaneGroup<S, T, kVectors>::get(From from, Length length, int64_t entries, T padding, S* lanes) const {
    const T* in[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) in[l] = from(places_[l < count_ ? l : count_ - 1]);
    if (uniform_) return gather<kLanes>(in, entries, lanes);
    fill(static_cast<S>(padding), lanes, entries);
    for (int64_t l = 0; l < kLanes; ++l) {
        const int64_t own = length(places_[l < count_ ? l : count_ - 1]);
        for (int64_t e = 0; e < own; ++e) lanes[e * kLanes + l] = static_cast<S>(in[l][e]);
    }
}

template <class S, class T, int kVectors>
template <class Out, class To, class Length>
void LaneGroup<S, T, kVectors>::put(const S* lanes, int64_t entries, To to, Length length) const {
    Out* out[kLanes];
    for (int64_t l = 0; l < count_; ++l) out[l] = to(places_[l]);
    if (uniform_) return scatter<kLanes>(lanes, count_, entries, out);
    for (int64_t l = 0; l < count_; ++l) {
        for (int64_t e = 0; e < length(places_[l]); ++e) out[l][e] = static_cast<Out>(lanes[e * kLanes + l]);
    }
}

template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::load_masses(const T* masses, bool rows, S* mass, S* unused) {
    const int64_t size = rows ? n_ : m_;
    if (masses) {
        const int64_t stride = rows ? args_.a_stride : args_.b_stride;
        get([&](const Place& p) { return masses + (stride ? p.index * stride : rows ? p.rows : p.columns); },
            [&](const Place& p) { return rows ? p.n : p.m; }, size, T(0), mass);
    } else {
        fill(static_cast<S>(1.0 / static_cast<double>(size)), mass, size);
    }
    for (int64_t k = 0; k < size * kLanes; k += kWidth) {
        store(unused + k, load(mass + k) > splat(S(0)) ? splat(S(0)) : splat(S(1)));
    }
}

template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::load_problems() {
    for (int64_t l = 0; places_.listed() && l < count_; ++l) uniform_ &= places_[l].n == n_ && places_[l].m == m_;
    if (uniform_) {
        get([&](const Place& p) { return args_.cost + p.entries; }, [](const Place&) { return 0; }, n_ * m_, T(0), cost_);
    } else {
        fill(std::numeric_limits<S>::infinity(), cost_, n_ * m_);
        for (int64_t l = 0; l < count_; ++l) {
            const T* cost = args_.cost + places_[l].entries;
            for (int64_t i = 0; i < places_[l].n; ++i) {
                for (int64_t j = 0; j < places_[l].m; ++j) cost_[(i * m_ + j) * kLanes + l] = static_cast<S>(*cost++);
            }
        }
    }
    load_masses(args_.a, true, a_, unused_a_);
    load_masses(args_.b, false, b_, unused_b_);
    start_columns();
    start_kernel();
}

// The columns that the loop starts from.
template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::start_columns() {
    for (int64_t k = 0; k < m_ * kLanes; k += kWidth) store(start_ + k, splat(S(1)) - load(unused_b_ + k));
    if (args_.initial_g) {
        get([&](const Place& p) { return args_.initial_g + p.columns; }, [](const Place& p) { return p.m; }, m_, T(0), sums_);
        const ScaledExp<S> exp(1.0 / args_.epsilon);
        const V limit = splat(static_cast<S>(kLargestLog<S> * args_.epsilon));
        for (int64_t k = 0; k < m_ * kLanes; k += kWidth) {
            const V g = load(sums_ + k), finite = g - g == V{} ? g : V{};
            store(start_ + k, load(start_ + k) * exp(min<S>(finite, limit)));
        }
    }
    std::memcpy(v_, start_, m_ * kLanes * sizeof(S));
}

// Shifts and kernel, and the smallest and the largest finite cost of each problem.
template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::start_kernel() {
    const V inf = splat(std::numeric_limits<S>::infinity());
    const ScaledExp<S> exp(1.0 / args_.epsilon);
    finite_ = true;
    for (int g = 0; g < kVectors; ++g) {
        V lowest = inf, highest = -inf;
        for (int64_t i = 0; i < n_; ++i) {
            const S* cost = cost_ + i * m_ * kLanes + g * kWidth;
            S* kernel = kernel_ + i * m_ * kLanes + g * kWidth;
            V least = inf;
            for (int64_t j = 0; j < m_; ++j) {
                const V c = load(cost + j * kLanes);
                least = min<S>(c, least);
                highest = max<S>(c, highest);
            }
            lowest = min<S>(least, lowest);
            const V shift = least < inf ? least : V{};
            store(shift_ + i * kLanes + g * kWidth, shift);
            for (int64_t j = 0; j < m_; ++j) store(kernel + j * kLanes, exp(shift - load(cost + j * kLanes)));
        }
        finite_ &= !any<S>(highest == inf);
        lowest_[g] = lowest;
        highest_[g] = highest;
    }
    for (int g = 0; g < kVectors && !finite_; ++g) {
        highest_[g] = -inf;
        for (int64_t k = g * kWidth; k < n_ * m_ * kLanes; k += kLanes) {
            const V c = load(cost_ + k);
            highest_[g] = max<S>(c < inf ? c : -inf, highest_[g]);
        }
    }
}

// The range of the exponents (cost_range and given_range of sinkhorn_solver.h) of every problem; infinite for one with
// masses that only the log domain takes. And which problems are safe: the map of the potentials is not expansive, so g / eps
// never leaves [-(R + r_b), R + r_b] for the ranges R of the costs and r_b of b over eps, and log(K v) and log(K^T u / b) stay
// within 2 R + r_b and log 32 of 0, where totals that differ do not make the potentials drift.
template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::ranges(V* range) {
    constexpr S smallest = std::numeric_limits<S>::min();
    const V inf = splat(std::numeric_limits<S>::infinity()), zero = {}, inverse = splat(static_cast<S>(1.0 / args_.epsilon));
    safe_ = finite_ && !args_.initial_g;
    for (int g = 0; g < kVectors; ++g) {
        const V spread = highest_[g] - lowest_[g];
        const V of_costs = spread > zero ? spread * inverse : zero;
        V ratio[2], total[2], limits[2][2];
        Mask good = zero == zero;
        for (int side = 0; side < 2; ++side) {
            const S* mass = (side ? b_ : a_) + g * kWidth;
            V least = inf, most = zero;
            total[side] = zero;
            for (int64_t k = 0; k < (side ? m_ : n_); ++k) {
                const V own = load(mass + k * kLanes);
                least = min<S>(own > zero ? own : inf, least);
                most = max<S>(own, most);
                total[side] += own;
                good &= own >= zero;
            }
            good &= (most > zero) & (most < inf) & (least >= splat(smallest));
            ratio[side] = most / least;
            limits[side][0] = least;
            limits[side][1] = most;
        }
        const V of_b = log(ratio[1]), both = log(ratio[0]) + of_b;
        good &= (ratio[0] < inf) & (ratio[1] < inf);
        range[g] = good ? of_costs + both : inf;
        const V apart = abs<S>(total[0] - total[1]) * static_cast<S>(args_.num_iters);
        safe_lanes_[g] = good & (S(2) * of_costs + of_b <= S(38)) & (apart <= total[0]) & (apart <= total[1]);
        for (const auto& limit : limits) safe_lanes_[g] &= (limit[0] >= S(1e-7)) & (limit[1] <= S(1e7));
        safe_ &= !any<S>(~safe_lanes_[g]);
        if (!args_.initial_g) continue;
        V low = zero, high = zero;
        for (int64_t j = 0; j < m_; ++j) {
            const V value = load(sums_ + j * kLanes + g * kWidth), finite = value - value == zero ? value : zero;
            low = min<S>(finite, low);
            high = max<S>(finite, high);
        }
        range[g] += (high - low) * inverse;
    }
}

// finish(r, g, start_r + sum_d K_rd x_d) for all rows r, or with the columns for rows; `start` may be null: zeros.
template <class S, class T, int kVectors>
template <bool kTransposed, class Finish>
OTKD_INLINE void LaneGroup<S, T, kVectors>::product(const S* x, const S* start, const Finish& finish) const {
    const int64_t rows = kTransposed ? m_ : n_, depth = kTransposed ? n_ : m_;
    const int64_t row_step = kTransposed ? kLanes : m_ * kLanes, depth_step = kTransposed ? m_ * kLanes : kLanes;
    for (int64_t r = 0; r < rows; r += kRows) {
        with_count<kRows>(rows - r, [&](auto block) {
            constexpr int kBlockRows = decltype(block)::value;
            V acc[kBlockRows][kVectors];  // not "= {}": that fills memory
            for (int i = 0; i < kBlockRows; ++i) {
                for (int g = 0; g < kVectors; ++g) acc[i][g] = V{};
            }
            for (int i = 0; start && i < kBlockRows; ++i) {
                for (int g = 0; g < kVectors; ++g) acc[i][g] = load(start + (r + i) * kLanes + g * kWidth);
            }
            const S* k = kernel_ + r * row_step;
            for (int64_t d = 0; d < depth; ++d, k += depth_step) {
                for (int g = 0; g < kVectors; ++g) {
                    const V factor = load(x + d * kLanes + g * kWidth);
                    for (int i = 0; i < kBlockRows; ++i) acc[i][g] += load(k + i * row_step + g * kWidth) * factor;
                }
            }
            for (int i = 0; i < kBlockRows; ++i) {
                for (int g = 0; g < kVectors; ++g) finish(r + i, g, acc[i][g]);
            }
        });
    }
}

// `steps` iterations from start_; into a trace of (u, v) where one is wanted, else into u_ and v_.
template <class S, class T, int kVectors>
template <bool kSafe>
void LaneGroup<S, T, kVectors>::iterate(int64_t steps, S* trace) {
    const S* current = start_;
    V low[kVectors], high[kVectors];
    for (int g = 0; g < kVectors; ++g) low[g] = high[g] = splat(S(1));
    for (int64_t t = 0; t < steps; ++t) {
        S *u = trace ? trace_u(t) : u_, *v = trace ? trace_v(t) : v_;
        const auto divide_into = [&](S* scaling, const S* mass) {
            return [&, scaling, mass](int64_t r, int g, V total) {
                const int64_t at = r * kLanes + g * kWidth;
                if constexpr (!kSafe) {
                    low[g] = min<S>(total, low[g]);
                    high[g] = max<S>(total, high[g]);
                }
                store(scaling + at, quotient<S>(load(mass + at), total));
            };
        };
        product<false>(current, unused_a_, divide_into(u, a_));
        if (args_.keep == Keep::last_step) std::memcpy(before_, current, m_ * kLanes * sizeof(S));
        product<true>(u, unused_b_, divide_into(v, b_));
        current = v;
    }
    for (int g = 0; g < kVectors; ++g) {
        low_[g] = low[g];
        high_[g] = high[g];
    }
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

#include "sinkhorn_lanes_bwd.h"
#include "sinkhorn_lanes_fwd.h"

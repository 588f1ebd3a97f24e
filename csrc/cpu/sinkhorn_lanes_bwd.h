// The gradients of sinkhorn_lanes.h, the adjoint of sinkhorn_scaling_bwd.h. For the unrolled gradient the loop runs once more,
// which is cheaper than its trace would be in memory, from call to call: 2 n m T multiply-adds a vector for the loop, 2 n m T
// for its adjoint and 2 n m T for the product of rank 2 T.
#pragma once
#include "sinkhorn_lanes.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::incoming(const T* grads, V* values) const {
    S lanes[kLanes] = {};
    for (int64_t l = 0; grads && l < count_; ++l) lanes[l] = static_cast<S>(grads[places_[l].index]);
    for (int g = 0; g < kVectors; ++g) values[g] = load(lanes + g * kWidth);
}

// The trace from the loop itself, and u_ and v_ from its end.
template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::iterate_again() {
    iterate(steps_, trace_);
    std::memcpy(u_, trace_u(steps_ - 1), n_ * kLanes * sizeof(S));
    std::memcpy(v_, trace_v(steps_ - 1), m_ * kLanes * sizeof(S));
    for (int64_t l = 0; l < count_; ++l) {
        if (ran_[l] == steps_) continue;
        for (int64_t i = 0; i < n_; ++i) u_[i * kLanes + l] = ran_[l] > 0 ? trace_u(ran_[l] - 1)[i * kLanes + l] : S(0);
        for (int64_t j = 0; j < m_; ++j) v_[j * kLanes + l] = ran_[l] > 0 ? trace_v(ran_[l] - 1)[j * kLanes + l] : S(0);
    }
}

// u_ and v_ from the history, and the step that is differentiated.
template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::last_scalings() {
    const int64_t slot = args_.gradient == Gradient::last_step ? 1 : 0;
    const auto at = [&](const Place& p) { return args_.history + p.history + kHistoryHeader; };
    for (int64_t k = 0; k < n_ * kLanes; ++k) u_[k] = 0;
    for (int64_t k = 0; k < m_ * kLanes; ++k) v_[k] = 0;
    for (int64_t l = 0; l < count_; ++l) {
        const Place& p = places_[l];
        const S* first = reinterpret_cast<const S*>(at(p));
        const S* last = first + slot * (p.n + p.m);
        for (int64_t i = 0; i < p.n; ++i) u_[i * kLanes + l] = last[i];
        for (int64_t j = 0; j < p.m; ++j) v_[j * kLanes + l] = last[p.n + j];
        for (int64_t j = 0; slot && j < p.m; ++j) start_[j * kLanes + l] = first[p.n + j];
    }
    if (steps_ == 0) return;
    std::memcpy(trace_u(0), u_, n_ * kLanes * sizeof(S));
    std::memcpy(trace_v(0), v_, m_ * kLanes * sizeof(S));
}

// Adjoints of the last potentials.
template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::first_adjoint() {
    const V zero = {}, epsilon = splat(static_cast<S>(args_.epsilon));
    fill(S(0), phi_bar_, n_);
    fill(S(0), gamma_bar_, m_);
    fill(S(0), sum_phi_, n_);
    fill(S(0), sum_gamma_, m_);
    if (args_.grad_f) {
        get([&](const Place& p) { return args_.grad_f + p.rows; }, [](const Place& p) { return p.n; }, n_, T(0), phi_bar_);
    }
    if (args_.grad_g) {
        get([&](const Place& p) { return args_.grad_g + p.columns; }, [](const Place& p) { return p.m; }, m_, T(0), gamma_bar_);
    }
    for (int g = 0; g < kVectors; ++g) {
        for (int64_t j = 0; j < m_; ++j) {
            const int64_t at = j * kLanes + g * kWidth;
            store(sums_ + at, zero);
            store(gamma_bar_ + at, load(v_ + at) > zero ? epsilon * load(gamma_bar_ + at) : zero);
        }
        for (int64_t i = 0; i < n_; ++i) {
            const int64_t at = i * kLanes + g * kWidth;
            const V u = load(u_ + at);
            V mass = zero, moved = zero;
            for (int64_t j = 0; j < m_; ++j) {
                const int64_t entry = (i * m_ + j) * kLanes + g * kWidth, column = j * kLanes + g * kWidth;
                const V kernel = load(kernel_ + entry), v = load(v_ + column);
                const V weighted = kernel * (load(cost_ + entry) - base_[g]), kc = finite_ ? weighted : (kernel > zero ? weighted : zero);
                mass += kernel * v;
                moved += kc * v;
                store(sums_ + column, load(sums_ + column) + kc * u);
            }
            const V bar = of_transport_[g] * u * moved + epsilon * (of_dual_[g] * (load(a_ + at) - u * mass) + load(phi_bar_ + at));
            store(phi_bar_ + at, u > zero ? bar : zero);
        }
        for (int64_t j = 0; j < m_; ++j) {
            const int64_t at = j * kLanes + g * kWidth;
            store(gamma_bar_ + at, load(gamma_bar_ + at) + of_transport_[g] * load(v_ + at) * load(sums_ + at));
        }
    }
}

// 1 / mass, 0 without mass, over what only the loop needs.
template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::invert_masses() {
    const V zero = {};
    for (const bool rows : {true, false}) {
        const S* mass = rows ? a_ : b_;
        S* inverse = rows ? unused_a_ : unused_b_;
        for (int64_t k = 0; k < (rows ? n_ : m_) * kLanes; k += kWidth) {
            const V own = load(mass + k);
            store(inverse + k, own > zero ? S(1) / own : zero);
        }
    }
}

// Step k backwards, in the lanes that ran it (kAll: all): w and z, and gamma_bar of the step before.
template <class S, class T, int kVectors>
template <bool kAll>
void LaneGroup<S, T, kVectors>::adjoint_step(int64_t k) {
    const V zero = {};
    const V now = splat(static_cast<S>(k)), next = splat(static_cast<S>(k + 1));
    const bool masses = args_.grad_a || args_.grad_b, inner = kAll && k + 1 < steps_;
    S *const w = adjoint_w(k), *const z = adjoint_z(k), *const gamma_bar = gamma_bar_, *const sum_phi = sum_phi_;
    const S *const u = trace_u(k), *const v = trace_v(k), *const v_before = before(k), *const phi_bar = phi_bar_;
    const S *const inverse_a = unused_a_, *const inverse_b = unused_b_;
    const int64_t columns = m_ * kLanes;
    Mask active[kVectors], last[kVectors];
    for (int g = 0; g < kVectors; ++g) {
        active[g] = now < lane_steps_[g];
        last[g] = next == lane_steps_[g];
    }
    for (int64_t j = 0; j < columns; j += kLanes) {
        for (int g = 0; g < kVectors; ++g) {
            const int64_t at = j + g * kWidth;
            V bar = load(gamma_bar + at);
            if constexpr (!kAll) bar = active[g] ? bar : zero;
            store(w + at, bar * (load(v + at) * load(inverse_b + at)));
        }
    }
    for (int64_t j = 0; masses && j < columns; j += kLanes) {
        for (int g = 0; g < kVectors; ++g) {
            const int64_t at = j + g * kWidth;
            store(sum_gamma_ + at, load(sum_gamma_ + at) + (active[g] ? load(gamma_bar + at) : zero));
        }
    }
    product<false>(w, nullptr, [&](int64_t i, int g, V sum) {
        const int64_t at = i * kLanes + g * kWidth;
        const V scaling = load(u + at), through = -(scaling * sum);
        V bar = through;
        if (!inner) bar += last[g] ? load(phi_bar + at) : zero;
        if constexpr (!kAll) bar = active[g] ? bar : zero;
        if (masses) store(sum_phi + at, load(sum_phi + at) + bar);
        store(z + at, bar * (scaling * load(inverse_a + at)));
    });
    product<true>(z, nullptr, [&](int64_t j, int g, V sum) {
        const int64_t at = j * kLanes + g * kWidth;
        const V bar = -(load(v_before + at) * sum);
        if constexpr (kAll) {
            store(gamma_bar + at, bar);
        } else {
            store(gamma_bar + at, active[g] ? bar : load(gamma_bar + at));
        }
    });
}

// body(rows, columns, i, j, offset of row i, of column j, of entry (i, j)) of every register tile of each vector.
template <class S, class T, int kVectors>
template <class Body>
OTKD_INLINE void LaneGroup<S, T, kVectors>::for_tiles(const Body& body) const {
    for (int64_t i = 0; i < n_; i += kLaneRows) {
        with_count<kLaneRows>(n_ - i, [&](auto rows) {
            for (int64_t j = 0; j < m_; j += kLaneColumns) {
                with_count<kLaneColumns>(m_ - j, [&](auto columns) {
                    for (int g = 0; g < kVectors; ++g) {
                        body(rows, columns, g, i * kLanes + g * kWidth, j * kLanes + g * kWidth,
                             (i * m_ + j) * kLanes + g * kWidth);
                    }
                });
            }
        });
    }
}

// bar_ += sum of u w + z v' over the steps [first, last): those of one block, whose vectors are still in the cache.
template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::add_steps(int64_t first, int64_t last) {
    for_tiles([&](auto rows, auto columns, int, int64_t i_at, int64_t j_at, int64_t entry) {
        constexpr int kR = decltype(rows)::value, kC = decltype(columns)::value;
        V acc[kR][kC];
        for (int r = 0; r < kR; ++r) {
            for (int c = 0; c < kC; ++c) acc[r][c] = load(bar_ + entry + (r * m_ + c) * kLanes);
        }
        for (int64_t k = first; k < last; ++k) {
            const S *left[2] = {trace_u(k) + i_at, adjoint_z(k) + i_at}, *right[2] = {adjoint_w(k) + j_at, before(k) + j_at};
            for (int half = 0; half < 2; ++half) {
                V column[kC];
                for (int c = 0; c < kC; ++c) column[c] = load(right[half] + c * kLanes);
                for (int r = 0; r < kR; ++r) {
                    const V row = load(left[half] + r * kLanes);
                    for (int c = 0; c < kC; ++c) acc[r][c] += row * column[c];
                }
            }
        }
        for (int r = 0; r < kR; ++r) {
            for (int c = 0; c < kC; ++c) store(bar_ + entry + (r * m_ + c) * kLanes, acc[r][c]);
        }
    });
}

// C_bar = K (u v (d_transport (1 - C / eps) + d_dual) + bar / eps), into cost_.
template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::cost_gradient() {
    const V zero = {}, inverse = splat(static_cast<S>(1.0 / args_.epsilon)), slope = steps_ > 0 ? inverse : zero;
    for (int64_t i = 0; i < n_; ++i) {
        for (int64_t j = 0; j < m_; ++j) {
            for (int g = 0; g < kVectors; ++g) {
                const int64_t at = (i * m_ + j) * kLanes + g * kWidth;
                const V kernel = load(kernel_ + at), cost = load(cost_ + at) - base_[g];
                const V direct = of_transport_[g] * (S(1) - cost * slope) + of_dual_[g];
                const V plan = load(u_ + i * kLanes + g * kWidth) * load(v_ + j * kLanes + g * kWidth);
                const V value = kernel * (steps_ > 0 ? plan * direct + load(bar_ + at) * inverse : plan * direct);
                store(cost_ + at, finite_ ? value : (kernel > zero ? value : zero));
            }
        }
    }
    if (uniform_) {
        return put<T>(cost_, n_ * m_, [&](const Place& p) { return args_.grad_cost + p.entries; }, [](const Place&) { return 0; });
    }
    for (int64_t l = 0; l < count_; ++l) {
        T* out = args_.grad_cost + places_[l].entries;
        for (int64_t i = 0; i < places_[l].n; ++i) {
            for (int64_t j = 0; j < places_[l].m; ++j) *out++ = static_cast<T>(cost_[(i * m_ + j) * kLanes + l]);
        }
    }
}

// By the masses: through the loop, and what the dual value and the shift of the costs by base_ have in their formulas.
template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::marginal_gradients() {
    const V zero = {}, epsilon = splat(static_cast<S>(args_.epsilon));
    for (const bool rows : {true, false}) {
        if (!(rows ? args_.grad_a : args_.grad_b)) continue;
        const int64_t count = rows ? n_ : m_, others = rows ? m_ : n_;
        const S *mass = rows ? a_ : b_, *other = rows ? b_ : a_, *scaling = rows ? u_ : v_, *sum = rows ? sum_phi_ : sum_gamma_;
        for (int g = 0; g < kVectors; ++g) {
            V total = zero;
            for (int64_t k = g * kWidth; k < others * kLanes; k += kLanes) total += load(other + k);
            for (int64_t k = g * kWidth; k < count * kLanes; k += kLanes) {
                const V own = load(mass + k), scale = load(scaling + k);
                const V shift = rows ? load(shift_ + k) : zero;
                V grad = steps_ > 0 ? load(sum + k) / own : zero;
                if (!rows && steps_ > 0) grad += of_transport_[g] * base_[g];
                const V relative = epsilon * (log(scale) - log(own)) + shift;
                grad += scale > zero ? of_dual_[g] * (relative - epsilon + epsilon * total) : zero;
                store(sums_ + k, own > zero ? grad : zero);
            }
        }
        put<T>(
            sums_, count, [&](const Place& p) { return rows ? args_.grad_a + p.rows : args_.grad_b + p.columns; },
            [&](const Place& p) { return rows ? p.n : p.m; });
    }
}

template <class S, class T, int kVectors>
void LaneGroup<S, T, kVectors>::backward(bool* solved) {
    int64_t most = 0;
    for (int64_t l = 0; l < count_; ++l) {
        const double* history = args_.history + places_[l].history;
        solved[l] = history[0] == static_cast<int>(kMethod);
        ran_[l] = solved[l] ? static_cast<int64_t>(history[1]) : 0;
        most = ran_[l] > most ? ran_[l] : most;
    }
    if (most == 0) return;
    steps_ = args_.gradient == Gradient::unroll ? most : args_.gradient == Gradient::last_step;
    load_problems();
    S lane_steps[kLanes];
    bool all = true;
    for (int64_t l = 0; l < kLanes; ++l) lane_steps[l] = static_cast<S>(args_.gradient == Gradient::unroll ? ran_[l] : 1);
    for (int64_t l = 0; l < count_; ++l) all &= lane_steps[l] == static_cast<S>(steps_);
    for (int g = 0; g < kVectors; ++g) {
        lane_steps_[g] = load(lane_steps + g * kWidth);
        base_[g] = lowest_[g] - lowest_[g] == V{} ? lowest_[g] : V{};
    }
    incoming(args_.grad_transport_cost, of_transport_);
    incoming(args_.grad_regularized_cost, of_dual_);
    args_.gradient == Gradient::unroll ? iterate_again() : last_scalings();
    if (steps_ > 0) {
        fill(S(0), bar_, args_.grad_cost ? n_ * m_ : 0);
        first_adjoint();
        invert_masses();
        for (int64_t k = steps_; k > 0; k -= kStepBlock) {
            const int64_t first = k > kStepBlock ? k - kStepBlock : 0;
            for (int64_t step = k - 1; step >= first; --step) all ? adjoint_step<true>(step) : adjoint_step<false>(step);
            if (args_.grad_cost) add_steps(first, k);
        }
    }
    if (args_.grad_cost) cost_gradient();
    marginal_gradients();
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

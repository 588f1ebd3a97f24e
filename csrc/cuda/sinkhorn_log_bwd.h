// The gradients of sinkhorn_log.h, in double: adjoints of the loop backwards. With the plans Q after the column update and
// R after the row update of a step,
//   w = gamma_bar lambda_b / (column sums of Q)      phi_bar   = [last step] first - Q w
//   z = phi_bar lambda_a / (row sums of R)           gamma_bar = -R^T z       (of the iteration before)
//   C_bar = P (d_transport (1 - X) + d_dual) + sum over the steps of (Q w + R z) / epsilon
// The same phases as the forward: rows a warp, columns 32 a block, then the cost's gradient an entry a thread.
#pragma once
#include "sinkhorn_log.h"

namespace otkd_fast {
namespace cuda {
namespace {

enum class BackwardPhase : int { first_rows, first_columns, rows, columns, cost, marginals };

// A problem with its history, which is read where it lies.
template <class T>
struct Trace {
    const Problem<T>& p;
    int64_t ran, steps, last;
    bool unroll;
    const double *phi, *gamma;  // of the last plan

    OTKD_DEVICE explicit Trace(const Problem<T>& problem)
        : p(problem), ran(static_cast<int64_t>(problem.history()[1])), steps(problem.steps(ran)),
          last(problem.last_slot(ran)), unroll(problem.args.gradient == Gradient::unroll),
          phi(problem.template kept_u<double>(last)), gamma(problem.template kept_v<double>(last)) {}
    OTKD_DEVICE const double* phi_of(int64_t k) const { return p.template kept_u<double>(unroll ? k : 1); }
    OTKD_DEVICE const double* gamma_of(int64_t k) const { return p.template kept_v<double>(unroll ? k : 1); }
    // The column's potential before step k.
    OTKD_DEVICE double before(int64_t k, int64_t j) const {
        if (!unroll) return p.template kept_v<double>(0)[j];
        if (k > 0) return p.template kept_v<double>(k - 1)[j];
        return p.mass_b(j) > 0 ? p.start_gamma(j) : -kInfinity;
    }
    OTKD_DEVICE double* z(int64_t k) const { return p.adjoints() + k * (p.n + p.m); }
    OTKD_DEVICE double* w(int64_t k) const { return z(k) + p.n; }
};

// lambda / (the sum that an update saw, in the plan after it): log scaling = log mass - lambda log sum.
OTKD_DEVICE double inverse_sum(double mass, double potential, double lambda) {
    const double level = log(mass);
    return lambda * exp(-(lambda == 1 ? level : potential + (level - potential) / lambda));
}

// The adjoint of row i's last potential from its sums in the plan: the mass, and what it moves times X.
template <class T>
OTKD_DEVICE void first_row(const Trace<T>& t, int64_t i, double mass, double moved) {
    const Problem<T>& p = t.p;
    const double of_transport = p.incoming(p.args.grad_transport_cost), of_dual = p.incoming(p.args.grad_regularized_cost);
    const double own = p.mass_a(i);
    const bool served = t.phi[i] > -kInfinity;
    const double target = served ? own * p.penalty_a().kept(t.phi[i] - log(own)) : 0.0;
    p.first()[i] = served ? p.args.epsilon * (of_transport * moved + of_dual * (target - mass) + p.incoming_f(i)) : 0.0;
    p.sum_phi()[i] = 0;
}

template <class T>
OTKD_DEVICE void first_rows(const Trace<T>& t, Part part) {
    const Problem<T>& p = t.p;
    OTKD_ROLLED
    for (int64_t i = part.part * block_warps() + warp_id(); i < p.n; i += part.parts * block_warps()) {
        double mass = 0, moved = 0;
        OTKD_ROLLED
        for (int64_t j = lane_id(); j < p.m; j += 32) {
            const double x = p.exponent(i, j), entry = exp(t.phi[i] + t.gamma[j] - x);
            mass += entry;
            moved += entry != 0 ? entry * x : 0.0;
        }
        mass = warp_sum(mass);
        moved = warp_sum(moved);
        if (lane_id() == 0) first_row(t, i, mass, moved);
    }
}

// gamma_bar_ of column j before step k is known: what step k needs of it.
template <class T>
OTKD_DEVICE void column_adjoint(const Trace<T>& t, int64_t k, int64_t j, double bar) {
    const Problem<T>& p = t.p;
    const double potential = t.gamma_of(k)[j];
    const bool used = potential > -kInfinity;
    p.sum_gamma()[j] += used ? bar : 0.0;
    t.w(k)[j] = used ? bar * inverse_sum(p.mass_b(j), potential, p.penalty_b().lambda()) : 0.0;
}

// The same for the last step, from what column j of the plan moves times X.
template <class T>
OTKD_DEVICE void first_column(const Trace<T>& t, int64_t j, double moved) {
    const Problem<T>& p = t.p;
    const bool used = t.gamma[j] > -kInfinity;
    p.sum_gamma()[j] = 0;
    const double bar = p.incoming(p.args.grad_transport_cost) * moved + p.incoming_g(j);
    column_adjoint(t, t.steps - 1, j, used ? p.args.epsilon * bar : 0.0);
}

// z of row i in step k from its sum Q w.
template <class T>
OTKD_DEVICE void row_adjoint(const Trace<T>& t, int64_t k, int64_t i, double sum) {
    const Problem<T>& p = t.p;
    const double potential = t.phi_of(k)[i];
    const bool used = potential > -kInfinity;
    const double bar = used ? (k == t.steps - 1 ? p.first()[i] : 0.0) - sum : 0.0;
    p.sum_phi()[i] += bar;
    t.z(k)[i] = used ? bar * inverse_sum(p.mass_a(i), potential, p.penalty_a().lambda()) : 0.0;
}

// Sums of `entry(i, j)` over the rows for 32 columns at a time, then `finish(j, sum)`.
template <class T, class Entry, class Finish>
OTKD_DEVICE void for_columns(const Problem<T>& p, Part part, double* shared, Entry entry, Finish finish) {
    OTKD_ROLLED
    for (int64_t j0 = part.part * 32; j0 < p.m; j0 += part.parts * 32) {
        const int64_t j = j0 + lane_id();
        double sum = 0;
        OTKD_ROLLED
        for (int64_t i = warp_id(); j < p.m && i < p.n; i += block_warps()) sum += entry(i, j);
        shared[thread_id()] = sum;
        barrier();
        if (warp_id() == 0 && j < p.m) {
            for (int w = 1; w < block_warps(); ++w) sum += shared[w * 32 + lane_id()];
            finish(j, sum);
        }
        barrier();
    }
}

template <class T>
OTKD_DEVICE void first_columns(const Trace<T>& t, Part part, double* shared) {
    const Problem<T>& p = t.p;
    for_columns(
        p, part, shared,
        [&](int64_t i, int64_t j) {
            const double x = p.exponent(i, j), entry = exp(t.phi[i] + t.gamma[j] - x);
            return entry != 0 ? entry * x : 0.0;
        },
        [&](int64_t j, double sum) { first_column(t, j, sum); });
}

template <class T>
OTKD_DEVICE void adjoint_rows(const Trace<T>& t, Part part, int64_t k) {
    const Problem<T>& p = t.p;
    if (k >= t.steps) return;
    const double *phi = t.phi_of(k), *gamma = t.gamma_of(k), *w = t.w(k);
    OTKD_ROLLED
    for (int64_t i = part.part * block_warps() + warp_id(); i < p.n; i += part.parts * block_warps()) {
        double sum = 0;
        OTKD_ROLLED
        for (int64_t j = lane_id(); j < p.m; j += 32) sum += exp(phi[i] + gamma[j] - p.exponent(i, j)) * w[j];
        sum = warp_sum(sum);
        if (lane_id() == 0) row_adjoint(t, k, i, sum);
    }
}

template <class T>
OTKD_DEVICE void adjoint_columns(const Trace<T>& t, Part part, int64_t k, double* shared) {
    const Problem<T>& p = t.p;
    if (k >= t.steps || k == 0) return;  // what comes before the first step is a constant
    const double *phi = t.phi_of(k), *z = t.z(k);
    for_columns(
        p, part, shared,
        [&](int64_t i, int64_t j) { return exp(phi[i] + t.before(k, j) - p.exponent(i, j)) * z[i]; },
        [&](int64_t j, double sum) { column_adjoint(t, k - 1, j, -sum); });
}

template <class T>
OTKD_DEVICE double cost_gradient_entry(const Trace<T>& t, double of_transport, double of_dual, int64_t i, int64_t j) {
    const Problem<T>& p = t.p;
    const double x = p.exponent(i, j), entry = exp(t.phi[i] + t.gamma[j] - x);
    double rest = 0;
    OTKD_ROLLED
    for (int64_t k = 0; k < t.steps; ++k) {
        const double phi = t.phi_of(k)[i] - x;
        rest += exp(phi + t.gamma_of(k)[j]) * t.w(k)[j] + exp(phi + t.before(k, j)) * t.z(k)[i];
    }
    const double slope = t.steps > 0 ? 1 - x : 1.0;
    return x == kInfinity ? 0.0 : entry * (of_transport * slope + of_dual) + rest / p.args.epsilon;
}

template <class T>
OTKD_DEVICE void log_cost_gradient(const Trace<T>& t, Part part) {
    const Problem<T>& p = t.p;
    const double of_transport = p.incoming(p.args.grad_transport_cost), of_dual = p.incoming(p.args.grad_regularized_cost);
    OTKD_ROLLED
    for (int64_t i = part.part * block_warps() + warp_id(); i < p.n; i += part.parts * block_warps()) {
        OTKD_ROLLED
        for (int64_t j = lane_id(); j < p.m; j += 32) {
            p.grad_cost[i * p.m + j] = static_cast<T>(cost_gradient_entry(t, of_transport, of_dual, i, j));
        }
    }
}

// One block.
template <class T>
OTKD_DEVICE void marginal_gradients(const Trace<T>& t, double* shared) {
    const Problem<T>& p = t.p;
    const double of_dual = p.incoming(p.args.grad_regularized_cost);
    double mass_a = 0, mass_b = 0;
    OTKD_ROLLED
    for (int64_t i = thread_id(); i < p.n; i += block_threads()) mass_a += p.mass_a(i);
    OTKD_ROLLED
    for (int64_t j = thread_id(); j < p.m; j += block_threads()) mass_b += p.mass_b(j);
    mass_a = block_sum(mass_a, shared);
    mass_b = block_sum(mass_b, shared);
    OTKD_ROLLED
    for (int64_t i = thread_id(); p.args.grad_a && i < p.n; i += block_threads()) {
        const double own = p.mass_a(i), by_mass = t.steps > 0 ? p.sum_phi()[i] / own : 0.0;
        p.args.grad_a[p.index * p.n + i] = marginal_gradient<T>(own, t.phi[i], by_mass, p.penalty_a(), of_dual, mass_b);
    }
    OTKD_ROLLED
    for (int64_t j = thread_id(); p.args.grad_b && j < p.m; j += block_threads()) {
        const double own = p.mass_b(j), by_mass = t.steps > 0 ? p.sum_gamma()[j] / own : 0.0;
        p.args.grad_b[p.index * p.m + j] = marginal_gradient<T>(own, t.gamma[j], by_mass, p.penalty_b(), of_dual, mass_a);
    }
}

template <class T>
OTKD_DEVICE void log_backward_phase(const Problem<T>& p, BackwardPhase phase, Part part, int64_t k, double* shared) {
    const Trace<T> t(p);
    if (phase == BackwardPhase::first_rows && t.steps > 0) first_rows(t, part);
    if (phase == BackwardPhase::first_columns && t.steps > 0) first_columns(t, part, shared);
    if (phase == BackwardPhase::rows) adjoint_rows(t, part, k);
    if (phase == BackwardPhase::columns) adjoint_columns(t, part, k, shared);
    if (phase == BackwardPhase::cost && p.grad_cost) log_cost_gradient(t, part);
    if (phase == BackwardPhase::marginals) marginal_gradients(t, shared);
}

// The whole backward by one block. `shared`: a double a thread.
template <class T>
OTKD_CALL void log_backward(const Batch<T>& batch, int64_t index, const T* cost, T* grad_cost, double* shared) {
    const Problem<T> p(batch, index, cost, grad_cost);
    const Trace<T> t(p);
    const Part all{0, 1};
    if (t.steps > 0) {
        first_rows(t, all);
        first_columns(t, all, shared);
    }
    barrier();
    OTKD_ROLLED
    for (int64_t k = t.steps - 1; k >= 0; --k) {
        adjoint_rows(t, all, k);
        barrier();
        adjoint_columns(t, all, k, shared);
        barrier();
    }
    if (p.grad_cost) log_cost_gradient(t, all);
    marginal_gradients(t, shared);
}

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

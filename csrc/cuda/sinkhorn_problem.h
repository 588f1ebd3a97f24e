// What the ways of solving share on the device: one problem of a batch, its pieces of memory, penalties, the decisions of a
// loop. A problem's potentials / epsilon are phi and gamma, X = C / epsilon.
#pragma once
#include "otkd_fast/sinkhorn.h"
#include "runtime.h"

namespace otkd_fast {
namespace cuda {
namespace {

// A penalty rho on a marginal, infinite for a constraint; `relative` is f' / epsilon = phi - log mass.
struct Penalty {
    double rho, epsilon;
    OTKD_DEVICE bool constraint() const { return rho == kInfinity; }
    OTKD_DEVICE double lambda() const { return constraint() ? 1.0 : rho / (rho + epsilon); }
    // exp(-f' / rho), the part of a mass that a plan is to move
    OTKD_DEVICE double kept(double relative) const {
        if (constraint()) return 1.0;
        return relative > -kInfinity ? exp(-relative * epsilon / rho) : 0.0;
    }
    // The dual value of one unit of mass.
    OTKD_DEVICE double value(double relative) const {
        if (constraint()) return relative > -kInfinity ? epsilon * relative : 0.0;
        return relative > -kInfinity ? -rho * expm1(-relative * epsilon / rho) : rho;
    }
    // Its derivative by the mass at a fixed potential.
    OTKD_DEVICE double slope(double relative, double other_total) const {
        if (constraint()) return relative > -kInfinity ? epsilon * (relative - 1.0 + other_total) : 0.0;
        return value(relative) - epsilon * kept(relative) + epsilon * other_total;
    }
};

// The state of one loop in the log domain.
struct State {
    double omega, error_before;
    int64_t ran, running;
    int64_t wide;  // exponentials are taken in double
};

// A batch of problems as the kernels get it.
template <class T>
struct Batch {
    SinkhornArgs<T> args;
    int64_t cost_stride;       // 0: one cost for all
    int64_t history_stride;    // doubles
    int64_t workspace_stride;  // doubles
    int64_t steps;             // that the backward differentiates at most
};

// One problem of it.
template <class T>
struct Problem {
    const Batch<T>& batch;
    const SinkhornArgs<T>& args;
    int64_t index, n, m;
    const T* cost;  // (n, m)
    T* grad_cost;   // (n, m) or null; may be the cost's own memory
    double* memory;
    double per_epsilon;

    OTKD_DEVICE Problem(const Batch<T>& all, int64_t at, const T* own_cost, T* own_grad)
        : batch(all), args(all.args), index(at), n(all.args.n), m(all.args.m), cost(own_cost), grad_cost(own_grad),
          memory(reinterpret_cast<double*>(all.args.workspace) + at * all.workspace_stride), per_epsilon(1.0 / all.args.epsilon) {}
    OTKD_DEVICE Problem(const Batch<T>& all, int64_t at)
        : Problem(all, at, all.args.cost + at * all.cost_stride,
                  all.args.grad_cost ? all.args.grad_cost + at * all.args.n * all.args.m : nullptr) {}

    OTKD_DEVICE double mass_a(int64_t i) const {
        return args.a ? static_cast<double>(args.a[index * n + i]) : 1.0 / static_cast<double>(n);
    }
    OTKD_DEVICE double mass_b(int64_t j) const {
        return args.b ? static_cast<double>(args.b[index * m + j]) : 1.0 / static_cast<double>(m);
    }
    // Potentials / epsilon as the loop starts, where there is mass.
    OTKD_DEVICE double start_phi(int64_t i) const { return start(args.initial_f, index * n + i); }
    OTKD_DEVICE double start_gamma(int64_t j) const { return start(args.initial_g, index * m + j); }
    OTKD_DEVICE Penalty penalty_a() const { return {args.penalty_a, args.epsilon}; }
    OTKD_DEVICE Penalty penalty_b() const { return {args.penalty_b, args.epsilon}; }
    OTKD_DEVICE bool plain() const {
        return args.relaxation == 1 && args.penalty_a == kInfinity && args.penalty_b == kInfinity;
    }
    OTKD_DEVICE double exponent(int64_t i, int64_t j) const { return static_cast<double>(cost[i * m + j]) * per_epsilon; }
    OTKD_DEVICE double* history() const { return args.history ? args.history + index * batch.history_stride : nullptr; }
    template <class S>
    OTKD_DEVICE S* kept_u(int64_t slot) const {
        return reinterpret_cast<S*>(history() + kHistoryHeader) + slot * (n + m);
    }
    template <class S>
    OTKD_DEVICE S* kept_v(int64_t slot) const {
        return kept_u<S>(slot) + n;
    }
    OTKD_DEVICE int64_t last_slot(int64_t ran) const {
        return args.keep == Keep::all ? ran - 1 : args.keep == Keep::last_step ? 1 : 0;
    }
    OTKD_DEVICE double incoming(const T* grads) const { return grads ? static_cast<double>(grads[index]) : 0.0; }
    OTKD_DEVICE double incoming_f(int64_t i) const { return args.grad_f ? static_cast<double>(args.grad_f[index * n + i]) : 0.0; }
    OTKD_DEVICE double incoming_g(int64_t j) const { return args.grad_g ? static_cast<double>(args.grad_g[index * m + j]) : 0.0; }
    // Steps that the backward differentiates, of `ran`.
    OTKD_DEVICE int64_t steps(int64_t ran) const {
        return args.gradient == Gradient::unroll ? ran : args.gradient == Gradient::last_step ? 1 : 0;
    }

    // The workspace: forward, then the backward's vectors over those it does not need.
    OTKD_DEVICE State* state() const { return reinterpret_cast<State*>(memory); }
    OTKD_DEVICE double* phi() const { return memory + 8; }               // (n,)
    OTKD_DEVICE double* gamma() const { return phi() + n; }              // (m,)
    OTKD_DEVICE double* gamma_before() const { return gamma() + m; }     // (m,) before the last iteration
    OTKD_DEVICE double* row_mass() const { return gamma_before() + m; }  // (n,) of the plan
    OTKD_DEVICE double* row_moved() const { return row_mass() + n; }     // (n,)
    OTKD_DEVICE double* column_mass() const { return row_moved() + n; }  // (m,)
    OTKD_DEVICE double* first() const { return memory + 8; }             // (n,)
    OTKD_DEVICE double* sum_phi() const { return first() + n; }          // (n,)
    OTKD_DEVICE double* gamma_bar() const { return sum_phi() + n; }      // (m,)
    OTKD_DEVICE double* sum_gamma() const { return gamma_bar() + m; }    // (m,)
    OTKD_DEVICE double* adjoints() const { return sum_gamma() + m; }     // (steps, n + m): z and w of each step
    OTKD_DEVICE double* scalings() const { return adjoints() + batch.steps * (n + m); }  // likewise, of a cluster: u and v'
    static int64_t doubles(int64_t rows, int64_t columns, int64_t steps, bool backward) {
        return 8 + (backward ? 2 * (rows + columns) + steps * (rows + columns) : 3 * (rows + columns));
    }

  private:
    OTKD_DEVICE double start(const T* potential, int64_t k) const {
        const double given = potential ? static_cast<double>(potential[k]) : 0.0;
        return fabs(given) < kInfinity ? given * per_epsilon : 0.0;
    }
};

template <class T>
Batch<T> make_batch(const SinkhornArgs<T>& args, bool shared_cost, bool backward) {
    const int64_t most = args.gradient == Gradient::unroll ? args.num_iters : args.gradient == Gradient::last_step;
    const int64_t steps = backward ? most : 0;
    return {args, shared_cost ? 0 : args.n * args.m, history_stride(args),
            Problem<T>::doubles(args.n, args.m, steps, backward), steps};
}

// Beyond the tiles, up to here, a cluster may solve a problem.
constexpr int64_t kFewestOfCluster = 129, kMostOfCluster = 1024;

// The same with a workspace that will do for a cluster, too.
template <class T>
Batch<T> make_large_batch(const SinkhornArgs<T>& args, bool shared_cost, bool backward) {
    Batch<T> batch = make_batch(args, shared_cost, backward);
    const int64_t most = larger(args.n, args.m);
    if (most >= kFewestOfCluster && most <= kMostOfCluster) batch.workspace_stride += batch.steps * (args.n + args.m);
    return batch;
}

// One side of the outputs, added up by the threads of a block.
struct SideSums {
    double error = 0, mass = 0, dual = 0, total = 0;
    // An entry of mass `own` whose potential is phi * epsilon and whose sum in the plan is `sum`.
    template <class T>
    OTKD_DEVICE void add(double own, double phi, double sum, const Penalty& penalty, T* potential) {
        const double relative = own > 0 ? phi - log(own) : 0.0;
        error += fabs(sum - (own > 0 ? own * penalty.kept(relative) : own));
        mass += own;
        total += sum;
        if (potential) *potential = static_cast<T>(penalty.epsilon * phi);
        if (own > 0) dual += own * penalty.value(relative);
    }
    OTKD_DEVICE void over_block(double* scratch) {
        error = block_sum(error, scratch);
        mass = block_sum(mass, scratch);
        dual = block_sum(dual, scratch);
        total = block_sum(total, scratch);
    }
};

template <class T>
OTKD_DEVICE void write_scalars(const Problem<T>& p, const SideSums& rows, const SideSums& columns, double transport_cost,
                               int64_t ran) {
    if (thread_id() != 0) return;
    const SinkhornArgs<T>& args = p.args;
    const double nan_mass = 0 * (rows.mass + columns.mass);  // a mass that is NaN took no part: say so in the result
    if (args.transport_cost) args.transport_cost[p.index] = static_cast<T>(transport_cost + nan_mass);
    if (args.regularized_cost) {
        const double value = rows.dual + columns.dual + args.epsilon * (rows.mass * columns.mass - columns.total);
        args.regularized_cost[p.index] = static_cast<T>(value);
    }
    if (args.marginal_error) args.marginal_error[p.index] = static_cast<T>(rows.error + columns.error);
    if (args.iterations) args.iterations[p.index] = ran;
}

// The header, and zeros where nothing was kept: the result is the same in every bit. The whole block, after a barrier.
template <class S, class T>
OTKD_DEVICE void close_history(const Problem<T>& p, Method method, int64_t ran) {
    if (!p.history()) return;
    S* slots = p.template kept_u<S>(0);
    const int64_t filled = (p.last_slot(ran) + 1) * (p.n + p.m);
    const int64_t all = (p.batch.history_stride - kHistoryHeader) * static_cast<int64_t>(sizeof(double) / sizeof(S));
    OTKD_ROLLED
    for (int64_t k = filled + thread_id(); k < all; k += block_threads()) slots[k] = 0;
    OTKD_ROLLED
    for (int64_t k = thread_id(); p.args.keep == Keep::last_step && k < p.n; k += block_threads()) slots[k] = 0;
    if (thread_id() != 0) return;
    p.history()[0] = static_cast<int>(method);
    p.history()[1] = static_cast<double>(ran);
}

// The gradient of one mass: through the loop, plus the part that the dual value has in its formula.
template <class T>
OTKD_DEVICE T marginal_gradient(double own, double phi, double by_mass, const Penalty& penalty, double of_dual,
                                double other_total) {
    if (!(own > 0)) return T(0);
    if (of_dual != 0) by_mass += of_dual * penalty.slope(phi - log(own), other_total);
    return static_cast<T>(by_mass);
}

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

// The two ends of sinkhorn_shared_bwd.h: the adjoints that the outputs hand to the last potentials, and the gradients that
// the adjoints of all iterations add up to.
#pragma once
#include "sinkhorn_shared_bwd.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// The rows of one panel: first_phi from <P, C> and the dual value; sums get W^T u.
template <class S, class T>
void SharedBackward<S, T>::first_rows(const Team& team, int64_t row, int64_t rows, bool add) {
    const int64_t whole = padded(rows);
    const S eps = static_cast<S>(args_.epsilon);
    S *panel = this->own_panel(team), *first = first_phi_ + row * lanes_;
    std::memset(first, 0, rows * lanes_ * sizeof(S));
    if (args_.grad_transport_cost) {
        S* weighted = this->own_weighted(team);
        kernel_.weigh(row, whole, weighted);
        this->times(weighted, row, whole, v_, first);
        std::memset(panel, 0, whole * lanes_ * sizeof(S));
        for_atoms(row, row + rows, [&](int64_t k, int64_t lane) {
            const Vec<S> x = load(rows_.scaling + k);
            store(panel + k - row * lanes_, load(rows_.mass + k) * x);
            store(first_phi_ + k, load(of_transport_ + lane) * x * load(first_phi_ + k));
        });
        this->transposed_times(weighted, row, whole, panel, this->own_sums(team), add);
    }
    if (args_.grad_regularized_cost) {
        this->times(kernel_.panel(row), row, whole, v_, panel);
        const double rate = rows_.penalty.constraint() ? 0.0 : rows_.penalty.epsilon / rows_.penalty.rho;
        for_atoms(row, row + rows, [&](int64_t k, int64_t lane) {
            const Vec<S> x = load(rows_.scaling + k), served = x * load(panel + k - row * lanes_), zero = {};
            Vec<S> target = splat(S(1));
            for (int w = 0; w < width<S> && rate != 0; ++w) {
                const double relative = std::log(double{x[w]}) + rows_.shift_of(k / lanes_) / args_.epsilon;
                target[w] = static_cast<S>(std::exp(-rate * relative));
            }
            const Vec<S> gap = load(of_dual_ + lane) * eps * (target - served);
            store(first_phi_ + k, load(first_phi_ + k) + (x > zero ? gap : zero));
        });
    }
}

// out = epsilon times the gradient of f or g, of the thread's own atoms.
template <class S, class T>
void SharedBackward<S, T>::load_incoming(const Team& team, bool row_side, const T* grad, S* out) {
    const S eps = static_cast<S>(args_.epsilon);
    int64_t begin, end;
    own_atoms(team, row_side, begin, end);
    if (begin < end) block_.load(grad + begin, row_side ? args_.n : args_.m, end - begin, out + begin * lanes_);
    for_atoms(begin, end, [&](int64_t k, int64_t) { store(out + k, eps * load(out + k)); });
}

template <class S, class T>
void SharedBackward<S, T>::first_adjoint(const Team& team) {
    int64_t begin, end;
    own_atoms(team, false, begin, end);
    for_atoms(begin, end, [&](int64_t k, int64_t) {
        store(v_ + k, load(columns_.mass + k) * load(columns_.scaling + k));
    });
    if (args_.grad_f) load_incoming(team, true, args_.grad_f, of_f_);
    if (args_.grad_g) load_incoming(team, false, args_.grad_g, of_g_);
    team.barrier();
    int64_t row0, row1;
    own_atoms(team, true, row0, row1);
    for_panels(row0, row1, [&](int64_t row, int64_t rows) { first_rows(team, row, rows, row > row0); });
    if (args_.grad_transport_cost) this->finish_sums(team, row0 >= row1);
    const S guard = static_cast<S>(args_.epsilon) * kernel_.column_guard();
    for_atoms(begin, end, [&](int64_t k, int64_t lane) {
        Vec<S> gamma = {};
        if (args_.grad_transport_cost) {
            gamma = load(of_transport_ + lane) * load(columns_.scaling + k) * load(this->sums_ + k);
        }
        gamma += load(of_dual_ + lane) * (guard * load(columns_.scaling + k));
        store(first_gamma_ + k, gamma);
    });
    team.barrier();
}

// outer += u w^T + z v'^T
template <class S, class T>
void SharedBackward<S, T>::collect_cost(const Team& team, S* outer) {
    const int64_t stride = outer_stride<S>(args_.m);
    int64_t begin, end;
    own_atoms(team, false, begin, end);
    if (begin < end) transpose_columns(before_, lanes_, begin, end, stride, v_t_);
    team.barrier();
    this->rows_of(team, begin, end);
    add_outer(begin, end, stride, lanes_, u_, w_t_, z_, v_t_, outer, [](int64_t, int64_t, Vec<S> sum) { return sum; });
    team.barrier();
}

// What C does to the outputs at fixed potentials: outer += epsilon (d_transport (1 - (C - base) / epsilon) + d_dual) u v^T,
// where the plan is a constant without the term in C.
template <class S, class T>
void SharedBackward<S, T>::direct_cost(const Team& team, S* outer) {
    const int64_t stride = outer_stride<S>(args_.m);
    const S eps = static_cast<S>(args_.epsilon);
    int64_t row0, row1, begin, end;
    own_atoms(team, true, row0, row1);
    for_atoms(row0, row1, [&](int64_t k, int64_t lane) {
        const Vec<S> u = load(rows_.mass + k) * load(rows_.scaling + k), d = load(of_transport_ + lane);
        store(u_ + k, eps * (d + load(of_dual_ + lane)) * u);
        store(z_ + k, d * u);
    });
    own_atoms(team, false, begin, end);
    for_atoms(begin, end, [&](int64_t k, int64_t) {
        store(before_ + k, load(columns_.mass + k) * load(columns_.scaling + k));
    });
    if (begin < end) transpose_columns(before_, lanes_, begin, end, stride, v_t_);
    team.barrier();
    this->rows_of(team, row0, row1);
    const S* none = nullptr;
    add_outer(row0, row1, stride, lanes_, u_, v_t_, none, none, outer, [](int64_t, int64_t, Vec<S> sum) { return sum; });
    if (!args_.grad_transport_cost || args_.gradient == Gradient::detach) return;
    add_outer(row0, row1, stride, lanes_, z_, v_t_, none, none, outer, [&](int64_t i, int64_t j, Vec<S> sum) {
        return i < args_.n && j < args_.m ? -(sum * kernel_.excess(i, j, args_.m - j)) : Vec<S>{};
    });
}

// The collected adjoints, and the part that the dual value has in its formula: f' - epsilon + epsilon sum(b), or with a
// penalty penalty (1 - e) - epsilon e + epsilon sum(b), e = exp(-f' / penalty).
template <class S, class T>
void SharedBackward<S, T>::marginal_gradient(const Team& team, const Scaled& side, const S* collected,
                                             const S* of_potential, const double* other_mass, T* out) {
    if (!out) return;
    const bool of_base = iterates_ && !is_rows(side);
    S* panel = this->own_panel(team);
    int64_t begin, end;
    own_atoms(team, is_rows(side), begin, end);
    for_panels(begin, end, [&](int64_t first, int64_t count) {
        for_atoms(first, first + count, [&](int64_t k, int64_t lane) {
            const Vec<S> zero = {};
            Vec<S> grad = load(collected + k);
            if (of_potential) grad += load(of_potential + k) / load(side.mass + k);
            if (of_base) grad += kernel_.base() * load(of_transport_ + lane);
            for (int64_t part = 0; part < width<S> && args_.grad_regularized_cost; part += width<double>) {
                const Vec<double> relative = side.relative(k / lanes_, load_double(side.scaling + k + part));
                for (int64_t w = part; w < part + width<double>; ++w) {
                    const double slope = side.penalty.slope(relative[w - part], other_mass[lane + w]);
                    grad[w] += static_cast<S>(of_dual_[lane + w] * slope);
                }
            }
            store(panel + k - first * lanes_, load(side.scaling + k) > zero ? grad : zero);
        });
        block_.save(panel, side.size, count, out + first);
    });
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

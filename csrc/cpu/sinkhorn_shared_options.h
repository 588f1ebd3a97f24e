// The loop of sinkhorn_shared_fwd.h with tol, over-relaxation and marginal penalties. The error of a plan is known from
// the first product of the next iteration, before anything is updated: a problem that meets tol stands still from then on.
#pragma once
#include "sinkhorn_shared_fwd.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// The scalings before the first update: 0 without mass; over-relaxed, where the first average looks at them, those of the
// initial potentials, exp((f - shift) / epsilon) / a.
template <class S, class T>
void SharedForward<S, T>::start_scalings(const Side<S>& side, const T* initial, double* out_of_range) {
    const Vec<double> zero = {};
    if (side.inverse) std::memset(side.inverse, 0, side.size * lanes_ * sizeof(S));
    if (initial) block_.load(initial, side.size, side.size, side.scaling);
    for (int64_t i = 0; i < side.size; ++i) {
        for (int64_t lane = 0; lane < lanes_; lane += width<double>) {
            const int64_t k = i * lanes_ + lane;
            const Vec<double> mass = load_double(side.mass + k), f = initial ? load_double(side.scaling + k) : zero;
            const Vec<double> potential = (f < kInfinity) & (f > -kInfinity) ? f : zero;
            const Vec<double> x = exp_double((potential - side.shift_of(i)) / side.penalty.epsilon - log(mass));
            const VecInt<double> used = (mass > zero) & (splat(control_.relaxed ? 1.0 : 0.0) > zero);
            const VecInt<double> lost = used & ~((x >= double{kSmallest<S>}) & (x <= double{kLargest<S>}));
            add_to(out_of_range + lane, lost ? splat(1.0) : zero);
            store_double(side.scaling + k, used ? x : zero);
        }
    }
}

// One iteration's scalings (1 / s where the update is damped) of atoms [begin, end) go where that slot is kept.
template <class S, class T>
void SharedForward<S, T>::keep_side(const Side<S>& side, int64_t begin, int64_t end, int64_t slot, bool running_only) {
    const S* from = side.inverse ? side.inverse : side.scaling;
    const int64_t first = side.shift ? 0 : args_.n, atoms = args_.n + args_.m;
    S* kept = block_.kept(slot);
    for (int64_t lane = 0; lane < (kept ? lanes_ : block_.count); ++lane) {
        if (running_only && lane < block_.count && !(control_.running[lane] > 0)) continue;
        if (kept) {
            S* to = kept + first * lanes_;
            for (int64_t i = begin; i < end; ++i) to[i * lanes_ + lane] = from[i * lanes_ + lane];
        } else {
            double* to = args_.apart + block_.problem(lane) * args_.apart_stride + slot * atoms + first;
            for (int64_t i = begin; i < end; ++i) to[i] = from[i * lanes_ + lane];
        }
    }
}

template <class S, class T>
void SharedForward<S, T>::keep_scalings(const Team& team, int64_t slot, bool running_only) {
    int64_t begin, end;
    own_atoms(team, true, begin, end);
    keep_side(rows_, begin, end, slot, running_only);
    own_atoms(team, false, begin, end);
    keep_side(columns_, begin, end, slot, running_only);
}

// Looks at the errors of the plans after `done` iterations; whether every problem has stopped.
template <class S, class T>
bool SharedForward<S, T>::all_stopped(const Team& team, int64_t done) {
    bool all = true;
    for (int64_t lane = 0; lane < block_.count; ++lane) {
        control_.observe(lane, done, sum(team, row_error, lane) + sum(team, column_error, lane));
        all &= control_.running[lane] == 0;
    }
    return all;
}

template <class S, class T>
void SharedForward<S, T>::iterate_with_options(const Team& team) {
    int64_t row0, row1, column0, column1;
    own_atoms(team, true, row0, row1);
    own_atoms(team, false, column0, column1);
    double* bad = own(team, out_of_range);
    for (int64_t done = 0; done < args_.num_iters; ++done) {
        for_panels(row0, row1, [&](int64_t row, int64_t rows) {
            this->times(kernel_.panel(row), row, padded(rows), v_, u_ + row * lanes_);
        });
        if (done > 0 && control_.wants_errors(done)) {
            double *error = cleared(team, row_error), *mass = cleared(team, plan_mass);
            add_errors(rows_, u_ + row0 * lanes_, lanes_, row0, row1, error, mass);
            team.barrier();
            if (all_stopped(team, done)) break;
        }
        if (done > 0 && args_.keep == Keep::last_step) keep_scalings(team, 0, true);
        update_side(rows_, u_, u_, lanes_, row0, row1, control_, bad);
        for_panels(row0, row1, [&](int64_t row, int64_t rows) {
            const S* u = u_ + row * lanes_;
            this->transposed_times(kernel_.panel(row), row, padded(rows), u, this->own_sums(team), row > row0);
        });
        this->finish_sums(team, row0 >= row1);
        update_side(columns_, this->sums_, v_, lanes_, column0, column1, control_, bad);
        double *error = cleared(team, column_error), *mass = cleared(team, plan_mass);
        add_errors(columns_, this->sums_ + column0 * lanes_, lanes_, column0, column1, error, mass);
        team.barrier();
        if (args_.keep == Keep::all) keep_scalings(team, done, false);
    }
    if (args_.keep == Keep::last) keep_scalings(team, 0, false);
    if (args_.keep == Keep::last_step) keep_scalings(team, 1, false);
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

// One side (rows or columns) of a block of problems: masses and scalings (size, L), and what is done to them an element at
// a time. With penalty rho, lambda = rho / (rho + epsilon), and f' = f - epsilon log a = epsilon log x + shift:
//   x_i = s_i^-lambda exp((lambda - 1) shift_i / epsilon),   s = K v        (1 / s_i without a penalty)
// and over-relaxed x <- x_old^(1 - omega) x^omega. All of it in double, whatever the products are computed in.
#pragma once
#include "sinkhorn_shared_block.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class S>
OTKD_INLINE Vec<double> load_double(const S* p) {
    return LoadAs<double, S>::full(p);
}
OTKD_INLINE void store_double(double* p, Vec<double> v) { store(p, v); }
OTKD_INLINE void store_double(float* p, Vec<double> v) {
    typedef float Half __attribute__((vector_size(width<double> * sizeof(float))));
    const Half half = __builtin_convertvector(v, Half);
    std::memcpy(p, &half, sizeof half);
}
OTKD_INLINE void add_to(double* p, Vec<double> v) { store(p, load(p) + v); }

// exp(x), infinite from 709 on.
OTKD_INLINE Vec<double> exp_double(Vec<double> x) {
    const ScaledExp<double> exp(1.0);
    return x > 709.0 ? splat(kInfinity) : exp(x > 709.0 ? splat(0.0) : x);
}

template <class S>
struct Side {
    int64_t size;
    const S* shift;  // (size,) in units of the cost; null: 0
    S* mass;
    S* scaling;
    S* inverse;      // 1 / s, which the derivative of a damped update needs; null where it is not kept
    Penalty penalty;

    double shift_of(int64_t i) const { return shift ? static_cast<double>(shift[i]) : 0.0; }
    // f' / epsilon of scalings x of atom i
    Vec<double> relative(int64_t i, Vec<double> x) const { return log(x) + shift_of(i) / penalty.epsilon; }
};

// v = exp(g / epsilon) for columns [begin, end) with mass, 1 where no g is given or it is not finite; 0 without mass.
template <class S, class T>
void start_columns(const Block<S, T>& block, const Side<S>& columns, int64_t begin, int64_t end, S* v) {
    const T* initial = block.args.initial_g;
    const int64_t lanes = block.lanes();
    if (initial && begin < end) block.load(initial + begin, columns.size, end - begin, v + begin * lanes);
    const Vec<double> zero = {}, one = splat(1.0);
    for (int64_t k = begin * lanes; k < end * lanes; k += width<double>) {
        const Vec<double> g = initial ? load_double(v + k) / block.args.epsilon : zero;
        const VecInt<double> finite = (g < kInfinity) & (g > -kInfinity);
        store_double(v + k, load_double(columns.mass + k) > zero ? (finite ? exp_double(g) : one) : zero);
    }
}

// What differs from problem to problem of a block.
struct LaneControl {
    Control each[kMaxLanes];
    double running[kMaxLanes];  // 1, or 0 once the problem has stopped: its scalings stay
    double omega[kMaxLanes];
    int64_t iterations[kMaxLanes];
    bool relaxed = false;

    template <class S, class T>
    explicit LaneControl(const Block<S, T>& block) {
        for (int64_t lane = 0; lane < kMaxLanes; ++lane) {
            each[lane] = Control(block.args);
            running[lane] = lane < block.count ? 1 : 0;
            omega[lane] = each[lane].omega();
            iterations[lane] = block.args.num_iters;
            relaxed |= omega[lane] != 1;
        }
    }
    bool wants_errors(int64_t done) const { return each[0].watches() || each[0].due(done); }
    // The marginal error of a problem after `done` iterations.
    void observe(int64_t lane, int64_t done, double error) {
        if (each[lane].due(done)) each[lane].observe(done, error);
        omega[lane] = each[lane].omega();
        relaxed |= omega[lane] != 1;
        if (each[lane].watches() && running[lane] > 0 && each[lane].stops(error)) {
            running[lane] = 0;
            iterations[lane] = done;
        }
    }
};

// The update of atoms [begin, end) from their sums; operand = mass scaling. out_of_range[lane] counts what left the range.
template <class S>
void update_side(const Side<S>& side, const S* sums, S* operand, int64_t lanes, int64_t begin, int64_t end,
                 const LaneControl& control, double* out_of_range) {
    const Vec<double> zero = {}, one = splat(1.0);
    const double damping = side.penalty.lambda(), low = kSmallest<S>, high = kLargest<S>;
    for (int64_t i = begin; i < end; ++i) {
        const double offset = (damping - 1) * side.shift_of(i) / side.penalty.epsilon;
        for (int64_t lane = 0; lane < lanes; lane += width<double>) {
            const int64_t k = i * lanes + lane;
            const Vec<double> sum = load_double(sums + k), mass = load_double(side.mass + k);
            const Vec<double> old = load_double(side.scaling + k), inverse = 1.0 / sum;
            const VecInt<double> moves = (mass > zero) & (load(control.running + lane) > zero);
            VecInt<double> bad = ~((sum >= low) & (sum <= high));
            Vec<double> scaling = inverse;
            if (control.relaxed || damping != 1.0) {
                const Vec<double> omega = load(control.omega + lane);
                Vec<double> log_scaling = offset - damping * log(sum);
                const VecInt<double> averaged = (old > zero) & (omega != one);
                log_scaling = averaged ? (1.0 - omega) * log(old) + omega * log_scaling : log_scaling;
                scaling = exp_double(log_scaling);
                bad |= ~((scaling >= low) & (scaling <= high));
            }
            add_to(out_of_range + lane, bad & moves ? one : zero);
            store_double(side.scaling + k, moves ? scaling : old);
            // of the rounded scaling, as in the iterations after the problem has stopped: its neighbours decide how many there are
            store_double(operand + k, mass * load_double(side.scaling + k));
            if (side.inverse) store_double(side.inverse + k, moves ? inverse : load_double(side.inverse + k));
        }
    }
}

// Adds to each lane the marginal error of atoms [begin, end), |(P 1)_i - a_i exp(-f'_i / penalty)|, and their (P 1)_i.
template <class S>
void add_errors(const Side<S>& side, const S* sums, int64_t lanes, int64_t begin, int64_t end, double* error,
                double* total) {
    const Vec<double> zero = {}, one = splat(1.0);
    const double rate = side.penalty.constraint() ? 0.0 : side.penalty.epsilon / side.penalty.rho;
    for (int64_t i = begin; i < end; ++i, sums += lanes) {
        for (int64_t lane = 0; lane < lanes; lane += width<double>) {
            const Vec<double> mass = load_double(side.mass + i * lanes + lane);
            const Vec<double> scaling = load_double(side.scaling + i * lanes + lane);
            const Vec<double> served = mass * scaling * load_double(sums + lane);
            const VecInt<double> used = mass > zero;
            const Vec<double> target = side.penalty.constraint() ? one : exp_double(-rate * side.relative(i, scaling));
            const Vec<double> gap = served - mass * target;
            add_to(error + lane, used ? (gap < zero ? -gap : gap) : zero);
            add_to(total + lane, used ? served : zero);
        }
    }
}

// Adds to each lane what mass times scaling times `sums` of atoms [begin, end) make.
template <class S>
void add_products(const Side<S>& side, const S* sums, int64_t lanes, int64_t begin, int64_t end, double* total) {
    for (int64_t i = begin; i < end; ++i, sums += lanes) {
        for (int64_t lane = 0; lane < lanes; lane += width<double>) {
            const int64_t k = i * lanes + lane;
            add_to(total + lane, load_double(side.mass + k) * load_double(side.scaling + k) * load_double(sums + lane));
        }
    }
}

// What a unit of mass of an atom adds to the dual value: f', or penalty (1 - exp(-f' / penalty)).
template <class S>
OTKD_INLINE Vec<S> density(const Side<S>& side, Vec<S> relative) {
    if (side.penalty.constraint()) return relative;
    Vec<S> value;
    for (int w = 0; w < width<S>; ++w) value[w] = static_cast<S>(side.penalty.value(relative[w] / side.penalty.epsilon));
    return value;
}

// out = f of at most a panel of atoms [begin, end), -inf without mass. Adds to each lane their part of the dual value,
// <a, f'> or penalty <a, 1 - exp(-f' / penalty)>, and their masses.
template <class S>
void add_potentials(const Side<S>& side, int64_t lanes, int64_t begin, int64_t end, S* out, double* dual, double* masses) {
    const Vec<S> zero = {}, eps = splat(static_cast<S>(side.penalty.epsilon));
    for (int64_t lane = 0; lane < lanes; lane += width<S>) {
        Vec<S> value = {}, total = {};
        for (int64_t i = begin; i < end; ++i) {
            const Vec<S> mass = load(side.mass + i * lanes + lane), x = load(side.scaling + i * lanes + lane);
            const Vec<S> relative = eps * log(x) + static_cast<S>(side.shift_of(i));
            const VecInt<S> used = mass > zero;
            store(out + (i - begin) * lanes + lane, used ? relative + eps * log(mass) : splat(static_cast<S>(-kInfinity)));
            value += used ? mass * density(side, relative) : zero;
            total += mass;
        }
        for (int w = 0; w < width<S>; ++w) {
            dual[lane + w] += value[w];
            masses[lane + w] += total[w];
        }
    }
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

// The gradient by the implicit function theorem: the potentials that the loop returned are taken as its fixed point. In
// phi = f / epsilon and gamma = g / epsilon, with r and c the row and the column sums of the plan P, the adjoints (u, v) that
// the outputs hand to (phi, gamma) lead to
//   [ r / lambda_a      P        ] [ w ]   [ u ]      C_bar = P (w_i + x_j) / epsilon + what C does by itself
//   [     P^T       c / lambda_b ] [ x ] = [ v ]      a_bar = r w / (lambda_a a),   b_bar = c x / (lambda_b b)
// Without penalties (1, -1) on each connected component of the plan is in the kernel, the gauge: it is projected out of
// (u, v) and of (w, x). Conjugate gradients on the Schur complement on the columns, preconditioned with c / lambda_b, until
// the residual is small; an iteration is one sweep over the kernel. All in double. The dual value does not change with the
// potentials here: its gradient is the envelope's.
#pragma once
#include "sinkhorn_sweep.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class Rows>
class Implicit {
    using T = typename Rows::Input;
    using Cost = typename Rows::Cost;
    using Args = typename Rows::Args;
    using V = Vec<double>;
    static_assert(sizeof(typename Rows::Scalar) == sizeof(double));

  public:
    Implicit(const Args& args, Arena& arena, int threads);
    void backward(const Problem<T>& p, const Team& team);

  private:
    static constexpr int64_t kMostSteps = 1000;
    static constexpr double kTolerance = sizeof(T) == sizeof(double) ? 1e-13 : 1e-7, kRounding = 1e-15;
    enum ImplicitSlots : int { kFirst, kSecond };

    template <class S>
    void load_scalings(const Problem<T>& p, const Team& team);
    void load_plan(const Problem<T>& p, const Team& team);
    void adjoints(const Problem<T>& p, const Team& team);
    void find_components();
    int64_t root(int64_t j);
    void project(double* rows, double* columns);
    template <class Weights>
    void multiply(const Team& team, const double* x, Weights weights);
    double start_solve(const Team& team, double& square);
    void solve(const Team& team);
    double inner(const Team& team, int slot, double own) {
        reduction_.put(team, slot, own);
        team.barrier();
        return reduction_.sum(team, slot);
    }
    void cost_gradient(const Problem<T>& p, const Team& team);
    void marginal_gradients(const Problem<T>& p);
    void rows_of(const Team& team, int64_t& begin, int64_t& end) const {
        split(n_pad_, kBlock, team.size, team.rank, begin, end);
    }
    void columns_of(const Team& team, int64_t& begin, int64_t& end) const {
        split(ld_, width<double>, team.size, team.rank, begin, end);
    }
    double team_sum(const Team& team, const double* partial, int64_t j) const {
        double total = 0;
        for (int r = 0; r < team.size; ++r) total += partial[r * ld_ + j];
        return total;
    }

    const Args& args_;
    Rows rows_;
    const int64_t n_, m_, n_pad_, ld_;
    const double lambda_a_, lambda_b_;
    double *scale_u_, *scale_v_, *phi_, *gamma_;  // P = scale_u K scale_v; potentials / epsilon
    double *r_, *c_, *u_, *v_, *w_, *x_;          // r and c over lambda
    double *residual_, *direction_, *image_, *vector_, *partial_, *second_;
    int64_t *label_, *row_label_;  // of the connected component: one of its columns
    double *component_sum_, *component_count_;
    Reduction reduction_;
    const bool gauge_;
    int64_t sweeps_ = 0;
};

template <class Rows>
Implicit<Rows>::Implicit(const Args& args, Arena& arena, int threads)
    : args_(args),
      rows_(args, arena, threads, true),
      n_(args.n),
      m_(args.m),
      n_pad_(round_up(args.n, kBlock)),
      ld_(round_up(args.m, 2 * width<double>)),
      lambda_a_(Penalty{args.penalty_a, args.epsilon}.lambda()),
      lambda_b_(Penalty{args.penalty_b, args.epsilon}.lambda()),
      gauge_(args.penalty_a == kInfinity && args.penalty_b == kInfinity) {
    for (double** row : {&scale_u_, &phi_, &r_, &u_, &w_}) *row = arena.take<double>(n_pad_);
    for (double** column : {&scale_v_, &gamma_, &c_, &v_, &x_, &residual_, &direction_, &image_, &vector_,
                            &component_sum_, &component_count_}) {
        *column = arena.take<double>(ld_);
    }
    partial_ = arena.take<double>(threads * ld_);
    second_ = arena.take<double>(threads * ld_);
    label_ = arena.take<int64_t>(ld_);
    row_label_ = arena.take<int64_t>(n_pad_);
    reduction_.slots = arena.take<double>(threads * kSlots);
}

// The kernel exp((shift - C) / epsilon) and the scalings that the forward kept.
template <class Rows>
template <class S>
void Implicit<Rows>::load_scalings(const Problem<T>& p, const Team& team) {
    int64_t begin, end;
    rows_.start(team);
    rows_of(team, begin, end);
    for (int64_t i = begin; i < end; ++i) {
        scale_u_[i] = i < n_ ? static_cast<double>(p.template kept_u<S>(0)[i]) : 0.0;
        phi_[i] = i < n_ ? std::log(scale_u_[i]) + rows_.shift(i) / args_.epsilon : -kInfinity;
    }
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; ++j) {
        scale_v_[j] = j < m_ ? static_cast<double>(p.template kept_v<S>(0)[j]) : 0.0;
        gamma_[j] = std::log(scale_v_[j]);
    }
    team.barrier();
}

// The plan itself, from the logarithms that the forward kept.
template <class Rows>
void Implicit<Rows>::load_plan(const Problem<T>& p, const Team& team) {
    int64_t begin, end;
    rows_of(team, begin, end);
    for (int64_t i = begin; i < end; ++i) {
        phi_[i] = i < n_ ? p.template kept_u<double>(0)[i] : -kInfinity;
        scale_u_[i] = phi_[i] > -kInfinity ? 1 : 0;
    }
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; ++j) {
        gamma_[j] = j < m_ ? p.template kept_v<double>(0)[j] : -kInfinity;
        scale_v_[j] = gamma_[j] > -kInfinity ? 1 : 0;
    }
    team.barrier();
    rows_.start_plan(team, phi_, gamma_);
    team.barrier();
}

// r / lambda_a, c / lambda_b, and u, v: the derivatives of <P, C> and of the potentials' own use.
template <class Rows>
void Implicit<Rows>::adjoints(const Problem<T>& p, const Team& team) {
    const double of_transport = p.incoming(args_.grad_transport_cost), eps = args_.epsilon;
    int64_t begin, end;
    rows_of(team, begin, end);
    double *masses = partial_ + team.rank * ld_, *moves = second_ + team.rank * ld_;
    std::memset(masses, 0, ld_ * sizeof(double));
    std::memset(moves, 0, ld_ * sizeof(double));
    for (int64_t i = n_; i < end; ++i) r_[i] = u_[i] = 0;
    const V zero = {};
    for_blocks(begin, end < n_ ? end : n_, rows_.block(), false, [&](int64_t i0, int64_t count) {
        const double* k = rows_.kernel(i0, count);
        const Cost* cost = rows_.cost(i0, count);
        for (int64_t i = i0; i < i0 + count; ++i, k += ld_, cost += m_) {
            V mass = {}, moved = {};
            for (int64_t j = 0; j < ld_; j += width<double>) {
                const V entry = scale_u_[i] * load(k + j) * load(scale_v_ + j);
                const V c = LoadAs<double, Cost>::part(cost + j, m_ - j, 0.0);
                const V product = entry > zero ? entry * c : zero;
                mass += entry;
                moved += product;
                store(masses + j, load(masses + j) + entry);
                store(moves + j, load(moves + j) + product);
            }
            r_[i] = sum<double>(mass) / lambda_a_;
            u_[i] = r_[i] > 0 ? of_transport * sum<double>(moved) : 0.0;
            if (args_.grad_f && r_[i] > 0) u_[i] += eps * args_.grad_f[p.index * n_ + i];
        }
    });
    team.barrier();
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; ++j) {
        c_[j] = team_sum(team, partial_, j) / lambda_b_;
        v_[j] = c_[j] > 0 ? of_transport * team_sum(team, second_, j) : 0.0;
        if (args_.grad_g && c_[j] > 0) v_[j] += eps * args_.grad_g[p.index * m_ + j];
    }
    team.barrier();
}

template <class Rows>
int64_t Implicit<Rows>::root(int64_t j) {
    while (label_[j] != j) j = label_[j] = label_[label_[j]];
    return j;
}

// Connected components of the plan's rows and columns. One thread.
template <class Rows>
void Implicit<Rows>::find_components() {
    int64_t apart = 0;
    for (int64_t j = 0; j < m_; ++j) {
        label_[j] = j;
        component_count_[j] = 0;
        apart += c_[j] > 0;
    }
    for_blocks(0, n_, rows_.block(), false, [&](int64_t i0, int64_t count) {
        const double* k = rows_.kernel(i0, count);
        for (int64_t i = i0; i < i0 + count; ++i, k += ld_) {
            row_label_[i] = -1;
            for (int64_t j = 0; r_[i] > 0 && j < m_; ++j) {
                if (!(k[j] > 0 && c_[j] > 0)) continue;
                const int64_t mine = root(j);
                if (row_label_[i] < 0) {
                    row_label_[i] = mine;
                    if (apart == 1) break;
                } else if (const int64_t other = root(row_label_[i]); other != mine) {
                    label_[mine] = other;
                    --apart;
                }
            }
        }
    });
    for (int64_t i = 0; i < n_; ++i) {
        if (row_label_[i] < 0) continue;
        row_label_[i] = root(row_label_[i]);
        component_count_[row_label_[i]] += 1;
    }
    for (int64_t j = 0; j < m_; ++j) {
        label_[j] = c_[j] > 0 ? root(j) : -1;
        if (label_[j] >= 0) component_count_[label_[j]] += 1;
    }
}

// (rows, columns) minus its part along (1, -1) on each component. One thread.
template <class Rows>
void Implicit<Rows>::project(double* rows, double* columns) {
    for (int64_t j = 0; j < m_; ++j) component_sum_[j] = 0;
    for (int64_t i = 0; i < n_; ++i) {
        if (row_label_[i] >= 0) component_sum_[row_label_[i]] += rows[i];
    }
    for (int64_t j = 0; j < m_; ++j) {
        if (label_[j] >= 0) component_sum_[label_[j]] -= columns[j];
    }
    for (int64_t i = 0; i < n_; ++i) {
        if (row_label_[i] >= 0) rows[i] -= component_sum_[row_label_[i]] / component_count_[row_label_[i]];
    }
    for (int64_t j = 0; j < m_; ++j) {
        if (label_[j] >= 0) columns[j] += component_sum_[label_[j]] / component_count_[label_[j]];
    }
}

// image_ = P^T weights(P x) for the thread's own columns, with weights(i, (P x)_i).
template <class Rows>
template <class Weights>
void Implicit<Rows>::multiply(const Team& team, const double* x, Weights weights) {
    int64_t begin, end;
    columns_of(team, begin, end);
    for (int64_t j = begin; j < end; ++j) vector_[j] = scale_v_[j] * x[j];
    team.barrier();
    double* sums = partial_ + team.rank * ld_;
    std::memset(sums, 0, ld_ * sizeof(double));
    int64_t row0, row1;
    rows_of(team, row0, row1);
    double scaled[kBlock];
    sweep(rows_, ld_, vector_, sums, row0, row1, sweeps_++ % 2 != 0, [&](int64_t i, const double* s) {
        for (int r = 0; r < kBlock; ++r) {
            scaled[r] = r_[i + r] > 0 ? scale_u_[i + r] * weights(i + r, scale_u_[i + r] * s[r]) : 0.0;
        }
        return scaled;
    });
    team.barrier();
    for (int64_t j = begin; j < end; ++j) image_[j] = scale_v_[j] * team_sum(team, partial_, j);
}

// residual_ and direction_ as conjugate gradients start with them, x = 0; returns the square at which they stop.
template <class Rows>
double Implicit<Rows>::start_solve(const Team& team, double& square) {
    int64_t begin, end;
    columns_of(team, begin, end);
    double size = 0, rounding = 0;
    multiply(team, v_, [&](int64_t i, double) { return std::fabs(u_[i]) / r_[i]; });
    for (int64_t j = begin; j < end; ++j) {
        const double terms = std::fabs(v_[j]) + image_[j];
        rounding += c_[j] > 0 ? terms * terms / c_[j] : 0.0;
    }
    multiply(team, v_, [&](int64_t i, double) { return u_[i] / r_[i]; });
    for (int64_t j = begin; j < end; ++j) {
        x_[j] = 0;
        residual_[j] = c_[j] > 0 ? v_[j] - image_[j] : 0.0;
        direction_[j] = c_[j] > 0 ? residual_[j] / c_[j] : 0.0;
        size += residual_[j] * direction_[j];
    }
    reduction_.put(team, kSecond, rounding);
    square = inner(team, kFirst, size);
    const double target = kTolerance * std::sqrt(square) + kRounding * std::sqrt(reduction_.sum(team, kSecond));
    team.barrier();
    return target * target;
}

// x_ of the Schur complement, then w_ = (u - P x) / r.
template <class Rows>
void Implicit<Rows>::solve(const Team& team) {
    int64_t begin, end, row0, row1;
    columns_of(team, begin, end);
    rows_of(team, row0, row1);
    double square, target = start_solve(team, square);
    for (int64_t step = 0; square > target && step < kMostSteps && step < 10 * m_; ++step) {
        multiply(team, direction_, [&](int64_t i, double s) { return s / r_[i]; });
        double curvature = 0;
        for (int64_t j = begin; j < end; ++j) {
            image_[j] = c_[j] * direction_[j] - image_[j];
            curvature += direction_[j] * image_[j];
        }
        curvature = inner(team, kFirst, curvature);
        if (!(curvature > 0)) break;
        const double length = square / curvature, before = square;
        square = 0;
        for (int64_t j = begin; j < end; ++j) {
            x_[j] += length * direction_[j];
            residual_[j] -= length * image_[j];
            square += c_[j] > 0 ? residual_[j] * residual_[j] / c_[j] : 0.0;
        }
        square = inner(team, kSecond, square);
        for (int64_t j = begin; j < end; ++j) {
            direction_[j] = c_[j] > 0 ? residual_[j] / c_[j] + square / before * direction_[j] : 0.0;
        }
    }
    for (int64_t j = begin; j < end; ++j) vector_[j] = scale_v_[j] * x_[j];
    team.barrier();
    dot_sweep(rows_, ld_, vector_, row0, row1, false, [&](int64_t i, const double* s) {
        for (int r = 0; r < kBlock; ++r) {
            w_[i + r] = r_[i + r] > 0 ? (u_[i + r] - scale_u_[i + r] * s[r]) / r_[i + r] : 0.0;
        }
    });
    team.barrier();
}

// C_bar = P ((w_i + x_j) / epsilon + d_transport (1 - C / epsilon) + d_dual)
template <class Rows>
void Implicit<Rows>::cost_gradient(const Problem<T>& p, const Team& team) {
    const double of_transport = p.incoming(args_.grad_transport_cost), of_dual = p.incoming(args_.grad_regularized_cost);
    const double inverse = 1.0 / args_.epsilon;
    int64_t begin, end;
    rows_of(team, begin, end);
    for_blocks(begin, end < n_ ? end : n_, rows_.block(), false, [&](int64_t i0, int64_t count) {
        const double* k = rows_.kernel(i0, count);
        const Cost* cost = rows_.cost(i0, count);
        Cost* out = rows_.gradient(i0, count);
        for (int64_t i = i0; i < i0 + count; ++i, k += ld_, cost += m_, out += m_) {
            for (int64_t j = 0; j < m_; j += width<double>) {
                const V entry = scale_u_[i] * load(k + j) * load(scale_v_ + j);
                const V c = LoadAs<double, Cost>::part(cost + j, m_ - j, 0.0);
                const V value = (w_[i] + load(x_ + j) - of_transport * c) * inverse + (of_transport + of_dual);
                store_as(out + j, entry != V{} ? entry * value : V{}, m_ - j);
            }
        }
        rows_.emit(i0, count);
    });
}

template <class Rows>
void Implicit<Rows>::marginal_gradients(const Problem<T>& p) {
    const double of_dual = p.incoming(args_.grad_regularized_cost);
    double mass_a = 0, mass_b = 0;
    for (int64_t i = 0; i < n_; ++i) mass_a += p.mass_a(i);
    for (int64_t j = 0; j < m_; ++j) mass_b += p.mass_b(j);
    T *grad_a = args_.grad_a ? args_.grad_a + p.index * n_ : nullptr;
    T *grad_b = args_.grad_b ? args_.grad_b + p.index * m_ : nullptr;
    write_marginal_gradient(
        grad_a, n_, p.penalty_a(), of_dual, mass_b, [&](int64_t i) { return p.mass_a(i); },
        [&](int64_t i) { return phi_[i]; }, [&](int64_t i) { return r_[i] * w_[i] / p.mass_a(i); });
    write_marginal_gradient(
        grad_b, m_, p.penalty_b(), of_dual, mass_a, [&](int64_t j) { return p.mass_b(j); },
        [&](int64_t j) { return gamma_[j]; }, [&](int64_t j) { return c_[j] * x_[j] / p.mass_b(j); });
}

template <class Rows>
void Implicit<Rows>::backward(const Problem<T>& p, const Team& team) {
    rows_.open(p, team);
    const Method method = static_cast<Method>(static_cast<int>(p.history()[0]));
    if (method == Method::log) load_plan(p, team);
    if (method == Method::scaling_double) load_scalings<double>(p, team);
    if (method == Method::scaling_float) load_scalings<float>(p, team);
    adjoints(p, team);
    if (gauge_ && team.rank == 0) {
        find_components();
        project(u_, v_);
    }
    team.barrier();
    solve(team);
    if (gauge_ && team.rank == 0) project(w_, x_);
    team.barrier();
    if (rows_.wants_gradient()) cost_gradient(p, team);
    rows_.close(team);
    if (team.rank == 0 && (args_.grad_a || args_.grad_b)) marginal_gradients(p);
    team.barrier();
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

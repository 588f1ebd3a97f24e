// The gradients of a block of problems. With phi = log u, gamma = log v, bars for adjoints and everything for a unit of
// mass, Phi = phi_bar / a, Gamma = gamma_bar / b, the loop of sinkhorn_shared_fwd.h backwards is, for t = T .. 1:
//   w_j = Gamma_j v_j                      Phi_i   = [t = T] first_i - x_i (K w)_i
//   z_i = Phi_i u_i                        Gamma_j = -y'_j (K^T z)_j                 (y', v' of iteration t - 1)
//   C_bar_ij += K_ij (u_i w_j + z_i v'_j) / epsilon
// and a, b collect the sums of Phi and Gamma: again one read of K and two products an iteration. With a penalty
// w = lambda b q Gamma and z = lambda a q Phi, q the inverse sums that are kept then instead of the scalings. What f and g
// are given from outside is not for a unit of mass: it joins w and z directly.
// Guards change nothing in this: x = 1 / (K v + guard) still has d log x = -x d(K v). Only the dual value then depends on the
// last columns, by epsilon (1 - y K^T u) = epsilon guard y.
// Without either the columns of P are exact after the last update, <P, C> = <P, C - base> + base sum(b): with base = min C
// nothing large cancels in C / epsilon.
#pragma once
#include "sinkhorn_shared_outer.h"
#include "sinkhorn_shared_side.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class S, class T>
class SharedBackward : SharedSweep<S, T> {
    using Base = SharedSweep<S, T>;
    using Base::at_, Base::kernel_, Base::lanes_;

  public:
    // One object a thread; those of a team lie on the same memory.
    SharedBackward(const Block<S, T>& block, const SharedKernel<S, T>& kernel, Arena& arena, int threads);

    // Writes the marginals' gradients and adds the block's part of C_bar epsilon / K to `outer` (n padded, outer_stride). By
    // all threads of the team.
    void solve(const Team& team, S* outer);

  private:
    // A side, and memory for scalings that are not kept in the block's layout, and for those that a penalty damps.
    struct Scaled : Side<S> {
        S *loaded, *damped;
    };
    Scaled scaled(int64_t size, int64_t padded, const S* shift, double penalty, Arena& arena) const;
    void start(const Team& team);
    const S* kept(const Team& team, const Scaled& side, int64_t slot, S* loaded) const;
    const S* scalings(const Team& team, const Scaled& side, const S* kept, S* damped) const;
    void load_scalings(const Team& team, int64_t slot);
    void first_adjoint(const Team& team);
    void first_rows(const Team& team, int64_t row, int64_t rows, bool add);
    void iterate(const Team& team, int64_t t, S* outer);
    template <class Gamma>
    void columns_to_rows(const Team& team, const S* joins, bool joined, Gamma of);
    void adjoint_rows(int64_t row, int64_t rows, const S* joins, bool joined, S* z);
    void rows_to_columns(const Team& team, const S* joins, bool joined, bool last);
    void previous_columns(const Team& team, int64_t slot);
    void previous_of_last(const Team& team);
    void collect_cost(const Team& team, S* outer);
    void direct_cost(const Team& team, S* outer);
    void marginal_gradient(const Team& team, const Scaled& side, const S* collected, const S* of_potential,
                           const double* other_mass, T* out);
    void load_incoming(const Team& team, bool row_side, const T* grad, S* out);

    bool is_rows(const Scaled& side) const { return &side == &rows_; }
    void own_atoms(const Team& team, bool row_side, int64_t& begin, int64_t& end) const {
        row_side ? this->rows_of(team, begin, end) : this->columns_of(team, begin, end);
        const int64_t size = row_side ? args_.n : args_.m;
        end = end < size ? end : size;
    }
    // Calls body(k, lane) for each vector of the atoms [begin, end); k is its place in an array (size, L).
    template <class Body>
    OTKD_INLINE void for_atoms(int64_t begin, int64_t end, Body body) const {
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t lane = 0; lane < lanes_; lane += width<S>) body(i * lanes_ + lane, lane);
        }
    }

    const SinkhornSharedArgs<T>& args_;
    const Block<S, T> block_;
    const bool iterates_;  // differentiates iterations, all or the last one
    Scaled rows_, columns_;
    S *v_, *before_, *first_phi_, *first_gamma_, *gamma_, *sum_phi_, *sum_gamma_;
    S *u_ = nullptr, *z_ = nullptr, *w_t_ = nullptr, *v_t_ = nullptr;  // u, z (n, L); w^T, v'^T (L, outer_stride)
    S *of_f_, *of_g_;  // epsilon times the gradients of f and g
    S of_transport_[kMaxLanes], of_dual_[kMaxLanes];
    double mass_a_[kMaxLanes] = {}, mass_b_[kMaxLanes] = {};  // totals, where the dual value is differentiated
    int64_t iterations_[kMaxLanes], most_iterations_ = 1;
};

template <class S, class T>
typename SharedBackward<S, T>::Scaled SharedBackward<S, T>::scaled(int64_t size, int64_t padded, const S* shift,
                                                                   double penalty, Arena& arena) const {
    Scaled side;
    side.size = size;
    side.shift = shift;
    side.mass = arena.take<S>(padded * lanes_);
    side.penalty = {penalty, args_.epsilon};
    side.loaded = arena.take<S>(std::is_same_v<S, T> ? 0 : size * lanes_);
    side.damped = arena.take<S>(side.penalty.constraint() ? 0 : size * lanes_);
    return side;
}

template <class S, class T>
SharedBackward<S, T>::SharedBackward(const Block<S, T>& block, const SharedKernel<S, T>& kernel, Arena& arena, int threads)
    : Base(kernel, arena, threads, block.lanes()),
      args_(block.args),
      block_(block),
      iterates_(args_.gradient == Gradient::unroll || args_.gradient == Gradient::last_step) {
    rows_ = scaled(args_.n, at_.n, kernel.shifts(), args_.penalty_a, arena);
    columns_ = scaled(args_.m, at_.m, nullptr, args_.penalty_b, arena);
    sum_phi_ = arena.take<S>(args_.n * lanes_);
    sum_gamma_ = arena.take<S>(args_.m * lanes_);
    v_ = arena.take<S>(at_.m * lanes_);
    before_ = arena.take<S>(args_.m * lanes_);
    first_phi_ = arena.take<S>(iterates_ ? at_.n * lanes_ : 0);
    first_gamma_ = arena.take<S>(iterates_ ? args_.m * lanes_ : 0);
    of_f_ = arena.take<S>(args_.grad_f ? args_.n * lanes_ : 0);
    of_g_ = arena.take<S>(args_.grad_g ? args_.m * lanes_ : 0);
    gamma_ = arena.take<S>(iterates_ ? args_.m * lanes_ : 0);
    if (!args_.grad_cost) return;
    u_ = arena.take<S>(at_.n * lanes_);
    z_ = arena.take<S>(at_.n * lanes_);
    w_t_ = arena.take<S>(lanes_ * outer_stride<S>(args_.m));
    v_t_ = arena.take<S>(lanes_ * outer_stride<S>(args_.m));
}

template <class S, class T>
void SharedBackward<S, T>::start(const Team& team) {
    const auto clear = [](S* values, int64_t count) { std::memset(values, 0, count * sizeof(S)); };
    if (team.rank == 0) {
        block_.load_masses(args_.a, args_.n, rows_.mass);
        block_.load_masses(args_.b, args_.m, columns_.mass);
        clear(v_, at_.m * lanes_);
        clear(sum_phi_, args_.n * lanes_);
        clear(sum_gamma_, args_.m * lanes_);
        if (iterates_) clear(gamma_, args_.m * lanes_);
        for (S* rows : {u_, z_}) {
            if (rows) clear(rows, at_.n * lanes_);
        }
        for (S* columns : {w_t_, v_t_}) {
            if (columns) clear(columns, lanes_ * outer_stride<S>(args_.m));
        }
    }
    for (int64_t lane = 0; lane < kMaxLanes; ++lane) {
        const int64_t p = lane < block_.count ? block_.problem(lane) : 0;
        const bool used = lane < block_.count && args_.methods[p] == static_cast<int>(args_.method);
        of_transport_[lane] = used && args_.grad_transport_cost ? static_cast<S>(args_.grad_transport_cost[p]) : S(0);
        of_dual_[lane] = used && args_.grad_regularized_cost ? static_cast<S>(args_.grad_regularized_cost[p]) : S(0);
        iterations_[lane] = used ? args_.iterations[p] : 0;
        most_iterations_ = iterations_[lane] > most_iterations_ ? iterations_[lane] : most_iterations_;
    }
    team.barrier();
    if (!args_.grad_regularized_cost) return;
    const auto add = [&](const Scaled& side, double* totals) {
        for (int64_t i = 0; i < side.size; ++i) {
            for (int64_t lane = 0; lane < lanes_; lane += width<double>) {
                add_to(totals + lane, load_double(side.mass + i * lanes_ + lane));
            }
        }
    };
    add(rows_, mass_a_);
    add(columns_, mass_b_);
}

// What is kept of this side in a slot; of problems solved apart, of the thread's own atoms, in `loaded`.
template <class S, class T>
const S* SharedBackward<S, T>::kept(const Team& team, const Scaled& side, int64_t slot, S* loaded) const {
    const int64_t first = is_rows(side) ? 0 : args_.n;
    if (const S* kept = block_.kept(slot)) return kept + first * lanes_;
    int64_t begin, end;
    own_atoms(team, is_rows(side), begin, end);
    const double* atoms = args_.apart + slot * (args_.n + args_.m) + first + begin;
    if (begin < end) block_.load(atoms, args_.apart_stride, end - begin, loaded + begin * lanes_);
    return loaded;
}

// The scalings of the thread's own atoms: what is kept, or its power where it is inverse sums and there is a penalty.
template <class S, class T>
const S* SharedBackward<S, T>::scalings(const Team& team, const Scaled& side, const S* kept, S* damped) const {
    if (side.penalty.constraint() || !iterates_) return kept;
    const double lambda = side.penalty.lambda();
    int64_t begin, end;
    own_atoms(team, is_rows(side), begin, end);
    for (int64_t i = begin; i < end; ++i) {
        const double offset = (lambda - 1) * side.shift_of(i) / args_.epsilon;
        for (int64_t k = i * lanes_; k < (i + 1) * lanes_; k += width<double>) {
            const Vec<double> inverse = load_double(kept + k), zero = {};
            store_double(damped + k, inverse > zero ? exp_double(offset + lambda * log(inverse)) : zero);
        }
    }
    return damped;
}

template <class S, class T>
void SharedBackward<S, T>::load_scalings(const Team& team, int64_t slot) {
    for (Scaled* side : {&rows_, &columns_}) {
        const S* inverse = kept(team, *side, slot, side->loaded);
        side->inverse = const_cast<S*>(inverse);
        side->scaling = const_cast<S*>(scalings(team, *side, inverse, side->damped));
    }
}

// w from the Gamma that of(k) gives, for the thread's own columns, which `inverse` and the masses belong to. Problems whose
// last iteration this is join with their first adjoints; `joined`: there are some.
template <class S, class T>
template <class Gamma>
OTKD_INLINE void SharedBackward<S, T>::columns_to_rows(const Team& team, const S* joins, bool joined, Gamma of) {
    const S lambda = static_cast<S>(columns_.penalty.lambda());
    const Vec<S> zero = {};
    const S *mass = columns_.mass, *inverse = columns_.inverse, *of_g = args_.grad_g ? of_g_ : nullptr;
    S *sum = args_.grad_b ? sum_gamma_ : nullptr, *w = v_;
    int64_t begin, end;
    own_atoms(team, false, begin, end);
    if (joined || sum || of_g || lambda != 1) {
        for_atoms(begin, end, [&](int64_t k, int64_t lane) {
            Vec<S> gamma = of(k);
            if (joined) gamma = load(joins + lane) > zero ? load(first_gamma_ + k) : gamma;
            if (sum) store(sum + k, load(sum + k) + gamma);
            Vec<S> bar = load(mass + k) * gamma;
            if (of_g) bar += load(joins + lane) * load(of_g + k);
            store(w + k, lambda * load(inverse + k) * bar);
        });
    } else {
        for (int64_t k = begin * lanes_; k < end * lanes_; k += width<S>) {
            store(w + k, load(inverse + k) * (load(mass + k) * of(k)));
        }
    }
    if (w_t_ && begin < end) transpose_columns(v_, lanes_, begin, end, outer_stride<S>(args_.m), w_t_);
    team.barrier();
}

// Phi and z from K w, and unless it is the last step K^T z.
template <class S, class T>
void SharedBackward<S, T>::rows_to_columns(const Team& team, const S* joins, bool joined, bool last) {
    S* sums = this->own_sums(team);
    int64_t begin, end;
    own_atoms(team, true, begin, end);
    for_panels(begin, end, [&](int64_t row, int64_t rows) {
        S* z = this->own_panel(team);
        this->times(kernel_.panel(row), row, padded(rows), v_, z);
        adjoint_rows(row, rows, joins, joined, z);
        if (!last) this->transposed_times(kernel_.panel(row), row, padded(rows), z, sums, row > begin);
    });
    if (!last) this->finish_sums(team, begin >= end);
}

// z (rows, L) in the place of the sums K w of these rows.
template <class S, class T>
void SharedBackward<S, T>::adjoint_rows(int64_t row, int64_t rows, const S* joins, bool joined, S* z) {
    const S lambda = static_cast<S>(rows_.penalty.lambda());
    const S *mass = rows_.mass, *scaling = rows_.scaling, *inverse = rows_.inverse;
    const S* of_f = args_.grad_f ? of_f_ : nullptr;
    S *sum = args_.grad_a ? sum_phi_ : nullptr, *kept_z = z_, *kept_u = u_;
    const int64_t first = row * lanes_;
    if (joined || of_f || kept_u || !sum || lambda != 1) {
        for_atoms(row, row + rows, [&](int64_t k, int64_t lane) {
            Vec<S> phi = -(load(scaling + k) * load(z + k - first));
            if (joined) phi += load(joins + lane) * load(first_phi_ + k);
            if (sum) store(sum + k, load(sum + k) + phi);
            Vec<S> bar = load(mass + k) * phi;
            if (of_f) bar += load(joins + lane) * load(of_f + k);
            const Vec<S> own = lambda * load(inverse + k) * bar;
            store(z + k - first, own);
            if (kept_z) store(kept_z + k, own);
            if (kept_u) store(kept_u + k, load(mass + k) * load(scaling + k));
        });
        return;
    }
    for (int64_t k = first; k < (row + rows) * lanes_; k += width<S>) {
        const Vec<S> x = load(scaling + k), phi = -(x * load(z + k - first));
        store(sum + k, load(sum + k) + phi);
        store(z + k - first, x * (load(mass + k) * phi));
    }
}

// v of the iteration before in before_; slot -1: before the first iteration.
template <class S, class T>
void SharedBackward<S, T>::previous_columns(const Team& team, int64_t slot) {
    int64_t begin, end;
    own_atoms(team, false, begin, end);
    if (slot < 0) return start_columns(block_, columns_, begin, end, before_);
    const S* y = scalings(team, columns_, kept(team, columns_, slot, before_), before_);
    for_atoms(begin, end, [&](int64_t k, int64_t) { store(before_ + k, load(columns_.mass + k) * load(y + k)); });
}

// v before the last iteration in before_: that of slot 0, or the start where there was one iteration.
template <class S, class T>
void SharedBackward<S, T>::previous_of_last(const Team& team) {
    int64_t begin, end;
    own_atoms(team, false, begin, end);
    previous_columns(team, 0);
    start_columns(block_, columns_, begin, end, gamma_);
    for (int64_t lane = 0; lane < lanes_; ++lane) {
        for (int64_t j = begin; j < end && iterations_[lane] <= 1; ++j) before_[j * lanes_ + lane] = gamma_[j * lanes_ + lane];
    }
}

// Iteration t backwards, of the problems that ran that long. Gamma = -y' (K^T z) of the sums that iteration t + 1 left.
template <class S, class T>
void SharedBackward<S, T>::iterate(const Team& team, int64_t t, S* outer) {
    const bool only = args_.gradient == Gradient::last_step, last = only || t == 0, first = only || t + 1 == most_iterations_;
    S joins[kMaxLanes];
    bool joined = false;
    for (int64_t lane = 0; lane < kMaxLanes; ++lane) {
        joins[lane] = only || iterations_[lane] == t + 1 ? S(1) : S(0);
        joined |= joins[lane] > 0;
    }
    load_scalings(team, only ? 1 : t);
    const S *y = columns_.scaling, *sums = this->sums_;
    if (first) {
        columns_to_rows(team, joins, joined, [](int64_t) { return Vec<S>{}; });
    } else {
        columns_to_rows(team, joins, joined, [=](int64_t k) { return -(load(y + k) * load(sums + k)); });
    }
    rows_to_columns(team, joins, joined, last);
    if (!outer) return;
    if (only) {
        previous_of_last(team);
    } else {
        previous_columns(team, t - 1);
    }
    collect_cost(team, outer);
}

template <class S, class T>
void SharedBackward<S, T>::solve(const Team& team, S* outer) {
    const FlushSubnormals flush;
    start(team);
    const int64_t last = args_.keep == Keep::all ? most_iterations_ - 1 : args_.keep == Keep::last_step ? 1 : 0;
    load_scalings(team, last);
    if (iterates_) {
        first_adjoint(team);
        const int64_t stop = args_.gradient == Gradient::unroll ? 0 : most_iterations_ - 1;
        for (int64_t t = most_iterations_ - 1; t >= stop; --t) iterate(team, t, outer);
        load_scalings(team, last);
    }
    if (outer) direct_cost(team, outer);
    team.barrier();
    marginal_gradient(team, rows_, sum_phi_, args_.grad_f ? of_f_ : nullptr, mass_b_, args_.grad_a);
    marginal_gradient(team, columns_, sum_gamma_, args_.grad_g ? of_g_ : nullptr, mass_a_, args_.grad_b);
    team.barrier();
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

#include "sinkhorn_shared_gradients.h"

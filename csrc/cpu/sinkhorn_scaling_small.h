// The loops of sinkhorn_scaling.h for a problem whose kernel fits in the first-level cache twice, as it is and transposed:
// both half-iterations are then products "matrix rows times scalars" with the sums in the lanes, without a horizontal
// sum, and everything else is done a vector at a time. The same recurrences, the same results to rounding. One thread.
#pragma once
#include "sinkhorn_scaling.h"
#include "transpose.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// y_j = sum_i x_i matrix_ij for the kVectors vectors of columns at `matrix`, four rows at a time
template <class S, int kVectors>
OTKD_INLINE void multiply_columns(const S* matrix, int64_t rows, int64_t stride, const S* x, S* y) {
    Vec<S> acc[4][kVectors] = {};
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) {
        for (int r = 0; r < 4; ++r) {
            const Vec<S> factor = splat(x[i + r]);
            for (int c = 0; c < kVectors; ++c) acc[r][c] += load(matrix + (i + r) * stride + c * width<S>) * factor;
        }
    }
    for (; i < rows; ++i) {
        const Vec<S> factor = splat(x[i]);
        for (int c = 0; c < kVectors; ++c) acc[0][c] += load(matrix + i * stride + c * width<S>) * factor;
    }
    for (int c = 0; c < kVectors; ++c) store(y + c * width<S>, (acc[0][c] + acc[1][c]) + (acc[2][c] + acc[3][c]));
}

// y = x^T matrix, matrix (rows, stride), stride a multiple of two vectors
template <class S>
void multiply(const S* matrix, int64_t rows, int64_t stride, const S* x, S* y) {
    int64_t j = 0;
    for (; j + 4 * width<S> <= stride; j += 4 * width<S>) multiply_columns<S, 4>(matrix + j, rows, stride, x, y + j);
    for (; j < stride; j += 2 * width<S>) multiply_columns<S, 2>(matrix + j, rows, stride, x, y + j);
}

// kernel_t_ (m, n), rows padded with zeros
template <class Rows>
void Scaling<Rows>::transpose_kernel() {
    transpose(rows_.kernel(0, n_), ld_, kernel_t_, n_vec_, n_, m_);
    for (int64_t j = 0; j < m_; ++j) {
        for (int64_t i = n_; i < n_vec_; ++i) kernel_t_[j * n_vec_ + i] = 0;
    }
}

// products_ = K v
template <class Rows>
void Scaling<Rows>::row_products() {
    multiply(kernel_t_, m_, n_vec_, v_, products_);
}

template <class Rows>
bool Scaling<Rows>::iterate_small(const Problem<T>& p) {
    transpose_kernel();
    const S* kernel = rows_.kernel(0, n_);
    const Team alone{0, 1, nullptr};
    Control control(args_);
    bool in_range = true;
    for (; ran_ < args_.num_iters; ++ran_) {
        row_products();
        if (control.needs_errors() && ran_ > 0) {
            const double error = row_error(p, 0, n_, products_) + column_error(p, 0, m_);
            if (control.due(ran_)) control.observe(ran_, error);
            if (control.stops(error)) break;
        }
        in_range &= update_rows(0, n_vec_, products_, control.omega());
        next_rows();
        multiply(kernel, n_, ld_, u_, columns_);
        in_range &= update_columns(0, ld_, control.omega());
        std::swap(v_, next_v_);
        if (args_.keep == Keep::all) keep_scalings(p, alone, ran_);
    }
    return in_range;
}

// One step of the adjoint loop from w on: z into left_, gamma_bar_ of the iteration before.
template <class Rows>
void Scaling<Rows>::adjoint_small(const Trace& step, int64_t k, const S* w, const S* v_before) {
    const bool last = k == steps_ - 1;
    multiply(kernel_t_, m_, n_vec_, w, products_);
    for (int64_t i = 0; i < n_vec_; i += width<S>) {
        const Vec<S> own = LoadAs<S, S>::part(step.u + i, n_ - i, S(0));
        const Vec<S> bar = (last ? load(phi_bar_ + i) : splat(S(0))) - own * load(products_ + i);
        store(products_ + i, bar * load(slope_ + i));
        for (int64_t r = i; args_.grad_a && r < i + width<S> && r < n_; ++r) sum_phi_[r] += bar[r - i];
    }
    for (int64_t i = 0; i < n_; ++i) {
        left_[(i * steps_ + k) * 2] = step.u[i];
        left_[(i * steps_ + k) * 2 + 1] = products_[i];
    }
    multiply(rows_.kernel(0, n_), n_, ld_, products_, columns_);
    for (int64_t j = 0; j < ld_; j += width<S>) store(gamma_bar_ + j, -(load(v_before + j) * load(columns_ + j)));
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

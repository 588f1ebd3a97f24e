// What the kernels of sinkhorn_shared.cu share: a batch of problems with one cost, its matrices and vectors, the products of an iteration
// and what becomes of their entries. Rows of the products are problems; u and v scale K = exp(-(C - low) / epsilon), low the least cost.
#pragma once
#include "point_tile.h"
#include "sinkhorn_log_bwd.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kOnceThreads = 256, kMatrixTile = 32;

template <class T>
struct SharedBatch {
    Batch<T> batch;
    double *ranges, *range;                  // (kRangeBlocks, 2) least and largest finite costs; those of all
    int64_t range_blocks;
    T *kernel, *kernel_t, *moved, *moved_t;  // K (n, m), K^T; K o (C - low) and its transpose
    T *u, *v;                                // (batch, n), (batch, m): scalings that no history holds, v also to start from
    T* partial;                              // (pieces, batch, longest)
    int* left;                               // (batch,): not solved on scalings
    int64_t longest, row_depth, column_depth, row_pieces, column_pieces;  // rows: of products that sum over columns

    OTKD_BOTH bool keeps_all() const { return batch.args.keep == Keep::all; }
    OTKD_DEVICE int64_t history_step() const { return batch.history_stride * static_cast<int64_t>(sizeof(double) / sizeof(T)); }
    OTKD_DEVICE T* slot(int64_t k) const { return reinterpret_cast<T*>(batch.args.history + kHistoryHeader) + k * (batch.args.n + batch.args.m); }
};

// One vector a problem, `stride` apart.
template <class T>
struct Vectors {
    T* data;
    int64_t stride;
    OTKD_DEVICE T& at(int64_t b, int64_t i) const { return data[b * stride + i]; }
};

// Of iteration k, as the forward writes them.
template <class T>
OTKD_DEVICE Vectors<T> forward_u(const SharedBatch<T>& all, int64_t k) {
    if (all.keeps_all()) return {all.slot(k), all.history_step()};
    return {all.u, all.batch.args.n};
}
template <class T>
OTKD_DEVICE Vectors<T> forward_v(const SharedBatch<T>& all, int64_t k) {
    if (all.keeps_all() && k >= 0) return {all.slot(k) + all.batch.args.n, all.history_step()};
    return {all.v, all.batch.args.m};
}
// As the backward finds them; `last`: of the plan.
template <class T>
struct Kept {
    const SharedBatch<T>& all;
    bool unroll;
    int64_t last;
    OTKD_DEVICE explicit Kept(const SharedBatch<T>& batch)
        : all(batch), unroll(batch.batch.args.gradient == Gradient::unroll),
          last(unroll ? batch.batch.args.num_iters - 1 : batch.batch.args.keep == Keep::last_step ? 1 : 0) {}
    OTKD_DEVICE Vectors<T> u(int64_t slot) const { return {all.slot(slot), all.history_step()}; }
    OTKD_DEVICE Vectors<T> v(int64_t slot) const { return {all.slot(slot) + all.batch.args.n, all.history_step()}; }
    OTKD_DEVICE Vectors<T> u_of(int64_t k) const { return u(unroll ? k : 1); }
    OTKD_DEVICE Vectors<T> v_of(int64_t k) const { return v(unroll ? k : 1); }
    OTKD_DEVICE Vectors<T> before(int64_t k) const {
        if (!unroll) return v(0);
        if (k > 0) return v(k - 1);
        return {all.v, all.batch.args.m};
    }
    // Adjoints of step k, in the workspaces of the problems.
    OTKD_DEVICE Vectors<T> z(int64_t k) const {
        const int64_t n = all.batch.args.n, m = all.batch.args.m, step = static_cast<int64_t>(sizeof(double) / sizeof(T));
        double* memory = reinterpret_cast<double*>(all.batch.args.workspace) + 8 + 2 * (n + m);
        return {reinterpret_cast<T*>(memory) + k * (n + m), all.batch.workspace_stride * step};
    }
    OTKD_DEVICE Vectors<T> w(int64_t k) const {
        const Vectors<T> own = z(k);
        return {own.data + all.batch.args.n, own.stride};
    }
};

enum class Product : int {
    rows, columns, mass_rows, moved_rows,                                     // forward
    first_moved, first_mass, first_columns, adjoint_rows, adjoint_columns     // backward
};

OTKD_BOTH bool over_rows(Product what) {  // sums over the rows of the cost
    return what == Product::columns || what == Product::first_columns || what == Product::adjoint_columns;
}

// The left operand, a vector a problem, and the rows of the right one.
template <class T>
OTKD_DEVICE Vectors<T> left_of(const SharedBatch<T>& all, Product what, int64_t k) {
    if (what == Product::rows) return forward_v(all, k - 1);
    if (what == Product::columns) return forward_u(all, k);
    if (what == Product::mass_rows || what == Product::moved_rows) return forward_v(all, k);
    const Kept<T> kept(all);
    if (what == Product::adjoint_rows) return kept.w(k);
    if (what == Product::adjoint_columns) return kept.z(k);
    return what == Product::first_columns ? kept.u(kept.last) : kept.v(kept.last);
}
template <class T>
OTKD_DEVICE const T* right_of(const SharedBatch<T>& all, Product what) {
    if (what == Product::moved_rows || what == Product::first_moved) return all.moved;
    if (what == Product::first_columns) return all.moved_t;
    return over_rows(what) ? all.kernel_t : all.kernel;
}

// gamma_bar of column j before step k is known.
template <class T>
OTKD_DEVICE void set_bar(const Problem<T>& p, const Kept<T>& kept, int64_t k, int64_t j, double bar) {
    const double mass = p.mass_b(j);
    const bool used = mass > 0;
    p.sum_gamma()[j] += used ? bar : 0.0;
    kept.w(k).at(p.index, j) = used ? static_cast<T>(bar * (static_cast<double>(kept.v_of(k).at(p.index, j)) / mass)) : T(0);
}

// What becomes of entry i of problem b of a product of the forward.
template <class T>
OTKD_DEVICE void forward_entry(const SharedBatch<T>& all, Product what, int64_t k, int64_t b, int64_t i, T sum) {
    const Problem<T> p(all.batch, b, all.batch.args.cost, nullptr);
    if (what == Product::rows || what == Product::columns) {
        const bool rows = what == Product::rows;
        const T mass = static_cast<T>(rows ? p.mass_a(i) : p.mass_b(i)), next = mass > 0 ? mass / sum : T(0);
        if (mass > 0 && !safe(sum)) all.left[b] = 1;
        if (!rows && k + 1 == p.args.num_iters) {
            if (p.args.keep == Keep::last_step) p.template kept_v<T>(0)[i] = forward_v(all, k - 1).at(b, i);
            p.column_mass()[i] = static_cast<double>(next) * sum;
        }
        (rows ? forward_u(all, k) : forward_v(all, k)).at(b, i) = next;
        return;
    }
    const double own = static_cast<double>(forward_u(all, k).at(b, i)) * sum;
    if (what == Product::mass_rows) p.row_mass()[i] = own;
    if (what == Product::moved_rows) p.row_moved()[i] = own + all.range[0] * p.row_mass()[i];
}

template <class T>
OTKD_DEVICE void backward_entry(const SharedBatch<T>& all, Product what, int64_t k, int64_t b, int64_t i, T sum) {
    const Problem<T> p(all.batch, b, all.batch.args.cost, nullptr);
    if (p.history()[0] == static_cast<int>(Method::log)) return;
    const Kept<T> kept(all);
    const double of_transport = p.incoming(p.args.grad_transport_cost), of_dual = p.incoming(p.args.grad_regularized_cost);
    const double eps = p.args.epsilon;
    if (what == Product::first_moved) p.first()[i] = sum;
    if (what == Product::first_mass) {
        const double own = kept.u(kept.last).at(b, i), moved = p.first()[i];
        p.first()[i] = own > 0 ? of_transport * own * moved + eps * (of_dual * (p.mass_a(i) - own * sum) + p.incoming_f(i)) : 0.0;
        p.sum_phi()[i] = 0;
    }
    if (what == Product::first_columns) {
        const double own = kept.v(kept.last).at(b, i);
        p.sum_gamma()[i] = 0;
        set_bar(p, kept, all.batch.steps - 1, i, own > 0 ? of_transport * own * sum + eps * p.incoming_g(i) : 0.0);
    }
    if (what == Product::adjoint_rows) {
        const double mass = p.mass_a(i), own = kept.u_of(k).at(b, i);
        const double bar = (k + 1 == all.batch.steps ? p.first()[i] : 0.0) - own * sum;
        p.sum_phi()[i] += bar;
        kept.z(k).at(b, i) = mass > 0 ? static_cast<T>(bar * own / mass) : T(0);
    }
    if (what == Product::adjoint_columns) set_bar(p, kept, k - 1, i, -static_cast<double>(kept.before(k).at(b, i)) * sum);
}

template <class T>
OTKD_DEVICE void product_entry(const SharedBatch<T>& all, Product what, int64_t k, int64_t b, int64_t i, T sum) {
    what < Product::first_moved ? forward_entry(all, what, k, b, i, sum) : backward_entry(all, what, k, b, i, sum);
}

// Blocks by tile of problems and outputs, and piece of the depth; shared_join adds the pieces up.
template <class T>
OTKD_KERNEL(kPointThreads, sizeof(T) == sizeof(float) ? 4 : 2) shared_product(OTKD_CONSTANT SharedBatch<T> all, Product what, int64_t k) {
    const SinkhornArgs<T>& args = all.batch.args;
    const bool columns = over_rows(what);
    const int64_t count = columns ? args.m : args.n, depth = columns ? args.n : args.m, a_piece = columns ? all.column_depth : all.row_depth;
    const uint32_t pieces = static_cast<uint32_t>(columns ? all.column_pieces : all.row_pieces);
    const uint32_t tiles = static_cast<uint32_t>((count + kOther - 1) / kOther), block = static_cast<uint32_t>(block_id());
    const int64_t piece = block % pieces, j0 = block / pieces % tiles * int64_t{kOther}, b0 = block / pieces / tiles * int64_t{kOwn};
    const int64_t begin = piece * a_piece, end = smaller(begin + a_piece, depth);
    const Vectors<T> left = left_of(all, what, k);
    const Rows<T> own{left.data + begin, args.batch, left.stride}, other{right_of(all, what) + begin, count, depth};
    T sums[4][4];
    point_sums<Form::product>(own, other, end - begin, b0, j0, reinterpret_cast<T*>(shared_memory()), sums);
    OTKD_UNROLL
    for (int r = 0; r < 4; ++r) {
        OTKD_UNROLL
        for (int c = 0; c < 4; ++c) {
            const int64_t b = b0 + own_of_thread() + r, j = j0 + other_of_thread() + c;
            if (b >= args.batch || j >= count) continue;
            all.partial[(piece * args.batch + b) * all.longest + j] = sums[r][c];
        }
    }
}

template <class T>
OTKD_KERNEL(kOnceThreads) shared_join(OTKD_CONSTANT SharedBatch<T> all, Product what, int64_t k) {
    const int64_t batch = all.batch.args.batch, count = over_rows(what) ? all.batch.args.m : all.batch.args.n;
    const int64_t pieces = over_rows(what) ? all.column_pieces : all.row_pieces;
    const uint32_t parts = static_cast<uint32_t>((count + kOnceThreads - 1) / kOnceThreads), block = static_cast<uint32_t>(block_id());
    const int64_t b = block / parts, i = block % parts * int64_t{kOnceThreads} + thread_id();
    if (i >= count) return;
    T sum = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) sum += all.partial[(piece * batch + b) * all.longest + i];
    product_entry(all, what, k, b, i, sum);
}

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

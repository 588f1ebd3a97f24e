// A problem sliced over the blocks of a cluster: what the forward and the backward have in common.
//
// Block q has the rows q R .. (q + 1) R - 1, and is the owner of the columns q S .. (q + 1) S - 1. Of its rows it keeps the absorbed kernel
//   K_ij = exp(alpha_i + beta_j - X_ij),   exponents formed in double
// `held` of them in shared memory; where they do not fit, the others are formed again from the cost at each use, with the same bits. K, its
// scalings and sums (type S) are in double, unless the input is float and the exponents of the problem span at most 60, as for scalings.
// Sums over columns stay in a block: 4 rows a warp, lanes along the columns. Sums over rows are one partial sum a column and block; the
// owner reads those of all blocks, in the order of their ranks, and hands its result to all. Two barriers of the cluster for each.
#pragma once
#include "sinkhorn_log.h"
#include "sinkhorn_tile.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kClusterThreads = 512, kMostBlocks = 16, kTileRows = 4;

// How a problem is cut: rows and columns of a block, and its shared memory.
struct Slices {
    int size, rows, columns, bytes;
};

// What is far from the loops over entries is called, not inlined: the kernels stay small.
OTKD_DEVICE float exp_apart(float x) { return exp_of(x); }
template <class D>  // double; templates, so that there is none of them on the host
OTKD_CALL D exp_apart(D x) {
    return exp_of(x);
}
template <class D>
OTKD_CALL D log_apart(D x) {
    return log(x);
}
// exp(potential - absorbed), 0 where there is nothing.
template <class D>
OTKD_CALL D scaling_apart(D potential, D absorbed) {
    return potential == -kInfinity || absorbed == -kInfinity ? 0.0 : exp_of(potential - absorbed);
}
template <class T>
OTKD_CALL double mass_apart(const Problem<T>& p, int64_t e, bool column) {
    return column ? p.mass_b(e) : p.mass_a(e);
}

template <class T, class S>
class Cluster {
  public:
    const Problem<T>& p;
    const Slices& cut;
    const int rank, m;
    const int rows;       // of this block
    const int first_row;
    const int owned;      // columns of this block
    const int first_column;
    const int held;       // of its rows, all or a multiple of kTileRows
    double *scratch, *alpha, *beta;  // (2 threads,), (R,), (m,)
    S *v, *partial, *u, *kernel;     // (m,) of all columns; (m,) sums of this block's rows; (R,); (held, m)
    int* flags;                      // (kMostBlocks,) one of each block, then one of this block

    OTKD_DEVICE Cluster(const Problem<T>& problem, const Slices& slices)
        : p(problem), cut(slices), rank(cluster_rank()), m(static_cast<int>(problem.m)),
          rows(share(static_cast<int>(problem.n), slices.rows)), first_row(rank * slices.rows),
          owned(share(static_cast<int>(problem.m), slices.columns)), first_column(rank * slices.columns),
          held(rows_held(slices, m, block_threads())) {
        scratch = reinterpret_cast<double*>(shared_memory());
        alpha = scratch + 2 * block_threads();
        beta = alpha + cut.rows;
        v = reinterpret_cast<S*>(beta + m);
        partial = v + m;
        u = partial + m;
        flags = reinterpret_cast<int*>(u + cut.rows);
        kernel = reinterpret_cast<S*>(flags + kFlags);
    }
    // Without rows of the kernel.
    OTKD_BOTH static int vector_bytes(const Slices& cut, int m, int threads) {
        const int doubles = 2 * threads + cut.rows + m, vectors = 2 * m + cut.rows;
        return doubles * static_cast<int>(sizeof(double)) + vectors * static_cast<int>(sizeof(S)) +
               kFlags * static_cast<int>(sizeof(int));
    }
    OTKD_BOTH static int rows_held(const Slices& cut, int m, int threads) {
        const int fit = larger(cut.bytes - vector_bytes(cut, m, threads), 0) / (m * static_cast<int>(sizeof(S)));
        return fit >= cut.rows ? cut.rows : fit / kTileRows * kTileRows;
    }

    OTKD_DEVICE T cost(int r, int j) const { return p.cost[(first_row + r) * m + j]; }
    OTKD_DEVICE double exponent(int r, int j) const { return static_cast<double>(cost(r, j)) * p.per_epsilon; }
    OTKD_DEVICE S formed(int r, int j) const { return exp_apart(static_cast<S>(alpha[r] + beta[j] - exponent(r, j))); }

    // The kernel anew from alpha and beta. Between barriers of the block.
    OTKD_DEVICE void fill() const {
        OTKD_ROLLED
        for (int r = 0; r < smaller(rows, held); ++r) {
            OTKD_ROLLED
            for (int j = thread_id(); j < m; j += block_threads()) {
                kernel[r * m + j] = exp_of(static_cast<S>(alpha[r] + beta[j] - exponent(r, j)));
            }
        }
    }

    // K with the potentials gamma_of(j) of the columns, and in each row 1 for the largest entry. Ends with a barrier.
    template <class Potential>
    OTKD_DEVICE void absorb_costs(Potential gamma_of) const {
        OTKD_ROLLED
        for (int j = thread_id(); j < m; j += block_threads()) beta[j] = gamma_of(j);
        barrier();
        OTKD_ROLLED
        for (int r = warp_id(); r < rows; r += block_warps()) {
            double top = -kInfinity;
            OTKD_ROLLED
            for (int j = lane_id(); j < m; j += 32) top = larger(top, beta[j] - exponent(r, j));
            top = warp_max(top);
            if (lane_id() == 0) alpha[r] = top > -kInfinity ? -top : -kInfinity;
        }
        barrier();
        fill();
        barrier();
    }
    // K with the potentials phi_of(i) and gamma_of(j). Ends with a barrier.
    template <class RowPotential, class Potential>
    OTKD_DEVICE void absorb(RowPotential phi_of, Potential gamma_of) const {
        OTKD_ROLLED
        for (int j = thread_id(); j < m; j += block_threads()) beta[j] = gamma_of(j);
        OTKD_ROLLED
        for (int r = thread_id(); r < rows; r += block_threads()) alpha[r] = phi_of(first_row + r);
        barrier();
        fill();
        barrier();
    }

    // For each 4 rows of the block by a warp: `kSums` sums over the columns of what visit(r, j, entry, terms) says, then finish(r, sums) with
    // all lanes, of which 8 have the same row; r >= rows: none.
    template <int kSums, class Visit, class Finish>
    OTKD_DEVICE void for_rows(Visit visit, Finish finish) const {
        OTKD_ROLLED
        for (int r0 = kTileRows * warp_id(); r0 < rows; r0 += kTileRows * block_warps()) {
            S x[kSums][kTileRows] = {}, sums[kSums];
            if (r0 < held) {
                along_rows<kSums>(r0, x, visit);
            } else {
                OTKD_ROLLED
                for (int q = 0; q < kTileRows; ++q) along_formed_row<kSums>(r0, q, x, visit);
            }
            OTKD_UNROLL
            for (int s = 0; s < kSums; ++s) sums[s] = exchange_sums(x[s]);
            finish(r0 + own_row(), sums);
        }
    }
    OTKD_DEVICE static int own_row() { return lane_id() / (32 / kTileRows); }
    OTKD_DEVICE static bool counts() { return lane_id() % (32 / kTileRows) == 0; }  // one lane a row

    // Sums over the block's rows of weight(r, j, entry) into `partial`, a thread a column.
    template <class Weight>
    OTKD_DEVICE void column_partials(Weight weight) const {
        OTKD_ROLLED
        for (int j = thread_id(); j < m; j += block_threads()) {
            S sum = 0;
            const int there = smaller(rows, held);
            OTKD_UNROLL_4
            for (int r = 0; r < there; ++r) sum += weight(r, j, kernel[r * m + j]);
            OTKD_ROLLED
            for (int r = there; r < rows; ++r) sum += weight(r, j, formed(r, j));
            partial[j] = sum;
        }
    }
    // Column j's sum over all rows; between two barriers of the cluster.
    OTKD_DEVICE S column_total(int j) const {
        S total = in_block(partial, 0)[j];
        OTKD_ROLLED
        for (int q = 1; q < cut.size; ++q) total += in_block(partial, q)[j];
        return total;
    }
    OTKD_DEVICE void hand_out(int j, S value) const {
        OTKD_ROLLED
        for (int q = 0; q < cut.size; ++q) in_block(v, q)[j] = value;
    }
    // This block's flag to all others, to be read after the next barrier of the cluster. A barrier of the block.
    OTKD_DEVICE void hand_out_flag(bool mine) const {
        const bool any = barrier_any(mine);
        if (thread_id() < cut.size) in_block(flags, thread_id())[rank] = any;
    }
    OTKD_DEVICE bool any_flag() const {
        bool any = false;
        OTKD_ROLLED
        for (int q = 0; q < cut.size; ++q) any |= flags[q] != 0;
        return any;
    }

  private:
    template <int kSums, class Visit>
    OTKD_DEVICE void along_rows(int r0, S (&x)[kSums][kTileRows], Visit visit) const {
        OTKD_ROLLED
        for (int j = lane_id(); j < m; j += 32) {
            OTKD_UNROLL
            for (int q = 0; q < kTileRows; ++q) {
                const int r = smaller(r0 + q, rows - 1);
                S terms[kSums];
                visit(r, j, kernel[r * m + j], terms);
                OTKD_UNROLL
                for (int s = 0; s < kSums; ++s) x[s][q] += terms[s];
            }
        }
    }
    template <int kSums, class Visit>
    OTKD_DEVICE void along_formed_row(int r0, int q, S (&x)[kSums][kTileRows], Visit visit) const {
        const int r = smaller(r0 + q, rows - 1);
        S sums[kSums] = {};
        OTKD_ROLLED
        for (int j = lane_id(); j < m; j += 32) {
            S terms[kSums];
            visit(r, j, formed(r, j), terms);
            OTKD_UNROLL
            for (int s = 0; s < kSums; ++s) sums[s] += terms[s];
        }
        OTKD_UNROLL
        for (int s = 0; s < kSums; ++s) {
            OTKD_UNROLL
            for (int at = 0; at < kTileRows; ++at) x[s][at] = at == q ? sums[s] : x[s][at];  // registers have no index
        }
    }

    static constexpr int kFlags = kMostBlocks + 2;  // an even number: doubles may follow
    OTKD_DEVICE int share(int count, int each) const { return larger(smaller(count - rank * each, each), 0); }
};

// What the sums of a problem are made in is decided, and the barrier after which all blocks have begun. Before any Cluster.
template <class T>
OTKD_CALL void decide_width(const Problem<T>& p, bool start) {
    double* scratch = reinterpret_cast<double*>(shared_memory());
    if (sizeof(T) == sizeof(float)) {
        log_range_rows(p, Part{cluster_rank(), cluster_size()});
        cluster_barrier();
    }
    if (cluster_rank() == 0) {
        if (start) log_start(p);
        barrier();
        if (sizeof(T) == sizeof(float)) log_width(p, scratch);
    }
    cluster_barrier();
}

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

// Pivoted Cholesky factor of one symmetric positive semidefinite matrix and its inverse by one block, in double (csrc/cpu/cholesky.h
// says why): A = D R^T R D, D the deviations, the largest remaining pivot first, until it is at the level of rounding. Rows and columns stay
// where they are; order[k] is the pivot of row k. n^3 / 2 multiply-adds for R, as many for R^-T.
#pragma once
#include "otkd_fast/sqrtm.h"
#include "runtime.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kFactorThreads = 512, kFactorColumns = 128, kFactorGroups = kFactorThreads / kFactorColumns;

// In units of rounding, as on the CPU: the smallest pivot, and the largest entry of what may be left beyond the rank.
template <class T>
constexpr double kFactorPivot = (sizeof(T) == sizeof(float) ? 0.25 : 32.0) * std::numeric_limits<T>::epsilon();
template <class T>
constexpr double kFactorRest = (sizeof(T) == sizeof(float) ? 16.0 : 128.0) * std::numeric_limits<T>::epsilon();

// A = (a + a^T) / 2 * 2^-exponent + shift I, a (n, n)
template <class T>
struct SymmetricPart {
    const T* a;
    int n, exponent;
    double shift, first, second;  // first second = 2^-exponent, each in the range of double
    OTKD_DEVICE SymmetricPart(const T* matrix, int64_t size, int scale, double added)
        : a(matrix), n(static_cast<int>(size)), exponent(scale), shift(added), first(0.5 * ldexp(1.0, -(scale / 2))),
          second(ldexp(1.0, -(scale - scale / 2))) {}
    OTKD_DEVICE double operator()(int64_t i, int64_t j) const {
        const double mean = (a[i * n + j] * first + a[j * n + i] * first) * second;
        return i == j ? mean + shift : mean;
    }
};

template <class T>
struct BlockCholesky {
    const SymmetricPart<T>& matrix;
    const int n;
    double *deviation, *rest, *scratch;  // (n,), (n,), (kFactorThreads,)
    double* top;                         // (2,): the pivot, what is left
    int *order, *place;                  // (n,): row of A of each pivot; which pivot each row of A was, -1 before it is, -2 for a variance of 0
    int* chosen;                         // (2,): its row
    double* rows;                        // (n, n): R
    int rank = 0;

    // Shared memory, without and with the rows there.
    static int64_t shared_bytes(int64_t n, bool with_rows) {
        return (2 * n + kFactorThreads + 2 + (with_rows ? n * n : 0)) * int64_t{sizeof(double)} + (2 * n + 2) * int64_t{sizeof(int)};
    }
    // `memory` null: the rows are in the shared memory
    OTKD_DEVICE BlockCholesky(const SymmetricPart<T>& of, unsigned char* shared, double* memory)
        : matrix(of), n(of.n), deviation(reinterpret_cast<double*>(shared)), rest(deviation + n), scratch(rest + n),
          top(scratch + kFactorThreads), rows(memory) {
        double* after = top + 2;
        if (!memory) {
            rows = after;
            after += static_cast<int64_t>(n) * n;
        }
        order = reinterpret_cast<int*>(after);
        place = order + n;
        chosen = place + n;
    }

    OTKD_DEVICE Definiteness factorize(double tolerance = kFactorPivot<T>) {
        for (int i = thread_id(); i < n; i += kFactorThreads) {
            const double variance = matrix(i, i);
            deviation[i] = variance > 0 ? sqrt(variance) : 0.0;
            rest[i] = variance > 0 ? 1.0 : 0.0;
            place[i] = variance > 0 ? -1 : -2;
        }
        barrier();
        OTKD_ROLLED
        for (rank = 0; rank < n; ++rank) {
            if (warp_id() == 0) choose();
            barrier();
            const int pivot = chosen[0];
            const double size = top[0], root = sqrt(size);
            if (!(size > tolerance)) break;
            reduce(pivot, rank, rows, [&](int j) { return j == pivot ? size : correlation(pivot, j); }, [&](int j, double value) {
                const double entry = j == pivot ? root : place[j] == -1 ? value / root : 0.0;
                rows[static_cast<int64_t>(rank) * n + j] = entry;
                rest[j] -= entry * entry;
                if (j == pivot) place[j] = rank;
            });
            if (thread_id() == 0) order[rank] = pivot;
        }
        barrier();
        if (rank == n) return Definiteness::definite;
        return left_over() <= kFactorRest<T> ? Definiteness::semidefinite : Definiteness::indefinite;
    }

    // inverse (rank, n) = R^-T, the columns in the order of A; 0 in those of no pivot. Returns |R^-T D^-1|^2 (Frobenius).
    OTKD_DEVICE double invert(double* inverse) {
        double squares = 0;
        OTKD_ROLLED
        for (int k = 0; k < rank; ++k) {
            const int pivot = order[k];
            const double reciprocal = 1 / rows[static_cast<int64_t>(k) * n + pivot];
            reduce(pivot, k, inverse, [&](int j) { return j == pivot ? 1.0 : 0.0; }, [&](int j, double value) {
                value *= reciprocal;
                inverse[static_cast<int64_t>(k) * n + j] = value;
                if (value != 0) squares += value / deviation[j] * (value / deviation[j]);
            });
        }
        return block_sum(squares, scratch);
    }

    // out (n, n) = R D, rows beyond the rank 0; A = out^T out
    template <class S>
    OTKD_DEVICE void store_factor(S* out) const {
        for (int64_t e = thread_id(); e < static_cast<int64_t>(n) * n; e += kFactorThreads) {
            out[e] = e / n < rank ? static_cast<S>(rows[e] * deviation[e % n]) : S(0);
        }
    }
    // out (n, n) = R^-T D^-1, rows beyond the rank 0; of a definite A^-1 = out^T out
    template <class S>
    OTKD_DEVICE void store_inverse(const double* inverse, S* out) const {
        for (int64_t e = thread_id(); e < static_cast<int64_t>(n) * n; e += kFactorThreads) {
            out[e] = e / n < rank && inverse[e] != 0 ? static_cast<S>(inverse[e] / deviation[e % n]) : S(0);
        }
    }

  private:
    OTKD_DEVICE double correlation(int i, int j) const {
        return place[j] == -2 || place[i] == -2 ? 0.0 : i == j ? 1.0 : matrix(i, j) / deviation[i] / deviation[j];
    }

    // The first of the rows with the largest rest, by one warp.
    OTKD_DEVICE void choose() {
        double best = -1;
        int at = n;
        for (int j = lane_id(); j < n; j += 32) {
            if (place[j] != -1 || !(rest[j] > best)) continue;
            best = rest[j];
            at = j;
        }
        OTKD_UNROLL
        for (int offset = 16; offset > 0; offset >>= 1) {
            const double other = shuffle_xor(best, offset);
            const int its = shuffle_xor(at, offset);
            if (!(other > best || (other == best && its < at))) continue;
            best = other;
            at = its;
        }
        if (lane_id() != 0) return;
        top[0] = best;
        chosen[0] = at;
    }

    // put(j, base(j) - sum over m < count of R[m][column] others[m][j]) for all j, each by one thread; barriers after.
    template <class Base, class Put>
    OTKD_DEVICE void reduce(int column, int count, const double* others, const Base& base, const Put& put) const {
        const int own = thread_id() % kFactorColumns, group = thread_id() / kFactorColumns;
        OTKD_ROLLED
        for (int j0 = 0; j0 < n; j0 += kFactorColumns) {
            const int j = j0 + own;
            double sum = 0;
            for (int64_t m = group; j < n && m < count; m += kFactorGroups) sum += rows[m * n + column] * others[m * n + j];
            scratch[thread_id()] = sum;
            barrier();
            if (group == 0 && j < n) {
                double total = 0;
                OTKD_UNROLL
                for (int g = 0; g < kFactorGroups; ++g) total += scratch[g * kFactorColumns + own];
                put(j, base(j) - total);
            }
            barrier();
        }
    }

    // Largest entry of what R leaves, and beside a variance of 0.
    OTKD_DEVICE double left_over() {
        double most = 0;
        OTKD_ROLLED
        for (int i = 0; i < n; ++i) {
            if (place[i] == -2) {
                for (int j = thread_id(); j < n; j += kFactorThreads) most = i == j ? most : larger(most, fabs(matrix(i, j)));
            } else if (place[i] == -1) {
                reduce(i, rank, rows, [&](int j) { return correlation(i, j); }, [&](int j, double value) {
                    if (place[j] == -1) most = larger(most, fabs(value));
                });
            }
        }
        return block_max(most, scratch);
    }
};

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

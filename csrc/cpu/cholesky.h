// Pivoted Cholesky factorisation of one symmetric positive semidefinite matrix, in double whatever the type of its entries.
//
//   D^-1 A D^-1 = R^T R,   D = diag(sqrt(A_ii)),   row k of R is 0 in the columns of the pivots before it
//
// It works on the correlation matrix, takes the largest remaining pivot first and stops when that is not above kPivot<T> units of
// rounding of T: below, the rounding of A's own entries decides. So the units of the variables do not matter, and a rank-deficient
// matrix has a factor of fewer rows. In double, because then the factor of a float matrix, and all that is computed from it, has errors
// of u sqrt(condition) and not of u condition. Rows and columns stay where they are: `order` says which was the pivot of each row of R.
// n^3 / 2 multiply-adds, rows in the lanes; what kBlock pivots take away from the other rows is subtracted at once.
#pragma once
#include <utility>

#include "arena.h"
#include "magnitude.h"
#include "otkd_fast/sqrtm.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// Rounding leaves of a zero in float64 up to 25 units at n = 256 (products of integers).
template <class T>
constexpr double kPivot = sizeof(T) == sizeof(float) ? 0.25 : 32.0;
// A direction v with v^T A v up to this many units of v^T diag(A) v may be rounding, whatever the order of the pivots: the factor is
// that of A + E, |E_ij| <= rounding sqrt(A_ii A_jj). A pivot shows that times what small ones before it amplify, sqrt(n) with pivoting.
template <class T>
constexpr double kQuotient = sizeof(T) == sizeof(float) ? 0.25 : 8.0;
// Entries of what is left beyond the rank found may be this many units; beyond, A is indefinite.
template <class T>
constexpr double kRest = sizeof(T) == sizeof(float) ? 16.0 : 128.0;

template <class T>
struct Cholesky {
    static constexpr int64_t kBlock = 32;
    int64_t n, ld;
    double* left;       // (n, ld): what is left of the correlation matrix
    double* rows;       // (n, ld): R
    double* deviation;  // (ld,): sqrt(A_ii)
    double* reciprocal; // (ld,): 1 / deviation, 0 for a variance of 0
    double* rest;       // (ld,): diagonal of what is left
    double* open;       // (ld,): 1 where there has been no pivot, else 0
    int64_t* order;     // (n,): row of A of each pivot, then the other ones
    int64_t rank;
    double stray;       // largest entry beside a variance of 0

    Cholesky(int64_t size, Arena& memory)
        : n(size), ld(round_up(size, 64 / sizeof(double)) + 8), left(memory.take<double>(n * ld)),
          rows(memory.take<double>(n * ld)), deviation(memory.take<double>(ld)), reciprocal(memory.take<double>(ld)),
          rest(memory.take<double>(ld)), open(memory.take<double>(ld)), order(memory.take<int64_t>(n)), rank(0), stray(0) {}

    // Entry (k, j) of R D, its columns in the order of the pivots
    double factor(int64_t k, int64_t j) const { return rows[k * ld + order[j]] * deviation[order[j]]; }

    // A = (a + a^T) / 2 * 2^-exponent + shift I, as a correlation matrix
    void read(const T* a, int exponent, double shift) {
        const PowerOfTwo<double> scale(-exponent);
        stray = 0;
        for (int64_t i = 0; i < ld; ++i) {
            const double variance = i < n ? a[i * n + i] * scale.first * scale.second + shift : 0.0;
            deviation[i] = variance > 0 ? std::sqrt(variance) : 0.0;
            reciprocal[i] = variance > 0 ? 1 / deviation[i] : 0.0;
            rest[i] = open[i] = variance > 0 ? 1.0 : 0.0;
        }
        constexpr int64_t tile = 16;
        for (int64_t i0 = 0; i0 < n; i0 += tile) {
            for (int64_t j0 = 0; j0 <= i0; j0 += tile) read_tile(a, scale, i0, j0, i0 + tile < n ? i0 + tile : n, j0 + tile);
        }
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = n; j < ld; ++j) left[i * ld + j] = 0;
        }
    }

    Definiteness factorize(double tolerance = kPivot<T> * std::numeric_limits<T>::epsilon()) {
        int64_t block = 0;
        for (rank = 0; rank < n; ++rank) {
            const int64_t pivot = largest_rest();
            if (!(rest[pivot] > tolerance)) break;
            if (rank - block == kBlock) {
                subtract(block, rank);
                block = rank;
            }
            order[rank] = pivot;
            double* row = rows + rank * ld;
            reduce_row(pivot, block, rank, row);
            const double root = std::sqrt(rest[pivot]);
            open[pivot] = 0;
            for (int64_t j = 0; j < ld; j += width<double>) {
                const Vec<double> entry = load(row + j) * load(open + j) / root;
                store(row + j, entry);
                store(rest + j, load(rest + j) - entry * entry);
            }
            row[pivot] = root;
            rest[pivot] = 0;
        }
        if (rank == n) return Definiteness::definite;
        return rest_is_rounding(block) ? Definiteness::semidefinite : Definiteness::indefinite;
    }

  private:
    void read_tile(const T* a, const PowerOfTwo<double>& scale, int64_t i0, int64_t j0, int64_t i1, int64_t j1) {
        for (int64_t i = i0; i < i1; ++i) {
            for (int64_t j = j0; j < j1 && j < i; ++j) {
                const double mean = 0.5 * (a[i * n + j] * scale.first + a[j * n + i] * scale.first) * scale.second;
                const double weight = reciprocal[i] * reciprocal[j];
                left[i * ld + j] = left[j * ld + i] = weight > 0 ? mean * weight : 0.0;
                if (!(weight > 0)) stray = std::fmax(stray, std::fabs(mean));
            }
            if (i < j1) left[i * ld + i] = rest[i];
        }
    }

    int64_t largest_rest() const {
        Vec<double> best = load(rest);
        for (int64_t j = width<double>; j < ld; j += width<double>) best = max<double>(load(rest + j), best);
        const double top = largest<double>(best);
        int64_t j = 0;
        while (j + 1 < n && rest[j] != top) ++j;
        return j;
    }

    // out = row i of what is left, less the rows [begin, end) of R
    void reduce_row(int64_t i, int64_t begin, int64_t end, double* out) const {
        constexpr int kVectors = 4;
        int64_t j = 0;
        for (; j + kVectors * width<double> <= ld; j += kVectors * width<double>) reduce<1, kVectors>(&i, begin, end, j, out, 0);
        for (; j < ld; j += width<double>) reduce<1, 1>(&i, begin, end, j, out, 0);
    }

    // kVectors vectors from j on of the kRows rows of `left` that `which` names, less rows [begin, end) of R; to out + r * step
    template <int kRows, int kVectors>
    OTKD_INLINE void reduce(const int64_t* which, int64_t begin, int64_t end, int64_t j, double* out, int64_t step) const {
        Vec<double> acc[kRows][kVectors];
        for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < kVectors; ++v) acc[r][v] = load(left + which[r] * ld + j + v * width<double>);
        }
        for (int64_t m = begin; m < end; ++m) {
            const double* row = rows + m * ld;
            Vec<double> entry[kVectors];
            for (int v = 0; v < kVectors; ++v) entry[v] = load(row + j + v * width<double>);
            for (int r = 0; r < kRows; ++r) {
                const Vec<double> weight = splat(row[which[r]]);
                for (int v = 0; v < kVectors; ++v) acc[r][v] -= weight * entry[v];
            }
        }
        for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < kVectors; ++v) store((step ? out + which[r] * step : out) + j + v * width<double>, acc[r][v]);
        }
    }

    // Takes the rows [begin, end) of R away from the rows that have not been pivots.
    void subtract(int64_t begin, int64_t end) {
        constexpr int kRows = OTKD_VECTOR_BYTES == 64 ? 6 : 3, kVectors = OTKD_VECTOR_BYTES == 64 ? 4 : 2;
        int64_t which[kRows], count = 0;
        for (int64_t i = 0; i < n; ++i) {
            if (open[i] > 0) which[count++] = i;
            if (count < kRows && i + 1 < n) continue;
            int64_t j = 0;
            for (; count == kRows && j + kVectors * width<double> <= ld; j += kVectors * width<double>) {
                reduce<kRows, kVectors>(which, begin, end, j, left, ld);
            }
            for (int64_t r = 0; r < count; ++r) {
                for (int64_t rest_j = j; rest_j < ld; rest_j += width<double>) reduce<1, 1>(which + r, begin, end, rest_j, left, ld);
            }
            count = 0;
        }
    }

    // Completes the order, too.
    bool rest_is_rounding(int64_t block) {
        double most = stray;
        int64_t last = rank;
        for (int64_t i = 0; i < n; ++i) {
            bool pivot = false;
            for (int64_t k = 0; k < rank; ++k) pivot |= order[k] == i;
            if (pivot) continue;
            order[last++] = i;
            if (!(open[i] > 0)) continue;
            double* row = rows + rank * ld;
            reduce_row(i, block, rank, row);
            for (int64_t j = 0; j < n; ++j) most = std::fmax(most, open[j] > 0 ? std::fabs(row[j]) : 0.0);
        }
        return most <= kRest<T> * std::numeric_limits<T>::epsilon();
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

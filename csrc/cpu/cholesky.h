// Pivoted Cholesky factorisation of one symmetric positive semidefinite matrix, in double whatever the type of its entries.
//
//   D^-1 A D^-1 = P R^T R P^T,   D = diag(sqrt(A_ii)), R upper triangular, P the order of the pivots
//
// It works on the correlation matrix, takes the largest remaining pivot first and stops when that is not above kPivot<T> units of
// rounding of T: below, the rounding of A's own entries decides. So the units of the variables do not matter, and a rank-deficient
// matrix has a factor of fewer rows. In double, because then the factor of a float matrix, and all that is computed from it, has errors
// of u sqrt(condition) and not of u condition. n^3 / 3 operations, rows in the lanes.
#pragma once
#include <utility>

#include "arena.h"
#include "magnitude.h"
#include "otkd_fast/sqrtm.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class T>
constexpr double kPivot = sizeof(T) == sizeof(float) ? 0.25 : 8.0;
// Entries of what is left beyond the rank found may be this many units; beyond, A is indefinite.
template <class T>
constexpr double kRest = sizeof(T) == sizeof(float) ? 16.0 : 128.0;

template <class T>
struct Cholesky {
    int64_t n, ld;
    double* rows;       // (n, ld): R from the diagonal on
    double* deviation;  // (n,): sqrt(A_ii), in the order of A
    double* rest;       // (ld,): diagonal of what is left
    double* column;     // (n,)
    int64_t* order;     // (n,): row of A of each pivot
    int64_t rank;
    double stray;       // largest entry beside a variance of 0

    Cholesky(int64_t size, Arena& memory)
        : n(size), ld(round_up(size, 64 / sizeof(double))), rows(memory.take<double>(n * ld)),
          deviation(memory.take<double>(n)), rest(memory.take<double>(ld)), column(memory.take<double>(n)),
          order(memory.take<int64_t>(n)), rank(0), stray(0) {}

    // A = (a + a^T) / 2 * 2^-exponent + shift I, as a correlation matrix
    void read(const T* a, int exponent, double shift) {
        const PowerOfTwo<double> scale(-exponent);
        stray = 0;
        for (int64_t i = 0; i < n; ++i) {
            const double variance = a[i * n + i] * scale.first * scale.second + shift;
            deviation[i] = variance > 0 ? std::sqrt(variance) : 0.0;
            rest[i] = variance > 0 ? 1.0 : 0.0;
            order[i] = i;
        }
        for (int64_t i = 0; i < n; ++i) {
            double* row = rows + i * ld;
            for (int64_t j = 0; j < i; ++j) {
                const double product = deviation[i] * deviation[j];
                const double mean = 0.5 * (a[i * n + j] * scale.first + a[j * n + i] * scale.first) * scale.second;
                row[j] = rows[j * ld + i] = product > 0 ? mean / product : 0.0;
                if (!(product > 0)) stray = std::fmax(stray, std::fabs(mean));
            }
            row[i] = rest[i];
            for (int64_t j = n; j < ld; ++j) row[j] = 0;
        }
        for (int64_t j = n; j < ld; ++j) rest[j] = 0;
    }

    Definiteness factorize(double tolerance = kPivot<T> * std::numeric_limits<T>::epsilon()) {
        for (rank = 0; rank < n; ++rank) {
            int64_t best = rank;
            for (int64_t j = rank + 1; j < n; ++j) best = rest[j] > rest[best] ? j : best;
            if (!(rest[best] > tolerance)) break;
            exchange(rank, best);
            const double root = std::sqrt(rest[rank]);
            reduce_row(rank);
            double* row = rows + rank * ld;
            for (int64_t j = rank / width<double> * width<double>; j < ld; j += width<double>) {
                const Vec<double> entry = load(row + j) / root;
                store(row + j, entry);
                store(rest + j, load(rest + j) - entry * entry);
            }
            row[rank] = root;
        }
        if (rank == n) return Definiteness::definite;
        return rest_is_rounding() ? Definiteness::semidefinite : Definiteness::indefinite;
    }

  private:
    void exchange(int64_t k, int64_t j) {
        if (k == j) return;
        std::swap(order[k], order[j]);
        std::swap(rest[k], rest[j]);
        for (int64_t c = 0; c < ld; ++c) std::swap(rows[k * ld + c], rows[j * ld + c]);
        for (int64_t r = 0; r < n; ++r) std::swap(rows[r * ld + k], rows[r * ld + j]);
    }

    // Row k of what is left after the rows before it, from the vector of the diagonal on
    void reduce_row(int64_t k) {
        constexpr int kVectors = 4;
        const int64_t depth = k < rank ? k : rank;
        for (int64_t m = 0; m < depth; ++m) column[m] = rows[m * ld + k];
        int64_t j = k / width<double> * width<double>;
        for (; j + kVectors * width<double> <= ld; j += kVectors * width<double>) reduce<kVectors>(k, j, depth);
        for (; j < ld; j += width<double>) reduce<1>(k, j, depth);
    }

    template <int kVectors>
    void reduce(int64_t k, int64_t j, int64_t depth) {
        Vec<double> acc[kVectors];
        for (int v = 0; v < kVectors; ++v) acc[v] = load(rows + k * ld + j + v * width<double>);
        for (int64_t m = 0; m < depth; ++m) {
            const Vec<double> factor = splat(column[m]);
            for (int v = 0; v < kVectors; ++v) {
                acc[v] -= factor * load(rows + m * ld + j + v * width<double>);
            }
        }
        for (int v = 0; v < kVectors; ++v) store(rows + k * ld + j + v * width<double>, acc[v]);
    }

    bool rest_is_rounding() {
        double largest = stray;
        for (int64_t k = rank; k < n; ++k) {
            reduce_row(k);
            for (int64_t j = k; j < n; ++j) largest = std::fmax(largest, std::fabs(rows[k * ld + j]));
        }
        return largest <= kRest<T> * std::numeric_limits<T>::epsilon();
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

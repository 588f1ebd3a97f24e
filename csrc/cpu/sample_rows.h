// Centred samples and the two products that Gaussian distances make of them: rows times rows, small matrix times rows.
#pragma once
#include "arena.h"
#include "lanes.h"
#include "magnitude.h"
#include "otkd_fast/threads.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// Register tiles: rows by rows of X Y^T; rows by vectors of P Y.
#if defined(__AVX512F__)
constexpr int kDotRows = 4, kDotColumns = 4, kImageRows = 6, kImageVectors = 4;
#elif defined(__AVX2__)
constexpr int kDotRows = 2, kDotColumns = 4, kImageRows = 4, kImageVectors = 2;
#else
constexpr int kDotRows = 2, kDotColumns = 2, kImageRows = 2, kImageVectors = 2;
#endif
constexpr int64_t kMeanRows = 64;  // rows that are summed in T before they are added in double
constexpr int kPlainExponent = 20;  // deviations below 2^20 and above 2^-20 are not scaled

// A sample (n, d) after centring: rows (n, ld), 2^-exponent (x - mean), zeros in the padding.
template <class T>
struct CentredSample {
    int64_t n, d, ld;
    T *rows, *sums;
    double* mean;
    double* facts;  // what the thread that read the sample tells the team: exponent, sum of squares of the rows

    CentredSample(int64_t count, int64_t features, Arena& memory)
        : n(count), d(features), ld(round_up(features, width<T>)), rows(memory.take<T>(count * ld)),
          sums(memory.take<T>(ld)), mean(memory.take<double>(ld)), facts(memory.take<double>(2)) {}

    int exponent() const { return static_cast<int>(facts[0]); }
    double squares() const { return facts[1]; }

    // Deviations from the first row come first: they are exactly 0 where the sample is constant, and a large mean costs no digits.
    void read(const T* x) {
        for (int64_t k = 0; k < ld; ++k) mean[k] = 0;
        for (int64_t i0 = 0; i0 < n; i0 += kMeanRows) {
            const int64_t i1 = i0 + kMeanRows < n ? i0 + kMeanRows : n;
            for (int64_t k = 0; k < ld; k += width<T>) store(sums + k, Vec<T>{});
            for (int64_t i = i0; i < i1; ++i) {
                for_vectors<T>(0, d, [&](int64_t k, int64_t count) {
                    const Vec<T> first = load_up_to(x + k, count, T(0));
                    store(sums + k, load(sums + k) + (load_up_to(x + i * d + k, count, T(0)) - first));
                });
            }
            for (int64_t k = 0; k < d; ++k) mean[k] += sums[k];
        }
        for (int64_t k = 0; k < ld; ++k) {
            mean[k] /= n;
            sums[k] = static_cast<T>(mean[k]);
        }
        VecInt<T> best = {};
        double squares = 0;
        for (int64_t i = 0; i < n; ++i) {
            Vec<T> part = {};
            for_vectors<T>(0, d, [&](int64_t k, int64_t count) {
                const Vec<T> first = load_up_to(x + k, count, T(0));
                const Vec<T> entry = (load_up_to(x + i * d + k, count, T(0)) - first) - load(sums + k);
                const VecInt<T> bits = magnitude_bits<T>(entry);
                best = bits > best ? bits : best;
                part += entry * entry;
                store(rows + i * ld + k, entry);
            });
            squares += sum<T>(part);
        }
        for (int64_t k = 0; k < d; ++k) mean[k] += x[k];
        T top = 0;
        for (int l = 0; l < width<T>; ++l) {
            const T size = ((Vec<T>)best)[l];
            top = size > top || std::isnan(size) ? size : top;
        }
        int exponent = exponent_of(top);
        if (exponent < -kPlainExponent || exponent > kPlainExponent) squares = scale(exponent);
        else exponent = 0;
        facts[0] = exponent;
        facts[1] = squares;
    }

  private:
    double scale(int exponent) {
        const PowerOfTwo<T> factor(-exponent);
        double squares = 0;
        for (int64_t i = 0; i < n; ++i) {
            Vec<T> part = {};
            for (int64_t k = i * ld; k < (i + 1) * ld; k += width<T>) {
                const Vec<T> entry = load(rows + k) * factor.first * factor.second;
                part += entry * entry;
                store(rows + k, entry);
            }
            squares += sum<T>(part);
        }
        return squares;
    }
};

// out (n, m) = X Y^T of rows of `ld` entries, a multiple of the vector; the team shares the rows of X.
template <class T>
void times_transposed(const T* x, const T* y, int64_t ld, T* out, int64_t n, int64_t m, const Team& team) {
    for (int64_t i = team.rank * kDotRows; i < n; i += team.size * kDotRows) {
        with_count<kDotRows>(n - i, [&](auto row_count) {
            constexpr int kRows = decltype(row_count)::value;
            for (int64_t j = 0; j < m; j += kDotColumns) {
                with_count<kDotColumns>(m - j, [&](auto column_count) {
                    constexpr int kColumns = decltype(column_count)::value;
                    Vec<T> acc[kRows][kColumns] = {};
                    for (int64_t k = 0; k < ld; k += width<T>) {
                        Vec<T> right[kColumns];
                        for (int c = 0; c < kColumns; ++c) right[c] = load(y + (j + c) * ld + k);
                        for (int r = 0; r < kRows; ++r) {
                            const Vec<T> left = load(x + (i + r) * ld + k);
                            for (int c = 0; c < kColumns; ++c) acc[r][c] += left * right[c];
                        }
                    }
                    for (int r = 0; r < kRows; ++r) {
                        for (int c = 0; c < kColumns; ++c) out[(i + r) * m + j + c] = sum<T>(acc[r][c]);
                    }
                });
            }
        });
    }
}

// finish(sum, i, k) for the vectors up to `columns`, a multiple of the vector, of row i of A Y, A (n, m) with entry (i, j) at
// i * row_step + j * depth_step, Y (m, ld); the team shares the rows of A.
template <class T, class Finish>
void times_rows(const T* a, int64_t row_step, int64_t depth_step, const T* y, int64_t ld, int64_t n, int64_t m,
                const Team& team, int64_t columns, const Finish& finish) {
    constexpr int64_t vector = width<T>;
    for (int64_t i = team.rank * kImageRows; i < n; i += team.size * kImageRows) {
        with_count<kImageRows>(n - i, [&](auto row_count) {
            constexpr int kRows = decltype(row_count)::value;
            for (int64_t k = 0; k < columns; k += kImageVectors * vector) {
                with_count<kImageVectors>((columns - k) / vector, [&](auto vector_count) {
                    constexpr int kVectors = decltype(vector_count)::value;
                    Vec<T> acc[kRows][kVectors] = {};
                    for (int64_t j = 0; j < m; ++j) {
                        Vec<T> right[kVectors];
                        for (int v = 0; v < kVectors; ++v) right[v] = load(y + j * ld + k + v * vector);
                        for (int r = 0; r < kRows; ++r) {
                            const Vec<T> left = splat(a[(i + r) * row_step + j * depth_step]);
                            for (int v = 0; v < kVectors; ++v) acc[r][v] += left * right[v];
                        }
                    }
                    for (int r = 0; r < kRows; ++r) {
                        for (int v = 0; v < kVectors; ++v) finish(acc[r][v], i + r, k + v * vector);
                    }
                });
            }
        });
    }
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

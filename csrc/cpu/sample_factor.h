// A triangular factor of the covariance of a centred sample with more rows than features, and what turns its image back into rows.
//
// Rows X (n, d), X^T X = F^T F with F (rank, d) by pivoted Cholesky: X = Q F with Q = X_p F_p^-1, p the pivots, so that the image Q T of a
// matrix T is X_p (F_p^-1 T): neither Q nor its rows are formed. Gram matrix, factor and solve in double, whatever the type of
// the rows: the factor has the accuracy of one by QR. n d^2 operations in double for the Gram matrix.
#pragma once
#include "cholesky.h"
#include "sample_rows.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr int64_t kGramRows = 32;  // of X that are converted to double at a time

// Directions in which a sample of this type is smaller than the square root of this, relative to its correlations, are left out.
template <class T>
constexpr double kSamplePivot = sizeof(T) == sizeof(float) ? 2.3e-13 : 8 * std::numeric_limits<double>::epsilon();

template <class T>
struct SampleFactor {
    int64_t d, ld;
    double *gram, *block, *solved;  // (d, d), (kGramRows, d), (d, d)
    T *factor, *image;              // (d, ld): F in the order of the features, rows beyond the rank 0; F_p^-1 T, rows in the order of X
    Cholesky<double> cholesky;

    SampleFactor(int64_t features, Arena& memory)
        : d(features), ld(round_up(features, width<T>)), gram(memory.take<double>(d * d)),
          block(memory.take<double>(kGramRows * round_up(d, width<double>))), solved(memory.take<double>(d * d)),
          factor(memory.take<T>(d * ld)), image(memory.take<T>(d * ld)), cholesky(features, memory) {}

    void factorize(const CentredSample<T>& sample) {
        accumulate_gram(sample);
        cholesky.read(gram, 0, 0);
        cholesky.factorize(kSamplePivot<T>);
        std::memset(factor, 0, d * ld * sizeof(T));
        for (int64_t j = 0; j < d; ++j) {
            const int64_t column = cholesky.order[j], rows = j + 1 < cholesky.rank ? j + 1 : cholesky.rank;
            for (int64_t k = 0; k < rows; ++k) factor[k * ld + column] = static_cast<T>(cholesky.factor(k, j));
        }
    }

    // image = F_p^-1 T, T (rank, ld)
    void solve(const T* t) {
        std::memset(image, 0, d * ld * sizeof(T));
        for (int64_t k = cholesky.rank - 1; k >= 0; --k) {
            double* row = solved + k * d;
            for (int64_t c = 0; c < d; ++c) row[c] = t[k * ld + c];
            for (int64_t l = k + 1; l < cholesky.rank; ++l) {
                const double* other = solved + l * d;
                const double weight = cholesky.factor(k, l);
                for (int64_t c = 0; c < d; ++c) row[c] -= weight * other[c];
            }
            const double reciprocal = 1 / cholesky.factor(k, k);
            T* out = image + cholesky.order[k] * ld;
            for (int64_t c = 0; c < d; ++c) out[c] = static_cast<T>(row[c] *= reciprocal);
        }
    }

  private:
    void accumulate_gram(const CentredSample<T>& sample) {
        const int64_t wide = round_up(d, width<double>);
        std::memset(gram, 0, d * d * sizeof(double));
        for (int64_t i0 = 0; i0 < sample.n; i0 += kGramRows) {
            const int64_t count = sample.n - i0 < kGramRows ? sample.n - i0 : kGramRows;
            for (int64_t i = 0; i < count; ++i) {
                for (int64_t k = 0; k < wide; ++k) block[i * wide + k] = k < d ? sample.rows[(i0 + i) * sample.ld + k] : 0.0;
            }
            const Team alone{0, 1, nullptr};
            for (int64_t row = 0; row < d; row += kImageRows) {  // the lower triangle, by rows of tiles
                const int64_t rows = d - row < kImageRows ? d - row : kImageRows;
                const int64_t columns = round_up(row + rows, width<double>);
                times_rows(block + row, int64_t{1}, wide, block, wide, rows, count, alone, columns,
                           [&](Vec<double> sum, int64_t r, int64_t k) {
                               double* out = gram + (row + r) * d + k;
                               const int64_t lanes = d - k < width<double> ? d - k : width<double>;
                               store_up_to(out, load_up_to(out, lanes, 0.0) + sum, lanes);
                           });
            }
        }
        for (int64_t i = 0; i < d; ++i) {
            for (int64_t j = 0; j < i; ++j) gram[j * d + i] = gram[i * d + j];
        }
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

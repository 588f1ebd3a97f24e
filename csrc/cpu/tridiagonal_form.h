// Reduction of one symmetric matrix to tridiagonal form by Householder reflections, in double, and the way back for eigenvectors.
//
//   A = Q T Q^T,  Q = H_0 H_1 ... H_(n-3),  H_k = I - scale_k u_k u_k^T  (Golub and Van Loan, Matrix Computations, 8.3)
//
// The updates A - v w^T - w v^T of kPairs steps wait: until then a step reads the upper half of A once, for A u, and corrects the image by
// the pairs (Dongarra, Hammarling, Sorensen, J. Comput. Appl. Math. 27, 1989). The pass that applies them computes the next image, too. So n^3 / 3
// multiply-adds for the images and as many for the updates, and n^3 / 6 entries are read: for n <= 512 from the second-level cache.
// Diagonal blocks of kBlock rows are kept whole, so that no vector has to be masked; retired rows hold their reflectors and count 0.
#pragma once
#include "arena.h"
#include "panels.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

class MatrixForm {
  public:
    static constexpr int64_t kBlock = 8;
    static constexpr int kRows = 4, kPairs = 8;
    static constexpr double kNothing = 1e-280;  // squares of entries that count 0, where the largest is about 1: above what is rounded as a subnormal

    int64_t n, size, ld;         // n rounded up to kBlock; the distance of rows
    double* a;                   // (size, ld): the matrix, its upper triangle and diagonal blocks; then reflectors in rows
    double *diagonal, *coupling; // (n,): coupling[i] between i and i + 1
    double* scale;               // (n,)

    MatrixForm(int64_t columns, Arena& memory) : n(columns), size(round_up(columns, kBlock)), ld(size + kBlock) {
        a = memory.take<double>(size * ld);
        for (double** piece : {&diagonal, &coupling, &scale, &reflector_, &image_}) *piece = memory.take<double>(size);
        left_ = memory.take<double>(kPairs * ld);
        right_ = memory.take<double>(kPairs * ld);
    }

    void reduce() {
        std::memset(left_, 0, kPairs * ld * sizeof(double));
        std::memset(right_, 0, kPairs * ld * sizeof(double));
        int pairs = 0;
        for (int64_t k = 0; k < n; ++k) {
            update_row(k, pairs);
            diagonal[k] = row(k)[k];
            coupling[k] = k + 1 < n ? row(k)[k + 1] : 0.0;
            scale[k] = 0;
            if (k + 2 >= n) continue;
            make_reflector(k);
            if (scale[k] == 0) continue;
            if (pairs == kPairs) {
                multiply<true>(k + 1);
                pairs = 0;
            } else {
                multiply<false>(k + 1);
                for (int t = 0; t < pairs; ++t) {
                    subtract(k + 1, left_ + t * ld, right_ + t * ld);
                }
            }
            keep_pair(k, pairs++);
        }
    }

    const double* reflector(int64_t k) const { return a + k * ld; }  // entries [k + 1, n)

  private:
    typedef Vec<double> V;
    double *reflector_, *image_;  // (size,)
    double *left_, *right_;       // (kPairs, ld): v and w of the updates that wait

    double* row(int64_t i) const { return a + i * ld; }
    static int64_t block_of(int64_t i) { return i / kBlock * kBlock; }

    static double dot(const double* x, const double* y, int64_t begin, int64_t end) {
        V total = {};
        for (int64_t j = begin; j < end; j += width<double>) total += load(x + j) * load(y + j);
        return sum<double>(total);
    }

    // Row k of the matrix, all updates applied; then they pass it over.
    void update_row(int64_t k, int pairs) {
        double* own = row(k);
        for (int t = 0; t < pairs; ++t) {
            double *v = left_ + t * ld, *w = right_ + t * ld;
            const V vk = splat(v[k]), wk = splat(w[k]);
            for (int64_t j = block_of(k); j < size; j += width<double>) store(own + j, load(own + j) - vk * load(w + j) - wk * load(v + j));
        }
        for (int t = 0; t < pairs; ++t) left_[t * ld + k] = right_[t * ld + k] = 0;
    }

    // u, from k + 1 on and 0 before, with u[k + 1] = 1: I - scale u u^T takes row k beyond the diagonal to (coupling, 0, ...).
    void make_reflector(int64_t k) {
        double* own = row(k);
        const double first = own[k + 1];
        double squares = 0;
        for (int64_t j = k + 2; j < n && j < block_of(k + 2) + kBlock; ++j) squares += own[j] * own[j];
        squares += dot(own, own, block_of(k + 2) + kBlock, size);
        if (!(squares > kNothing)) return;
        const double norm = std::sqrt(first * first + squares), beta = first > 0 ? -norm : norm, unit = 1 / (first - beta);
        scale[k] = (beta - first) / beta;
        coupling[k] = beta;
        own[k + 1] = 1;
        for (int64_t j = k + 2; j < n; ++j) own[j] *= unit;
        const int64_t begin = block_of(k + 1);
        for (int64_t j = begin; j <= k; ++j) reflector_[j] = 0;
        std::memcpy(reflector_ + k + 1, own + k + 1, (size - k - 1) * sizeof(double));
    }

    // image = A u from index `begin` on, after the updates if kUpdate
    template <bool kUpdate>
    void multiply(int64_t begin) {
        for (int64_t j = block_of(begin); j < size; ++j) image_[j] = 0;
        for (int64_t i = block_of(begin); i < size; i += kRows) multiply_rows<kUpdate>(i);
    }

    template <bool kUpdate>
    OTKD_INLINE void multiply_rows(int64_t i) {
        V sums[kRows] = {}, own[kRows];
        for (int r = 0; r < kRows; ++r) own[r] = splat(reflector_[i + r]);
        int64_t j = block_of(i);
        for (const int64_t end = j + kBlock; j < end; j += width<double>) multiply_vectors<kUpdate, true>(i, j, own, sums);
        for (; j < size; j += width<double>) multiply_vectors<kUpdate, false>(i, j, own, sums);
        for (int r = 0; r < kRows; ++r) image_[i + r] += sum<double>(sums[r]);
    }

    template <bool kUpdate, bool kDiagonal>
    OTKD_INLINE void multiply_vectors(int64_t i, int64_t j, const V (&own)[kRows], V (&sums)[kRows]) {
        V entries[kRows];
        for (int r = 0; r < kRows; ++r) entries[r] = load(row(i + r) + j);
        if constexpr (kUpdate) {
            for (int t = 0; t < kPairs; ++t) {
                const double *v = left_ + t * ld, *w = right_ + t * ld;
                const V vj = load(v + j), wj = load(w + j);
                for (int r = 0; r < kRows; ++r) entries[r] -= splat(v[i + r]) * wj + splat(w[i + r]) * vj;
            }
            for (int r = 0; r < kRows; ++r) store(row(i + r) + j, entries[r]);
        }
        const V other = load(reflector_ + j);
        for (int r = 0; r < kRows; ++r) sums[r] += entries[r] * other;
        if constexpr (!kDiagonal) {
            V total = load(image_ + j);
            for (int r = 0; r < kRows; ++r) total += own[r] * entries[r];
            store(image_ + j, total);
        }
    }

    // image -= v (w u) + w (v u)
    void subtract(int64_t begin, const double* v, const double* w) {
        const int64_t first = block_of(begin);
        const V along_w = splat(dot(w, reflector_, first, size)), along_v = splat(dot(v, reflector_, first, size));
        for (int64_t j = first; j < size; j += width<double>) {
            store(image_ + j, load(image_ + j) - along_w * load(v + j) - along_v * load(w + j));
        }
    }

    void keep_pair(int64_t k, int place) {
        double *v = left_ + place * ld, *w = right_ + place * ld;
        const int64_t begin = block_of(k + 1);
        for (int64_t j = begin; j <= k; ++j) image_[j] = 0;
        const double factor = scale[k], shift = 0.5 * factor * factor * dot(image_, reflector_, begin, size);
        for (int64_t j = begin; j < size; ++j) {
            v[j] = reflector_[j];
            w[j] = factor * image_[j] - shift * reflector_[j];
        }
    }
};

// rows (n, n), eigenvectors of T, <- those of A: rows (I - Y F^T Y^T) for blocks of kWide reflectors Y, the last ones first, F their triangular
// factor (Schreiber and Van Loan, SIAM J. Sci. Stat. Comput. 10, 1989). n^3 multiply-adds.
template <class T>
struct WayBack {
    static constexpr int64_t kWide = 48;
    struct From {
        int64_t begin, depth;
        Span operator()(int64_t, int64_t) const { return {begin, depth}; }
    };

    const MatrixForm& form;
    Panels<T> lines, columns, small, share, weighted;  // Y^T; Y; Y^T Y, then F^T; rows Y; rows Y F^T
    double* factor;                                    // (kWide, kWide), F in columns

    void run(const Panels<T>& rows) const {
        const int64_t n = form.n, last = n < 3 ? 0 : n - 2;
        for (int64_t k = (last - 1) / kWide * kWide; last > 0 && k >= 0; k -= kWide) {
            apply(rows, k, last - k < kWide ? last - k : kWide);
        }
    }

  private:
    void apply(const Panels<T>& rows, int64_t k, int64_t count) const {
        const int64_t n = form.n, begin = k / kPanel<T> * kPanel<T>;
        const auto keep = [](Vec<T> sum, int64_t) { return sum; };
        const Team alone{0, 1, nullptr};
        read(k, count, begin);
        multiply_symmetric(columns, columns, small, count, From{begin, n}, alone, keep);
        make_factor(k, count);
        multiply(rows, columns, share, n, count, From{begin, n}, alone, keep);
        multiply(share, small, weighted, n, count, FullDepth{count}, alone, keep);
        const auto shifted = [begin](const Panels<T>& p) { return Panels<T>{p.data + p.offset(0, begin), p.rows}; };
        const Panels<T> target = shifted(rows);
        multiply(weighted, shifted(lines), target, n, n - begin, FullDepth{count}, alone,
                 [&](Vec<T> sum, int64_t at) { return load(target.data + at) - sum; });
    }

    // Y^T and Y from row `begin` on
    void read(int64_t k, int64_t count, int64_t begin) const {
        const int64_t n = form.n, padded = round_up(count, kPanel<T>);
        for (int64_t i = begin; i < n; i += kPanel<T>) {
            for (int64_t j = 0; j < padded; ++j) {
                const double* u = form.reflector(k + (j < count ? j : 0));
                T* line = lines.data + lines.offset(j, i);
                for (int64_t c = 0; c < kPanel<T>; ++c) line[c] = j < count && i + c < n && i + c > k + j ? static_cast<T>(u[i + c]) : T(0);
            }
            for (int64_t j = 0; j < padded; j += kPanel<T>) {
                transpose(lines.data + lines.offset(j, i), int64_t{kPanel<T>}, columns.data + columns.offset(i, j), int64_t{kPanel<T>}, kPanel<T>, kPanel<T>);
            }
        }
    }

    // H_k ... H_(k + count - 1) = I - Y F Y^T, F upper triangular; its transpose takes the place of Y^T Y
    void make_factor(int64_t k, int64_t count) const {
        for (int64_t j = 0; j < count; ++j) {
            double* own = factor + j * kWide;
            for (int64_t i = 0; i < kWide; ++i) own[i] = 0;
            for (int64_t p = 0; p < j; ++p) {
                const Vec<double> share_of = splat(-form.scale[k + j] * small.at(p, j));
                for (int64_t i = 0; i <= p; i += width<double>) store(own + i, load(own + i) + share_of * load(factor + p * kWide + i));
            }
            own[j] = form.scale[k + j];
        }
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t j = 0; j < round_up(count, kPanel<T>); ++j) small.at(i, j) = j < count ? static_cast<T>(factor[i * kWide + j]) : T(0);
        }
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

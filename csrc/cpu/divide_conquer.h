// Eigenvalues of a symmetric tridiagonal matrix in double, and its eigenvectors in T, by halves (Cuppen, Numer. Math. 36, 1981):
//
//   T = diag(T_1, T_2) + |rho| z z^T,  T_i = Q_i D_i Q_i^T   ->   D + |rho| z z^T = U L U^T (secular.h),  T = (Q U) L (Q U)^T
//
// z is made of the last row of Q_1 and the first of Q_2, which are kept in double; Q and U are of T, as nothing but the result is
// formed from them. Vectors lie in rows, those of a part where its columns are. Where z is 0 or two values are equal at the level
// of rounding, a vector stays as it is, two of them after a rotation. What is left is multiplied: 4 n^3 / 3 multiply-adds for
// all halves, if nothing stays.
#pragma once
#include <algorithm>

#include "panels.h"
#include "secular.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class T>
class DivideConquer {
  public:
    Panels<T> vectors;  // (n, n): eigenvectors in rows
    double* values;     // (n,): their eigenvalues, in no order

    // `gathered` and `weights` are scratch, (n, n) and (n, n + 2 kUnit).
    DivideConquer(int64_t size, const Panels<T>& eigenvectors, const Panels<T>& gathered, const Panels<T>& weights, Arena& memory)
        : vectors(eigenvectors), n_(size), gathered_(gathered), weights_(weights), secular_(size, memory) {
        const int64_t padded = round_up(size, kUnit);
        for (double** piece : {&values, &first_, &last_, &z_, &vector_, &first_kept_, &last_kept_}) *piece = memory.take<double>(padded);
        leaf_ = memory.take<double>(kLeaf * kLeaf);
        for (double*& piece : staged_) piece = memory.take<double>(padded);
        for (int64_t** piece : {&order_, &kept_, &left_, &lists_[0], &lists_[1]}) *piece = memory.take<int64_t>(size);
        support_ = memory.take<unsigned char>(size);
    }

    // Of the diagonal and the couplings, which it overwrites. False where it did not converge.
    bool solve(double* diagonal, double* coupling) {
        diagonal_ = diagonal;
        coupling_ = coupling;
        double size = 0;
        for (int64_t k = 0; k < n_; ++k) size = std::fmax(size, std::fabs(diagonal[k]) + (k + 1 < n_ ? std::fabs(coupling[k]) : 0.0));
        level_ = kNegligible * size;
        return solve(0, n_);
    }

    static constexpr double kNegligible = 1e-15;       // relative to the matrix
    static constexpr int64_t kUnit = 16, kLeaf = 32;  // parts begin at multiples of kUnit, a whole number of panels

  private:
    int64_t n_;
    double level_ = 0;
    Panels<T> gathered_, weights_;
    Secular secular_;
    double *diagonal_ = nullptr, *coupling_ = nullptr;
    double *first_, *last_;        // (n,): first and last entry of the vectors of a part
    double *z_, *vector_, *first_kept_, *last_kept_, *leaf_;
    double* staged_[3];               // values, first and last entries of the rows after a merge
    int64_t *order_, *kept_, *left_;  // rows by value; those to multiply; those that stay
    int64_t* lists_[2];               // places in kept_ of the rows with entries in the first and in the second part
    unsigned char* support_;          // 1: entries in the first part, 2: in the second

    bool solve(int64_t begin, int64_t count) {
        if (count <= kLeaf) return solve_leaf(begin, count);
        const int64_t half = round_up(count / 2, kUnit), middle = begin + half;
        const double rho = std::fabs(coupling_[middle - 1]), sign = coupling_[middle - 1] < 0 ? -1 : 1;
        diagonal_[middle - 1] -= rho;
        diagonal_[middle] -= rho;
        return solve(begin, half) && solve(middle, count - half) && merge(begin, half, count, rho, sign);
    }

    Panels<T> part(int64_t row, int64_t column) const { return {vectors.data + vectors.offset(row, column), vectors.rows}; }

    // Implicit QL with Wilkinson's shift on at most kLeaf rows.
    bool solve_leaf(int64_t begin, int64_t count) {
        double *d = diagonal_ + begin, *e = coupling_ + begin;
        for (int64_t i = 0; i < count * kLeaf; ++i) leaf_[i] = i / kLeaf == i % kLeaf;
        constexpr int kMostSweeps = 60;
        for (int64_t k = 0; k < count; ++k) {
            for (int sweep = 0;; ++sweep) {
                int64_t end = k;
                while (end + 1 < count && std::fabs(e[end]) > 0.25 * level_) ++end;
                if (end == k) break;
                if (sweep == kMostSweeps) return false;
                chase(d, e, k, end);
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            values[begin + i] = d[i];
            first_[begin + i] = leaf_[i * kLeaf];
            last_[begin + i] = leaf_[i * kLeaf + count - 1];
            for (int64_t j = 0; j < round_up(count, kUnit); ++j) vectors.at(begin + i, begin + j) = static_cast<T>(leaf_[i * kLeaf + j]);
        }
        return true;
    }

    void chase(double* d, double* e, int64_t begin, int64_t end) {
        const double half = (d[begin + 1] - d[begin]) / (2 * e[begin]), root = std::sqrt(half * half + 1);
        double g = d[end] - d[begin] + e[begin] / (half < 0 ? half - root : half + root), s = 1, c = 1, p = 0;
        for (int64_t i = end - 1; i >= begin; --i) {
            const double f = s * e[i], b = c * e[i], norm = std::sqrt(f * f + g * g);
            if (i + 1 < end) e[i + 1] = norm;
            s = norm > 0 ? f / norm : 0;
            c = norm > 0 ? g / norm : 1;
            const double shifted = d[i + 1] - p, t = (d[i] - shifted) * s + 2 * c * b;
            p = s * t;
            d[i + 1] = shifted + p;
            g = c * t - b;
            rotate(leaf_ + i * kLeaf, leaf_ + (i + 1) * kLeaf, c, s, kLeaf);
        }
        d[begin] -= p;
        e[begin] = g;
    }

    // low <- c low - s high, high <- s low + c high
    template <class S>
    static void rotate(S* low, S* high, S c, S s, int64_t count) {
        for (int64_t j = 0; j < count; j += width<S>) {
            const Vec<S> one = load(low + j), other = load(high + j);
            store(low + j, c * one - s * other);
            store(high + j, s * one + c * other);
        }
    }

    bool merge(int64_t begin, int64_t half, int64_t count, double rho, double sign) {
        for (int64_t i = begin; i < begin + count; ++i) {
            const bool upper = i < begin + half;
            z_[i] = upper ? last_[i] : sign * first_[i];
            support_[i] = upper ? 1 : 2;
            (upper ? last_ : first_)[i] = 0;
            order_[i] = i;
            clear(i, upper ? begin + half : begin, upper ? begin + count : begin + half);
        }
        std::sort(order_ + begin, order_ + begin + count, [this](int64_t i, int64_t j) { return values[i] < values[j] || (values[i] == values[j] && i < j); });
        int64_t stay = 0;
        const int64_t size = deflate(begin, count, rho, stay);
        if (size > 0 && !secular_.solve(size, rho)) return false;
        int64_t lengths[2] = {};
        gather(begin, half, count, size, lengths);
        for (int64_t t = 0; t < stay; ++t) {
            const int64_t i = left_[t];
            copy_row(vectors, i, begin, gathered_, size + t, 0, count);
            stage(size + t, values[i], first_[i], last_[i]);
        }
        const int64_t second = round_up(lengths[0], kUnit);
        make_weights(size, lengths, second);
        const Panels<T> weights{weights_.data + weights_.offset(0, second), weights_.rows}, rows{gathered_.data + gathered_.offset(0, half), gathered_.rows};
        compose(weights_, gathered_, part(begin, begin), size, half, lengths[0]);
        compose(weights, rows, part(begin, begin + half), size, count - half, lengths[1]);
        for (int64_t t = size; t < count; ++t) copy_row(gathered_, t, -begin, vectors, begin + t, 0, count);
        std::memcpy(values + begin, staged_[0], count * sizeof(double));
        std::memcpy(first_ + begin, staged_[1], count * sizeof(double));
        std::memcpy(last_ + begin, staged_[2], count * sizeof(double));
        return true;
    }

    // out (size, columns) = weights (size, depth) rows
    static void compose(const Panels<T>& weights, const Panels<T>& rows, const Panels<T>& out, int64_t size, int64_t columns, int64_t depth) {
        if (depth == 0) {
            for (int64_t p = 0; p < panels_of<T>(columns); ++p) std::memset(out.data + p * out.stride(), 0, size * kPanel<T> * sizeof(T));
        }
        multiply(weights, rows, out, size, columns, FullDepth{depth}, Team{0, 1, nullptr}, [](Vec<T> sum, int64_t) { return sum; });
    }

    // Entries [from, to) of row i.
    void clear(int64_t i, int64_t from, int64_t to) {
        for (int64_t j = from; j < to; j += kPanel<T>) std::memset(vectors.data + vectors.offset(i, j), 0, kPanel<T> * sizeof(T));
    }

    // Splits the rows into those kept, by value, whose number it returns, and `stay` ones that are eigenvectors already.
    int64_t deflate(int64_t begin, int64_t count, double rho, int64_t& stay) {
        int64_t size = 0, before = -1;
        const auto keep = [&](int64_t i) {
            kept_[size] = i;
            secular_.d[size] = values[i];
            secular_.z[size++] = z_[i];
        };
        for (int64_t t = begin; t < begin + count; ++t) {
            const int64_t i = order_[t];
            if (rho * std::fabs(z_[i]) <= level_) {
                left_[stay++] = i;
                continue;
            }
            if (before >= 0) {
                const double length = std::sqrt(z_[before] * z_[before] + z_[i] * z_[i]), c = z_[i] / length, s = z_[before] / length;
                if (std::fabs((values[i] - values[before]) * c * s) <= level_) {
                    unite(begin, count, before, i, c, s);
                    z_[i] = length;
                    left_[stay++] = before;
                } else {
                    keep(before);
                }
            }
            before = i;
        }
        if (before >= 0) keep(before);
        return size;
    }

    // Turns two rows of nearly equal values so that z is 0 for the first.
    void unite(int64_t begin, int64_t count, int64_t i, int64_t j, double c, double s) {
        for (int64_t column = begin; column < begin + count; column += kPanel<T>) {
            T* one = vectors.data + vectors.offset(i, column);
            rotate(one, one + (j - i) * kPanel<T>, static_cast<T>(c), static_cast<T>(s), kPanel<T>);
        }
        for (double* entries : {first_, last_}) {
            const double one = entries[i], other = entries[j];
            entries[i] = c * one - s * other;
            entries[j] = s * one + c * other;
        }
        const double one = values[i], other = values[j];
        values[i] = c * c * one + s * s * other;
        values[j] = s * s * one + c * c * other;
        support_[i] = support_[j] = support_[i] | support_[j];
    }

    // What is multiplied: the kept rows that have entries in each part, one below the other.
    void gather(int64_t begin, int64_t half, int64_t count, int64_t size, int64_t (&lengths)[2]) {
        for (int64_t t = 0; t < size; ++t) {
            const int64_t i = kept_[t];
            first_kept_[t] = first_[i];
            last_kept_[t] = last_[i];
            for (int side = 0; side < 2; ++side) {
                if (!(support_[i] >> side & 1)) continue;
                copy_row(vectors, i, begin, gathered_, lengths[side], side == 0 ? 0 : half, side == 0 ? half : count);
                lists_[side][lengths[side]++] = t;
            }
        }
        for (int64_t t = size; t % kUnit != 0; ++t) first_kept_[t] = last_kept_[t] = 0;
    }

    // Entries [from, to) of a row; `shift` is the column of `in` that is column 0 of `out`, or, negative, the other way round.
    static void copy_row(const Panels<T>& in, int64_t i, int64_t shift, const Panels<T>& out, int64_t to_row, int64_t from, int64_t to) {
        for (int64_t j = from; j < to; j += kPanel<T>) {
            const int64_t source = shift < 0 ? j : j + shift, target = shift < 0 ? j - shift : j;
            std::memcpy(out.data + out.offset(to_row, target), in.data + in.offset(i, source), kPanel<T> * sizeof(T));
        }
    }

    void stage(int64_t place, double value, double first, double last) {
        staged_[0][place] = value;
        staged_[1][place] = first;
        staged_[2][place] = last;
    }

    void make_weights(int64_t size, const int64_t (&lengths)[2], int64_t second) {
        for (int64_t k = 0; k < size; ++k) {
            secular_.vector(k, vector_);
            Vec<double> first = {}, last = {};
            for (int64_t t = 0; t < size; t += width<double>) {
                first += load(vector_ + t) * load(first_kept_ + t);
                last += load(vector_ + t) * load(last_kept_ + t);
            }
            stage(k, secular_.value(k), sum<double>(first), sum<double>(last));
            for (int side = 0; side < 2; ++side) {
                for (int64_t p = 0; p < lengths[side]; ++p) weights_.at(k, (side == 0 ? 0 : second) + p) = static_cast<T>(vector_[lists_[side][p]]);
            }
        }
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

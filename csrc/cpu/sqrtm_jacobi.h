// Roots and eigenvectors of small semidefinite matrices, one in each lane, by one-sided Jacobi rotations.
//
// A = F^T F by Cholesky in double; rotations from the left make the rows of F orthogonal: w_k = s_k v_k^T, so that
//
//   A^(1/2) = sum_k s_k v_k v_k^T,   A^(-1/2) = sum_k v_k v_k^T / s_k over s_k > 0
//
// Rows of F and not of A: small eigenvalues come out to u sqrt(condition) (Veselic and Hari, Numer. Math. 56, 1989). The lanes go
// through the same pairs in the same order; one whose rows are orthogonal rotates no more, so its bits do not depend on its
// neighbours. The adjoint divides by s_k + s_l in the eigenbasis. About 2.5 n^3 operations a sweep, 5 to 8 sweeps.
#pragma once
#include <algorithm>

#include "cholesky.h"
#include "lanes.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// Rows whose cosine is at most kOrthogonal are left alone; a lane is done after a sweep that met none above kDone.
template <class T>
constexpr T kOrthogonal = 2 * std::numeric_limits<T>::epsilon();
template <class T>
constexpr T kDone = 16 * std::numeric_limits<T>::epsilon();
constexpr int kMostSweeps = 40;

// w (n, n): R with A = R^T R, R upper triangular, in the lanes where every pivot is above the rounding of A (their mask is returned);
// 0 from the first other pivot's row on in the rest. `scratch`: n * n vectors of double.
template <class T>
VecInt<T> factorize_lanes(const Lanes<T>& a, const Lanes<T>& w, int64_t n, double* scratch) {
    constexpr int part = width<double>;
    typedef T Part __attribute__((vector_size(part * sizeof(T))));
    const double tolerance = kPivot<T> * std::numeric_limits<T>::epsilon();
    VecInt<T> definite = {};
    for (int first = 0; first < width<T>; first += part) {
        VecInt<double> good = Vec<double>{} == Vec<double>{};
        for (int64_t k = 0; k < n; ++k) {
            Vec<double> variance = {}, factor = {};
            for (int64_t j = k; j < n; ++j) {
                Part entry;
                std::memcpy(&entry, a.at(k, j) + first, sizeof entry);
                Vec<double> sum = __builtin_convertvector(entry, Vec<double>);
                if (j == k) variance = sum;
                for (int64_t m = 0; m < k; ++m) sum -= load(scratch + (m * n + k) * part) * load(scratch + (m * n + j) * part);
                if (j == k) {
                    good &= sum > tolerance * variance;
                    factor = good ? 1.0 / sqrt<double>(sum) : Vec<double>{};
                }
                sum *= factor;
                store(scratch + (k * n + j) * part, sum);
                entry = __builtin_convertvector(sum, Part);
                std::memcpy(w.at(k, j) + first, &entry, sizeof entry);
            }
            for (int64_t j = 0; j < k; ++j) std::memset(w.at(k, j) + first, 0, part * sizeof(T));
        }
        for (int l = 0; l < part; ++l) definite[first + l] = static_cast<typename Simd<T>::Int>(good[l]);
    }
    return definite;
}

template <class T>
OTKD_INLINE Vec<T> row_product(const T* p, const T* q, int64_t n) {
    Vec<T> even = {}, odd = {};
    int64_t j = 0;
    for (; j + 2 <= n; j += 2) {
        even += load(p + j * width<T>) * load(q + j * width<T>);
        odd += load(p + (j + 1) * width<T>) * load(q + (j + 1) * width<T>);
    }
    if (j < n) even += load(p + j * width<T>) * load(q + j * width<T>);
    return even + odd;
}

// Disjoint pairs of rows that are rotated together: the angle of one takes longer to compute than its rows to rotate.
#if defined(__AVX512F__)
constexpr int kPairs = 4;
#else
constexpr int kPairs = 2;
#endif
constexpr int64_t kFewRows = 10;  // up to which one at a time is faster: a pair that is orthogonal is then skipped
struct RowPair {
    int64_t p, q;  // p < q
};

// Makes the rows of each pair orthogonal in the lanes of `active`; true in those where one of the cosines was above kDone.
template <class T, int kCount>
OTKD_INLINE VecInt<T> rotate(const Lanes<T>& w, T* norms, int64_t n, const RowPair* pairs, VecInt<T> active) {
    const Vec<T> zero = {}, one = splat(T(1));
    Vec<T> half[kCount], sine[kCount];
    VecInt<T> turns = {}, again = {};
    for (int k = 0; k < kCount; ++k) half[k] = row_product(w.at(pairs[k].p, 0), w.at(pairs[k].q, 0), n);
    for (int k = 0; k < kCount; ++k) {
        T *norm_p = norms + pairs[k].p * width<T>, *norm_q = norms + pairs[k].q * width<T>;
        const Vec<T> alpha = load(norm_p), beta = load(norm_q), gamma = half[k], squared = gamma * gamma, limit = alpha * beta;
        const VecInt<T> turn = active & (squared > kOrthogonal<T> * kOrthogonal<T> * limit);
        const Vec<T> gap = beta - alpha, twice = gamma + gamma;
        const Vec<T> square = gap * gap + twice * twice, hypotenuse = square * reciprocal_sqrt<T>(square);
        const Vec<T> tangent = turn ? twice * reciprocal<T>(gap < zero ? gap - hypotenuse : gap + hypotenuse) : zero;
        // by the tangent of half the angle: small angles round little, and sine and cosine are those of one angle to rounding
        const Vec<T> secant_squared = one + tangent * tangent;
        half[k] = tangent * reciprocal<T>(one + secant_squared * reciprocal_sqrt<T>(secant_squared));
        sine[k] = (half[k] + half[k]) * reciprocal<T>(one + half[k] * half[k]);
        store(norm_p, alpha - tangent * gamma);
        store(norm_q, beta + tangent * gamma);
        turns |= turn;
        again |= turn & (squared > kDone<T> * kDone<T> * limit);
    }
    if (!any<T>(turns)) return again;
    for (int k = 0; k < kCount; ++k) {
        T *row_p = w.at(pairs[k].p, 0), *row_q = w.at(pairs[k].q, 0);
        for (int64_t j = 0; j < n; ++j) {
            const Vec<T> x = load(row_p + j * width<T>), y = load(row_q + j * width<T>);
            store(row_p + j * width<T>, x - sine[k] * (y + half[k] * x));
            store(row_q + j * width<T>, y + sine[k] * (x - half[k] * y));
        }
    }
    return again;
}

// One sweep over all pairs, those of a round disjoint, kCount of them at a time.
template <class T, int kCount>
VecInt<T> sweep(const Lanes<T>& w, T* norms, int64_t n, VecInt<T> active) {
    const int64_t last = n - 1 + n % 2;  // the index that stays; with n odd it is no row
    VecInt<T> again = {};
    for (int64_t round = 0; round < last; ++round) {
        RowPair pairs[kCount];
        int count = 0;
        for (int64_t i = 0; 2 * i <= last; ++i) {
            const int64_t up = round + i, down = round - i, p = up < last ? up : up - last, q = down < 0 ? down + last : down;
            if (i > 0) pairs[count++] = {p < q ? p : q, p < q ? q : p};
            else if (last < n) pairs[count++] = {p, last};
            if (count == kCount) {
                again |= rotate<T, kCount>(w, norms, n, pairs, active);
                count = 0;
            }
        }
        if (count > 0) with_count<kCount>(count, [&](auto c) { again |= rotate<T, decltype(c)::value>(w, norms, n, pairs, active); });
    }
    return again;
}

// Rotates until the rows of w (n, n) are orthogonal; norms: their squared norms.
template <class T>
void orthogonalize(const Lanes<T>& w, T* norms, int64_t n) {
    VecInt<T> active = Vec<T>{} == Vec<T>{};
    for (int sweeps = 0; sweeps < kMostSweeps && any<T>(active); ++sweeps) {
        for (int64_t k = 0; k < n; ++k) store(norms + k * width<T>, row_product(w.at(k, 0), w.at(k, 0), n));
        active &= n <= kFewRows ? sweep<T, 1>(w, norms, n, active) : sweep<T, kPairs>(w, norms, n, active);
    }
    for (int64_t k = 0; k < n; ++k) store(norms + k * width<T>, row_product(w.at(k, 0), w.at(k, 0), n));
}

// Each lane's own power of two, and NaN where the matrix is not finite (0 elsewhere).
template <class T>
struct LaneScale {
    int exponent[width<T>];
    Vec<T> first, second, broken;

    // even exponents, so that the root scales by a power of two as well
    LaneScale(const T* entries, int64_t count) {
        VecInt<T> best = {};
        for (int64_t k = 0; k < count; ++k) {
            const VecInt<T> bits = magnitude_bits<T>(load(entries + k * width<T>));
            best = bits > best ? bits : best;
        }
        const Vec<T> size = (Vec<T>)best;
        broken = size - size;
        for (int l = 0; l < width<T>; ++l) {
            exponent[l] = (exponent_of(size[l]) + 1) / 2 * 2;
            const PowerOfTwo<T> scale(-exponent[l]);
            first[l] = scale.first;
            second[l] = scale.second;
        }
    }

    Vec<T> apply(Vec<T> v) const { return broken == broken ? v * first * second : Vec<T>{}; }

    // 2^(times exponent / 2) for a small `times`
    void back(int times, Vec<T>& head, Vec<T>& tail) const {
        for (int l = 0; l < width<T>; ++l) {
            const PowerOfTwo<T> scale(times * (exponent[l] / 2));
            head[l] = scale.first;
            tail[l] = scale.second;
        }
    }
};

// The work of one thread on the matrices of one vector.
template <class T>
struct JacobiRoot {
    int64_t n;
    Lanes<T> a, basis, result;  // (n, n), (n + 1, n), (n, n)
    T* norms;
    double* scratch;
    Cholesky<T> cholesky;
    VecInt<T> definite = {};

    JacobiRoot(int64_t size, Arena& memory)
        : n(size), a(take(size, memory)), basis(take(size + 1, memory)), result(take(size, memory)),
          norms(memory.take<T>(size * width<T>)), scratch(memory.take<double>(size * size * width<double>)),
          cholesky(size, memory) {}

    Lanes<T> take(int64_t rows, Arena& memory) const {
        const Lanes<T> piece{memory.take<T>(rows * n * width<T>), n};
        memory.take<unsigned char>(1344);  // no two matrices start at the same place of a page
        return piece;
    }

    // Matrices [begin, begin + count) of the batch.
    void forward(const SqrtmArgs<T>& args, int64_t begin, int64_t count) {
        const LaneScale<T> scale = factorize(args, begin, count);
        orthogonalize(basis, norms, n);
        compose(args.inverse, scale);
        store_lanes(result.data, n * n, count, n * n, args.root + begin * n * n);
        store_lanes(basis.data, (n + 1) * n, count, (n + 1) * n, args.aux + begin * (n + 1) * n);
    }

    // Rows of a factor F of each scaled matrix in `basis`, A = F^T F, upper triangular in the lanes of `definite`; marks the indefinite ones.
    LaneScale<T> factorize(const SqrtmArgs<T>& args, int64_t begin, int64_t count) {
        const T* matrices = args.matrix + begin * n * n;
        load_lanes(matrices, n * n, count, n * n, result.data);
        const LaneScale<T> scale(result.data, n * n);
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j <= i; ++j) {
                const Vec<T> mean = T(0.5) * scale.apply(result.get(i, j)) + T(0.5) * scale.apply(result.get(j, i));
                a.set(i, j, mean);
                a.set(j, i, mean);
            }
        }
        definite = factorize_lanes(a, basis, n, scratch);
        for (int64_t l = 0; l < count; ++l) {
            args.unsolved[begin + l] = 0;
            if (!definite[l] && scale.broken[l] == 0) args.unsolved[begin + l] = factorize_one(matrices + l * n * n, l, scale.exponent[l]);
        }
        return scale;
    }

    // Gradients of matrices [begin, begin + count) of the batch.
    void backward(const SqrtmArgs<T>& args, int64_t begin, int64_t count) {
        load_lanes(args.aux + begin * (n + 1) * n, (n + 1) * n, count, (n + 1) * n, basis.data);
        load_lanes(args.grad_root + begin * n * n, n * n, count, n * n, result.data);
        const Lanes<T> columns = a;  // eigenvectors in columns
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < n; ++j) columns.set(j, i, basis.get(i, j));
            for (int64_t j = 0; j < i; ++j) {
                const Vec<T> mean = T(0.5) * (result.get(i, j) + result.get(j, i));
                result.set(i, j, mean);
                result.set(j, i, mean);
            }
        }
        const LaneScale<T> scale(basis.at(n, 0), n);
        for (int64_t k = 0; k < n; ++k) basis.set(n, k, scale.apply(basis.get(n, k)) + scale.broken);
        const Lanes<T> product{reinterpret_cast<T*>(scratch), n};
        const auto keep = [](Vec<T> sum, int64_t, int64_t) { return sum; };
        multiply(result, columns, product, n, n, n, keep);
        multiply_symmetric(columns, product, result, n, n, [&](Vec<T> sum, int64_t k, int64_t l) {
            return quotient(sum, basis.get(n, k), basis.get(n, l), args.inverse);
        });
        multiply(result, basis, product, n, n, n, keep);
        Vec<T> head, tail;
        scale.back(args.inverse ? -6 : -2, head, tail);
        multiply_symmetric(basis, product, result, n, n, [&](Vec<T> sum, int64_t, int64_t) { return sum * head * tail; });
        store_lanes(result.data, n * n, count, n * n, args.grad_matrix + begin * n * n);
        for (int64_t l = 0; l < count; ++l) {
            const T* roots = args.aux + ((begin + l) * (n + 1) + n) * n;
            const bool some = std::any_of(roots, roots + n, [](T root) { return root > 0; });
            args.unsolved[begin + l] = some && std::any_of(roots, roots + n, [](T root) { return root == 0; });
        }
    }

  private:
    // Lane l of the factor by pivoted Cholesky; true if the matrix is indefinite.
    bool factorize_one(const T* matrix, int64_t l, int exponent) {
        cholesky.read(matrix, exponent, 0);
        const Definiteness kind = cholesky.factorize();
        for (int64_t k = 0; k < n; ++k) {
            for (int64_t j = 0; j < n; ++j) {
                const double entry = k < cholesky.rank && j >= k ? cholesky.factor(k, j) : 0.0;
                basis.at(k, cholesky.order[j])[l] = static_cast<T>(entry);
            }
        }
        return kind == Definiteness::indefinite;
    }

    // result = root, basis = eigenvectors and scaled roots of eigenvalues, from orthogonal rows and their squared norms
    void compose(bool inverse, const LaneScale<T>& scale) {
        Vec<T> head, tail;
        scale.back(1, head, tail);
        for (int64_t k = 0; k < n; ++k) {
            const Vec<T> root = sqrt<T>(load(norms + k * width<T>));
            const Vec<T> reciprocal = root > Vec<T>{} ? T(1) / root : Vec<T>{};
            for (int64_t j = 0; j < n; ++j) {
                const Vec<T> row = basis.get(k, j), unit = row * reciprocal;
                a.set(k, j, inverse ? unit * reciprocal : row);
                basis.set(k, j, unit + scale.broken);
            }
            basis.set(n, k, root * head * tail + scale.broken);
        }
        if (inverse) scale.back(-1, head, tail);
        multiply_symmetric(basis, a, result, n, n, [&](Vec<T> sum, int64_t, int64_t) { return sum * head * tail; });
    }

    // Entry of the gradient in the eigenbasis; 0 between two directions in which A is 0.
    static Vec<T> quotient(Vec<T> g, Vec<T> root_k, Vec<T> root_l, bool inverse) {
        const Vec<T> sum = root_k + root_l;
        const Vec<T> divisor = inverse ? -(sum * root_k * root_l) : sum;
        return divisor == Vec<T>{} ? Vec<T>{} : g / divisor;
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

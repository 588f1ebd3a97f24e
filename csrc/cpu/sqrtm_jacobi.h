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

// Makes rows p and q orthogonal in the lanes of `active`; true in those whose cosine was above kDone.
template <class T>
OTKD_INLINE VecInt<T> rotate(const Lanes<T>& w, T* norms, int64_t n, int64_t p, int64_t q, VecInt<T> active) {
    T *row_p = w.at(p, 0), *row_q = w.at(q, 0);
    const Vec<T> zero = {}, one = splat(T(1));
    const Vec<T> alpha = load(norms + p * width<T>), beta = load(norms + q * width<T>);
    const Vec<T> gamma = row_product(row_p, row_q, n), squared = gamma * gamma, limit = alpha * beta;
    const VecInt<T> turn = active & (squared > kOrthogonal<T> * kOrthogonal<T> * limit);
    if (!any<T>(turn)) return turn;
    const Vec<T> gap = beta - alpha, twice = gamma + gamma;
    const Vec<T> square = gap * gap + twice * twice, hypotenuse = square * reciprocal_sqrt<T>(square);
    const Vec<T> tangent = turn ? twice * reciprocal<T>(gap < zero ? gap - hypotenuse : gap + hypotenuse) : zero;
    // by the tangent of half the angle: small angles round little, and sine and cosine are those of one angle to rounding
    const Vec<T> secant_squared = one + tangent * tangent;
    const Vec<T> half = tangent * reciprocal<T>(one + secant_squared * reciprocal_sqrt<T>(secant_squared));
    const Vec<T> sine = (half + half) * reciprocal<T>(one + half * half);
    for (int64_t j = 0; j < n; ++j) {
        const Vec<T> x = load(row_p + j * width<T>), y = load(row_q + j * width<T>);
        store(row_p + j * width<T>, x - sine * (y + half * x));
        store(row_q + j * width<T>, y + sine * (x - half * y));
    }
    store(norms + p * width<T>, alpha - tangent * gamma);
    store(norms + q * width<T>, beta + tangent * gamma);
    return turn & (squared > kDone<T> * kDone<T> * limit);
}

// Rotates until the rows of w (n, n) are orthogonal; norms: their squared norms.
template <class T>
void orthogonalize(const Lanes<T>& w, T* norms, int64_t n) {
    const int64_t even = n + n % 2;
    VecInt<T> active = Vec<T>{} == Vec<T>{};
    for (int sweep = 0; sweep < kMostSweeps && any<T>(active); ++sweep) {
        for (int64_t k = 0; k < n; ++k) store(norms + k * width<T>, row_product(w.at(k, 0), w.at(k, 0), n));
        VecInt<T> again = {};
        for (int64_t round = 0; round + 1 < even; ++round) {  // all pairs, those of a round disjoint
            for (int64_t i = 0; 2 * i < even; ++i) {
                const int64_t p = (round + i) % (even - 1), q = i ? (round - i + even - 1) % (even - 1) : even - 1;
                if (p < n && q < n) again |= rotate(w, norms, n, p < q ? p : q, p < q ? q : p, active);
            }
        }
        active &= again;
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
        const VecInt<T> definite = factorize_lanes(a, basis, n, scratch);
        for (int64_t l = 0; l < count; ++l) {
            args.unsolved[begin + l] = 0;
            if (!definite[l] && scale.broken[l] == 0) args.unsolved[begin + l] = factorize_one(matrices + l * n * n, l, scale.exponent[l]);
        }
        orthogonalize(basis, norms, n);
        compose(args.inverse, scale);
        store_lanes(result.data, n * n, count, n * n, args.root + begin * n * n);
        store_lanes(basis.data, (n + 1) * n, count, (n + 1) * n, args.aux + begin * (n + 1) * n);
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

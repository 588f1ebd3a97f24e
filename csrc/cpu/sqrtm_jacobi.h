// Roots and eigenvectors of small semidefinite matrices, one in each lane, by one-sided Jacobi rotations.
//
// A = F^T F by Cholesky in double, with pivots where A is nearly singular; rotations from the left make the rows of F orthogonal: w_k = s_k v_k^T, so that
//
//   A^(1/2) = sum_k s_k v_k v_k^T,   A^(-1/2) = sum_k v_k v_k^T / s_k over s_k > 0
//
// Rows of F and not of A: small eigenvalues come out to u sqrt(condition) (Veselic and Hari, Numer. Math. 56, 1989). The lanes go
// through the same pairs in the same order; one whose rows are orthogonal rotates no more, so its bits do not depend on its
// neighbours. The adjoint divides by s_k + s_l in the eigenbasis. About 1.5 n^3 multiply-adds a sweep, 5 to 8 sweeps.
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

// 1 / x and 1 / sqrt(x) to four digits at least, where that is faster; x = 0 and infinite x may give NaN.
template <class T>
OTKD_INLINE Vec<T> rough_reciprocal(Vec<T> x) {
    return reciprocal<T>(x);
}
template <class T>
OTKD_INLINE Vec<T> rough_reciprocal_sqrt(Vec<T> x) {
    return reciprocal_sqrt<T>(x);
}
#if defined(__AVX512F__)
template <>
OTKD_INLINE Vec<float> rough_reciprocal<float>(Vec<float> x) {
    return (Vec<float>)_mm512_rcp14_ps((__m512)x);
}
template <>
OTKD_INLINE Vec<float> rough_reciprocal_sqrt<float>(Vec<float> x) {
    return (Vec<float>)_mm512_rsqrt14_ps((__m512)x);
}
#endif

template <class T>
OTKD_INLINE Vec<T> row_product(const T* p, const T* q, int64_t n) {
    Vec<T> sums[4] = {};
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        for (int k = 0; k < 4; ++k) sums[k] += load(p + (j + k) * width<T>) * load(q + (j + k) * width<T>);
    }
    for (; j < n; ++j) sums[0] += load(p + j * width<T>) * load(q + j * width<T>);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// p -= down q, q += up p, of two rows that do not overlap.
template <class T>
OTKD_INLINE void turn(T* __restrict p, T* __restrict q, int64_t n, Vec<T> down, Vec<T> up) {
    for (int64_t j = 0; j < n; ++j) {
        const Vec<T> x = load(p + j * width<T>), y = load(q + j * width<T>);
        store(p + j * width<T>, x - down * y);
        store(q + j * width<T>, y + up * x);
    }
}

// The rows of each lane are those of `w` times the square roots of `weights`, which the rotations change: two multiply-adds an entry in
// place of four (Gentleman, J. Inst. Maths Applics 12, 1973). `norms`: their squared norms.
template <class T>
struct WeightedRows {
    Lanes<T> w;
    T *weights, *norms;  // (n,)
};

// Makes rows p and q orthogonal in the lanes of `active`; true in those where their cosine was above kDone. The angle need not be exact,
// what is done with it is a rotation all the same.
template <class T>
OTKD_INLINE VecInt<T> rotate(const WeightedRows<T>& rows, int64_t n, int64_t p, int64_t q, VecInt<T> active) {
    T *weights_p = rows.weights + p * width<T>, *weights_q = rows.weights + q * width<T>;
    T *norms_p = rows.norms + p * width<T>, *norms_q = rows.norms + q * width<T>;
    const Vec<T> zero = {}, one = splat(T(1)), product = row_product(rows.w.at(p, 0), rows.w.at(q, 0), n);
    const Vec<T> weight_p = load(weights_p), weight_q = load(weights_q), weight = weight_p * weight_q;
    const Vec<T> alpha = load(norms_p), beta = load(norms_q), limit = alpha * beta, squared = product * product * weight;
    const VecInt<T> turns = active & (squared > kOrthogonal<T> * kOrthogonal<T> * limit);
    if (!any<T>(turns)) return VecInt<T>{};
    const Vec<T> gap = beta - alpha, square = gap * gap + T(4) * squared, hypotenuse = square * rough_reciprocal_sqrt<T>(square);
    // the tangent over the root of `weight`
    const Vec<T> slope = turns ? (product + product) * rough_reciprocal<T>(gap < zero ? gap - hypotenuse : gap + hypotenuse) : zero;
    const Vec<T> down = slope * weight_q, up = slope * weight_p;
    turn(rows.w.at(p, 0), rows.w.at(q, 0), n, down, up);
    const Vec<T> cosine_squared = reciprocal<T>(one + down * up), moved = slope * product * weight;
    store(weights_p, weight_p * cosine_squared);
    store(weights_q, weight_q * cosine_squared);
    store(norms_p, alpha - moved);
    store(norms_q, beta + moved);
    return turns & (squared > kDone<T> * kDone<T> * limit);
}

// Multiplies the rows by the square roots of their weights, which become 1; computes their norms.
template <class T>
void weigh(const WeightedRows<T>& rows, int64_t n) {
    for (int64_t k = 0; k < n; ++k) {
        const Vec<T> factor = sqrt<T>(load(rows.weights + k * width<T>));
        Vec<T> squares = {};
        for (int64_t j = 0; j < n; ++j) {
            const Vec<T> entry = rows.w.get(k, j) * factor;
            rows.w.set(k, j, entry);
            squares += entry * entry;
        }
        store(rows.weights + k * width<T>, splat(T(1)));
        store(rows.norms + k * width<T>, squares);
    }
}

// One sweep over all pairs, those of a round disjoint; lanes in which a cosine was above kDone.
template <class T>
OTKD_INLINE VecInt<T> sweep(const WeightedRows<T>& rows, int64_t n, VecInt<T> active) {
    constexpr int64_t kRounds = 48;  // a weight is halved in each at most
    const int64_t last = n - 1 + n % 2;  // the index that stays; with n odd it is no row
    VecInt<T> again = {};
    for (int64_t round = 0; round < last; ++round) {
        if (round % kRounds == 0) weigh(rows, n);
        if (last < n) again |= rotate(rows, n, round, last, active);
        for (int64_t i = 1; 2 * i <= last; ++i) {
            const int64_t up = round + i, down = round - i, p = up < last ? up : up - last, q = down < 0 ? down + last : down;
            again |= rotate(rows, n, p < q ? p : q, p < q ? q : p, active);
        }
    }
    return again;
}

// Rotates until the rows of w (n, n) are orthogonal in the lanes of `active`; norms (2 n,): their squared norms, then scratch.
template <class T>
void orthogonalize(const Lanes<T>& w, T* norms, int64_t n, VecInt<T> active) {
    const WeightedRows<T> rows{w, norms + n * width<T>, norms};
    for (int64_t k = 0; k < n; ++k) store(rows.weights + k * width<T>, splat(T(1)));
    for (int sweeps = 0; sweeps < kMostSweeps && any<T>(active); ++sweeps) {
        active &= sweep(rows, n, active);
    }
    weigh(rows, n);
}

// Each lane's own power of two, and NaN where the matrix is not finite (0 elsewhere).
template <class T>
struct LaneScale {
    VecInt<T> exponent;  // even, so that the root scales by a power of two as well; 0 where the matrix is 0
    Vec<T> first, second, broken;

    // Of the largest of `count` entries, which it makes less than 2^top, `top` even.
    LaneScale(const T* entries, int64_t count, int top = 0) {
        constexpr typename Simd<T>::Int bias = std::numeric_limits<T>::max_exponent - 1;
        VecInt<T> best = {};
        for (int64_t k = 0; k < count; ++k) {
            const VecInt<T> bits = magnitude_bits<T>(load(entries + k * width<T>));
            best = bits > best ? bits : best;
        }
        const Vec<T> size = (Vec<T>)best;
        broken = size - size;
        const VecInt<T> above = (best >> (std::numeric_limits<T>::digits - 1)) - bias + 1;  // 2^above > size
        exponent = (best > 0) & (broken == Vec<T>{}) ? ((above + 1) & ~typename Simd<T>::Int{1}) - top : VecInt<T>{};
        const VecInt<T> half = -exponent >> 1;
        first = powers_of_two<T>(half);
        second = powers_of_two<T>(-exponent - half);
    }

    Vec<T> apply(Vec<T> v) const { return broken == broken ? v * first * second : Vec<T>{}; }

    // 2^(times exponent / 2) for a small `times`
    void back(int times, Vec<T>& head, Vec<T>& tail) const {
        const VecInt<T> whole = (exponent >> 1) * times, half = whole >> 1;
        head = powers_of_two<T>(half);
        tail = powers_of_two<T>(whole - half);
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
          norms(memory.take<T>(2 * size * width<T>)), scratch(memory.take<double>(size * size * width<double>)),
          cholesky(size, memory) {}

    Lanes<T> take(int64_t rows, Arena& memory) const {
        const Lanes<T> piece{memory.take<T>(rows * n * width<T>), n};
        memory.take<unsigned char>(1344);  // no two matrices start at the same place of a page
        return piece;
    }

    // Matrices [begin, begin + count) of the batch.
    void forward(const SqrtmArgs<T>& args, int64_t begin, int64_t count) {
        const LaneScale<T> scale = factorize(args, begin, count);
        orthogonalize(basis, norms, n, Vec<T>{} == Vec<T>{});
        decide(args, begin, count, scale);
        compose(args.inverse, scale);
        store_lanes(result.data, n * n, count, n * n, args.root + begin * n * n);
        store_lanes(basis.data, (n + 1) * n, count, (n + 1) * n, args.aux + begin * (n + 1) * n);
    }

    // Rows of a factor F of each scaled matrix in `basis`, A = F^T F, upper triangular in the lanes of `definite`; marks the indefinite ones.
    LaneScale<T> factorize(const SqrtmArgs<T>& args, int64_t begin, int64_t count) {
        const T* matrices = args.matrix + begin * n * n;
        load_lanes(matrices, n * n, count, n * n, result.data);
        const LaneScale<T> scale(result.data, n * n, kTop);
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
        VecInt<T> some = {}, none = {};  // roots > 0, roots of 0
        for (int64_t k = 0; k < n; ++k) {
            const Vec<T> root = basis.get(n, k);
            some |= root > Vec<T>{};
            none |= root == Vec<T>{};
            basis.set(n, k, scale.apply(root) + scale.broken);
        }
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
        for (int64_t l = 0; l < count; ++l) args.unsolved[begin + l] = (some & none)[l] != 0;
    }

  private:
    // Entries of A are scaled to 2^kTop, so that the squared norms of rows may be far apart: the square of the largest does not overflow
    static constexpr int kTop = sizeof(T) == sizeof(float) ? 56 : 496;

    // Of pivots in any order one may be rounding that smaller ones before it have amplified. Where that can matter, a pivoted
    // factor says what the rank is, and the rows are made orthogonal again.
    void decide(const SqrtmArgs<T>& args, int64_t begin, int64_t count, const LaneScale<T>& scale) {
        const VecInt<T> doubtful = definite & near_rounding();
        if (any<T>(doubtful)) {
            for (int64_t l = 0; l < count; ++l) {
                if (doubtful[l]) args.unsolved[begin + l] = factorize_one(args.matrix + (begin + l) * n * n, l, scale.exponent[l]);
            }
            orthogonalize(basis, norms, n, doubtful);
        }
        const VecInt<T> lost = lost_rows();
        for (int64_t l = 0; any<T>(lost) && l < count; ++l) args.unsolved[begin + l] |= lost[l] != 0;
    }

    // Lanes with rows so short that squares of their products vanish before these say that they are orthogonal.
    VecInt<T> lost_rows() const {
        const T least = std::sqrt(std::numeric_limits<T>::denorm_min()) / kDone<T>;
        VecInt<T> lost = {};
        for (int64_t k = 0; k < n; ++k) {
            const Vec<T> norm = load(norms + k * width<T>);
            lost |= (norm > Vec<T>{}) & (norm < least);
        }
        return lost;
    }

    // Lanes whose smallest eigenvalue is not well above the level of rounding: a pivot is at least the smallest eigenvalue of the
    // correlation matrix, and that at least the one of A over its largest variance.
    VecInt<T> near_rounding() const {
        constexpr T level = static_cast<T>(2 * kPivot<T>) * std::numeric_limits<T>::epsilon();
        Vec<T> variance = {}, least = load(norms);
        for (int64_t k = 0; k < n; ++k) {
            variance = max<T>(variance, a.get(k, k));
            least = min<T>(least, load(norms + k * width<T>));
        }
        return least <= level * variance;
    }

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

// Reduction of symmetric matrices, one in each lane, to tridiagonal form by Householder reflections (Golub and Van Loan, Matrix
// Computations, 8.3), in double. 4 n^3 / 3 operations, and as many for the product of the reflections.
#pragma once
#include "lanes.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

inline Vec<double> entry_at(const double* p, int64_t i) { return load(p + i * width<double>); }
inline void put_at(double* p, int64_t i, Vec<double> v) { store(p + i * width<double>, v); }

struct TridiagonalForm {
    static constexpr int kRows = 4;  // of q that go through the registers together
    typedef Vec<double> V;

    int64_t n;
    Lanes<double> q;             // (n, n): the matrix, then the reflectors, then the product of the reflections
    double *diagonal, *coupling; // (n,): of the form, coupling[i] between i and i + 1
    double *image, *reflector, *scale, *projection;  // (n,)

    // Row k of q: what is left of the matrix for j >= k becomes, beyond the diagonal, the reflector of step k; scale[k] its factor.
    void reduce() {
        for (int64_t k = 0; k + 2 < n; ++k) {
            put_at(diagonal, k, q.get(k, k));
            make_reflector(k);
            multiply_trailing(k + 1);
            const V factor = entry_at(scale, k);
            V product = {};
            for (int64_t j = k + 1; j < n; ++j) product += entry_at(image, j) * entry_at(reflector, j);
            const V shift = 0.5 * factor * factor * product;
            for (int64_t j = k + 1; j < n; ++j) put_at(image, j, factor * entry_at(image, j) - shift * entry_at(reflector, j));
            update_trailing(k + 1);
        }
        for (int64_t k = n < 2 ? 0 : n - 2; k < n; ++k) {
            put_at(diagonal, k, q.get(k, k));
            put_at(coupling, k, k + 1 < n ? q.get(k, k + 1) : V{});
        }
    }

    // reflector (from k + 1 on) v with v[k + 1] = 1: I - scale v v^T takes row k beyond the diagonal to (coupling, 0, ...).
    void make_reflector(int64_t k) {
        const V first = q.get(k, k + 1), zero = {}, one = splat(1.0);
        V squares = {};
        for (int64_t j = k + 2; j < n; ++j) squares += q.get(k, j) * q.get(k, j);
        const VecInt<double> reflects = squares > zero;
        const V size = sqrt<double>(first * first + squares);
        const V beta = reflects ? (first > zero ? -size : size) : first;
        const V unit = reflects ? one / (first - beta) : zero;
        put_at(scale, k, reflects ? (beta - first) / beta : zero);
        put_at(coupling, k, beta);
        put_at(reflector, k + 1, one);
        q.set(k, k + 1, one);
        for (int64_t j = k + 2; j < n; ++j) {
            const V entry = q.get(k, j) * unit;
            q.set(k, j, entry);
            put_at(reflector, j, entry);
        }
    }

    // image = (trailing matrix) reflector, from index `begin` on
    void multiply_trailing(int64_t begin) {
        for (int64_t j = begin; j < n; ++j) put_at(image, j, V{});
        int64_t i = begin;
        for (; i + kRows <= n; i += kRows) multiply_rows<kRows>(i);
        for (; i < n; ++i) multiply_rows<1>(i);
    }

    template <int kCount>
    OTKD_INLINE void multiply_rows(int64_t i) {
        V own[kCount], sum[kCount];
        for (int r = 0; r < kCount; ++r) {
            own[r] = entry_at(reflector, i + r);
            sum[r] = V{};
        }
        for (int r = 0; r < kCount; ++r) {
            sum[r] += q.get(i + r, i + r) * own[r];
            for (int s = r + 1; s < kCount; ++s) {
                const V entry = q.get(i + r, i + s);
                sum[r] += entry * own[s];
                sum[s] += entry * own[r];
            }
        }
        for (int64_t j = i + kCount; j < n; ++j) {
            const V other = entry_at(reflector, j);
            V total = entry_at(image, j);
            for (int r = 0; r < kCount; ++r) {
                const V entry = q.get(i + r, j);
                sum[r] += entry * other;
                total += entry * own[r];
            }
            put_at(image, j, total);
        }
        for (int r = 0; r < kCount; ++r) put_at(image, i + r, entry_at(image, i + r) + sum[r]);
    }

    // trailing matrix -= reflector image^T + image reflector^T, its upper triangle
    void update_trailing(int64_t begin) {
        int64_t i = begin;
        for (; i + kRows <= n; i += kRows) update_rows<kRows>(i);
        for (; i < n; ++i) update_rows<1>(i);
    }

    template <int kCount>
    OTKD_INLINE void update_rows(int64_t i) {
        V v[kCount], w[kCount];
        for (int r = 0; r < kCount; ++r) {
            v[r] = entry_at(reflector, i + r);
            w[r] = entry_at(image, i + r);
        }
        for (int64_t j = i; j < n; ++j) {
            const V vj = entry_at(reflector, j), wj = entry_at(image, j);
            for (int r = 0; r < kCount; ++r) q.set(i + r, j, q.get(i + r, j) - v[r] * wj - w[r] * vj);
        }
    }

    // q = product of the reflections. Each pass subtracts one reflection and multiplies by the next one's vector.
    void make_vectors() {
        const int64_t last = n < 2 ? 0 : n - 2;
        for (int64_t j = last; last > 0 && j < n; ++j) put_at(image, j, q.get(last - 1, j));
        for (int64_t i = last; i < n; ++i) set_identity_row(i);
        for (int64_t k = last - 1; k >= 0; --k) {
            const V factor = entry_at(scale, k);
            for (int64_t j = k + 1; j < n; ++j) {
                put_at(reflector, j, q.get(k, j));
                put_at(projection, j, factor * entry_at(image, j));
                put_at(image, j, V{});
            }
            set_identity_row(k);
            put_at(image, k, splat(1.0));
            int64_t i = k + 1;
            for (; i + kRows <= n; i += kRows) reflect_rows<kRows>(i, k);
            for (; i < n; ++i) reflect_rows<1>(i, k);
        }
    }

  private:
    void set_identity_row(int64_t i) {
        for (int64_t j = 0; j < n; ++j) q.set(i, j, i == j ? splat(1.0) : V{});
    }

    // Rows [i, i + kCount) from column k + 1 on, column k being 0 there.
    template <int kCount>
    OTKD_INLINE void reflect_rows(int64_t i, int64_t k) {
        V v[kCount], next[kCount];
        for (int r = 0; r < kCount; ++r) {
            v[r] = entry_at(reflector, i + r);
            next[r] = k > 0 ? q.get(k - 1, i + r) : V{};
            q.set(i + r, k, V{});
        }
        for (int64_t j = k + 1; j < n; ++j) {
            const V share = entry_at(projection, j);
            V total = entry_at(image, j);
            for (int r = 0; r < kCount; ++r) {
                const V entry = q.get(i + r, j) - v[r] * share;
                q.set(i + r, j, entry);
                total += next[r] * entry;
            }
            put_at(image, j, total);
        }
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

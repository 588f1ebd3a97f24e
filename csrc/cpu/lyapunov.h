// The Lyapunov equation S X + X S = G for a positive definite S with eigenvalues in [lower, upper], by products.
//
// With p = sqrt(lower upper), N = (S + p I)^-1 and M = I - 2 p N (a Cayley transform, |M| < 1) the equation is
// X - M X M = 2 p N G N, so that X is the sum of M^l (2 p N G N) M^l over l >= 0; it is doubled, as Smith does (SIAM J. Appl. Math. 16,
// 1968):
//
//   X <- X + M X M,   M <- M M
//
// until |M|^4, which bounds what is left out, is below rounding: log2(upper / lower) / 2 + 3 times or so, 4 n^3 operations each. Nothing is divided by a
// gap or a sum of eigenvalues, no rounding grows, and X is exactly symmetric.
#pragma once
#include "triangular.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class T>
struct Lyapunov {
    int64_t n;
    Panels<T> m, next, product, x;
    Cholesky<T> cholesky;
    static constexpr int kMostDoublings = 60;
    // |M|^4 after which the sum is done: what it leaves out, relative to X
    static constexpr double kLeftOut = sizeof(T) == sizeof(float) ? 3e-8 : 1e-16;

    Lyapunov(int64_t size, Arena& memory) : n(size), cholesky(size, memory) {
        const int64_t rows = round_up(n, kPanel<T>);
        for (Panels<T>* piece : {&m, &next, &product, &x}) *piece = {memory.take<T>(rows * rows), rows};
    }

    // x = X for 2^-exponent S and (G + G^T) / 2
    void solve(const T* s, const T* grad, int exponent, double lower, double upper, const Team& team) {
        const T shift = static_cast<T>(std::sqrt(lower) * std::sqrt(upper));
        if (team.rank == 0) {
            for (const Panels<T>& piece : {product, x}) std::memset(piece.data, 0, piece.rows * piece.rows * sizeof(T));
        }
        resolvent(s, exponent, shift, team);
        if (team.rank == 0) load_symmetric(grad, next);
        team.barrier();
        const auto keep = [](Vec<T> sum, int64_t) { return sum; };
        multiply(next, m, product, n, n, FullDepth{n}, team, keep);
        team.barrier();
        const Vec<T> twice = splat(2 * shift);
        multiply_symmetric(m, product, x, n, FullDepth{n}, team, [&](Vec<T> sum, int64_t) { return twice * sum; });
        team.barrier();
        if (team.rank == 0) scale_panels(m, n, n, -2 * shift);
        team.barrier();
        add_to_diagonal(m, n, T(1), team);
        team.barrier();
        for (int k = 0; k < kMostDoublings; ++k) {
            const double size = squared_norm(m, n, T(0));  // by each thread: nothing to share
            multiply(x, m, product, n, n, FullDepth{n}, team, keep);
            team.barrier();
            // not into x, which it reads at the end of its sums
            multiply_symmetric(m, product, next, n, FullDepth{n}, team,
                               [&](Vec<T> sum, int64_t at) { return load(x.data + at) + sum; });
            team.barrier();
            std::swap(x, next);
            if (size * size <= kLeftOut || !(size < std::numeric_limits<double>::infinity())) break;
            multiply_symmetric(m, m, product, n, FullDepth{n}, team, keep);
            team.barrier();
            std::swap(m, product);
        }
    }

    // x = -S^2 X S^2 for 2^-exponent S
    void times_squares(const T* s, int exponent, const Team& team) {
        const auto keep = [](Vec<T> sum, int64_t) { return sum; };
        if (team.rank == 0) load_panels(s, n, n, false, PowerOfTwo<T>(-exponent), m);
        team.barrier();
        multiply_symmetric(m, m, next, n, FullDepth{n}, team, keep);
        team.barrier();
        multiply(x, next, product, n, n, FullDepth{n}, team, keep);
        team.barrier();
        multiply_symmetric(next, product, x, n, FullDepth{n}, team, [](Vec<T> sum, int64_t) { return -sum; });
        team.barrier();
    }

  private:
    // m = (2^-exponent S + shift I)^-1 in the order of S
    void resolvent(const T* s, int exponent, double shift, const Team& team) {
        if (team.rank == 0) {
            cholesky.read(s, exponent, shift);
            cholesky.factorize();
            store_factor(cholesky, m);
        }
        team.barrier();
        invert_transposed(m, next, n, team);
        team.barrier();
        multiply_symmetric(next, next, product, n, LowerDepth{n}, team, [](Vec<T> sum, int64_t) { return sum; });
        team.barrier();
        if (team.rank == 0) {
            const int64_t* order = cholesky.order;
            std::memset(m.data, 0, panels_of<T>(n) * m.stride() * sizeof(T));
            for (int64_t j = 0; j < n; ++j) {
                for (int64_t i = 0; i < n; ++i) m.at(order[i], order[j]) = product.at(i, j);
            }
        }
    }

    void load_symmetric(const T* grad, const Panels<T>& out) const {
        std::memset(out.data, 0, panels_of<T>(n) * out.stride() * sizeof(T));
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j <= i; ++j) out.at(i, j) = out.at(j, i) = (grad[i * n + j] + grad[j * n + i]) / 2;
        }
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

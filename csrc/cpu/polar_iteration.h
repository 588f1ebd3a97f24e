// X <- X (a I + b X^T X + c (X^T X)^2), step by step along a schedule, on panels and in lanes: the singular values of X go to
// 1, its singular vectors stay. Two half products and one whole one a step. X^T X and its square are exactly symmetric.
#pragma once
#include <utility>

#include "lanes.h"
#include "otkd_fast/polar_schedule.h"
#include "panels.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// X (n, m), n >= m, and two buffers of its size; the result changes places with the buffers.
template <class T>
struct PolarIteration {
    Panels<T> x, gram, polynomial;
    int64_t n, m;
    double excess = 0;  // |X^T X - I|^2 before the last step

    // gram = X^T X; polynomial = b X^T X + c (X^T X)^2, or b X^T X alone; the diagonal gets a; X <- X polynomial.
    // `inner` is the depth of X^T X, `outer` that of X times the polynomial.
    template <class Inner, class Outer>
    void step(double a, double b, double c, Inner inner, Outer outer, const Team& team, bool measure = false) {
        const Vec<T> linear = splat(static_cast<T>(b)), square = splat(static_cast<T>(c));
        if (c == 0) {
            multiply_symmetric(x, x, polynomial, m, inner, team, [&](Vec<T> sum, int64_t) { return linear * sum; });
        } else {
            multiply_symmetric(x, x, gram, m, inner, team, [](Vec<T> sum, int64_t) { return sum; });
            team.barrier();
            if (measure) excess = squared_norm(gram, m, T(1));
            multiply_symmetric(gram, gram, polynomial, m, FullDepth{m}, team, [&](Vec<T> sum, int64_t at) {
                return square * sum + linear * load(gram.data + at);
            });
        }
        add_to_diagonal(polynomial, m, static_cast<T>(a), team);
        team.barrier();
        multiply(x, polynomial, gram, n, m, outer, team, [](Vec<T> sum, int64_t) { return sum; });
        team.barrier();
        std::swap(x, gram);
    }

    void run(const PolarSchedule& schedule, const Team& team) {
        for (int k = 0; k < schedule.count; ++k) {
            const PolarStep& s = schedule.step[k];
            step(s.a, s.b, s.c, FullDepth{n}, FullDepth{m}, team);
        }
    }

    // For a square upper triangular F: gram = F^T F, polynomial = its square, *bound >= |F|, from the norm of the latter.
    void begin(const Panels<T>& f, double* bound, const Team& team) {
        const auto keep = [](Vec<T> sum, int64_t) { return sum; };
        if (team.rank == 0) {
            for (const Panels<T>& piece : {gram, polynomial, x}) std::memset(piece.data, 0, panels_of<T>(m) * piece.stride() * sizeof(T));
        }
        team.barrier();
        multiply_symmetric(f, f, gram, m, UpperDepth{m}, team, keep);
        team.barrier();
        multiply_symmetric(gram, gram, polynomial, m, FullDepth{m}, team, keep);
        team.barrier();
        if (team.rank == 0) *bound = kNormMargin * std::sqrt(std::sqrt(std::sqrt(squared_norm(polynomial, m, T(0)))));
        team.barrier();
    }

    // x = polar(f) after begin(), whose products make the first step. `settle`: the last step again until X^T X was close enough to I.
    void run(const Panels<T>& f, const PolarSchedule& schedule, double bound, bool settle, const Team& team) {
        const PolarStep& first = schedule.step[0];
        const PolarStep& last = schedule.step[schedule.count - 1];
        const double t = first.top / bound;
        combine(t * first.a, t * t * t * first.b, t * t * t * t * t * first.c, team);
        multiply(f, polynomial, x, m, m, LowerDepth{m}, team, [](Vec<T> sum, int64_t) { return sum; });
        team.barrier();
        for (int k = 1; k < schedule.count; ++k) {
            const PolarStep& s = schedule.step[k];
            step(s.a, s.b, s.c, FullDepth{n}, FullDepth{m}, team, k + 1 == schedule.count);
        }
        for (int extra = 0; settle && extra < kMostExtra && !(excess <= kSettled); ++extra) {
            step(last.a, last.b, last.c, FullDepth{n}, FullDepth{m}, team, true);
        }
    }

    // The cubic step of Newton and Schulz: an error e of a singular value becomes 1.5 e^2.
    void refine(const Team& team) { step(1.5, -0.5, 0, FullDepth{n}, FullDepth{m}, team); }

  private:
    static constexpr int kMostExtra = 12;
    // |X^T X - I|^2 from which on an error e of a singular value, at most half the root of this, becomes 2.5 e^3
    static constexpr double kSettled = sizeof(T) == sizeof(float) ? 1e-4 : 1e-10;

    // polynomial = c polynomial + b gram + a I; the caller waits for the team after it has read it
    void combine(double a, double b, double c, const Team& team) {
        const Vec<T> linear = splat(static_cast<T>(b)), square = splat(static_cast<T>(c));
        for (int64_t p = team.rank; p < panels_of<T>(m); p += team.size) {
            T* out = polynomial.data + p * polynomial.stride();
            const T* in = gram.data + p * gram.stride();
            for (int64_t k = 0; k < m * kPanel<T>; k += width<T>) store(out + k, square * load(out + k) + linear * load(in + k));
            for (int64_t i = p * kPanel<T>; i < m && i < (p + 1) * kPanel<T>; ++i) polynomial.at(i, i) += static_cast<T>(a);
        }
        team.barrier();
    }
};

// The same, a matrix in every lane.
template <class T>
struct LanePolarIteration {
    Lanes<T> x, gram, polynomial;
    int64_t n, m;

    // Coefficients of each lane; (1, 0, 0) leaves its x as it is, bit for bit.
    void step(Vec<T> a, Vec<T> b, Vec<T> c) {
        multiply_symmetric(x, x, gram, m, n, [](Vec<T> sum, int64_t, int64_t) { return sum; });
        multiply_symmetric(gram, gram, polynomial, m, m, [&](Vec<T> sum, int64_t i, int64_t j) { return c * sum + b * gram.get(i, j); });
        finish(a);
    }

    void run(const PolarSchedule& schedule) {
        for (int k = 0; k < schedule.count; ++k) {
            const PolarStep& s = schedule.step[k];
            step(splat(static_cast<T>(s.a)), splat(static_cast<T>(s.b)), splat(static_cast<T>(s.c)));
        }
    }

    void refine() {
        multiply_symmetric(x, x, polynomial, m, n, [&](Vec<T> sum, int64_t, int64_t) { return T(-0.5) * sum; });
        finish(splat(T(1.5)));
    }

  private:
    // x (polynomial + constant I)
    void finish(Vec<T> constant) {
        for (int64_t i = 0; i < m; ++i) polynomial.set(i, i, polynomial.get(i, i) + constant);
        multiply(x, polynomial, gram, n, m, m, [](Vec<T> sum, int64_t, int64_t) { return sum; });
        std::swap(x, gram);
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

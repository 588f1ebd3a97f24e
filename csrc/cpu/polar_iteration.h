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

    // gram = X^T X; polynomial = b X^T X + c (X^T X)^2, or b X^T X alone; the diagonal gets a; X <- X polynomial.
    // `inner` is the depth of X^T X, `outer` that of X times the polynomial.
    template <class Inner, class Outer>
    void step(double a, double b, double c, Inner inner, Outer outer, const Team& team) {
        const Vec<T> linear = splat(static_cast<T>(b)), square = splat(static_cast<T>(c));
        if (c == 0) {
            multiply_symmetric(x, x, polynomial, m, inner, team, [&](Vec<T> sum, int64_t) { return linear * sum; });
        } else {
            multiply_symmetric(x, x, gram, m, inner, team, [](Vec<T> sum, int64_t) { return sum; });
            team.barrier();
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

    // X upper triangular, to begin with, or any
    void run(const PolarSchedule& schedule, bool upper, const Team& team) {
        for (int k = 0; k < schedule.count; ++k) {
            const PolarStep& s = schedule.step[k];
            if (k == 0 && upper) step(s.a, s.b, s.c, UpperDepth{n}, LowerDepth{m}, team);
            else step(s.a, s.b, s.c, FullDepth{n}, FullDepth{m}, team);
        }
    }

    // The cubic step of Newton and Schulz: an error e of a singular value becomes 1.5 e^2.
    void refine(const Team& team) { step(1.5, -0.5, 0, FullDepth{n}, FullDepth{m}, team); }
};

// The same, a matrix in every lane.
template <class T>
struct LanePolarIteration {
    Lanes<T> x, gram, polynomial;
    int64_t n, m;

    void step(double a, double b, double c) {
        const Vec<T> constant = splat(static_cast<T>(a)), linear = splat(static_cast<T>(b)), square = splat(static_cast<T>(c));
        if (c == 0) {
            multiply_symmetric(x, x, polynomial, m, n, [&](Vec<T> sum, int64_t, int64_t) { return linear * sum; });
        } else {
            multiply_symmetric(x, x, gram, m, n, [](Vec<T> sum, int64_t, int64_t) { return sum; });
            multiply_symmetric(gram, gram, polynomial, m, m, [&](Vec<T> sum, int64_t i, int64_t j) {
                return square * sum + linear * gram.get(i, j);
            });
        }
        for (int64_t i = 0; i < m; ++i) polynomial.set(i, i, polynomial.get(i, i) + constant);
        multiply(x, polynomial, gram, n, m, m, [](Vec<T> sum, int64_t, int64_t) { return sum; });
        std::swap(x, gram);
    }

    void run(const PolarSchedule& schedule) {
        for (int k = 0; k < schedule.count; ++k) step(schedule.step[k].a, schedule.step[k].b, schedule.step[k].c);
    }

    void refine() { step(1.5, -0.5, 0); }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

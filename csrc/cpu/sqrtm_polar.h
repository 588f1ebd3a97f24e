// Root of a semidefinite matrix by products: A = F^T F (cholesky.h, F upper triangular up to the order of the pivots),
//
//   U = polar(F):   A^(1/2) = U^T F,   A^(-1/2) = F^-1 U
//
// An estimate of |F^-1| tells how small the singular values of F are, and so how many steps the polar iteration takes; a step is added
// where the last but one has not come close enough to an orthogonal matrix. About (4 k + 1) n^3 operations for k steps, k = 6 at condition
// 1e4. F and its order come from one thread, everything else is shared by the team.
#pragma once
#include "otkd_fast/sqrtm.h"
#include "polar_iteration.h"
#include "triangular.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class T>
struct PolarRoot {
    int64_t n;
    Panels<T> factor, inverse, x, gram, polynomial;
    Cholesky<T> cholesky;
    double* facts;  // what rank 0 tells the team: Definiteness, bound of |F|, estimate of the smallest singular value of F

    PolarRoot(int64_t size, Arena& memory) : n(size), cholesky(size, memory), facts(memory.take<double>(3)) {
        const int64_t rows = round_up(n, kPanel<T>);
        for (Panels<T>* piece : {&factor, &inverse, &x, &gram, &polynomial}) *piece = {memory.take<T>(rows * rows), rows};
    }

    // polynomial = the root of 2^-exponent A or, of a definite one, its inverse, in the order of the pivots
    Definiteness solve(const T* a, int exponent, bool inverse_root, const Team& team) {
        factorize(a, exponent, team);
        const Definiteness kind = static_cast<Definiteness>(static_cast<int>(facts[0]));
        if (inverse_root && kind != Definiteness::definite) return kind;
        PolarIteration<T> it{x, gram, polynomial, n, n};
        it.begin(factor, facts + 1, team);
        const PolarSchedule schedule = polar_schedule_for<T>(facts[2] / facts[1]);
        it.run(factor, schedule, facts[1], kind == Definiteness::definite, team);
        const auto keep = [](Vec<T> sum, int64_t) { return sum; };
        if (inverse_root) multiply_symmetric(inverse, it.x, polynomial, n, LowerDepth{n}, team, keep);
        else multiply_symmetric(it.x, factor, polynomial, n, UpperDepth{n}, team, keep);
        team.barrier();
        return kind;
    }

    // Of the eigenvalues of the root of 2^-exponent A; the lower one is 0 where A is not definite, or so small that the steps leave its
    // direction of U unfinished: that does not matter to the root, but to its inverse and its gradient
    double upper_bound() const { return facts[1]; }
    double lower_bound() const { return facts[2] >= kServed * facts[1] ? facts[2] : 0.0; }

    // out (n, n) = the result times `scale`, in the order of A
    void store(T* out, T scale) const {
        const int64_t* order = cholesky.order;
        for (int64_t j = 0; j < n; ++j) {
            const T* column = polynomial.data + polynomial.offset(0, j);
            for (int64_t i = 0; i < n; ++i) out[order[j] * n + order[i]] = column[i * kPanel<T>] * scale;
        }
    }

  private:
    // Singular value of F over |F| that the schedule and the steps after it, each of at least 1.8 there, take to 1
    static constexpr double kServed = polar_schedule<T>().step->lowest / 1000;

    void factorize(const T* a, int exponent, const Team& team) {
        if (team.rank == 0) {
            cholesky.read(a, exponent, 0);
            facts[0] = static_cast<double>(cholesky.factorize());
            store_factor(cholesky, factor);
        }
        team.barrier();
        const bool definite = facts[0] == static_cast<double>(Definiteness::definite);
        if (definite) invert_transposed(factor, inverse, n, team);
        team.barrier();
        if (team.rank == 0) facts[2] = definite ? 1 / norm_estimate(inverse, n, gram.data) : 0.0;
        team.barrier();
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

// Eigenvalues and eigenvectors of one symmetric matrix of any size by one block, in double: one-sided Jacobi rotations of the rows of
// A + 2 |A|_F I, which end as eigenvectors times eigenvalues of it; the shift keeps these away from 0. A pair of rows a warp, all
// disjoint pairs of a round at once; 3 n^3 multiply-adds a sweep, 6 to 10 sweeps. For the matrices that products do not serve.
#pragma once
#include "cholesky_block.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kJacobiSweeps = 30;
constexpr double kJacobiOrthogonal = 4e-16, kJacobiDone = 4e-15;  // cosines, as in sqrtm.cu

struct BlockJacobi {
    int n;
    double* rows;     // (n, n): eigenvectors at the end
    double* values;   // (n,)
    double* scratch;  // 32
    double norm = 0;  // |A|_F

    static int64_t shared_bytes(int64_t n) { return (n + 32) * int64_t{sizeof(double)}; }
    OTKD_DEVICE BlockJacobi(int64_t size, unsigned char* shared, double* memory)
        : n(static_cast<int>(size)), rows(memory), values(reinterpret_cast<double*>(shared)), scratch(values + n) {}

    template <class T>
    OTKD_DEVICE void solve(const SymmetricPart<T>& matrix) {
        double squares = 0;
        for (int64_t e = thread_id(); e < static_cast<int64_t>(n) * n; e += kFactorThreads) {
            rows[e] = matrix(e / n, e % n);
            squares += rows[e] * rows[e];
        }
        norm = sqrt(block_sum(squares, scratch));
        const double shift = 2 * norm;
        for (int i = thread_id(); i < n; i += kFactorThreads) rows[static_cast<int64_t>(i) * n + i] += shift;
        barrier();
        for (int sweep = 0; sweep < kJacobiSweeps; ++sweep) {
            if (!rotate_all()) break;
        }
        OTKD_ROLLED
        for (int k = warp_id(); k < n; k += kFactorThreads / 32) {
            double* row = rows + static_cast<int64_t>(k) * n;
            double sum = 0;
            for (int j = lane_id(); j < n; j += 32) sum += row[j] * row[j];
            const double length = sqrt(warp_sum(sum));
            for (int j = lane_id(); j < n; j += 32) row[j] = length > 0 ? row[j] / length : row[j];
            if (lane_id() == 0) values[k] = length - shift;
        }
        barrier();
    }

  private:
    // One sweep, n - 1 rounds (n for an odd n, where one row rests in each); whether any pair was not orthogonal.
    OTKD_DEVICE bool rotate_all() {
        const int places = n + n % 2;
        bool again = false;
        OTKD_ROLLED
        for (int round = 0; round < places - 1; ++round) {
            OTKD_ROLLED
            for (int pair = warp_id(); pair < places / 2; pair += kFactorThreads / 32) {
                const int one = pair == 0 ? places - 1 : (round + pair) % (places - 1);
                const int two = pair == 0 ? round : (round + places - 1 - pair) % (places - 1);
                const int p = smaller(one, two), q = larger(one, two);
                if (q < n) again |= rotate(rows + static_cast<int64_t>(p) * n, rows + static_cast<int64_t>(q) * n);
            }
            barrier();
        }
        return barrier_any(again);
    }

    OTKD_DEVICE bool rotate(double* left, double* right) const {
        double own = 0, its = 0, gamma = 0;
        for (int j = lane_id(); j < n; j += 32) {
            own += left[j] * left[j];
            its += right[j] * right[j];
            gamma += left[j] * right[j];
        }
        own = warp_sum(own);
        its = warp_sum(its);
        gamma = warp_sum(gamma);
        const double limit = own * its, gap = its - own;
        if (!(gamma * gamma > kJacobiOrthogonal * kJacobiOrthogonal * limit)) return false;
        const double size = sqrt(gap * gap + 4 * gamma * gamma), tangent = 2 * gamma / (gap < 0 ? gap - size : gap + size);
        const double cosine = 1 / sqrt(1 + tangent * tangent), sine = tangent * cosine;
        for (int j = lane_id(); j < n; j += 32) {
            const double a = left[j], b = right[j];
            left[j] = cosine * a - sine * b;
            right[j] = cosine * b + sine * a;
        }
        return gamma * gamma > kJacobiDone * kJacobiDone * limit;
    }
};

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

// Eigenvalues and eigenvectors of one symmetric matrix of any size by one block, in double: one-sided Jacobi rotations of the rows of
// A + 2 |A|_F I, which end as eigenvectors times eigenvalues of it; the shift keeps these away from 0. A pair of rows a warp, all
// disjoint pairs of a round at once; 2.5 n^3 multiply-adds a sweep, 6 to 10 sweeps. Eigenvalues as Rayleigh quotients of A: the shift does
// not show in them. For the matrices that products do not serve.
#pragma once
#include "cholesky_block.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kJacobiThreads = 256, kJacobiSweeps = 30;
constexpr double kJacobiOrthogonal = 4e-16, kJacobiDone = 4e-15;  // cosines, as in sqrtm.cu

struct BlockJacobi {
    int n;
    double* rows;     // (n, n): eigenvectors at the end
    double* values;   // (n,): squares of the rows, then eigenvalues
    double* scratch;  // 32
    double norm = 0;  // |A|_F

    static int64_t shared_bytes(int64_t n) { return (n + 32) * int64_t{sizeof(double)}; }
    OTKD_DEVICE BlockJacobi(int64_t size, unsigned char* shared, double* memory)
        : n(static_cast<int>(size)), rows(memory), values(reinterpret_cast<double*>(shared)), scratch(values + n) {}

    template <class T>
    OTKD_DEVICE void solve(const SymmetricPart<T>& matrix) {
        double squares = 0;
        for (int64_t e = thread_id(); e < static_cast<int64_t>(n) * n; e += kJacobiThreads) {
            rows[e] = matrix(e / n, e % n);
            squares += rows[e] * rows[e];
        }
        norm = sqrt(block_sum(squares, scratch));
        const double shift = 2 * norm;
        for (int i = thread_id(); i < n; i += kJacobiThreads) rows[static_cast<int64_t>(i) * n + i] += shift;
        barrier();
        for (int sweep = 0; sweep < kJacobiSweeps; ++sweep) {
            measure();
            if (!rotate_all()) break;
        }
        measure();
        OTKD_ROLLED
        for (int k = warp_id(); k < n; k += kJacobiThreads / 32) {
            double* row = rows + static_cast<int64_t>(k) * n;
            const double length = sqrt(values[k]);
            for (int j = lane_id(); j < n; j += 32) row[j] = length > 0 ? row[j] / length : row[j];
        }
        barrier();
        OTKD_ROLLED
        for (int k = warp_id(); k < n; k += kJacobiThreads / 32) {
            const double* row = rows + static_cast<int64_t>(k) * n;
            double sum = 0;
            for (int i = 0; i < n; ++i) {
                for (int j = lane_id(); j < n; j += 32) sum += row[i] * matrix(i, j) * row[j];
            }
            sum = warp_sum(sum);
            if (lane_id() == 0) values[k] = sum;
        }
        barrier();
    }

  private:
    OTKD_DEVICE void measure() {
        OTKD_ROLLED
        for (int k = warp_id(); k < n; k += kJacobiThreads / 32) {
            const double* row = rows + static_cast<int64_t>(k) * n;
            double sum = 0;
            for (int j = lane_id(); j < n; j += 32) sum += row[j] * row[j];
            sum = warp_sum(sum);
            if (lane_id() == 0) values[k] = sum;
        }
        barrier();
    }

    // One sweep, n - 1 rounds (n for an odd n, where one row rests in each); whether any pair was not orthogonal.
    OTKD_DEVICE bool rotate_all() {
        const int places = n + n % 2;
        bool again = false;
        OTKD_ROLLED
        for (int round = 0; round < places - 1; ++round) {
            OTKD_ROLLED
            for (int pair = warp_id(); pair < places / 2; pair += kJacobiThreads / 32) {
                const int one = pair == 0 ? places - 1 : (round + pair) % (places - 1);
                const int two = pair == 0 ? round : (round + places - 1 - pair) % (places - 1);
                const int p = smaller(one, two), q = larger(one, two);
                if (q < n) again |= rotate(p, q);
            }
            barrier();
        }
        return barrier_any(again);
    }

    // The squares of the two rows are those of the last sweep, carried on: they stay within a factor of 9 of each other.
    OTKD_DEVICE bool rotate(int p, int q) {
        double *left = rows + static_cast<int64_t>(p) * n, *right = rows + static_cast<int64_t>(q) * n, gamma = 0;
        for (int j = lane_id(); j < n; j += 32) gamma += left[j] * right[j];
        gamma = warp_sum(gamma);
        const double own = shuffle(lane_id() == 0 ? values[p] : 0.0, 0), its = shuffle(lane_id() == 0 ? values[q] : 0.0, 0);
        const double limit = own * its, gap = its - own;
        if (!(gamma * gamma > kJacobiOrthogonal * kJacobiOrthogonal * limit)) return false;
        const double size = sqrt(gap * gap + 4 * gamma * gamma), tangent = 2 * gamma / (gap < 0 ? gap - size : gap + size);
        const double cosine = 1 / sqrt(1 + tangent * tangent), sine = tangent * cosine;
        for (int j = lane_id(); j < n; j += 32) {
            const double a = left[j], b = right[j];
            left[j] = cosine * a - sine * b;
            right[j] = cosine * b + sine * a;
        }
        if (lane_id() == 0) {  // the only one to read and write them
            values[p] = own - tangent * gamma;
            values[q] = its + tangent * gamma;
        }
        return gamma * gamma > kJacobiDone * kJacobiDone * limit;
    }
};

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

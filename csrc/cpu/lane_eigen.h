// Eigenvalues and eigenvectors of symmetric matrices in double, one in each lane: tridiagonal form (lane_tridiagonal.h), then implicit QL
// iterations with Wilkinson's shift (Golub and Van Loan, Matrix Computations, 8.3).
//
// Each lane has its own window of the tridiagonal matrix; a sweep goes over the union of the windows, with the identity for a rotation
// outside a lane's own. A rotation needs the one before it, about 60 cycles: kGroups vectors of matrices take turns. The rotations of kSweeps
// sweeps are kept and then applied to kRows rows of the vectors at a time, which carry one column in registers. About 6 n^3 operations
// beside the form's. The bits of a lane depend neither on its neighbours nor on where it lies.
#pragma once
#include <utility>

#include "arena.h"
#include "lane_tridiagonal.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

struct LaneEigen {
    static constexpr int kGroups = 2;
    static constexpr int64_t kMatrices = kGroups * width<double>;
    static constexpr int kRows = 4, kSweeps = 2;
    static constexpr int64_t kMostSweeps = 60;  // an eigenvalue; two are usual
    typedef Vec<double> V;
    typedef VecInt<double> Index;

    int64_t n;
    double negligible;  // couplings of this size relative to the matrix are 0

    // The window of each lane: it seeks eigenvalue `first`, n - 1 when it has all, and its block ends at `end`.
    struct Group {
        Lanes<double> q;              // (n, n): the matrix, then its eigenvectors in columns
        double *diagonal, *coupling;  // (n,): the diagonal is the eigenvalues at last
        double *cosine, *sine;        // (kSweeps, n): of the rotation of i and i + 1
        V level;
        int64_t first[width<double>], end[width<double>];
    } groups[kGroups];
    double* scratch;  // (4, n)

    LaneEigen(int64_t size, double negligible_size, Arena& memory) : n(size), negligible(negligible_size) {
        for (Group& group : groups) {
            group.q = {memory.take<double>(n * n * width<double>), n};
            group.diagonal = memory.take<double>(n * width<double>);
            group.coupling = memory.take<double>(n * width<double>);
            group.cosine = memory.take<double>(kSweeps * n * width<double>);
            group.sine = memory.take<double>(kSweeps * n * width<double>);
        }
        scratch = memory.take<double>(4 * n * width<double>);
    }

    // Replaces each q, finite and symmetric (its upper triangle counts), and makes the diagonals. False where a lane did not converge.
    bool solve() {
        const int64_t apart = n * width<double>;
        for (Group& group : groups) {
            TridiagonalForm form{n, group.q, group.diagonal, group.coupling, scratch, scratch + apart, scratch + 2 * apart, scratch + 3 * apart};
            form.reduce();
            form.make_vectors();
            reverse(group);
            V size = {};
            for (int64_t k = 0; k < n; ++k) size = max<double>(size, abs<double>(entry_at(group.diagonal, k)) + abs<double>(entry_at(group.coupling, k)));
            group.level = negligible * size;
            for (int64_t& first : group.first) first = 0;
        }
        int64_t begin[kSweeps], end[kSweeps];
        for (int64_t sweep = 0; sweep < kMostSweeps * n; sweep += kSweeps) {
            int count = 0;
            for (; count < kSweeps && find_windows(begin[count], end[count]); ++count) make_rotations(count, begin[count], end[count]);
            for (Group& group : groups) apply(group, count, begin, end);
            if (count < kSweeps) return true;
        }
        return false;
    }

  private:
    // The form from its other end: reduced from the top it has what is large there, and sweeps upwards lose least of what is
    // small if they find that first.
    void reverse(const Group& group) const {
        const auto swap = [](double* p, int64_t i, int64_t j) {
            const V one = entry_at(p, i);
            put_at(p, i, entry_at(p, j));
            put_at(p, j, one);
        };
        for (int64_t i = 0; i < n / 2; ++i) swap(group.diagonal, i, n - 1 - i);
        for (int64_t i = 0; i < (n - 1) / 2; ++i) swap(group.coupling, i, n - 2 - i);
        for (int64_t row = 0; row < n; ++row) {
            for (int64_t k = 0; k < n / 2; ++k) swap(group.q.data + row * n * width<double>, k, n - 1 - k);
        }
    }

    // False if all lanes are done; else the union [begin, end] of the windows.
    bool find_windows(int64_t& begin, int64_t& end) {
        begin = n;
        end = 0;
        for (Group& group : groups) {
            Index first, last = Index{} + (n - 1);
            std::memcpy(&first, group.first, sizeof first);
            for (int64_t k = n - 2; k >= 0; --k) {
                const V coupling = entry_at(group.coupling, k);
                const Index zero = abs<double>(coupling) <= group.level;
                put_at(group.coupling, k, zero ? V{} : coupling);
                last = zero & (first <= k) ? Index{} + k : last;
            }
            std::memcpy(group.end, &last, sizeof last);
            for (int l = 0; l < width<double>; ++l) {
                int64_t &lo = group.first[l], &hi = group.end[l];
                while (lo < n - 1 && hi == lo) {
                    ++lo;
                    for (hi = lo; hi < n - 1 && group.coupling[hi * width<double> + l] != 0;) ++hi;
                }
                if (lo >= n - 1) continue;
                begin = lo < begin ? lo : begin;
                end = hi > end ? hi : end;
            }
        }
        return begin < end;
    }

    // What a sweep carries from a rotation to the next.
    struct Chase {
        Index first, end;
        V g, s, c, p;
    };

    // One QL sweep of every lane in its window.
    void make_rotations(int place, int64_t begin, int64_t end) {
        Chase chases[kGroups];
        for (int k = 0; k < kGroups; ++k) {
            std::memcpy(&chases[k].first, groups[k].first, sizeof(Index));
            std::memcpy(&chases[k].end, groups[k].end, sizeof(Index));
            chases[k].g = start(groups[k]);
            chases[k].s = chases[k].c = splat(1.0);
            chases[k].p = V{};
        }
        for (int64_t i = end - 1; i >= begin; --i) {
            for (int k = 0; k < kGroups; ++k) rotation(groups[k], chases[k], place * n + i, i);
        }
        for (int k = 0; k < kGroups; ++k) {
            Group& group = groups[k];
            for (int l = 0; l < width<double>; ++l) {
                const int64_t lo = group.first[l], hi = group.end[l];
                if (lo >= n - 1) continue;
                group.diagonal[lo * width<double> + l] -= chases[k].p[l];
                group.coupling[lo * width<double> + l] = chases[k].g[l];
                group.coupling[hi * width<double> + l] = 0;
            }
        }
    }

    OTKD_INLINE void rotation(const Group& group, Chase& chase, int64_t at, int64_t i) const {
        const V zero = {}, one = splat(1.0);
        const Index active = (chase.first <= i) & (chase.end > i);
        const V e = entry_at(group.coupling, i), next = entry_at(group.diagonal, i + 1);
        const V f = chase.s * e, b = chase.c * e, square = f * f + chase.g * chase.g;
        const V inverse = square > zero ? reciprocal_sqrt<double>(square) : zero;
        const V sine = f * inverse, cosine = square > zero ? chase.g * inverse : one;
        const V shifted = next - chase.p;
        const V t = (entry_at(group.diagonal, i) - shifted) * sine + (cosine + cosine) * b;
        const V step = sine * t;
        put_at(group.coupling, i + 1, active ? square * inverse : entry_at(group.coupling, i + 1));
        put_at(group.diagonal, i + 1, active ? shifted + step : next);
        chase.g = active ? cosine * t - b : chase.g;
        chase.s = active ? sine : chase.s;
        chase.c = active ? cosine : chase.c;
        chase.p = active ? step : chase.p;
        put_at(group.sine, at, active ? sine : zero);
        put_at(group.cosine, at, active ? cosine : one);
    }

    // The last diagonal entry of each window less the shift of its lane
    V start(const Group& group) const {
        V result = {};
        for (int l = 0; l < width<double>; ++l) {
            const auto at = [l](const double* p, int64_t i) { return p[i * width<double> + l]; };
            const int64_t lo = group.first[l];
            if (lo >= n - 1) continue;
            const double e = at(group.coupling, lo), here = at(group.diagonal, lo);
            const double half = (at(group.diagonal, lo + 1) - here) / (2 * e), root = std::sqrt(half * half + 1);
            result[l] = at(group.diagonal, group.end[l]) - here + e / (half < 0 ? half - root : half + root);
        }
        return result;
    }

    void apply(const Group& group, int count, const int64_t* begin, const int64_t* end) const {
        int64_t i = 0;
        for (; i + kRows <= n; i += kRows) {
            for (int place = 0; place < count; ++place) rotate_rows<kRows>(group, i, place, begin[place], end[place]);
        }
        for (; i < n; ++i) {
            for (int place = 0; place < count; ++place) rotate_rows<1>(group, i, place, begin[place], end[place]);
        }
    }

    // The rotations of a sweep on the columns of rows [i, i + kCount).
    template <int kCount>
    OTKD_INLINE void rotate_rows(const Group& group, int64_t i, int place, int64_t begin, int64_t end) const {
        const Lanes<double>& q = group.q;
        V carried[kCount];
        for (int r = 0; r < kCount; ++r) carried[r] = q.get(i + r, end);
        for (int64_t k = end - 1; k >= begin; --k) {
            const V s = entry_at(group.sine, place * n + k), c = entry_at(group.cosine, place * n + k);
            for (int r = 0; r < kCount; ++r) {
                const V other = q.get(i + r, k);
                q.set(i + r, k + 1, s * other + c * carried[r]);
                carried[r] = c * other - s * carried[r];
            }
        }
        for (int r = 0; r < kCount; ++r) q.set(i + r, begin, carried[r]);
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

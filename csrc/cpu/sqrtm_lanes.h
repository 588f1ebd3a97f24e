// Roots (not inverse ones) of small semidefinite matrices by products, one in each lane, as sqrtm_polar.h has them: without
// a gradient faster than the rotations (sqrtm_jacobi.h) from d = 12 or so on. Uses their factor F of A = F^T F and their memory.
//
// The Frobenius norm of the inverse of F F^T says how many steps of the schedule a lane needs. The others are the identity for it: its bits
// do not depend on its neighbours. About 2 (k + 1) n^3 multiply-adds for k steps.
#pragma once
#include <utility>

#include "polar_iteration.h"
#include "sqrtm_jacobi.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr int64_t kLaneRoot = 24;

template <class T>
struct LaneRoot {
    int64_t n;
    JacobiRoot<T> work;
    LaneRoot(int64_t size, Arena& memory) : n(size), work(size, memory) {}

    // Matrices [begin, begin + count) of the batch.
    void forward(const SqrtmArgs<T>& args, int64_t begin, int64_t count) {
        const LaneScale<T> scale = work.factorize(args, begin, count);
        const Vec<T> zero = {}, upper = norm_bound();
        Vec<T> lower = lowest();
        // of smaller ones the schedule does not take the direction to the end
        lower = work.definite & (lower >= static_cast<T>(polar_schedule<T>().step->lowest) * upper) ? lower : zero;
        LanePolarIteration<T> it{work.a, work.result, Lanes<T>{reinterpret_cast<T*>(work.scratch), n}, n, n};
        for (int64_t k = 0; k < n * n; ++k) store(it.x.data + k * width<T>, load(work.basis.data + k * width<T>));
        iterate(it, upper, lower);
        Vec<T> head, tail;
        scale.back(1, head, tail);
        multiply_symmetric(it.x, work.basis, it.gram, n, n,
                           [&](Vec<T> sum, int64_t, int64_t) { return sum * head * tail + scale.broken; });
        store_lanes(it.gram.data, n * n, count, n * n, args.root + begin * n * n);
        const Vec<T> top = upper * head * tail + scale.broken, bottom = lower * head * tail + scale.broken;
        for (int64_t l = 0; l < count; ++l) {
            args.aux[2 * (begin + l)] = top[l];
            args.aux[2 * (begin + l) + 1] = bottom[l];
        }
    }

  private:
    // Of F: |F|^2 = |A| is at most the Frobenius norm and the largest row sum of A.
    Vec<T> norm_bound() const {
        Vec<T> squares = {}, most = {};
        for (int64_t i = 0; i < n; ++i) {
            Vec<T> row = {};
            for (int64_t j = 0; j < n; ++j) {
                const Vec<T> entry = abs<T>(work.a.get(i, j));
                squares += entry * entry;
                row += entry;
            }
            most = max<T>(most, row);
        }
        return static_cast<T>(kNormMargin) * sqrt<T>(min<T>(sqrt<T>(squares), most));
    }

    // Lower bound of the smallest singular value s of an upper triangular F: |(F F^T)^-1| >= s^-2, Frobenius norm. 0 where a column v of
    // F^-1 is a direction in which A may be rounding: v^T A v = 1 is not above kQuotient units of v^T diag(A) v. Uses result and scratch.
    Vec<T> lowest() {
        const Lanes<T>&f = work.basis, &inverse = work.result;
        const Lanes<T> product{reinterpret_cast<T*>(work.scratch), n};
        const Vec<T> zero = {}, one = splat(T(1));
        for (int64_t i = n - 1; i >= 0; --i) {
            const Vec<T> diagonal = f.get(i, i), reciprocal = one / (diagonal == zero ? one : diagonal);
            for (int64_t j = 0; j < n; ++j) {
                Vec<T> sum = i == j ? one : zero;
                for (int64_t k = i + 1; k <= j; ++k) sum -= f.get(i, k) * inverse.get(k, j);
                inverse.set(i, j, sum * reciprocal);
            }
        }
        Vec<T> squares = {}, most = {};
        for (int64_t j = 0; j < n; ++j) {
            Vec<T> sum = {};
            for (int64_t i = 0; i <= j; ++i) sum += inverse.get(i, j) * inverse.get(i, j) * work.a.get(i, i);
            most = max<T>(most, sum);
        }
        multiply_symmetric(inverse, inverse, product, n, n, [](Vec<T> sum, int64_t, int64_t) { return sum; });
        for (int64_t k = 0; k < n * n; ++k) squares += load(product.data + k * width<T>) * load(product.data + k * width<T>);
        const VecInt<T> sure = most * static_cast<T>(kQuotient<T> * std::numeric_limits<T>::epsilon()) < one;
        return sure ? T(0.99) / sqrt<T>(sqrt<T>(squares)) : zero;
    }

    // it.x = its polar factor; each lane starts where the rest of the schedule serves its singular values.
    void iterate(LanePolarIteration<T>& it, Vec<T> upper, Vec<T> lower) const {
        const PolarSchedule all = polar_schedule<T>();
        int skipped[width<T>], least = all.count, most = 0;
        Vec<T> factor;
        for (int l = 0; l < width<T>; ++l) {
            const PolarSchedule own = polar_schedule_for<T>(upper[l] > 0 ? lower[l] / upper[l] : 1);
            skipped[l] = all.count - own.count;
            least = skipped[l] < least ? skipped[l] : least;
            most = skipped[l] > most ? skipped[l] : most;
            factor[l] = static_cast<T>(upper[l] > 0 ? own.step->top / upper[l] : 0);
        }
        for (int64_t k = 0; k < n * n; ++k) store(it.x.data + k * width<T>, load(it.x.data + k * width<T>) * factor);
        for (int k = least; k < all.count; ++k) {
            const PolarStep& step = all.step[k];
            Vec<T> a = splat(static_cast<T>(step.a)), b = splat(static_cast<T>(step.b)), c = splat(static_cast<T>(step.c));
            for (int l = 0; most > k && l < width<T>; ++l) {
                if (skipped[l] <= k) continue;
                a[l] = 1;
                b[l] = c[l] = 0;
            }
            it.step(a, b, c);
        }
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

// Moments of one window that is a row of memory (inner = 1, one cell), and their adjoint; moments.cpp has the formulas. Lanes are positions
// while x is read, in the order of memory; what is one number a row, is computed for as many rows as a vector has lanes.
#pragma once
#include "otkd_fast/moments.h"
#include "rows.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr int64_t kSumRun = 64;  // terms of a lane that are added in T; what they sum to, in double

template <class T>
struct RowMoments {
    const FeatureMomentsArgs<T>& args;
    int64_t length;

    static bool serves(const FeatureMomentsArgs<T>& a) { return a.inner == 1 && a.cells() == 1 && a.positions() >= width<T>; }
    explicit RowMoments(const FeatureMomentsArgs<T>& a) : args(a), length(a.positions()) {}

    // Features [begin, begin + count), at most as many as lanes.
    void forward(int64_t begin, int64_t count) const {
        const Moments own(*this, begin, count);
        store_up_to(args.mean + begin, load(own.origin) + load(own.mean), count);
        store_up_to(args.std + begin, own.std, count);
    }

    void backward(int64_t begin, int64_t count) const {
        const Moments own(*this, begin, count);
        T share[width<T>], slope[width<T>];
        const auto incoming = [&](const T* grad) { return grad ? load_up_to(grad + begin, count, T(0)) : Vec<T>{}; };
        store(share, incoming(args.grad_mean) / static_cast<T>(length));
        const Vec<T> of_std = incoming(args.grad_std) / (own.std * static_cast<T>(length - args.unbiased));
        store(slope, own.std == Vec<T>{} ? Vec<T>{} : of_std);
        for (int64_t l = 0; l < count; ++l) {
            const Vec<T> first = splat(own.origin[l]), middle = splat(own.mean[l]), constant = splat(share[l]), factor = splat(slope[l]);
            const T* row = args.x + (begin + l) * length;
            T* out = args.grad_x + (begin + l) * length;
            for_vectors<T>(0, length, [&](int64_t p, int64_t some) {
                store_up_to(out + p, constant + factor * ((load_up_to(row + p, some, T(0)) - first) - middle), some);
            });
        }
    }

  private:
    typedef double Wide __attribute__((vector_size(width<T> * sizeof(double))));

    // First position of each row, mean of the deviations from that, standard deviation; 0 beyond the last row.
    struct Moments {
        T origin[width<T>] = {}, mean[width<T>];
        Vec<T> std;

        Moments(const RowMoments& work, int64_t begin, int64_t count) {
            const T* x = work.args.x + begin * work.length;
            for (int64_t l = 0; l < count; ++l) origin[l] = x[l * work.length];
            const double length = static_cast<double>(work.length);
            store(mean, work.totals(x, count, 1 / length, [&](int64_t l) {
                return [first = splat(origin[l])](Vec<T> entry) { return entry - first; };
            }));
            const Vec<T> variance = work.totals(x, count, 1 / (length - work.args.unbiased), [&](int64_t l) {
                return [first = splat(origin[l]), middle = splat(mean[l])](Vec<T> entry) {
                    const Vec<T> deviation = (entry - first) - middle;
                    return deviation * deviation;
                };
            });
            std = sqrt<T>(variance + static_cast<T>(work.args.eps));
        }
    };

    // factor * sum of term_l(x_p) of each row l; term_l = term_of(l)
    template <class TermOf>
    OTKD_INLINE Vec<T> totals(const T* x, int64_t count, double factor, const TermOf& term_of) const {
        T lanes[width<T>] = {};
        Wide sums = {};
        for (int64_t begin = 0; begin < length; begin += kSumRun * width<T>) {
            const int64_t end = begin + kSumRun * width<T> < length ? begin + kSumRun * width<T> : length;
            for (int64_t l = 0; l < count; ++l) lanes[l] = sum<T>(sum_up(x + l * length, begin, end, term_of(l)));
            sums += __builtin_convertvector(load(lanes), Wide);
        }
        return __builtin_convertvector(sums * factor, Vec<T>);
    }

    // In each lane the sum of term over its positions in [begin, end).
    template <class Term>
    OTKD_INLINE Vec<T> sum_up(const T* row, int64_t begin, int64_t end, const Term& term) const {
        Vec<T> parts[2] = {};
        int64_t p = begin;
        for (; p + 2 * width<T> <= end; p += 2 * width<T>) {
            for (int k = 0; k < 2; ++k) parts[k] += term(load(row + p + k * width<T>));
        }
        if (p + width<T> <= end) {
            parts[0] += term(load(row + p));
            p += width<T>;
        }
        if (p < end) parts[1] += first_lanes<T>(end - p) ? term(load_part(row + p, end - p, T(0))) : Vec<T>{};
        return parts[0] + parts[1];
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

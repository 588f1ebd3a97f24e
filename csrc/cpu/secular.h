// Eigenvalues of D + rho z z^T, D diagonal and rising, rho > 0 and no z 0: the roots of
//
//   f(x) = 1 / rho + sum_i z_i^2 / (d_i - x),   one in each (d_k, d_(k+1)) and one beyond the last d
//
// Each is kept as the distance from the nearer d, so that every d_i - x has all its digits. Between two poles the two halves of the sum are
// replaced by one pole each, which agree with them in value and slope (Bunch, Nielsen, Sorensen, Numer. Math. 31, 1978); what leaves the
// bracket, or does not shrink f, is bisected. The vectors are those of a z' for which the roots found are exact (Gu and Eisenstat, SIAM J.
// Matrix Anal. Appl. 16, 1995): orthogonal to rounding whatever the distances.
#pragma once
#include "arena.h"
#include "simd.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

class Secular {
  public:
    double *d, *z;  // (size,) the input, padded to a vector by `pad`

    Secular(int64_t most, Arena& memory) {
        for (double** piece : {&d, &z, &distance_, &weight_, &ratio_}) *piece = memory.take<double>(round_up(most, kLanes));
        origin_ = memory.take<int64_t>(most);
    }

    // False where a root is not found, which only NaN brings about.
    bool solve(int64_t size, double rho) {
        size_ = size;
        padded_ = round_up(size, kLanes);
        inverse_ = 1 / rho;
        double squares = 0;
        for (int64_t i = 0; i < size; ++i) squares += z[i] * z[i];
        const double beyond = std::fabs(d[0]) + std::fabs(d[size - 1]) + rho * squares;
        for (int64_t i = size; i < padded_; ++i) {
            d[i] = d[size - 1] + 2 * beyond + 1;
            z[i] = 0;
        }
        for (int64_t k = 0; k < size; ++k) {
            if (!find(k, rho * squares)) return false;
        }
        fit();
        return true;
    }

    double value(int64_t k) const { return d[origin_[k]] + distance_[k]; }

    // out (size,), padded: eigenvector k, of length 1
    void vector(int64_t k, double* out) const {
        const V pole = splat(d[origin_[k]]), step = splat(distance_[k]);
        V squares = {};
        for (int64_t i = 0; i < padded_; i += width<double>) {
            const V entry = load(weight_ + i) / ((load(d + i) - pole) - step);
            squares += entry * entry;
            store(out + i, entry);
        }
        const double unit = 1 / std::sqrt(sum<double>(squares));
        for (int64_t i = 0; i < padded_; i += width<double>) store(out + i, load(out + i) * unit);
    }

  private:
    typedef Vec<double> V;
    typedef VecInt<double> Index;
    static constexpr int64_t kLanes = 8;
    static constexpr int kMostSteps = 200;
    static constexpr double kSmall = 4e-15;  // of f, relative to the terms it is summed from

    int64_t size_ = 0, padded_ = 0;
    double inverse_ = 0;  // 1 / rho
    double *distance_, *weight_, *ratio_;
    int64_t* origin_;

    struct Sums {
        double below, below_slope, above, above_slope;  // of the terms up to `split`, of those beyond, and their derivatives
        double value(double inverse) const { return inverse + below + above; }
        double slope() const { return below_slope + above_slope; }
        double size(double inverse) const { return inverse - below + above; }
    };

    Sums evaluate(int64_t split, double pole_at, double step_by) const {
        const V pole = splat(pole_at), step = splat(step_by);
        V sums[2] = {}, slopes[2] = {};
        const int64_t mixed = (split + 1) / width<double> * width<double>;
        const auto add = [&](int64_t i, V& to, V& slope) {
            const V own = load(z + i), term = own / ((load(d + i) - pole) - step);
            to += own * term;
            slope += term * term;
        };
        int64_t i = 0;
        for (; i < mixed; i += width<double>) add(i, sums[0], slopes[0]);
        if (mixed <= split) {
            V value = {}, slope = {}, zero = {};
            add(i, value, slope);
            const Index low = first_lanes<double>(split + 1 - i);
            sums[0] += low ? value : zero;
            slopes[0] += low ? slope : zero;
            sums[1] += low ? zero : value;
            slopes[1] += low ? zero : slope;
            i += width<double>;
        }
        for (; i < padded_; i += width<double>) add(i, sums[1], slopes[1]);
        return {sum<double>(sums[0]), sum<double>(slopes[0]), sum<double>(sums[1]), sum<double>(slopes[1])};
    }

    bool find(int64_t k, double reach) {
        const bool outside = k == size_ - 1;
        origin_[k] = k;
        if (size_ == 1) {
            distance_[k] = reach;
            return true;
        }
        const int64_t split = outside ? k - 1 : k;
        double low = 0, high = outside ? reach : d[k + 1] - d[k], step = outside ? reach : 0.5 * high;
        Sums sums = evaluate(split, d[k], step);
        if (!outside) {
            const double gap = high;
            const bool near = sums.value(inverse_) >= 0;  // the root is in the lower half
            if (!near) origin_[k] = k + 1;
            low = near ? 0 : -0.5 * gap;
            high = near ? 0.5 * gap : 0;
            step = near ? step : -step;
        }
        return approach(k, split, sums, low, high, step);
    }

    // Root k, from `step` on, the distance from its pole, in the bracket (low, high)
    bool approach(int64_t k, int64_t split, Sums sums, double low, double high, double step) {
        const double pole = d[origin_[k]];
        double before = std::numeric_limits<double>::infinity();
        for (int count = 0; count < kMostSteps; ++count) {
            const double value = sums.value(inverse_), size = std::fabs(value);
            (value < 0 ? low : high) = step;
            const bool done = size <= kSmall * (sums.size(inverse_) + std::fabs(step) * sums.slope());
            distance_[k] = step;
            if (done) return true;
            double next = step + correction(sums, (d[split] - pole) - step, (d[split + 1] - pole) - step);
            if (!(next > low && next < high) || (count > 3 && size > 0.5 * before)) next = 0.5 * (low + high);
            if (!(next > low && next < high)) return next == low || next == high;
            before = size;
            step = next;
            sums = evaluate(split, pole, step);
        }
        return false;
    }

    // To the root of c + s / (below - x) + S / (above - x), which agrees with both halves of f at x = 0
    double correction(const Sums& sums, double below, double above) const {
        const double value = sums.value(inverse_), product = below * above;
        const double c = value - below * sums.below_slope - above * sums.above_slope;
        const double a = (below + above) * value - product * sums.slope(), b = product * value;
        const double root = std::sqrt(std::fabs(a * a - 4 * b * c));
        const double step = a <= 0 ? (a - root) / (2 * c) : 2 * b / (a + root);
        return step * value < 0 ? step : -value / sums.slope();
    }

    // weight = the z' whose roots are those found, but for a factor
    void fit() {
        for (int64_t i = 0; i < padded_; ++i) ratio_[i] = 1;
        for (int64_t k = 0; k < size_; ++k) {
            const V pole = splat(d[origin_[k]]), step = splat(distance_[k]), own = splat(d[k]), one = splat(1.0);
            for (int64_t i = 0; i < padded_; i += width<double>) {
                const V here = load(d + i), gap = here - own;
                store(ratio_ + i, load(ratio_ + i) * (((here - pole) - step) / (gap != V{} ? gap : one)));
            }
        }
        for (int64_t i = 0; i < padded_; ++i) weight_[i] = i < size_ ? std::copysign(std::sqrt(std::fabs(ratio_[i])), z[i]) : 0.0;
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

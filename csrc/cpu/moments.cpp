// Means and standard deviations over (overlapping) windows of positions, and their adjoint (reference/moments.py).
//
//   mean_w = sum_{p in w} x_p / |w|,   std_w = sqrt(sum_{p in w} (x_p - mean_w)^2 / (|w| - unbiased) + eps)
//   dx_p = sum_{w with p} gm_w / |w| + gs_w (x_p - mean_w) / ((|w| - unbiased) std_w)       (0 for the second where std_w = 0)
//
// x (outer, positions, inner): a vector holds one position of as many features, each a lane: features beside each other (inner), or, where
// inner is small, features that are transposed as they are read. x is read once from memory; the windows then run over a copy in
// cache. Deviations are taken from the first position of a window, so that a large mean costs no digits and a constant window has a std of 0
// exactly; sums of kSumRun terms in T, sums of those in double. The adjoint keeps nothing: it computes the deviations again.
#include "otkd_fast/moments.h"

#include "arena.h"
#include "lanes.h"
#include "moments_rows.h"
#include "otkd_fast/threads.h"
#include "rows.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr int64_t kParallelWork = 60 * 1000;  // entries of x, about 10 us of one thread

template <class T>
struct MomentsWork {
    const FeatureMomentsArgs<T>& args;
    int64_t positions, cells, per_outer, blocks;
    T *tile, *grad;      // (positions, width)
    T *first, *second;   // (cells, width): mean and std, or their gradients

    MomentsWork(const FeatureMomentsArgs<T>& a, int rank)
        : args(a), positions(a.positions()), cells(a.cells()),
          per_outer(side_by_side() ? (a.inner + width<T> - 1) / width<T> : 0),
          blocks(side_by_side() ? a.outer * per_outer : (a.outer * a.inner + width<T> - 1) / width<T>) {
        Arena memory{a.workspace + rank * (feature_moments_workspace_bytes(a) / a.threads)};
        tile = memory.take<T>(positions * width<T>);
        grad = memory.take<T>(positions * width<T>);
        first = memory.take<T>(cells * width<T>);
        second = memory.take<T>(cells * width<T>);
    }

    void forward(int64_t b) {
        const int64_t count = lanes_of(b);
        read(args.x, positions, b, tile);
        int64_t cell = 0;
        for_cells([&](const int64_t (&begin)[kMomentAxes], const int64_t (&end)[kMomentAxes]) {
            const Window w(*this, begin, end);
            store(first + cell * width<T>, w.origin + w.mean);
            store(second + cell++ * width<T>, w.std);
        });
        write(first, cells, b, count, args.mean);
        write(second, cells, b, count, args.std);
    }

    void backward(int64_t b) {
        const int64_t count = lanes_of(b);
        read(args.x, positions, b, tile);
        std::memset(first, 0, cells * width<T> * sizeof(T));
        std::memset(second, 0, cells * width<T> * sizeof(T));
        if (args.grad_mean) read(args.grad_mean, cells, b, first);
        if (args.grad_std) read(args.grad_std, cells, b, second);
        std::memset(grad, 0, positions * width<T> * sizeof(T));
        int64_t cell = 0;
        for_cells([&](const int64_t (&begin)[kMomentAxes], const int64_t (&end)[kMomentAxes]) {
            const Window w(*this, begin, end);
            const Vec<T> share = load(first + cell * width<T>) / static_cast<T>(w.size);
            const Vec<T> own = load(second + cell++ * width<T>) / (w.std * static_cast<T>(w.size - args.unbiased));
            const Vec<T> slope = w.std == Vec<T>{} ? Vec<T>{} : own;
            w.each(*this, [&](int64_t p) {
                const Vec<T> deviation = (load(tile + p) - w.origin) - w.mean;
                store(grad + p, load(grad + p) + (share + slope * deviation));
            });
        });
        write(grad, positions, b, count, args.grad_x);
    }

  private:
    // Window [begin, end): its first position, mean and standard deviation of the deviations from that.
    struct Window {
        const int64_t *begin, *end;
        int64_t size;
        Vec<T> origin, mean, std;

        Window(const MomentsWork& work, const int64_t (&from)[kMomentAxes], const int64_t (&to)[kMomentAxes])
            : begin(from), end(to), size((to[0] - from[0]) * (to[1] - from[1]) * (to[2] - from[2])) {
            origin = load(work.tile + ((from[0] * work.args.size[1] + from[1]) * work.args.size[2] + from[2]) * width<T>);
            const double share = 1.0 / static_cast<double>(size);
            mean = total(work, [&](Vec<T> x) { return x - origin; }, share);
            const double divisor = 1.0 / static_cast<double>(size - work.args.unbiased);
            const Vec<T> variance = total(work, [&](Vec<T> x) {
                const Vec<T> deviation = (x - origin) - mean;
                return deviation * deviation;
            }, divisor);
            std = sqrt<T>(variance + static_cast<T>(work.args.eps));
        }

        template <class Body>
        void each(const MomentsWork& work, const Body& body) const {
            for (int64_t i = begin[0]; i < end[0]; ++i) {
                for (int64_t j = begin[1]; j < end[1]; ++j) {
                    const int64_t row = (i * work.args.size[1] + j) * work.args.size[2];
                    for (int64_t k = begin[2]; k < end[2]; ++k) body((row + k) * width<T>);
                }
            }
        }

        // factor * sum of term(x_p)
        template <class Term>
        Vec<T> total(const MomentsWork& work, const Term& term, double factor) const {
            double wide[width<T>] = {};
            Vec<T> part = {};
            int64_t run = 0;
            each(work, [&](int64_t p) {
                part += term(load(work.tile + p));
                if (++run == kSumRun) {
                    for (int l = 0; l < width<T>; ++l) wide[l] += part[l];
                    part = Vec<T>{};
                    run = 0;
                }
            });
            Vec<T> result;
            for (int l = 0; l < width<T>; ++l) result[l] = static_cast<T>((wide[l] + part[l]) * factor);
            return result;
        }
    };

    template <class Body>
    void for_cells(const Body& body) const {
        int64_t begin[kMomentAxes], end[kMomentAxes];
        const auto bounds = [&](int axis, int64_t index) {
            const int64_t size = args.size[axis], grid = args.grid[axis];
            begin[axis] = index * size / grid;
            end[axis] = ((index + 1) * size + grid - 1) / grid;
        };
        for (int64_t i = 0; i < args.grid[0]; ++i) {
            bounds(0, i);
            for (int64_t j = 0; j < args.grid[1]; ++j) {
                bounds(1, j);
                for (int64_t k = 0; k < args.grid[2]; ++k) {
                    bounds(2, k);
                    body(begin, end);
                }
            }
        }
    }

    bool side_by_side() const { return 2 * args.inner > width<T>; }

    int64_t lanes_of(int64_t b) const {
        const int64_t left = side_by_side() ? args.inner - b % per_outer * width<T> : args.outer * args.inner - b * width<T>;
        return left < width<T> ? left : int64_t{width<T>};
    }

    // Where feature l of block b starts in a tensor (outer, length, inner).
    int64_t start(int64_t b, int64_t length, int64_t l) const {
        if (side_by_side()) return b / per_outer * length * args.inner + b % per_outer * width<T> + l;
        const int64_t feature = b * width<T> + l;
        return feature / args.inner * length * args.inner + feature % args.inner;
    }

    // out (length, width) from a tensor (outer, length, inner)
    void read(const T* in, int64_t length, int64_t b, T* out) const {
        const int64_t count = lanes_of(b), inner = args.inner;
        if (side_by_side()) {
            const T* from = in + start(b, length, 0);
            for (int64_t p = 0; p < length; ++p) store(out + p * width<T>, load_up_to(from + p * inner, count, T(0)));
        } else if (inner == 1) {
            load_lanes(in + start(b, length, 0), length, count, length, out);
        } else {
            for (int64_t l = 0; l < width<T>; ++l) {
                const T* from = in + start(b, length, l < count ? l : 0);
                for (int64_t p = 0; p < length; ++p) out[p * width<T> + l] = from[p * inner];
            }
        }
    }

    void write(const T* in, int64_t length, int64_t b, int64_t count, T* out) const {
        const int64_t inner = args.inner;
        if (side_by_side()) {
            T* to = out + start(b, length, 0);
            for (int64_t p = 0; p < length; ++p) store_up_to(to + p * inner, load(in + p * width<T>), count);
        } else if (inner == 1) {
            store_lanes(in, length, count, length, out + start(b, length, 0));
        } else {
            for (int64_t l = 0; l < count; ++l) {
                T* to = out + start(b, length, l);
                for (int64_t p = 0; p < length; ++p) to[p * inner] = in[p * width<T> + l];
            }
        }
    }
};

template <class T>
void run(const FeatureMomentsArgs<T>& args, bool adjoint) {
    const int64_t entries = args.outer * args.positions() * args.inner;
    parallel(entries < kParallelWork ? 1 : args.threads, [&](const Team& team) {
        if (RowMoments<T>::serves(args)) {
            const RowMoments<T> rows(args);
            int64_t begin, end;
            split(args.outer, width<T>, team.size, team.rank, begin, end);
            for (int64_t row = begin; row < end; row += width<T>) {
                const int64_t count = end - row < width<T> ? end - row : int64_t{width<T>};
                adjoint ? rows.backward(row, count) : rows.forward(row, count);
            }
            return;
        }
        MomentsWork<T> work(args, team.rank);
        int64_t begin, end;
        split(work.blocks, 1, team.size, team.rank, begin, end);
        for (int64_t b = begin; b < end; ++b) adjoint ? work.backward(b) : work.forward(b);
    });
}

}  // namespace

void feature_moments_fwd(const FeatureMomentsArgs<float>& args) { run(args, false); }
void feature_moments_fwd(const FeatureMomentsArgs<double>& args) { run(args, false); }
void feature_moments_bwd(const FeatureMomentsArgs<float>& args) { run(args, true); }
void feature_moments_bwd(const FeatureMomentsArgs<double>& args) { run(args, true); }

}  // namespace OTKD_ISA
}  // namespace otkd_fast

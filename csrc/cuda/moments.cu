// Means and standard deviations over (overlapping) windows of positions, and their adjoint (reference/moments.py), float and double.
//
//   mean_w = sum_{p in w} x_p / |w|,   std_w = sqrt(sum_{p in w} (x_p - mean_w)^2 / (|w| - unbiased) + eps)
//   dx_p = sum_{w with p} gm_w / |w| + gs_w (x_p - mean_w) / ((|w| - unbiased) std_w)       (0 for the second where std_w = 0)
//
// x (outer, s0, s1, s2, inner), window i of g on an axis of s from floor(i s / g) to ceil((i + 1) s / g). Forward: a block has some windows,
// several threads each, which lie along the window where inner is 1, else side by side along inner; two passes over the window, the
// second from the cache. Deviations are taken from the window's first position: a large mean costs no digits, a constant window has
// exactly none. Runs of kSumRun terms in T, sums of those in double. Backward: the moments again, then a thread an entry of x.
#include "otkd_fast/moments.h"

#include "runtime.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kThreads = 256, kSumRun = 64, kShare = 8;  // positions that a thread should have at least

template <class T>
struct Windows {
    FeatureMomentsArgs<T> args;
    T *mean, *std;     // (outer, g0, g1, g2, inner)
    int64_t items, positions;  // windows of all features; positions of one
    int threads;       // of a window: a power of two
    bool from_first;   // means of the deviations from the first position
};

OTKD_BOTH int64_t start_of(int64_t window, int64_t size, int64_t grid) { return window * size / grid; }
OTKD_BOTH int64_t stop_of(int64_t window, int64_t size, int64_t grid) { return ((window + 1) * size + grid - 1) / grid; }

// sum of term(x_p) over the positions of a window, the same in all of its threads. `own`, `own + width`, ...: this thread's positions.
template <class T, class Term>
OTKD_DEVICE double window_sum(const T* x, const uint32_t (&count)[kMomentAxes], const FeatureMomentsArgs<T>& args, int64_t origin, uint32_t own,
                              int threads, int place, int step, double* scratch, bool there, const Term& term) {
    const uint32_t all = count[0] * count[1] * count[2];
    double sum = 0;
    T run = 0;
    int length = 0;
    for (uint32_t e = own; there && e < all; e += threads) {
        const int64_t i = e / (count[1] * count[2]), j = e / count[2] % count[1], k = e % count[2];
        run += term(x[origin + ((i * args.size[1] + j) * args.size[2] + k) * args.inner]);
        if (++length == kSumRun) {
            sum += run;
            run = 0;
            length = 0;
        }
    }
    scratch[thread_id()] = sum + run;
    barrier();
    double total = 0;
    for (int t = 0; t < threads; ++t) total += scratch[place + t * step];
    barrier();
    return total;
}

template <class T>
OTKD_KERNEL(kThreads) window_moments(OTKD_CONSTANT Windows<T> windows) {
    double* scratch = reinterpret_cast<double*>(shared_memory());  // (kThreads,)
    const FeatureMomentsArgs<T>& args = windows.args;
    const int threads = windows.threads, groups = kThreads / threads;
    const bool along = args.inner == 1;
    const int group = along ? thread_id() / threads : thread_id() % groups, own = along ? thread_id() % threads : thread_id() / groups;
    const int64_t item = block_id() * groups + group;
    const bool there = item < windows.items;
    int64_t rest = there ? item / args.inner : 0, from[kMomentAxes];
    uint32_t count[kMomentAxes];
    for (int axis = kMomentAxes - 1; axis >= 0; --axis) {
        const int64_t window = rest % args.grid[axis];
        rest /= args.grid[axis];
        from[axis] = start_of(window, args.size[axis], args.grid[axis]);
        count[axis] = static_cast<uint32_t>(stop_of(window, args.size[axis], args.grid[axis]) - from[axis]);
    }
    const int64_t line = ((rest * args.size[0] + from[0]) * args.size[1] + from[1]) * args.size[2] + from[2];
    const int64_t origin = line * args.inner + (there ? item % args.inner : 0);
    const T first = args.x[origin];
    const int place = along ? group * threads : group, step = along ? 1 : groups;
    const double size = static_cast<double>(count[0] * count[1] * count[2]);
    const double sum = window_sum(args.x, count, args, origin, own, threads, place, step, scratch, there,
                                  [&](T value) { return value - first; });
    const T mean = static_cast<T>(sum / size);
    const double squares = window_sum(args.x, count, args, origin, own, threads, place, step, scratch, there, [&](T value) {
        const T deviation = (value - first) - mean;
        return deviation * deviation;
    });
    if (!there || own != 0) return;
    windows.mean[item] = windows.from_first ? mean : static_cast<T>(first + sum / size);
    windows.std[item] = sqrt(static_cast<T>(squares / (size - args.unbiased)) + static_cast<T>(args.eps));
}

// The gradient of one entry of x: over the windows that it is in, at most two of each axis.
template <class T>
OTKD_KERNEL(kThreads) moments_gradient(OTKD_CONSTANT Windows<T> windows) {
    const FeatureMomentsArgs<T>& args = windows.args;
    const int64_t at = block_id() * kThreads + thread_id();
    if (at >= args.outer * windows.positions * args.inner) return;
    const int64_t feature = at % args.inner, outer = at / args.inner / windows.positions;
    int64_t rest = at / args.inner % windows.positions, position[kMomentAxes];
    for (int axis = kMomentAxes - 1; axis >= 0; --axis) {
        position[axis] = rest % args.size[axis];
        rest /= args.size[axis];
    }
    T total = 0;
    for (int choice = 0; choice < 8; ++choice) {
        int64_t cell = outer, line = outer, size = 1;
        bool there = true;
        for (int axis = 0; axis < kMomentAxes; ++axis) {
            // the last window that begins at or before the position, or the one before it
            const int64_t grid = args.grid[axis], length = args.size[axis];
            const int64_t window = ((position[axis] + 1) * grid - 1) / length - (choice >> axis & 1);
            there &= window >= 0 && position[axis] < stop_of(window, length, grid);
            cell = cell * grid + window;
            line = line * length + start_of(window, length, grid);
            size *= stop_of(window, length, grid) - start_of(window, length, grid);
        }
        if (!there) continue;
        cell = cell * args.inner + feature;
        if (args.grad_mean) total += args.grad_mean[cell] / static_cast<T>(size);
        if (!args.grad_std || windows.std[cell] == 0) continue;
        const T deviation = (args.x[at] - args.x[line * args.inner + feature]) - windows.mean[cell];
        total += args.grad_std[cell] / (windows.std[cell] * static_cast<T>(size - args.unbiased)) * deviation;
    }
    args.grad_x[at] = total;
}

template <class T>
void moments(const FeatureMomentsArgs<T>& args, T* mean, T* std, bool from_first, const Target& target) {
    Windows<T> windows{args, mean, std, args.outer * args.cells() * args.inner, args.positions(), 1, from_first};
    const int64_t largest = ceil_div(args.size[0], args.grid[0]) * ceil_div(args.size[1], args.grid[1]) * ceil_div(args.size[2], args.grid[2]);
    while (windows.threads < 32 && largest >= 2 * kShare * windows.threads) windows.threads *= 2;
    launch("window_moments", window_moments<T>, ceil_div(windows.items, kThreads / windows.threads), kThreads,
           kThreads * int64_t{sizeof(double)}, target, windows);
}

}  // namespace

template <class T>
int64_t feature_moments_workspace_bytes(const FeatureMomentsArgs<T>& args, bool backward) {
    return backward ? 2 * args.outer * args.cells() * args.inner * int64_t{sizeof(T)} : 0;
}

template <class T>
void feature_moments_fwd(const FeatureMomentsArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    moments(args, args.mean, args.std, false, target);
}

template <class T>
void feature_moments_bwd(const FeatureMomentsArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    T* mean = reinterpret_cast<T*>(args.workspace);
    T* std = mean + args.outer * args.cells() * args.inner;
    if (args.grad_std) moments(args, mean, std, true, target);
    const Windows<T> windows{args, mean, std, 0, args.positions(), 1, true};
    const int64_t entries = args.outer * args.positions() * args.inner;
    launch("moments_gradient", moments_gradient<T>, ceil_div(entries, kThreads), kThreads, 0, target, windows);
}

#define OTKD_INSTANTIATE(T)                                                                 \
    template int64_t feature_moments_workspace_bytes(const FeatureMomentsArgs<T>&, bool);     \
    template void feature_moments_fwd(const FeatureMomentsArgs<T>&, const Target&); \
    template void feature_moments_bwd(const FeatureMomentsArgs<T>&, const Target&);
OTKD_INSTANTIATE(float)
OTKD_INSTANTIATE(double)
#undef OTKD_INSTANTIATE

}  // namespace cuda
}  // namespace otkd_fast

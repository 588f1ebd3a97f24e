// Polar factors of a batch of matrices, and their nuclear norms (reference/polar.py), float and double.
//
//   K = U diag(s) V^T:   P = U p(diag(s)) V^T,   nuclear_norm = <K, P>,   p(s) = 1 for s > lowest |K|, p(0) = 0
//
// p is a composition of odd quintics (polar_schedule.h) on K / bound(|K|), then one cubic step; <K, P> is summed in double. K is
// scaled by a power of two first; a wide K is transposed as it is read. 2 k m^2 (2 n + m) operations for k steps, n >= m.
// n, m <= 160 (double: 112), as far as shared memory holds X and X^T X (201 KiB at 160 x 160, float; 99 KiB at 112 x 112): one launch, a block
// a matrix (polar_tile.h), K read and P written once. Larger: three products a step (matrix_product.cu), X and two more in memory.
#include "otkd_fast/polar.h"

#include "matrix_product.h"
#include "otkd_fast/polar_schedule.h"
#include "polar_tile.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kRowThreads = 512;
constexpr int64_t kScratch = 32 * sizeof(double);

template <class T, int kGrid, int kTile>
OTKD_KERNEL(kGrid * kGrid, 1) polar_tile(OTKD_CONSTANT PolarArgs<T> args, OTKD_CONSTANT PolarSteps<T> steps) {
    PolarTile<T, kGrid, kTile>(args).solve(block_id(), steps);
}

// Matrices of any size, a block each: x (batch, n, m), n >= m, is K over a bound of its norm, times `top`; exponents (batch,).
template <class T>
struct Large {
    PolarArgs<T> args;
    T *x, *gram, *polynomial, *other;
    int* exponents;
    int64_t n, m;
    double top;
};

template <class T>
OTKD_KERNEL(kRowThreads) polar_begin(OTKD_CONSTANT Large<T> large) {
    double* scratch = reinterpret_cast<double*>(shared_memory());
    const PolarArgs<T>& args = large.args;
    const int64_t n = large.n, m = large.m, entries = n * m;
    const T* matrix = args.matrix + block_id() * entries;
    T* x = large.x + block_id() * entries;
    const double largest = largest_magnitude(matrix, entries, scratch);
    const int exponent = largest > 0 ? exponent_above(largest) : 0;  // X = 0, or NaN, stays what it is
    for (int64_t e = thread_id(); e < entries; e += kRowThreads) {
        const int64_t i = e / m, j = e % m;
        x[e] = ldexp(matrix[args.n < args.m ? j * n + i : e], -exponent);
    }
    barrier();
    const double bound = norm_bound(x, n, m, m, scratch);
    const T factor = static_cast<T>(!(largest < kInfinity) ? kNaN : largest > 0 ? large.top / bound : 0.0);
    for (int64_t e = thread_id(); e < entries; e += kRowThreads) x[e] *= factor;
    if (thread_id() == 0) large.exponents[block_id()] = exponent;
}

// polar = x, transposed back, and its inner product with K
template <class T>
OTKD_KERNEL(kRowThreads) polar_end(OTKD_CONSTANT Large<T> large) {
    double* scratch = reinterpret_cast<double*>(shared_memory());
    const PolarArgs<T>& args = large.args;
    const int64_t n = large.n, m = large.m, entries = n * m;
    const T *matrix = args.matrix + block_id() * entries, *x = large.x + block_id() * entries;
    const int exponent = large.exponents[block_id()];
    double norm = 0;
    for (int64_t e = thread_id(); e < entries; e += kRowThreads) {
        const T entry = args.n < args.m ? x[e % n * m + e / n] : x[e];
        args.polar[block_id() * entries + e] = entry;
        norm += static_cast<double>(ldexp(matrix[e], -exponent)) * entry;
    }
    norm = block_sum(norm, scratch);
    if (thread_id() == 0) args.nuclear_norm[block_id()] = static_cast<T>(ldexp(norm, exponent));
}

template <class T>
PolarSteps<T> all_steps(int count) {
    const PolarSchedule schedule = polar_schedule<T>(count);
    PolarSteps<T> steps{};
    steps.count = schedule.count + 1;
    steps.top = schedule.step[0].top;
    for (int s = 0; s < schedule.count; ++s) {
        steps.a[s] = static_cast<T>(schedule.step[s].a);
        steps.b[s] = static_cast<T>(schedule.step[s].b);
        steps.c[s] = static_cast<T>(schedule.step[s].c);
    }
    steps.a[schedule.count] = T(1.5);  // the cubic step of Newton and Schulz: an error e of a singular value becomes 1.5 e^2
    steps.b[schedule.count] = T(-0.5);
    return steps;
}

// The matrices laid out in the workspace; with a null one the pointers mean nothing. Returns its bytes.
template <class T>
int64_t lay_out(const PolarArgs<T>& args, Large<T>& large) {
    large.args = args;
    large.n = larger(args.n, args.m);
    large.m = smaller(args.n, args.m);
    int64_t used = 0;
    auto take = [&](int64_t bytes) {
        unsigned char* piece = args.workspace ? args.workspace + used : nullptr;
        used += round_up(bytes, 64);
        return piece;
    };
    const int64_t whole = args.batch * large.n * large.m * int64_t{sizeof(T)}, square = args.batch * large.m * large.m * int64_t{sizeof(T)};
    large.x = reinterpret_cast<T*>(take(whole));
    large.other = reinterpret_cast<T*>(take(whole));
    large.gram = reinterpret_cast<T*>(take(square));
    large.polynomial = reinterpret_cast<T*>(take(square));
    large.exponents = reinterpret_cast<int*>(take(args.batch * int64_t{sizeof(int)}));
    return used;
}

template <class T>
void in_products(const PolarArgs<T>& args, const PolarSteps<T>& steps, const Target& target) {
    Large<T> large;
    lay_out(args, large);
    large.top = steps.top;
    launch("polar_begin", polar_begin<T>, args.batch, kRowThreads, kScratch, target, large);
    const int64_t n = large.n, m = large.m;
    for (int s = 0; s < steps.count; ++s) {
        const bool quintic = steps.c[s] != 0;
        ProductArgs<T> gram{large.x, large.x, quintic ? large.gram : large.polynomial, args.batch, m, m, n, n * m, 1, m, n * m, m, 1};
        if (!quintic) gram.alpha = steps.b[s], gram.diagonal = steps.a[s];
        matrix_product(gram, target);
        if (quintic) {
            ProductArgs<T> square{large.gram, large.gram, large.polynomial, args.batch, m, m, m, m * m, 1, m, m * m, m, 1};
            square.c = large.gram;
            square.alpha = steps.c[s];
            square.beta = steps.b[s];
            square.diagonal = steps.a[s];
            matrix_product(square, target);
        }
        matrix_product(ProductArgs<T>{large.x, large.polynomial, large.other, args.batch, n, m, m, n * m, m, 1, m * m, m, 1}, target);
        std::swap(large.x, large.other);
    }
    launch("polar_end", polar_end<T>, args.batch, kRowThreads, kScratch, target, large);
}

// Whether tiles of this size serve the matrices and the shared memory holds them; launches, where there are steps.
template <class T, int kGrid, int kTile>
bool try_tile(const PolarArgs<T>& args, const PolarSteps<T>* steps, const Target& target) {
    using Tile = PolarTile<T, kGrid, kTile>;
    if (larger(args.n, args.m) > Tile::kSize) return false;
    const int64_t bytes = Tile::shared_bytes(static_cast<int>(args.n), static_cast<int>(args.m));
    if (bytes > shared_memory_limit(target)) return false;
    if (steps) launch("polar_tile", polar_tile<T, kGrid, kTile>, args.batch, Tile::kThreads, bytes, target, args, *steps);
    return true;
}

template <class T>
bool in_a_block(const PolarArgs<T>& args, const PolarSteps<T>* steps, const Target& target) {
    if (try_tile<T, 8, 4>(args, steps, target) || try_tile<T, 16, 4>(args, steps, target)) return true;
    if (try_tile<T, 16, 7>(args, steps, target)) return true;
    if constexpr (sizeof(T) == sizeof(float)) return try_tile<T, 16, 10>(args, steps, target);
    else return false;
}

}  // namespace

template <class T>
int64_t polar_workspace_bytes(const PolarArgs<T>& args, const Target& target) {
    Large<T> large;
    return in_a_block<T>(args, nullptr, target) ? 0 : lay_out(args, large);
}

template <class T>
void polar_fwd(const PolarArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    const PolarSteps<T> steps = all_steps<T>(args.steps);
    if (!in_a_block(args, &steps, target)) in_products(args, steps, target);
}

#define OTKD_INSTANTIATE(T)                                                   \
    template int64_t polar_workspace_bytes(const PolarArgs<T>&, const Target&); \
    template void polar_fwd(const PolarArgs<T>&, const Target&);
OTKD_INSTANTIATE(float)
OTKD_INSTANTIATE(double)
#undef OTKD_INSTANTIATE

}  // namespace cuda
}  // namespace otkd_fast

// Squared 2-Wasserstein distances between the Gaussians fitted to two samples, and their gradients (reference/gaussian.py):
//
//   W2^2 = |mean_x - mean_y|^2 + |X|^2 / n + |Y|^2 / m - 2 <K, P>,   dW2^2 / dx_i = 2 (X_i / n - (P Y)_i / sqrt(n m)) + 2 (mean_x - mean_y) / n
//
// X, Y: centred rows (n - 1, m - 1 in place of n, m if unbiased, but not in the means), K = X Y^T / sqrt(n m) (n, m), P = polar(K).
// Where both samples have more rows than features and a block does not hold K: K = F G^T (d, d) for factors X^T X = F^T F, Y^T Y = G^T G by pivoted
// Cholesky (cholesky_block.h), and the image P Y becomes X F^-1 (P G), F^-1 of the pivots; Gram matrices, factors and F^-1 P G in double.
// Launches: means and sizes; centred rows; K; P (polar.cu: one up to 160 x 160); the value; with gradients P less the mean of its columns, or of its
// rows, and a product each. 2 n m d operations for K and each gradient; x and y are read three times, centred rows kept in the workspace.
// Sums of squares, means and <K, P> in double; deviations are from the first row first: a constant sample has exactly none, and a large
// mean costs no digits. Rows beyond 2^20 or below 2^-20 are scaled by a power of two, so that no square overflows or vanishes.
#include "otkd_fast/gaussian.h"

#include "cholesky_block.h"
#include "matrix_product.h"
#include "runtime.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kFeatures = 32, kPlainExponent = 20;
constexpr int64_t kScratch = 32 * sizeof(double), kRowsInABlock = 160;
// Directions in which a sample of this type is smaller than the square root of this, relative to its correlations, are left out.
template <class T>
constexpr double kSamplePivot = sizeof(T) == sizeof(float) ? 2.3e-13 : 8 * std::numeric_limits<double>::epsilon();

template <class T>
struct Samples {
    GaussianSamplesArgs<T> args;
    int64_t chunks;                   // of kFeatures features
    T *rows_x, *rows_y;               // (batch, n, d), (batch, m, d): 2^-exponent (x - mean)
    double *mean, *largest, *squares; // (batch, 2, d): of the deviations from the first row; (batch, 2, chunks) both
    int* exponents;                   // (batch, 2)
    T *offset;                        // (2, batch, d): 2 (mean_x - mean_y) / n, 2 (mean_y - mean_x) / m
    T *K, *P, *norm;                  // (batch, n, m) both, K of the scaled rows, not divided; (batch,)
    T *centred_x, *centred_y;         // (batch, n, m): P less the mean of each column, of each row
    unsigned char* polar;
    int64_t polar_bytes;
    bool tall, factor_in_shared;  // K from factors; all below only then
    int64_t rows, columns;        // of K
    double *wide_x, *wide_y, *gram, *inverse, *factor, *work;  // (batch, n, d), (batch, m, d); (2, batch, d, d) all
    double *wide_P, *image, *solved;                           // (batch, d, d)
    T *narrow, *solved_narrow;                                 // (2, batch, d, d), (batch, d, d): factor, solved
};

// One of the two samples of a problem, and some of its features.
template <class T>
struct Part {
    int64_t index, chunk, n, d, k;  // k: this thread's feature
    int side;
    const T* x;
    T* rows;
    double* wide;  // or null
    OTKD_DEVICE explicit Part(const Samples<T>& all) {
        const uint32_t chunks = all.chunks, block = block_id();
        chunk = block % chunks;
        side = block / chunks % 2;
        index = block / chunks / 2;
        n = side ? all.args.m : all.args.n;
        d = all.args.d;
        k = chunk * kFeatures + lane_id();
        x = (side ? all.args.y : all.args.x) + index * n * d;
        rows = (side ? all.rows_y : all.rows_x) + index * n * d;
        wide = all.tall ? (side ? all.wide_y : all.wide_x) + index * n * d : nullptr;
    }
    OTKD_DEVICE int64_t at() const { return index * 2 + side; }
};

template <class T>
OTKD_KERNEL(kThreads) sample_means(OTKD_CONSTANT Samples<T> all) {
    double* sums = reinterpret_cast<double*>(shared_memory());  // (kWarps, kFeatures)
    double* scratch = sums + kThreads;
    const Part<T> part(all);
    const bool inside = part.k < part.d;
    const T first = inside ? part.x[part.k] : T(0);
    double sum = 0;
    for (int64_t i = warp_id(); inside && i < part.n; i += kWarps) sum += part.x[i * part.d + part.k] - first;
    sums[thread_id()] = sum;
    barrier();
    double mean = 0;
    for (int w = 0; w < kWarps; ++w) mean += sums[w * kFeatures + lane_id()];
    mean /= static_cast<double>(part.n);
    const T shift = static_cast<T>(mean);
    double best = 0;
    for (int64_t i = warp_id(); inside && i < part.n; i += kWarps) {
        best = larger(fabs(static_cast<double>((part.x[i * part.d + part.k] - first) - shift)), best);  // NaN does not count
    }
    best = block_max(best, scratch);
    if (inside && warp_id() == 0) all.mean[part.at() * part.d + part.k] = mean;
    if (thread_id() == 0) all.largest[part.at() * all.chunks + part.chunk] = best;
}

template <class T>
OTKD_KERNEL(kThreads) sample_rows(OTKD_CONSTANT Samples<T> all) {
    double* scratch = reinterpret_cast<double*>(shared_memory());
    const Part<T> part(all);
    double best = 0;
    for (int64_t c = thread_id(); c < all.chunks; c += kThreads) best = larger(all.largest[part.at() * all.chunks + c], best);
    best = block_max(best, scratch);
    int exponent = best > 0 && best < kInfinity ? ilogb(best) + 1 : 0;
    if (exponent >= -kPlainExponent && exponent <= kPlainExponent) exponent = 0;
    double squares = 0;
    if (part.k < part.d) {
        const T first = part.x[part.k], shift = static_cast<T>(all.mean[part.at() * part.d + part.k]);
        for (int64_t i = warp_id(); i < part.n; i += kWarps) {
            T entry = (part.x[i * part.d + part.k] - first) - shift;
            if (exponent != 0) entry = ldexp(entry, -exponent);
            part.rows[i * part.d + part.k] = entry;
            if (part.wide) part.wide[i * part.d + part.k] = entry;
            squares += static_cast<double>(entry) * entry;
        }
    }
    squares = block_sum(squares, scratch);
    if (thread_id() != 0) return;
    all.squares[part.at() * all.chunks + part.chunk] = squares;
    if (part.chunk == 0) all.exponents[part.at()] = exponent;
}

// The value of one problem, and what the means have of the gradients.
template <class T>
OTKD_KERNEL(kThreads) samples_value(OTKD_CONSTANT Samples<T> all) {
    double* scratch = reinterpret_cast<double*>(shared_memory());
    const GaussianSamplesArgs<T>& args = all.args;
    const int64_t index = block_id(), entries = all.rows * all.columns;
    const double* mean = all.mean + index * 2 * args.d;
    double squares[2] = {0, 0}, gap = 0, norm = 0;
    for (int64_t c = thread_id(); c < all.chunks; c += kThreads) {
        for (int side = 0; side < 2; ++side) squares[side] += all.squares[(index * 2 + side) * all.chunks + c];
    }
    for (int64_t k = thread_id(); k < args.d; k += kThreads) {
        const double first = static_cast<double>(args.x[index * args.n * args.d + k]) - args.y[index * args.m * args.d + k];
        const double difference = first + (mean[k] - mean[args.d + k]);
        gap += difference * difference;
        all.offset[index * args.d + k] = static_cast<T>(2 * difference / static_cast<double>(args.n));
        all.offset[(args.batch + index) * args.d + k] = static_cast<T>(-2 * difference / static_cast<double>(args.m));
    }
    for (int64_t e = thread_id(); e < entries; e += kThreads) {
        norm += static_cast<double>(all.K[index * entries + e]) * all.P[index * entries + e];
    }
    gap = block_sum(gap, scratch);
    norm = block_sum(norm, scratch);
    const double x = block_sum(squares[0], scratch), y = block_sum(squares[1], scratch);
    if (thread_id() != 0) return;
    const int ex = all.exponents[2 * index], ey = all.exponents[2 * index + 1];
    const double n = static_cast<double>(args.n - args.unbiased), m = static_cast<double>(args.m - args.unbiased);
    const double value = gap + ldexp(x, 2 * ex) / n + ldexp(y, 2 * ey) / m - 2 * ldexp(norm / sqrt(n * m), ex + ey);
    args.value[index] = static_cast<T>(value < 0 ? 0 : value);
}

// Factor of a Gram matrix and its inverse; block_id: x of all problems, then y.
template <class T>
OTKD_KERNEL(kFactorThreads, 1) sample_factor(OTKD_CONSTANT Samples<T> all) {
    const int64_t d = all.args.d, at = block_id() * d * d;
    const SymmetricPart<double> gram(all.gram + at, d, 0, 0);
    BlockCholesky<double> cholesky(gram, shared_memory(), all.factor_in_shared ? nullptr : all.work + at);
    cholesky.factorize(kSamplePivot<T>);
    double *factor = all.factor + at, *inverse = all.inverse + at;
    cholesky.store_factor(factor);
    cholesky.store_factor(all.narrow + at);
    double* solved = all.gram + at;  // the matrix is not needed any more
    barrier();
    cholesky.invert(solved);
    cholesky.store_inverse(solved, inverse);
}

template <class From, class To>
OTKD_KERNEL(kThreads) convert(const From* from, To* to, int64_t count) {
    const int64_t e = block_id() * kThreads + thread_id();
    if (e < count) to[e] = static_cast<To>(from[e]);
}

// P less the mean of each column (x), of each row (y): rounding gives P a part there that the derivative has not. A warp a line.
template <class T>
OTKD_KERNEL(kThreads) centre_factor(OTKD_CONSTANT Samples<T> all, bool of_y) {
    const int64_t n = all.args.n, m = all.args.m, lines = of_y ? n : m, length = of_y ? m : n, step = of_y ? 1 : m, apart = of_y ? m : 1;
    const int64_t index = block_id() * kWarps + warp_id();
    if (index >= all.args.batch * lines) return;
    const int64_t begin = index / lines * n * m + index % lines * apart;
    double sum = 0;
    for (int64_t k = lane_id(); k < length; k += 32) sum += all.P[begin + k * step];
    const T mean = static_cast<T>(warp_sum(sum) / static_cast<double>(length));
    T* out = of_y ? all.centred_y : all.centred_x;
    for (int64_t k = lane_id(); k < length; k += 32) out[begin + k * step] = all.P[begin + k * step] - mean;
}

// Everything laid out in the workspace; with a null one the pointers mean nothing. Returns its bytes.
template <class T>
int64_t lay_out(const GaussianSamplesArgs<T>& args, Samples<T>& all, const Target& target) {
    all.args = args;
    all.chunks = ceil_div(args.d, kFeatures);
    int64_t used = 0;
    auto take = [&](auto*& piece, int64_t count) {
        using S = std::remove_reference_t<decltype(*piece)>;
        piece = args.workspace ? reinterpret_cast<S*>(args.workspace + used) : nullptr;
        used += round_up(count * int64_t{sizeof(S)}, 64);
    };
    all.tall = smaller(args.n, args.m) > args.d && larger(args.n, args.m) > kRowsInABlock;
    all.factor_in_shared = BlockCholesky<double>::shared_bytes(args.d, true) <= shared_memory_limit(target);
    all.rows = all.tall ? args.d : args.n;
    all.columns = all.tall ? args.d : args.m;
    const int64_t batch = args.batch, entries = batch * all.rows * all.columns, square = all.tall ? batch * args.d * args.d : 0;
    take(all.rows_x, batch * args.n * args.d);
    take(all.rows_y, batch * args.m * args.d);
    take(all.mean, batch * 2 * args.d);
    take(all.largest, batch * 2 * all.chunks);
    take(all.squares, batch * 2 * all.chunks);
    take(all.exponents, batch * 2);
    take(all.offset, batch * 2 * args.d);
    take(all.K, entries);
    take(all.P, entries);
    take(all.norm, batch);
    take(all.centred_x, args.grad_x && !all.tall ? entries : 0);
    take(all.centred_y, args.grad_y && !all.tall ? entries : 0);
    take(all.wide_x, all.tall ? batch * args.n * args.d : 0);
    take(all.wide_y, all.tall ? batch * args.m * args.d : 0);
    for (double** piece : {&all.gram, &all.inverse, &all.factor}) take(*piece, 2 * square);
    take(all.work, all.factor_in_shared ? 0 : 2 * square);
    for (double** piece : {&all.wide_P, &all.image, &all.solved}) take(*piece, square);
    take(all.narrow, 2 * square);
    take(all.solved_narrow, square);
    PolarArgs<T> polar{};
    polar.batch = batch;
    polar.n = all.rows;
    polar.m = all.columns;
    all.polar_bytes = polar_workspace_bytes(polar, target);
    take(all.polar, all.polar_bytes);
    return used;
}

template <class T>
void factor(const Samples<T>& all, const Target& target) {
    const GaussianSamplesArgs<T>& args = all.args;
    const int64_t n = args.n, m = args.m, d = args.d, square = d * d, side = args.batch * square;
    if (all.tall) {
        matrix_product(ProductArgs<double>{all.wide_x, all.wide_x, all.gram, args.batch, d, d, n, n * d, 1, d, n * d, d, 1}, target);
        matrix_product(ProductArgs<double>{all.wide_y, all.wide_y, all.gram + side, args.batch, d, d, m, m * d, 1, d, m * d, d, 1}, target);
        const int64_t shared = BlockCholesky<double>::shared_bytes(d, all.factor_in_shared);
        launch("sample_factor", sample_factor<T>, 2 * args.batch, kFactorThreads, shared, target, all);
        matrix_product(ProductArgs<T>{all.narrow, all.narrow + side, all.K, args.batch, d, d, d, square, d, 1, square, 1, d}, target);
    } else {
        matrix_product(ProductArgs<T>{all.rows_x, all.rows_y, all.K, args.batch, n, m, d, n * d, d, 1, m * d, 1, d}, target);
    }
    PolarArgs<T> polar{};
    polar.matrix = all.K;
    polar.polar = all.P;
    polar.nuclear_norm = all.norm;
    polar.workspace = all.polar;
    polar.batch = args.batch;
    polar.n = all.rows;
    polar.m = all.columns;
    polar_fwd(polar, target);
}

// solved_narrow (batch, d, d) = F^-1 P G, or G^-1 P^T F
template <class T>
void solve_image(const Samples<T>& all, bool of_y, const Target& target) {
    const int64_t d = all.args.d, square = d * d, batch = all.args.batch, entries = batch * square, blocks = ceil_div(entries, kThreads);
    const double *inverse = all.inverse + (of_y ? entries : 0), *other = all.factor + (of_y ? 0 : entries);
    launch("convert", convert<T, double>, blocks, kThreads, 0, target, all.P, all.wide_P, entries);
    const int64_t row = of_y ? 1 : d;
    matrix_product(ProductArgs<double>{all.wide_P, other, all.image, batch, d, d, d, square, row, d + 1 - row, square, d, 1}, target);
    matrix_product(ProductArgs<double>{inverse, all.image, all.solved, batch, d, d, d, square, 1, d, square, d, 1}, target);
    launch("convert", convert<double, T>, blocks, kThreads, 0, target, all.solved, all.solved_narrow, entries);
}

template <class T>
void gradient(const Samples<T>& all, bool of_y, const Target& target) {
    const GaussianSamplesArgs<T>& args = all.args;
    const int64_t n = args.n, m = args.m, d = args.d, count = of_y ? m : n;
    if (all.tall) solve_image(all, of_y, target);
    else launch("centre_factor", centre_factor<T>, ceil_div(args.batch * (n + m - count), kWarps), kThreads, 0, target, all, of_y);
    const T* own_rows = of_y ? all.rows_y : all.rows_x;
    ProductArgs<T> image = all.tall
        ? ProductArgs<T>{own_rows, all.solved_narrow, of_y ? args.grad_y : args.grad_x, args.batch, count, d, d, count * d, d, 1, d * d, d, 1}
        : of_y
        ? ProductArgs<T>{all.centred_y, all.rows_x, args.grad_y, args.batch, m, d, n, n * m, 1, m, n * d, d, 1}
        : ProductArgs<T>{all.centred_x, all.rows_y, args.grad_x, args.batch, n, d, m, n * m, m, 1, m * d, d, 1};
    const double own = static_cast<double>((of_y ? m : n) - args.unbiased), other = static_cast<double>((of_y ? n : m) - args.unbiased);
    image.c = own_rows;
    image.alpha = -2 / std::sqrt(own * other);
    image.beta = 2 / own;
    image.row = all.offset + (of_y ? args.batch * d : 0);
    image.exponents = all.exponents;
    image.of_sum = of_y ? 0 : 1;
    image.of_c = of_y ? 1 : 0;
    matrix_product(image, target);
}

}  // namespace

template <class T>
int64_t gaussian_samples_workspace_bytes(const GaussianSamplesArgs<T>& args, const Target& target) {
    Samples<T> all;
    return lay_out(args, all, target);
}

template <class T>
void gaussian_samples(const GaussianSamplesArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    Samples<T> all;
    lay_out(args, all, target);
    const int64_t blocks = args.batch * 2 * all.chunks;
    launch("sample_means", sample_means<T>, blocks, kThreads, kThreads * int64_t{sizeof(double)} + kScratch, target, all);
    launch("sample_rows", sample_rows<T>, blocks, kThreads, kScratch, target, all);
    factor(all, target);
    launch("samples_value", samples_value<T>, args.batch, kThreads, kScratch, target, all);
    if (args.grad_x) gradient(all, false, target);
    if (args.grad_y) gradient(all, true, target);
}

#define OTKD_INSTANTIATE(T)                                                                        \
    template int64_t gaussian_samples_workspace_bytes(const GaussianSamplesArgs<T>&, const Target&); \
    template void gaussian_samples(const GaussianSamplesArgs<T>&, const Target&);
OTKD_INSTANTIATE(float)
OTKD_INSTANTIATE(double)
#undef OTKD_INSTANTIATE

}  // namespace cuda
}  // namespace otkd_fast

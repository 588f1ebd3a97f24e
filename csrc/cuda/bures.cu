// Squared Bures distances between covariances and their gradients (reference/gaussian.py, bures), in double, whatever the type:
//
//   A = F^T F, B = G^T G, P = polar(F G^T):   d(A, B) = |F|^2 + |G|^2 - 2 <F G^T, P>,   dd/dB = I - T,   T G^T = F^T P
//
// Factors by pivoted Cholesky, a block a matrix (cholesky_block.h); of matrices that are not definite from eigenvectors (jacobi_block.h), with
// pseudo-inverses, in a launch that the others leave. T = N + (N - G^T G^-T N)^T for N = F^T P G^-T, made symmetric; the last term is 0 for a
// definite B. Products by matrix_product.cu, P by polar.cu: 2 d^3 (1 + 44) operations, and 4 d^3 for each gradient (8 d^3: singular).
#include "otkd_fast/gaussian.h"

#include "cholesky_block.h"
#include "jacobi_block.h"
#include "matrix_product.h"
#include "otkd_fast/cuda.h"
#include "polar_norm.h"

namespace otkd_fast {
namespace cuda {
namespace {

// Eigenvalues up to this, in units of |A|_F, may come from the rounding of the entries of A.
template <class T>
constexpr double kRounding = std::numeric_limits<T>::epsilon();
constexpr int64_t kPart = 16 * kFactorThreads;  // entries of a gradient that a block finishes

template <class T>
struct Bures {
    BuresArgs<T> args;
    double *rows, *vectors;      // (2, batch, d, d), of A and of B: R, null where shared memory has it; R^-T, or eigenvectors
    double *factor, *inverse;    // (2, batch, d, d): F with A = F^T F, F^-T (or its pseudo-inverse)
    double *K, *P, *image, *N, *part, *covered;  // (batch, d, d)
    double *trace, *norm;        // (2, batch): of the scaled A, NaN where it is not finite; (batch,)
    int *exponent, *singular;    // (2, batch)
    unsigned char* polar;
    int64_t polar_bytes;
    bool rows_in_shared;
};

template <class T>
OTKD_KERNEL(kFactorThreads, 1) covariance_factor(OTKD_CONSTANT Bures<T> all) {
    const BuresArgs<T>& args = all.args;
    const int64_t entries = args.d * args.d, index = block_id();
    const T* a = index < args.batch ? args.a + index * entries : args.b + (index - args.batch) * entries;
    double* scratch = reinterpret_cast<double*>(shared_memory());
    double *factor = all.factor + index * entries, *inverse = all.inverse + index * entries;
    const double largest = largest_magnitude(a, entries, scratch);
    if (!(largest > 0)) {
        for (int64_t e = thread_id(); e < entries; e += kFactorThreads) factor[e] = inverse[e] = 0;
        if (thread_id() != 0) return;
        all.trace[index] = largest;
        all.exponent[index] = all.singular[index] = 0;
        return;
    }
    const SymmetricPart<T> matrix(a, args.d, (exponent_above(largest) + 2) / 2 * 2, 0);
    BlockCholesky<T> cholesky(matrix, shared_memory(), all.rows_in_shared ? nullptr : all.rows + index * entries);
    const bool definite = cholesky.factorize() == Definiteness::definite;
    double trace = 0;
    if (definite) {
        cholesky.store_factor(factor);
        double* solved = all.vectors + index * entries;
        cholesky.invert(solved);
        cholesky.store_inverse(solved, inverse);
        for (int64_t i = thread_id(); i < args.d; i += kFactorThreads) trace += matrix(i, i);
        trace = block_sum(trace, cholesky.scratch);
    }
    if (thread_id() != 0) return;
    all.trace[index] = trace;
    all.exponent[index] = matrix.exponent;
    all.singular[index] = !definite;
}

template <class T>
OTKD_KERNEL(kJacobiThreads, 1) covariance_eigenvectors(OTKD_CONSTANT Bures<T> all) {
    const BuresArgs<T>& args = all.args;
    const int64_t d = args.d, entries = d * d, index = block_id();
    if (!all.singular[index]) return;
    const T* a = index < args.batch ? args.a + index * entries : args.b + (index - args.batch) * entries;
    BlockJacobi eigen(d, shared_memory(), all.vectors + index * entries);
    eigen.solve(SymmetricPart<T>(a, d, all.exponent[index], 0));
    const double level = eigen.norm * kRounding<T>;
    double trace = 0;
    for (int64_t e = thread_id(); e < entries; e += kJacobiThreads) {
        const double value = eigen.values[e / d], root = value > level ? sqrt(value) : 0.0;
        all.factor[index * entries + e] = eigen.rows[e] * root;
        all.inverse[index * entries + e] = root > 0 ? eigen.rows[e] / root : 0.0;
        if (e % d == 0) trace += root * root;
    }
    trace = block_sum(trace, eigen.scratch);
    if (thread_id() == 0) all.trace[index] = trace;
}

// A warp's thread a problem.
template <class T>
OTKD_KERNEL(32) bures_value(OTKD_CONSTANT Bures<T> all) {
    const BuresArgs<T>& args = all.args;
    const int64_t index = block_id() * 32 + thread_id(), other = args.batch + index;
    if (index >= args.batch) return;
    const int own = all.exponent[index], its = all.exponent[other];
    const double traces = ldexp(all.trace[index], own) + ldexp(all.trace[other], its);
    const double value = traces - 2 * ldexp(all.norm[index], (own + its) / 2);
    args.value[index] = static_cast<T>(value < 0 ? 0 : value);
}

template <class T>
OTKD_KERNEL(kFactorThreads) bures_gradient(OTKD_CONSTANT Bures<T> all, bool of_b) {
    const BuresArgs<T>& args = all.args;
    const int64_t d = args.d, entries = d * d, parts = (entries + kPart - 1) / kPart, index = block_id() / parts;
    const int64_t own = index + (of_b ? args.batch : 0), other = index + (of_b ? 0 : args.batch), begin = block_id() % parts * kPart;
    const double *N = all.N + index * entries, *covered = all.covered + index * entries;
    const double broken = (all.trace[own] + all.trace[other]) * 0;  // NaN where a matrix was not finite
    const int exponent = (all.exponent[other] - all.exponent[own]) / 2;
    const bool singular = all.singular[own] != 0;
    T* out = (of_b ? args.grad_b : args.grad_a) + index * entries;
    for (int64_t e = begin + thread_id(); e < smaller(begin + kPart, entries); e += kFactorThreads) {
        const int64_t mirror = e % d * d + e / d;
        const double sum = N[e] + N[mirror];
        const double map = singular ? sum - 0.5 * (covered[e] + covered[mirror]) : 0.5 * sum;
        out[e] = static_cast<T>((e == mirror ? 1.0 : 0.0) - ldexp(map, exponent) + broken);
    }
}

// Everything laid out in the workspace; with a null one the pointers mean nothing. Returns its bytes.
template <class T>
int64_t lay_out(const BuresArgs<T>& args, Bures<T>& all, const Target& target) {
    all.args = args;
    all.rows_in_shared = BlockCholesky<T>::shared_bytes(args.d, true) <= shared_memory_limit(target);
    const int64_t entries = args.batch * args.d * args.d;
    int64_t used = 0;
    auto take = [&](auto*& piece, int64_t count) {
        using S = std::remove_reference_t<decltype(*piece)>;
        piece = args.workspace ? reinterpret_cast<S*>(args.workspace + used) : nullptr;
        used += round_up(count * int64_t{sizeof(S)}, 64);
    };
    take(all.rows, all.rows_in_shared ? 0 : 2 * entries);
    for (double** piece : {&all.vectors, &all.factor, &all.inverse}) take(*piece, 2 * entries);
    for (double** piece : {&all.K, &all.P, &all.image, &all.N, &all.part, &all.covered}) take(*piece, entries);
    take(all.trace, 2 * args.batch);
    take(all.norm, args.batch);
    take(all.exponent, 2 * args.batch);
    take(all.singular, 2 * args.batch);
    PolarArgs<double> polar{};
    polar.batch = args.batch;
    polar.n = polar.m = args.d;
    all.polar_bytes = polar_workspace_bytes(polar, target);
    take(all.polar, all.polar_bytes);
    return used;
}

// out = op(A) op(B) for square matrices
template <class T>
ProductArgs<double> product(const Bures<T>& all, const double* a, bool a_transposed, const double* b, bool b_transposed, double* out) {
    const int64_t d = all.args.d;
    return {a, b, out, all.args.batch, d, d, d, d * d, a_transposed ? 1 : d, a_transposed ? d : 1, d * d, b_transposed ? 1 : d, b_transposed ? d : 1};
}

template <class T>
void gradient(const Bures<T>& all, bool of_b, const Target& target) {
    const int64_t entries = all.args.batch * all.args.d * all.args.d;
    const int64_t own = of_b ? entries : 0, other = entries - own;
    matrix_product(product(all, all.factor + other, true, all.P, !of_b, all.image), target);
    matrix_product(product(all, all.image, false, all.inverse + own, false, all.N), target);
    ProductArgs<double> part = product(all, all.inverse + own, false, all.N, false, all.part);
    ProductArgs<double> covered = product(all, all.factor + own, true, all.part, false, all.covered);
    part.steps = covered.steps = all.singular + (of_b ? all.args.batch : 0);
    matrix_product(part, target);
    matrix_product(covered, target);
    const int64_t blocks = all.args.batch * ceil_div(all.args.d * all.args.d, kPart);
    launch("bures_gradient", bures_gradient<T>, blocks, kFactorThreads, 0, target, all, of_b);
}

}  // namespace

template <class T>
int64_t bures_workspace_bytes(const BuresArgs<T>& args, const Target& target) {
    Bures<T> all;
    return lay_out(args, all, target);
}

template <class T>
void bures(const BuresArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    Bures<T> all;
    lay_out(args, all, target);
    const int64_t entries = args.batch * args.d * args.d, shared = BlockCholesky<T>::shared_bytes(args.d, all.rows_in_shared);
    launch("covariance_factor", covariance_factor<T>, 2 * args.batch, kFactorThreads, shared, target, all);
    launch("covariance_eigenvectors", covariance_eigenvectors<T>, 2 * args.batch, kJacobiThreads, BlockJacobi::shared_bytes(args.d), target, all);
    matrix_product(product(all, all.factor, false, all.factor + entries, true, all.K), target);
    PolarArgs<double> polar{};
    polar.matrix = all.K;
    polar.polar = all.P;
    polar.nuclear_norm = all.norm;
    polar.workspace = all.polar;
    polar.batch = args.batch;
    polar.n = polar.m = args.d;
    polar_fwd(polar, target);
    launch("bures_value", bures_value<T>, ceil_div(args.batch, 32), 32, 0, target, all);
    if (args.grad_a) gradient(all, false, target);
    if (args.grad_b) gradient(all, true, target);
}

#define OTKD_INSTANTIATE(T)                                                    \
    template int64_t bures_workspace_bytes(const BuresArgs<T>&, const Target&); \
    template void bures(const BuresArgs<T>&, const Target&);
OTKD_INSTANTIATE(float)
OTKD_INSTANTIATE(double)
#undef OTKD_INSTANTIATE

}  // namespace cuda
}  // namespace otkd_fast

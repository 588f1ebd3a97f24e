// Roots of symmetric positive semidefinite matrices of any size, and their adjoint, by products (reference/sqrtm.py, 'polar'), float and
// double.
//
//   A = F^T F, U = polar(F):   A^(1/2) = U^T F,   A^(-1/2) = F^-1 U;   dA = X with S X + X S = G,   of the inverse dA = -R^2 Y R^2, R Y + Y R = G
//
// F by pivoted Cholesky in double, a block a matrix (cholesky_block.h); U by polar.cu; then one product. The adjoint, with S scaled by a power
// of two to have its eigenvalues around 1: N = (S + I)^-1, M = I - 2 N, X = sum of M^l (2 N G N) M^l by doubling (csrc/cpu/lyapunov.h says
// why), as often as bounds of the eigenvalues tell for each matrix; done ones leave the launches at once. 2 n^3 (22 + 1) operations
// forward, 2 n^3 (4 + 3 k) backward, k = 8 or so at condition 1e4. Matrices that this does not serve, indefinite ones and singular ones of
// the inverse and the adjoint, are solved from eigenvectors by a block each (jacobi_block.h), in a launch that the others leave: nothing
// waits for the device.
#include "otkd_fast/sqrtm.h"

#include "cholesky_block.h"
#include "jacobi_block.h"
#include "matrix_product.h"
#include "otkd_fast/cuda.h"
#include "otkd_fast/polar.h"
#include "otkd_fast/polar_schedule.h"
#include "polar_norm.h"

namespace otkd_fast {
namespace cuda {
namespace {

// Doublings at most; what they may leave out, relative to X.
template <class T>
constexpr int kMostDoublings = sizeof(T) == sizeof(float) ? 20 : 26;
template <class T>
constexpr double kLeftOut = sizeof(T) == sizeof(float) ? 3e-8 : 1e-16;
// Eigenvalues up to this, in units of |A|_F, may come from the rounding of the entries of A.
template <class T>
constexpr double kRootRounding = std::numeric_limits<T>::epsilon();
// Singular values of F below this, in units of |F|, are not those of U: an inverse root is then one from eigenvectors.
template <class T>
constexpr double kServed = polar_schedule<T>().step[0].lowest;
constexpr int64_t kPart = 16 * kFactorThreads;  // entries of a matrix that a block finishes

template <class T>
struct LargeRoot {
    SqrtmArgs<T> args;
    double *rows, *inverse;      // (batch, d, d): R, null where shared memory has it; R^-T, or eigenvectors
    double *eigen_one, *eigen_two;  // (batch, d, d) in the place of the others below
    T *factor, *unitary, *folded;   // (batch, d, d): F, U, F^-T; adjoint: (S + I)^-1 and then powers of M, and the next one
    T *x, *product, *grad, *scaled; // adjoint: X, a product, (G + G^T) / 2, 2^-exponent S
    T* norm;
    int *exponent, *left, *steps;   // (batch,): of A or S; 1 where eigenvectors are needed; doublings
    unsigned char* polar;
    int64_t polar_bytes;
    bool rows_in_shared;
};

template <class T>
OTKD_KERNEL(kFactorThreads, 1) root_factor(OTKD_CONSTANT LargeRoot<T> all) {
    const SqrtmArgs<T>& args = all.args;
    const int64_t d = args.d, entries = d * d, index = block_id();
    const T* a = args.matrix + index * entries;
    double* scratch = reinterpret_cast<double*>(shared_memory());
    const double largest = largest_magnitude(a, entries, scratch);
    T *aux = args.aux + 2 * index, *factor = all.factor + index * entries;
    if (!(largest > 0)) {  // 0, or not finite: NaN
        for (int64_t e = thread_id(); e < entries; e += kFactorThreads) factor[e] = 0;
        if (thread_id() == 0) {
            aux[0] = aux[1] = static_cast<T>(largest);
            all.exponent[index] = all.left[index] = 0;
        }
        return;
    }
    const SymmetricPart<T> matrix(a, d, (exponent_above(largest) + 2) / 2 * 2, 0);
    double squares = 0;
    for (int64_t e = thread_id(); e < entries; e += kFactorThreads) {
        const double entry = matrix(e / d, e % d);
        squares += entry * entry;
    }
    const double upper = kNormMargin * sqrt(sqrt(block_sum(squares, scratch)));
    BlockCholesky<T> cholesky(matrix, shared_memory(), all.rows_in_shared ? nullptr : all.rows + index * entries);
    const Definiteness kind = cholesky.factorize();
    cholesky.store_factor(factor);
    double lower = 0;
    if (kind == Definiteness::definite) {
        double* inverse = all.inverse + index * entries;
        lower = 1 / (kNormMargin * sqrt(cholesky.invert(inverse)));
        if (args.inverse) cholesky.store_inverse(inverse, all.folded + index * entries);
    }
    if (thread_id() != 0) return;
    const bool small = args.inverse && !(lower >= upper * kServed<T>);
    all.left[index] = kind == Definiteness::indefinite || small;
    all.exponent[index] = matrix.exponent;
    aux[0] = static_cast<T>(ldexp(upper, matrix.exponent / 2));
    aux[1] = static_cast<T>(all.left[index] ? 0.0 : ldexp(lower, matrix.exponent / 2));
}

// Some entries of a matrix: index, and the first and the one after the last.
template <class T>
struct Piece {
    int64_t index, begin, end;
    OTKD_DEVICE explicit Piece(const SqrtmArgs<T>& args) {
        const int64_t entries = args.d * args.d, parts = (entries + kPart - 1) / kPart;
        index = block_id() / parts;
        begin = block_id() % parts * kPart;
        end = smaller(begin + kPart, entries);
    }
};

template <class T>
int64_t pieces(const SqrtmArgs<T>& args) {
    return args.batch * ceil_div(args.d * args.d, kPart);
}

// root = (product + product^T) / 2, scaled back; 0 and NaN where A is
template <class T>
OTKD_KERNEL(kFactorThreads) root_end(OTKD_CONSTANT LargeRoot<T> all) {
    const SqrtmArgs<T>& args = all.args;
    const int64_t d = args.d;
    const Piece<T> piece(args);
    if (all.left[piece.index]) return;
    const T* product = all.product + piece.index * d * d;
    const T upper = args.aux[2 * piece.index];
    const int half = all.exponent[piece.index] / 2;
    for (int64_t e = piece.begin + thread_id(); e < piece.end; e += kFactorThreads) {
        const T mean = T(0.5) * (product[e] + product[e % d * d + e / d]);
        args.root[piece.index * d * d + e] = upper > 0 ? ldexp(mean, args.inverse ? -half : half) : upper;
    }
}

template <class T>
OTKD_KERNEL(kJacobiThreads, 1) root_by_eigenvectors(OTKD_CONSTANT LargeRoot<T> all) {
    const SqrtmArgs<T>& args = all.args;
    const int64_t d = args.d, entries = d * d, index = block_id();
    if (!all.left[index]) return;
    const int exponent = all.exponent[index];
    BlockJacobi eigen(d, shared_memory(), all.inverse + index * entries);
    eigen.solve(SymmetricPart<T>(args.matrix + index * entries, d, exponent, 0));
    for (int k = thread_id(); k < d; k += kJacobiThreads) {
        const double value = eigen.values[k], root = value > 0 ? sqrt(value) : 0.0;
        const bool kept = value > eigen.norm * kRootRounding<T>;
        eigen.values[k] = !args.inverse ? root : kept ? 1 / root : 0.0;
    }
    barrier();
    T* out = args.root + index * entries;
    for (int64_t e = thread_id(); e < entries; e += kJacobiThreads) {
        const int64_t i = e / d, j = e % d;
        if (j > i) continue;
        double sum = 0;
        for (int64_t k = 0; k < d; ++k) sum += eigen.values[k] * eigen.rows[k * d + i] * eigen.rows[k * d + j];
        out[i * d + j] = out[j * d + i] = static_cast<T>(ldexp(sum, args.inverse ? -exponent / 2 : exponent / 2));
    }
}

// Doublings after which powers of M = (S - I) / (S + I) are negligible, eigenvalues of S in [lower, upper].
template <class T>
OTKD_DEVICE int doublings(double lower, double upper) {
    const double gap = smaller(2 * lower / (1 + lower), 2 / (1 + upper));  // 1 - |M|
    const double rate = gap < 1 ? -log1p(-gap) : kInfinity;
    return larger(1, static_cast<int>(ceil(log2(-log(kLeftOut<T>) / rate))) - 1);
}

// S scaled, (S + I)^-1 to `factor`, as F^-1 and F^-T of its factor to `folded`, and the symmetric part of G.
template <class T>
OTKD_KERNEL(kFactorThreads, 1) adjoint_begin(OTKD_CONSTANT LargeRoot<T> all) {
    const SqrtmArgs<T>& args = all.args;
    const int64_t d = args.d, entries = d * d, index = block_id();
    const double upper = args.aux[2 * index], lower = args.aux[2 * index + 1];
    const double top = args.inverse ? 1 / lower : upper, bottom = args.inverse ? 1 / upper : lower;
    const int exponent = lower > 0 ? ilogb(sqrt(top) * sqrt(bottom)) : 0;
    const int count = lower > 0 ? doublings<T>(ldexp(bottom, -exponent), ldexp(top, -exponent)) : 0;
    const bool served = lower > 0 && count <= kMostDoublings<T>;
    if (thread_id() == 0) {
        all.exponent[index] = exponent;
        all.steps[index] = served ? count : 0;
        all.left[index] = upper > 0 && !served;
    }
    if (!served) return;
    const T* s = args.root + index * entries;
    const T* grad = args.grad_root + index * entries;
    for (int64_t e = thread_id(); e < entries; e += kFactorThreads) {
        all.grad[index * entries + e] = T(0.5) * grad[e] + T(0.5) * grad[e % d * d + e / d];
        all.scaled[index * entries + e] = ldexp(s[e], -exponent);
    }
    const SymmetricPart<T> matrix(s, d, exponent, 1);
    BlockCholesky<T> cholesky(matrix, shared_memory(), all.rows_in_shared ? nullptr : all.rows + index * entries);
    cholesky.factorize();
    cholesky.invert(all.inverse + index * entries);
    cholesky.store_inverse(all.inverse + index * entries, all.folded + index * entries);
}

// grad_matrix = the symmetric part of X, scaled back
template <class T>
OTKD_KERNEL(kFactorThreads) adjoint_end(OTKD_CONSTANT LargeRoot<T> all) {
    const SqrtmArgs<T>& args = all.args;
    const int64_t d = args.d;
    const Piece<T> piece(args);
    if (all.left[piece.index]) return;
    const T *x = all.x + piece.index * d * d, upper = args.aux[2 * piece.index];
    const int exponent = all.exponent[piece.index] * (args.inverse ? 3 : -1);
    const bool served = all.steps[piece.index] > 0;
    for (int64_t e = piece.begin + thread_id(); e < piece.end; e += kFactorThreads) {
        args.grad_matrix[piece.index * d * d + e] = served ? ldexp(T(0.5) * (x[e] + x[e % d * d + e / d]), exponent) : upper;
    }
}

// out = V X, V X^T or V^T X for (d, d) matrices, by a block.
enum class Form { plain, right_transposed, left_transposed };
template <class X>
OTKD_DEVICE void slow_product(const double* v, const X& x, int64_t d, Form form, double* out) {
    for (int64_t e = thread_id(); e < d * d; e += kJacobiThreads) {
        const int64_t i = e / d, j = e % d;
        double sum = 0;
        for (int64_t k = 0; k < d; ++k) sum += v[form == Form::left_transposed ? k * d + i : i * d + k] * (form == Form::right_transposed ? x(j, k) : x(k, j));
        out[e] = sum;
    }
    barrier();
}

template <class T>
OTKD_KERNEL(kJacobiThreads, 1) adjoint_by_eigenvectors(OTKD_CONSTANT LargeRoot<T> all) {
    const SqrtmArgs<T>& args = all.args;
    const int64_t d = args.d, entries = d * d, index = block_id();
    if (!all.left[index]) return;
    double *one = all.eigen_one + index * entries, *two = all.eigen_two + index * entries;
    BlockJacobi eigen(d, shared_memory(), all.inverse + index * entries);
    const double largest = largest_magnitude(args.matrix + index * entries, entries, eigen.scratch);
    const int exponent = (exponent_above(largest) + 2) / 2 * 2;
    eigen.solve(SymmetricPart<T>(args.matrix + index * entries, d, exponent, 0));
    const double *V = eigen.rows, level = eigen.norm * kRootRounding<T>;
    const SymmetricPart<T> grad(args.grad_root + index * entries, d, 0, 0);
    const auto at = [&](const double* matrix) { return [=](int64_t i, int64_t j) { return matrix[i * d + j]; }; };
    slow_product(V, grad, d, Form::plain, one);
    slow_product(one, at(V), d, Form::right_transposed, two);
    for (int64_t e = thread_id(); e < entries; e += kJacobiThreads) {
        const double left = eigen.values[e / d], right = eigen.values[e % d];
        const double root = left > 0 ? sqrt(left) : 0.0, its = right > 0 ? sqrt(right) : 0.0;
        if (args.inverse) two[e] = left > level && right > level ? -two[e] / (root + its) / root / its : 0.0;
        else two[e] = left > level || right > level ? two[e] / (root + its) : 0.0;
    }
    barrier();
    slow_product(two, at(V), d, Form::plain, one);
    slow_product(V, at(one), d, Form::left_transposed, two);
    for (int64_t e = thread_id(); e < entries; e += kJacobiThreads) {
        const double mean = 0.5 * (two[e] + two[e % d * d + e / d]);
        args.grad_matrix[index * entries + e] = static_cast<T>(ldexp(mean, (args.inverse ? -3 : -1) * (exponent / 2)));
    }
}

// Everything laid out in the workspace; with a null one the pointers mean nothing. Returns its bytes.
template <class T>
int64_t lay_out(const SqrtmArgs<T>& args, bool backward, LargeRoot<T>& all, const Target& target) {
    all.args = args;
    all.rows_in_shared = BlockCholesky<T>::shared_bytes(args.d, true) <= shared_memory_limit(target);
    const int64_t entries = args.batch * args.d * args.d;
    int64_t used = 0;
    auto take = [&](auto*& piece, int64_t count) {
        using S = std::remove_reference_t<decltype(*piece)>;
        piece = args.workspace ? reinterpret_cast<S*>(args.workspace + used) : nullptr;
        used += round_up(count * int64_t{sizeof(S)}, 64);
    };
    take(all.exponent, args.batch);
    take(all.left, args.batch);
    take(all.steps, args.batch);
    take(all.norm, args.batch);
    take(all.inverse, entries);
    const int64_t before = used;
    take(all.rows, all.rows_in_shared ? 0 : entries);
    take(all.factor, entries);
    take(all.product, entries);
    take(all.folded, backward || args.inverse ? entries : 0);
    take(all.unitary, entries);
    for (T** piece : {&all.x, &all.grad, &all.scaled}) take(*piece, backward ? entries : 0);
    PolarArgs<T> polar{};
    polar.batch = args.batch;
    polar.n = polar.m = args.d;
    all.polar_bytes = backward ? 0 : polar_workspace_bytes(polar, target);
    take(all.polar, all.polar_bytes);
    const int64_t end = used;
    used = before;  // eigenvectors are computed after everything else
    if (backward) {
        take(all.eigen_one, entries);
        take(all.eigen_two, entries);
    }
    return used = larger(used, end);
}

// out = alpha op(A) B for square matrices; `transposed`: op(A) = A^T
template <class T>
ProductArgs<T> square(const LargeRoot<T>& all, const T* a, bool transposed, const T* b, T* out, double alpha = 1) {
    const int64_t d = all.args.d;
    ProductArgs<T> product{a, b, out, all.args.batch, d, d, d, d * d, transposed ? 1 : d, transposed ? d : 1, d * d, d, 1};
    product.alpha = alpha;
    return product;
}

template <class T>
void forward(const LargeRoot<T>& all, const Target& target) {
    const SqrtmArgs<T>& args = all.args;
    const int64_t d = args.d, shared = BlockCholesky<T>::shared_bytes(d, all.rows_in_shared);
    launch("root_factor", root_factor<T>, args.batch, kFactorThreads, shared, target, all);
    PolarArgs<T> polar{};
    polar.matrix = all.factor;
    polar.polar = all.unitary;
    polar.nuclear_norm = all.norm;
    polar.workspace = all.polar;
    polar.batch = args.batch;
    polar.n = polar.m = d;
    polar_fwd(polar, target);
    if (args.inverse) matrix_product(square(all, all.folded, true, all.unitary, all.product), target);
    else matrix_product(square(all, all.unitary, true, all.factor, all.product), target);
    launch("root_end", root_end<T>, pieces(args), kFactorThreads, 0, target, all);
    launch("root_by_eigenvectors", root_by_eigenvectors<T>, args.batch, kJacobiThreads, BlockJacobi::shared_bytes(d), target, all);
}

template <class T>
void backward(const LargeRoot<T>& all, const Target& target) {
    const SqrtmArgs<T>& args = all.args;
    const int64_t d = args.d, shared = BlockCholesky<T>::shared_bytes(d, all.rows_in_shared);
    launch("adjoint_begin", adjoint_begin<T>, args.batch, kFactorThreads, shared, target, all);
    T *power = all.factor, *next = all.unitary;
    const auto multiply = [&](ProductArgs<T> product, int step) {
        product.steps = all.steps;
        product.step = step;
        matrix_product(product, target);
    };
    multiply(square(all, all.folded, true, all.folded, next), 0);  // (S + I)^-1
    multiply(square(all, all.grad, false, next, all.product), 0);
    multiply(square(all, next, false, all.product, all.x, 2.0), 0);
    ProductArgs<T> first = square(all, all.folded, true, all.folded, power, -2.0);
    first.diagonal = 1;
    multiply(first, 0);
    for (int k = 0; k < kMostDoublings<T>; ++k) {
        multiply(square(all, all.x, false, power, all.product), k);
        ProductArgs<T> sum = square(all, power, false, all.product, all.x);
        sum.c = all.x;
        sum.beta = 1;
        multiply(sum, k);
        multiply(square(all, power, false, power, next), k + 1);
        std::swap(power, next);
    }
    if (args.inverse) {
        multiply(square(all, all.scaled, false, all.scaled, power), 0);
        multiply(square(all, all.x, false, power, all.product), 0);
        multiply(square(all, power, false, all.product, all.x, -1.0), 0);
    }
    launch("adjoint_end", adjoint_end<T>, pieces(args), kFactorThreads, 0, target, all);
    launch("adjoint_by_eigenvectors", adjoint_by_eigenvectors<T>, args.batch, kJacobiThreads, BlockJacobi::shared_bytes(d), target, all);
}

}  // namespace

template <class T>
int64_t sqrtm_workspace_bytes(const SqrtmArgs<T>& args, bool backward, const Target& target) {
    LargeRoot<T> all;
    return lay_out(args, backward, all, target);
}

template <class T>
void sqrtm_polar_fwd(const SqrtmArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    LargeRoot<T> all;
    lay_out(args, false, all, target);
    forward(all, target);
}

template <class T>
void sqrtm_polar_bwd(const SqrtmArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    LargeRoot<T> all;
    lay_out(args, true, all, target);
    backward(all, target);
}

#define OTKD_INSTANTIATE(T)                                                               \
    template int64_t sqrtm_workspace_bytes(const SqrtmArgs<T>&, bool, const Target&); \
    template void sqrtm_polar_fwd(const SqrtmArgs<T>&, const Target&);                    \
    template void sqrtm_polar_bwd(const SqrtmArgs<T>&, const Target&);
OTKD_INSTANTIATE(float)
OTKD_INSTANTIATE(double)
#undef OTKD_INSTANTIATE

}  // namespace cuda
}  // namespace otkd_fast

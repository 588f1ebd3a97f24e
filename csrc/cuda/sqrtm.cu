// Roots of small symmetric positive semidefinite matrices, d <= 32, and their adjoint (reference/sqrtm.py, 'eigh'), float and double.
//
//   A = V diag(w) V^T:   S = V diag(sqrt(max(w, 0))) V^T, its inverse over w above the rounding of A;   dA = V (V^T G V / (s_k + s_l)) V^T
//
// One-sided Jacobi by a warp, a lane a vector in registers. A definite: the vectors are the rows of its Cholesky factor, and end as s_k v_k, small
// s_k to u sqrt(condition). Else: the columns of B = A + 2 |A|_F I, which end as eigenvectors times eigenvalues of B; the shift keeps these
// away from 0, and does not show in the eigenvalues of A, which are Rayleigh quotients. All disjoint pairs of a round rotate at once: a
// lane gets its partner's vector by shuffles, and both find the same angle. In double, whatever the type: about 4 d^3 multiply-adds a
// sweep, 5 to 9 sweeps. d <= 16: two matrices a warp. A is scaled by an even power of two first.
#include "otkd_fast/sqrtm.h"

#include "otkd_fast/cuda.h"
#include "runtime.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kMostSweeps = 30;
constexpr double kOrthogonal = 4e-16, kDone = 4e-15;  // cosines: a pair is left alone below; a sweep was the last one below

template <class T>
constexpr double kRounding = std::numeric_limits<T>::epsilon();

// kSize lanes have a matrix of the batch; `lane` is the one's number among them.
template <class T, int kSize>
struct Small {
    static constexpr int kMatrices = 32 / kSize, kLine = kSize + 1;
    const SqrtmArgs<T>& args;
    const int d, lane;
    const int64_t index;
    const bool there;
    double* memory;  // 2 (kSize, kLine)

    OTKD_DEVICE explicit Small(const SqrtmArgs<T>& call)
        : args(call), d(static_cast<int>(call.d)), lane(lane_id() % kSize), index(block_id() * kMatrices + lane_id() / kSize),
          there(index < call.batch), memory(reinterpret_cast<double*>(shared_memory()) + lane_id() / kSize * 2 * kSize * kLine) {}
    static int64_t shared_bytes() { return 32 / kSize * 2 * kSize * kLine * int64_t{sizeof(double)}; }

    OTKD_DEVICE static double sum(double value) {
        OTKD_UNROLL
        for (int offset = kSize / 2; offset > 0; offset /= 2) value += shuffle_xor(value, offset);
        return value;
    }
    OTKD_DEVICE static double most(double value) {
        OTKD_UNROLL
        for (int offset = kSize / 2; offset > 0; offset /= 2) value = larger(value, shuffle_xor(value, offset));
        return value;
    }
    // column = that of the symmetric part of a matrix; 0 beyond its ends
    OTKD_DEVICE void load(const T* matrix, double (&column)[kSize]) const {
        OTKD_UNROLL
        for (int j = 0; j < kSize; ++j) {
            const bool inside = there && j < d && lane < d;
            column[j] = inside ? 0.5 * matrix[j * d + lane] + 0.5 * matrix[lane * d + j] : 0.0;
        }
    }
    // The lane's row of a symmetric result, and its mirror image.
    OTKD_DEVICE void store(const double (&row)[kSize], T* out) const {
        OTKD_UNROLL
        for (int j = 0; j < kSize; ++j) {
            if (!there || lane >= d || j > lane) continue;
            out[lane * d + j] = static_cast<T>(row[j]);
            out[j * d + lane] = static_cast<T>(row[j]);
        }
    }
};

// The lane's partner in one of kSize - 1 rounds, which bring all pairs together.
template <int kSize>
OTKD_DEVICE int partner_of(int lane, int round) {
    if (lane == kSize - 1) return round * (kSize / 2) % (kSize - 1);
    const int other = (round - lane + kSize - 1) % (kSize - 1);
    return other == lane ? kSize - 1 : other;
}

template <int kSize>
OTKD_DEVICE double squared(const double (&column)[kSize]) {
    double sum = 0;
    OTKD_UNROLL
    for (int j = 0; j < kSize; ++j) sum += column[j] * column[j];
    return sum;
}

// Rotates the columns of all lanes until they are orthogonal. The whole warp.
template <int kSize>
OTKD_DEVICE void orthogonalize(double (&column)[kSize]) {
    const int lane = lane_id() % kSize, first = lane_id() - lane;
    for (int sweep = 0; sweep < kMostSweeps; ++sweep) {
        bool again = false;
        OTKD_ROLLED
        for (int round = 0; round < kSize - 1; ++round) {
            const int partner = partner_of<kSize>(lane, round);
            const bool left = lane < partner;
            double other[kSize], gamma = 0;
            OTKD_UNROLL
            for (int j = 0; j < kSize; ++j) {
                other[j] = shuffle(column[j], first + partner);
                gamma += column[j] * other[j];  // the same in both lanes
            }
            const double own = squared(column), its = shuffle(own, first + partner);
            const double limit = own * its, gap = left ? its - own : own - its;
            if (!(gamma * gamma > kOrthogonal * kOrthogonal * limit)) continue;
            again |= gamma * gamma > kDone * kDone * limit;
            const double size = sqrt(gap * gap + 4 * gamma * gamma), tangent = 2 * gamma / (gap < 0 ? gap - size : gap + size);
            const double half = tangent / (1 + sqrt(1 + tangent * tangent)), sine = 2 * half / (1 + half * half);
            OTKD_UNROLL
            for (int j = 0; j < kSize; ++j) {
                column[j] += left ? -sine * (other[j] + half * column[j]) : sine * (other[j] - half * column[j]);
            }
        }
        if (!barrier_any(again)) break;
    }
}

// Of an A that is not definite: eigenvalues up to this, in units of |A|_F; reference/sqrtm.py says why the gradient of the root has its own.
template <class T>
OTKD_DEVICE double eigenvalue_level(bool inverse, int d) {
    return inverse || sizeof(T) == sizeof(double) ? kRounding<T> : kRounding<T> / sqrt(d < 4 ? 4.0 : static_cast<double>(d));
}

// Pivots of the Cholesky factor above this, in units of the variance, are not the rounding of A; nor are eigenvalues above it in units
// of v^T diag(A) v. The latter sees a zero that smaller pivots before it have amplified.
template <class T>
constexpr double kPivot = sizeof(T) == sizeof(float) ? 0.25 * kRounding<T> : 8 * kRounding<T>;

// Upper triangular R in M with M = R^T R; false where a pivot is in the rounding of M. All lanes, before and after a barrier.
template <class T, int kSize>
OTKD_DEVICE bool factorize(double* M, int d, int lane) {
    const double variance = lane < d ? M[lane * (kSize + 1) + lane] : 0.0;
    bool definite = true;
    OTKD_ROLLED
    for (int k = 0; k < d; ++k) {
        const double pivot = M[k * (kSize + 1) + k], limit = kPivot<T> * shuffle(variance, lane_id() - lane + k);
        definite &= pivot > limit;
        const double own = definite && lane >= k ? M[k * (kSize + 1) + lane] / sqrt(pivot) : 0.0;
        barrier();
        M[k * (kSize + 1) + lane] = own;
        barrier();
        OTKD_ROLLED
        for (int i = k + 1; i <= lane; ++i) M[i * (kSize + 1) + lane] -= M[k * (kSize + 1) + i] * own;
        barrier();
    }
    return definite;
}

// v^T M v for M (kSize, kSize + 1), v in memory and in registers.
template <int kSize>
OTKD_DEVICE double quotient(const double* M, const double* v, int d, const double (&column)[kSize]) {
    double value = 0;
    OTKD_ROLLED
    for (int i = 0; i < d; ++i) {
        double sum = 0;
        OTKD_UNROLL
        for (int j = 0; j < kSize; ++j) sum += M[i * (kSize + 1) + j] * column[j];
        value += v[i] * sum;
    }
    return value;
}

template <class T, int kSize>
OTKD_KERNEL(32, 8) jacobi_root(OTKD_CONSTANT SqrtmArgs<T> args) {
    const Small<T, kSize> at(args);
    const int d = at.d, lane = at.lane;
    double column[kSize], largest = 0;
    at.load(args.matrix + at.index * d * d, column);
    bool bad = false;
    OTKD_UNROLL
    for (int j = 0; j < kSize; ++j) {
        largest = larger(fabs(column[j]), largest);
        bad |= !(fabs(column[j]) < kInfinity);
    }
    bad = at.sum(bad ? 1.0 : 0.0) > 0;
    largest = at.most(largest);
    const int half = largest > 0 && !bad ? (ilogb(largest) + 2) / 2 : 0;  // of the exponent
    OTKD_UNROLL
    for (int j = 0; j < kSize; ++j) column[j] = bad ? 0.0 : ldexp(column[j], -2 * half);
    OTKD_UNROLL
    for (int j = 0; j < kSize; ++j) at.memory[j * at.kLine + lane] = at.memory[(kSize + j) * at.kLine + lane] = column[j];
    const double norm = sqrt(at.sum(squared(column)));
    barrier();
    const bool definite = factorize<T, kSize>(at.memory, d, lane);
    const double shift = definite ? 0.0 : 2 * norm;
    OTKD_UNROLL
    for (int j = 0; j < kSize; ++j) {
        if (definite) column[j] = j >= lane && j < d ? at.memory[lane * at.kLine + j] : 0.0;
        else column[j] += j == lane && lane < d ? shift : 0.0;
    }
    orthogonalize(column);
    const double length = sqrt(squared(column));
    T* aux = args.aux + at.index * (d + 1) * d;
    OTKD_UNROLL
    for (int j = 0; j < kSize; ++j) {
        column[j] = length > 0 ? column[j] / length : 0.0;
        at.memory[lane * at.kLine + j] = column[j];  // no other lane reads this row before the barrier
        if (at.there && lane < d && j < d) aux[lane * d + j] = static_cast<T>(column[j]);
    }
    double* weights = at.memory + kSize * at.kLine;
    double value = length * length, level = 0;
    if (definite) {
        OTKD_ROLLED
        for (int j = 0; j < d; ++j) level += at.memory[lane * at.kLine + j] * at.memory[lane * at.kLine + j] * weights[j * at.kLine + j];
        level *= kPivot<T>;
    } else {
        value = quotient(weights, at.memory + lane * at.kLine, d, column);
        level = norm * eigenvalue_level<T>(args.inverse, d);
    }
    barrier();
    const double root = lane >= d || !(value > 0) ? 0.0 : definite ? length : sqrt(value);
    const bool kept = value > level;
    const double weight = bad ? kNaN : !args.inverse ? root : kept ? 1 / root : 0.0;
    if (at.there && lane < d) aux[d * d + lane] = static_cast<T>(bad ? kNaN : ldexp(kept ? root : -root, half));
    weights[lane] = lane < d ? weight : 0.0;
    barrier();
    OTKD_UNROLL
    for (int j = 0; j < kSize; ++j) column[j] = 0;
    OTKD_ROLLED
    for (int k = 0; k < d; ++k) {
        const double own = at.memory[k * at.kLine + lane] * weights[k];
        OTKD_UNROLL
        for (int j = 0; j < kSize; ++j) column[j] += own * at.memory[k * at.kLine + j];
    }
    OTKD_UNROLL
    for (int j = 0; j < kSize; ++j) column[j] = ldexp(column[j], args.inverse ? -half : half);
    at.store(column, args.root + at.index * d * d);
}

// row = sum over k of left(k) times row k of `right`
template <int kSize, class Left>
OTKD_DEVICE void combine(const Left& left, const double* right, int d, double (&row)[kSize]) {
    OTKD_UNROLL
    for (int j = 0; j < kSize; ++j) row[j] = 0;
    OTKD_ROLLED
    for (int k = 0; k < d; ++k) {
        const double own = left(k);
        OTKD_UNROLL
        for (int j = 0; j < kSize; ++j) row[j] += own * right[k * (kSize + 1) + j];
    }
}

// Lane k has row k of the matrices in the eigenbasis.
template <class T, int kSize>
OTKD_KERNEL(32, 8) jacobi_root_backward(OTKD_CONSTANT SqrtmArgs<T> args) {
    const Small<T, kSize> at(args);
    const int d = at.d, lane = at.lane, line = at.kLine;
    double *V = at.memory, *other = V + kSize * line;  // eigenvectors in rows; G, then products
    const T* aux = args.aux + at.index * (d + 1) * d;
    double row[kSize];
    at.load(args.grad_root + at.index * d * d, row);
    OTKD_UNROLL
    for (int j = 0; j < kSize; ++j) {
        other[lane * line + j] = row[j];
        V[lane * line + j] = at.there && lane < d && j < d ? static_cast<double>(aux[lane * d + j]) : 0.0;
    }
    const double mark = at.there && lane < d ? static_cast<double>(aux[d * d + lane]) : 0.0, root = fabs(mark);
    const bool kept = mark > 0;
    const double broken = at.sum(root) * 0;  // NaN where the matrix was not finite
    barrier();
    combine([&](int k) { return V[lane * line + k]; }, other, d, row);  // V G
    barrier();
    OTKD_ROLLED
    for (int l = 0; l < kSize; ++l) {
        double sum = 0;
        OTKD_UNROLL
        for (int j = 0; j < kSize; ++j) sum += row[j] * V[l * line + j];
        const int place = lane_id() - lane + l;
        const double its = shuffle(root, place);
        const bool its_kept = shuffle(kept ? 1 : 0, place) != 0;
        double value = 0;
        if (args.inverse) {
            if (kept && its_kept) value = -sum / (root + its) / root / its;
        } else if (kept || its_kept) {
            value = sum / (root + its);
        }
        other[lane * line + l] = value + broken;
    }
    barrier();
    combine([&](int k) { return other[lane * line + k]; }, V, d, row);  // X V
    barrier();
    OTKD_UNROLL
    for (int j = 0; j < kSize; ++j) other[lane * line + j] = row[j];
    barrier();
    combine([&](int k) { return V[k * line + lane]; }, other, d, row);  // V^T X V
    at.store(row, args.grad_matrix + at.index * d * d);
}

}  // namespace

template <class T>
void sqrtm_fwd(const SqrtmArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    if (args.d <= 16) {
        launch("jacobi_root", jacobi_root<T, 16>, ceil_div(args.batch, 2), 32, Small<T, 16>::shared_bytes(), target, args);
    } else {
        launch("jacobi_root", jacobi_root<T, 32>, args.batch, 32, Small<T, 32>::shared_bytes(), target, args);
    }
}

template <class T>
void sqrtm_bwd(const SqrtmArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    if (args.d <= 16) {
        launch("jacobi_root_backward", jacobi_root_backward<T, 16>, ceil_div(args.batch, 2), 32, Small<T, 16>::shared_bytes(), target, args);
    } else {
        launch("jacobi_root_backward", jacobi_root_backward<T, 32>, args.batch, 32, Small<T, 32>::shared_bytes(), target, args);
    }
}

#define OTKD_INSTANTIATE(T)                                     \
    template void sqrtm_fwd(const SqrtmArgs<T>&, const Target&); \
    template void sqrtm_bwd(const SqrtmArgs<T>&, const Target&);
OTKD_INSTANTIATE(float)
OTKD_INSTANTIATE(double)
#undef OTKD_INSTANTIATE

}  // namespace cuda
}  // namespace otkd_fast

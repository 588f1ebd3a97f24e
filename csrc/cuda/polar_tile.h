// One matrix of polar.cu by one block, in shared memory: X (n, m), n >= m, and one (m, m) matrix; each product is formed in
// registers and then takes the place of an operand.
#pragma once
#include "otkd_fast/polar.h"
#include "polar_norm.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kMostSteps = 22;

// X <- X (a I + b X^T X + c (X^T X)^2), step by step.
template <class T>
struct PolarSteps {
    int count;
    double top;  // norm of X that the first one expects
    T a[kMostSteps], b[kMostSteps], c[kMostSteps];
};

// kGrid x kGrid threads; each has every kGrid-th row and column, up to kTile of them.
template <class T, int kGrid, int kTile>
struct PolarTile {
    static constexpr int kThreads = kGrid * kGrid, kSize = kGrid * kTile, kRun = 16;
    static constexpr int kPart = kTile < 10 ? kTile : kTile / 2;  // columns whose runs are summed at a time: registers have no place for more

    const PolarArgs<T>& args;
    const int n, m, rows, columns, ld, tx, ty;
    const bool transposed;
    T *x, *g;         // (rows, ld), (columns, ld); 0 beyond n and m
    double* scratch;  // 32 values in the place of g, before and after the steps
    T acc[kTile][kTile];

    static int round_up_to_grid(int size) { return (size + kGrid - 1) / kGrid * kGrid; }
    static int64_t shared_bytes(int n, int m) {
        const int rows = round_up_to_grid(larger(n, m)), columns = round_up_to_grid(smaller(n, m));
        return (rows + columns) * (columns + 1) * int64_t{sizeof(T)};
    }

    OTKD_DEVICE explicit PolarTile(const PolarArgs<T>& call)
        : args(call), n(larger(call.n, call.m)), m(smaller(call.n, call.m)), rows((n + kGrid - 1) / kGrid * kGrid),
          columns((m + kGrid - 1) / kGrid * kGrid), ld(columns + 1), tx(thread_id() % kGrid), ty(thread_id() / kGrid),
          transposed(call.n < call.m), x(reinterpret_cast<T*>(shared_memory())), g(x + rows * ld),
          scratch(reinterpret_cast<double*>(g)) {}

    OTKD_DEVICE void solve(int64_t index, const PolarSteps<T>& steps) {
        const T* matrix = args.matrix + index * n * m;
        T* polar = args.polar + index * n * m;
        const double largest = largest_magnitude(matrix, int64_t{n} * m, scratch);
        if (!(largest > 0)) {  // 0, or not finite
            for (int e = thread_id(); e < n * m; e += kThreads) polar[e] = static_cast<T>(largest);
            if (thread_id() == 0) args.nuclear_norm[index] = static_cast<T>(largest);
            return;
        }
        const int exponent = exponent_above(largest);
        load(matrix, exponent);
        normalise(steps.top);
        for (int s = 0; s < steps.count; ++s) step(steps.a[s], steps.b[s], steps.c[s]);
        double norm = 0;
        for_entries([&](int64_t at, T& entry) {
            polar[at] = entry;
            norm += static_cast<double>(ldexp(matrix[at], -exponent)) * entry;
        });
        norm = block_sum(norm, scratch);
        if (thread_id() == 0) args.nuclear_norm[index] = static_cast<T>(ldexp(norm, exponent));
    }

  private:
    // Calls body(place in the matrix in memory, entry of x), neighbouring threads along the rows in memory.
    template <class Body>
    OTKD_DEVICE void for_entries(const Body& body) {
        const int along = transposed ? n : m;
        for (int e = thread_id(); e < n * m; e += kThreads) {
            const int line = e / along, k = e % along;
            body(e, transposed ? x[k * ld + line] : x[line * ld + k]);
        }
    }

    OTKD_DEVICE void load(const T* matrix, int exponent) {
        for (int e = thread_id(); e < (rows + columns) * ld; e += kThreads) x[e] = 0;
        barrier();
        for_entries([&](int64_t at, T& entry) { entry = ldexp(matrix[at], -exponent); });
        barrier();
    }

    OTKD_DEVICE void normalise(double top) {
        const T factor = static_cast<T>(top / norm_bound(x, n, m, ld, scratch));
        for (int e = thread_id(); e < rows * ld; e += kThreads) x[e] *= factor;
        barrier();
    }

    // The symmetric products are sums of products of the same entries in the same order above and below the diagonal.
    OTKD_DEVICE void step(T a, T b, T c) {
        accumulate(x, 1, ld, x, n, columns);
        if (c != 0) {
            put(g, columns);
            barrier();
            accumulate(g, 1, ld, g, m, columns);  // g is its own transpose
            each([&](int r, int k, int at) { acc[r][k] = c * acc[r][k] + b * g[at]; }, columns);
            barrier();
        } else {
            each([&](int r, int k, int) { acc[r][k] *= b; }, columns);
        }
        if (tx == ty) {
            OTKD_UNROLL
            for (int r = 0; r < kTile; ++r) acc[r][r] += a;
        }
        put(g, columns);
        barrier();
        accumulate(x, ld, 1, g, m, rows);
        barrier();
        put(x, rows);
        barrier();
    }

    // acc = L R, L (lines, depth) with entry (i, k) at i * line + k * step, R (depth, columns) with rows of ld. Rows and columns beyond
    // the ends are taken from inside, and not used. Sums of float are sums of kRun terms, added up: equal terms round to one side.
    OTKD_DEVICE void accumulate(const T* left, int line, int step, const T* right, int depth, int lines) {
        int own[kTile], other[kTile];
        OTKD_UNROLL
        for (int r = 0; r < kTile; ++r) {
            own[r] = (r * kGrid < lines ? r * kGrid + ty : ty) * line;
            other[r] = r * kGrid < columns ? r * kGrid + tx : tx;
            OTKD_UNROLL
            for (int k = 0; k < kTile; ++k) acc[r][k] = 0;
        }
        if constexpr (sizeof(T) == sizeof(double)) {
            add_products<kTile>(left, own, step, right, other, 0, depth, acc);
        } else {
            OTKD_UNROLL
            for (int first = 0; first < kTile; first += kPart) {
                OTKD_ROLLED
                for (int begin = 0; begin < depth; begin += kRun) {
                    T run[kTile][kPart] = {};
                    add_products<kPart>(left, own, step, right, other + first, begin, smaller(begin + kRun, depth), run);
                    OTKD_UNROLL
                    for (int r = 0; r < kTile; ++r) {
                        OTKD_UNROLL
                        for (int k = 0; k < kPart; ++k) acc[r][first + k] += run[r][k];
                    }
                }
            }
        }
    }

    // sums += the products of this thread's rows and kColumns of its columns, over the depth [begin, end)
    template <int kColumns>
    OTKD_DEVICE void add_products(const T* left, const int* own, int step, const T* right, const int* other, int begin, int end,
                                  T (&sums)[kTile][kColumns]) {
        OTKD_ROLLED
        for (int d = begin; d < end; ++d) {
            T one[kTile], two[kColumns];
            OTKD_UNROLL
            for (int r = 0; r < kTile; ++r) one[r] = left[own[r] + d * step];
            OTKD_UNROLL
            for (int k = 0; k < kColumns; ++k) two[k] = right[other[k] + d * ld];
            OTKD_UNROLL
            for (int r = 0; r < kTile; ++r) {
                OTKD_UNROLL
                for (int k = 0; k < kColumns; ++k) sums[r][k] += one[r] * two[k];
            }
        }
    }

    // body(r, k, place) for this thread's entries of a matrix of `lines` rows
    template <class Body>
    OTKD_DEVICE void each(const Body& body, int lines) {
        OTKD_UNROLL
        for (int r = 0; r < kTile; ++r) {
            OTKD_UNROLL
            for (int k = 0; k < kTile; ++k) {
                if (r * kGrid < lines && k * kGrid < columns) body(r, k, (r * kGrid + ty) * ld + k * kGrid + tx);
            }
        }
    }

    OTKD_DEVICE void put(T* to, int lines) {
        each([&](int r, int k, int at) { to[at] = acc[r][k]; }, lines);
    }
};

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

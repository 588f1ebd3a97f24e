// What the kernels of cost_matrix.cu and cost_matrix_ragged.cu share: rows as they are compared, a tile of sums, the gradient of some rows.
#pragma once
#include "runtime.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int kTile = 64, kStage = 16, kLine = kTile + 1, kThreads = 256, kSumDepth = 256, kRowThreads = 128;
constexpr int kGradRows = 32, kGradDepth = 64, kGradStage = 16;
constexpr int64_t kWantedBlocks = 264, kSplitDepth = 512;

template <class T>
struct Plan {
    CostMatrixArgs<T> args;
    const T *x, *y;                 // rows as they are compared
    int64_t x_stride, y_stride;     // from one problem to the next
    T *rows, *partial;
    double *norms, *scales;         // (batch, n + m), cosine only
    int64_t splits, depth;          // of the forward
};

template <class T>
bool rewrites(const CostMatrixArgs<T>& args) {
    return args.metric == Metric::cosine || args.temperature_x > 0 || args.temperature_y > 0;
}

// The workspace laid out; with a null one the pointers mean nothing. Returns its bytes.
template <class T>
int64_t make_plan(const CostMatrixArgs<T>& args, Plan<T>& plan, bool may_split = true) {
    const int64_t rows = args.n + args.m, tiles = args.batch * ceil_div(args.n, kTile) * ceil_div(args.m, kTile);
    plan.args = args;
    plan.splits = may_split && tiles < kWantedBlocks ? smaller(ceil_div(args.d, kSplitDepth), ceil_div(kWantedBlocks, tiles)) : 1;
    plan.depth = round_up(ceil_div(args.d, larger<int64_t>(plan.splits, 1)), kStage);
    plan.splits = larger<int64_t>(ceil_div(args.d, larger<int64_t>(plan.depth, 1)), 1);
    unsigned char* base = reinterpret_cast<unsigned char*>(args.workspace);
    int64_t used = 0;
    auto take = [&](int64_t bytes) {
        unsigned char* piece = base ? base + used : nullptr;
        used += round_up(bytes, 64);
        return piece;
    };
    const int64_t norms = args.metric == Metric::cosine ? args.batch * rows : 0;
    plan.norms = reinterpret_cast<double*>(take(norms * 8));
    plan.scales = reinterpret_cast<double*>(take(norms * 8));
    plan.rows = reinterpret_cast<T*>(take(rewrites(args) ? args.batch * rows * args.d * int64_t{sizeof(T)} : 0));
    plan.partial = reinterpret_cast<T*>(
        take(plan.splits > 1 ? plan.splits * args.batch * args.n * args.m * int64_t{sizeof(T)} : 0));
    plan.x = rewrites(args) ? plan.rows : args.x;
    plan.y = rewrites(args) ? plan.rows + args.n * args.d : args.y;
    plan.x_stride = rewrites(args) ? rows * args.d : args.x_batch_stride;
    plan.y_stride = rewrites(args) ? rows * args.d : args.y_batch_stride;
    return used;
}

// Softmax of one row, then (cosine) its exact scaling to a norm in [1, 2). One block.
template <class T>
OTKD_KERNEL(kRowThreads) rewrite_rows(OTKD_CONSTANT Plan<T> plan) {
    double* scratch = reinterpret_cast<double*>(shared_memory());
    const CostMatrixArgs<T>& args = plan.args;
    const int64_t rows = args.n + args.m, index = block_id() / rows, row = block_id() % rows, d = args.d;
    const bool is_x = row < args.n;
    const T* in = is_x ? args.x + index * args.x_batch_stride + row * d
                       : args.y + index * args.y_batch_stride + (row - args.n) * d;
    T* out = plan.rows + (index * rows + row) * d;
    const double temperature = is_x ? args.temperature_x : args.temperature_y;
    double factor = 1;
    T top = 0;
    if (temperature > 0) {
        T best = static_cast<T>(-kInfinity);
        bool nan = false;
        for (int64_t k = thread_id(); k < d; k += block_threads()) {
            best = larger(in[k], best);
            nan |= !(in[k] == in[k]);
        }
        top = static_cast<T>(block_max(static_cast<double>(best), scratch));
        if (barrier_any(nan)) top = static_cast<T>(kNaN);
        const T inverse = static_cast<T>(1.0 / temperature);
        double total = 0;
        for (int64_t k = thread_id(); k < d; k += block_threads()) {
            const T e = exp_of((in[k] - top) * inverse);
            out[k] = e;
            total += e;
        }
        factor = 1.0 / block_sum(total, scratch);
    }
    double most = 0, squares = 0;
    for (int64_t k = thread_id(); k < d; k += block_threads()) {
        const T value = temperature > 0 ? out[k] * static_cast<T>(factor) : in[k];
        out[k] = value;
        most = larger(most, fabs(static_cast<double>(value)));
        if (!(value == value)) squares = value;
    }
    if (args.metric != Metric::cosine) return;
    most = block_max(most, scratch);
    double scale = most > 0 && most < kInfinity ? ldexp(1.0, -ilogb(most)) : 1.0;
    for (int64_t k = thread_id(); k < d; k += block_threads()) squares += (out[k] * scale) * (out[k] * scale);
    double norm = sqrt(block_sum(squares, scratch));
    if (norm > 0 && norm < kInfinity) {
        const double fix = ldexp(1.0, -ilogb(norm));
        scale *= fix;
        norm *= fix;
    }
    for (int64_t k = thread_id(); k < d; k += block_threads()) out[k] = static_cast<T>(out[k] * scale);
    if (thread_id() == 0) {
        plan.norms[index * rows + row] = norm;
        plan.scales[index * rows + row] = scale;
    }
}

// What a finished sum over the depth stands for.
template <class T>
OTKD_DEVICE T finished(const Plan<T>& plan, int64_t index, int64_t i, int64_t j, T value) {
    if (plan.args.metric == Metric::l2) return sqrt(value);
    if (plan.args.metric != Metric::cosine) return value;
    const double* norms = plan.norms + index * (plan.args.n + plan.args.m);
    const double nx = norms[i], ny = norms[plan.args.n + j], gap = value - (nx - ny) * (nx - ny);
    return nx * ny == 0 ? T(1) : static_cast<T>((gap < 0 ? 0 : gap) / (2 * nx * ny));
}

// The sums of rows [i0, rows_end) of x and [j0, columns_end) of y over the depths [begin, end), a tile of them; `shared`: kTileValues.
template <class T, bool kL1>
OTKD_DEVICE void tile_sums(const T* x, const T* y, int64_t d, int64_t i0, int64_t rows_end, int64_t j0, int64_t columns_end, int64_t begin,
                           int64_t end, T* shared, T (&total)[4][4]) {
    T *xs = shared, *ys = shared + kStage * kLine;  // (kStage, kLine)
    const int t = thread_id(), tx = t % 16, ty = t / 16;
    T part[4][4] = {};
    for (int64_t k0 = begin; k0 < end; k0 += kStage) {
        for (int e = t; e < kTile * kStage; e += kThreads) {
            const int r = e / kStage, k = e % kStage;
            const bool inside = k0 + k < end;
            xs[k * kLine + r] = inside && i0 + r < rows_end ? x[(i0 + r) * d + k0 + k] : T(0);
            ys[k * kLine + r] = inside && j0 + r < columns_end ? y[(j0 + r) * d + k0 + k] : T(0);
        }
        barrier();
        OTKD_UNROLL
        for (int k = 0; k < kStage; ++k) {
            T own[4], other[4];
            OTKD_UNROLL
            for (int r = 0; r < 4; ++r) {
                own[r] = xs[k * kLine + ty + 16 * r];
                other[r] = ys[k * kLine + tx + 16 * r];
            }
            OTKD_UNROLL
            for (int r = 0; r < 4; ++r) {
                OTKD_UNROLL
                for (int c = 0; c < 4; ++c) {
                    const T delta = own[r] - other[c];
                    part[r][c] += kL1 ? (delta < 0 ? -delta : delta) : delta * delta;
                }
            }
        }
        barrier();
        if ((k0 - begin) % kSumDepth != kSumDepth - kStage && k0 + kStage < end) continue;
        OTKD_UNROLL
        for (int r = 0; r < 4; ++r) {
            OTKD_UNROLL
            for (int c = 0; c < 4; ++c) {
                total[r][c] += part[r][c];
                part[r][c] = 0;
            }
        }
    }
}

// Some of the rows of x, [r0, r1), and of y, [c0, c1), with their costs: that of rows i and j lies at start + (i - r0) (c1 - c0) + j - c0.
struct Window {
    int64_t r0, r1, c0, c1, start;
    OTKD_DEVICE int64_t at(int64_t i, int64_t j) const { return start + (i - r0) * (c1 - c0) + j - c0; }
};

// The factor of (x_i - y_j) in the gradient of C_ij, times the incoming gradient.
template <class T>
OTKD_DEVICE T weight(const Plan<T>& plan, const Window& window, int64_t index, int64_t i, int64_t j) {
    const CostMatrixArgs<T>& args = plan.args;
    const int64_t at = window.at(i, j);
    const T grad = args.grad_cost[at];
    if (args.metric == Metric::l1) return grad;
    if (args.metric == Metric::sqeuclidean) return 2 * grad;
    if (args.metric == Metric::l2) return args.cost[at] > 0 ? grad / args.cost[at] : T(0);
    const double* norms = plan.norms + index * (args.n + args.m);
    const double product = norms[i] * norms[args.n + j];
    return product == 0 ? T(0) : static_cast<T>(grad / product);
}

// sum_j w_ij (x_i - y_j), or with signs in place of differences, for rows from a0 on and entries from k0 on of one operand; `of_y`: the
// operands change places. `shared`: kGradientValues.
template <class T, bool kL1>
OTKD_DEVICE void gradient_rows(const Plan<T>& plan, const Window& window, int64_t index, bool of_y, int64_t a0, int64_t k0, T* shared) {
    T *weights = shared, *across = shared + kGradStage * (kGradRows + 1);  // (kGradStage, kGradRows), (kGradStage, kGradDepth)
    const int64_t na = of_y ? window.c1 : window.r1, nb = of_y ? window.r1 : window.c1, d = plan.args.d;
    const T *x = plan.x + index * plan.x_stride, *y = plan.y + index * plan.y_stride;
    const T *own_rows = of_y ? y : x, *other_rows = of_y ? x : y;
    const int t = thread_id(), tk = t % 32, ta = t / 32;
    T own[4][2], acc[4][2] = {};
    OTKD_UNROLL
    for (int r = 0; r < 4; ++r) {
        OTKD_UNROLL
        for (int c = 0; c < 2; ++c) {
            const int64_t a = a0 + ta + 8 * r, k = k0 + tk + 32 * c;
            own[r][c] = a < na && k < d ? own_rows[a * d + k] : T(0);
        }
    }
    for (int64_t b0 = of_y ? window.r0 : window.c0; b0 < nb; b0 += kGradStage) {
        OTKD_ROLLED
        for (int e = t; e < kGradStage * kGradRows; e += kThreads) {
            // neighbouring threads along the columns of the cost
            const int b = of_y ? e / kGradRows : e % kGradStage, r = of_y ? e % kGradRows : e / kGradStage;
            const bool inside = b0 + b < nb && a0 + r < na;
            weights[b * (kGradRows + 1) + r] =
                !inside ? T(0) : of_y ? weight(plan, window, index, b0 + b, a0 + r) : weight(plan, window, index, a0 + r, b0 + b);
        }
        OTKD_ROLLED
        for (int e = t; e < kGradStage * kGradDepth; e += kThreads) {
            const int b = e / kGradDepth, k = e % kGradDepth;
            across[e] = b0 + b < nb && k0 + k < d ? other_rows[(b0 + b) * d + k0 + k] : T(0);
        }
        barrier();
        const int count = static_cast<int>(smaller<int64_t>(kGradStage, nb - b0));
        for (int b = 0; b < count; ++b) {
            const T other[2] = {across[b * kGradDepth + tk], across[b * kGradDepth + tk + 32]};
            OTKD_UNROLL
            for (int r = 0; r < 4; ++r) {
                const T w = weights[b * (kGradRows + 1) + ta + 8 * r];
                OTKD_UNROLL
                for (int c = 0; c < 2; ++c) {
                    const T delta = own[r][c] - other[c];
                    if (kL1) {
                        acc[r][c] += delta > 0 ? w : delta < 0 ? -w : delta;
                    } else {
                        acc[r][c] += w * delta;
                    }
                }
            }
        }
        barrier();
    }
    T* out = of_y ? plan.args.grad_y + index * plan.args.m * d : plan.args.grad_x + index * plan.args.n * d;
    OTKD_UNROLL
    for (int r = 0; r < 4; ++r) {
        OTKD_UNROLL
        for (int c = 0; c < 2; ++c) {
            const int64_t a = a0 + ta + 8 * r, k = k0 + tk + 32 * c;
            if (a < na && k < d) out[a * d + k] = acc[r][c];
        }
    }
}

// Cosine: the part of the gradient of a row, numbered over both operands, that is along it.
template <class T>
OTKD_DEVICE double along_row(const Plan<T>& plan, const Window& window, int64_t index, int64_t row, bool is_x, double* scratch) {
    const CostMatrixArgs<T>& args = plan.args;
    const int64_t own_row = is_x ? row : row - args.n, begin = is_x ? window.c0 : window.r0, end = is_x ? window.c1 : window.r1;
    const double* norms = plan.norms + index * (args.n + args.m);
    const double own = norms[row], *other = is_x ? norms + args.n : norms;
    double along = 0;
    for (int64_t j = begin + thread_id(); own > 0 && j < end; j += block_threads()) {
        if (other[j] == 0) continue;
        const int64_t at = is_x ? window.at(own_row, j) : window.at(j, own_row);
        const double grad = args.grad_cost[at], cost = args.cost[at];
        along += grad * ((1 / own - 1 / other[j]) - cost / own);
    }
    along = block_sum(along, scratch);
    return own > 0 ? along / own : 0.0;
}

// Through the rewriting of one row, in place on its gradient. One block.
template <class T>
OTKD_DEVICE void row_backward(const Plan<T>& plan, const Window& window, int64_t index, int64_t row, double* scratch) {
    const CostMatrixArgs<T>& args = plan.args;
    const int64_t rows = args.n + args.m, d = args.d;
    const bool is_x = row < args.n, cosine = args.metric == Metric::cosine;
    T* grad = is_x ? args.grad_x : args.grad_y;
    if (!grad) return;
    grad += is_x ? (index * args.n + row) * d : (index * args.m + row - args.n) * d;
    const T* own = plan.rows + (index * rows + row) * d;
    const double temperature = is_x ? args.temperature_x : args.temperature_y;
    T factor = 0, back = 1, undo = 1;
    if (cosine) {
        factor = static_cast<T>(along_row(plan, window, index, row, is_x, scratch));
        back = static_cast<T>(plan.scales[index * rows + row]);
        undo = static_cast<T>(1 / plan.scales[index * rows + row]);
    }
    double dot = 0;
    for (int64_t k = thread_id(); k < d; k += block_threads()) {
        const T value = cosine ? (grad[k] + factor * own[k]) * back : grad[k];
        if (cosine) grad[k] = value;
        dot += static_cast<double>(value) * (own[k] * undo);
    }
    if (!(temperature > 0)) return;
    const T shift = static_cast<T>(block_sum(dot, scratch)), scale = static_cast<T>(1.0 / temperature);
    for (int64_t k = thread_id(); k < d; k += block_threads()) grad[k] = own[k] * undo * (grad[k] - shift) * scale;
}

constexpr int64_t kScratch = 32 * sizeof(double);

template <class T>
void prepare_rows(const Plan<T>& plan, const Target& target) {
    if (!rewrites(plan.args) || plan.args.rows_ready) return;
    launch("rewrite_rows", rewrite_rows<T>, plan.args.batch * (plan.args.n + plan.args.m), kRowThreads, kScratch, target, plan);
}

constexpr int64_t kTileValues = 2 * kStage * kLine, kGradientValues = kGradStage * (kGradRows + 1 + kGradDepth);

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

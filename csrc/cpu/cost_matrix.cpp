// Pairwise cost matrices, forward and backward (reference/cost_matrix.py).
//
//   l1           C_ij = sum_k |x_ik - y_jk|
//   sqeuclidean  C_ij = sum_k (x_ik - y_jk)^2,   l2: its root
//   cosine       C_ij = 1 - <x_i, y_j> / (|x_i| |y_j|) = (|x_i - y_j|^2 - (|x_i| - |y_j|)^2) / (2 |x_i| |y_j|)
//
// Differences are formed before they are squared or summed, never by a matrix product: near-coincident rows keep
// full relative accuracy. float32 sums run over blocks of 256 entries, which also keeps long rows accurate.
// Forward: tiles of kRows x 2 vectors of C in registers, columns in the lanes, y packed a panel at a time;
// (2 or 3) n m d operations, n d + m d + n m elements moved. Backward: tiles of kGradRows x 2 vectors of the
// gradient, depth in the lanes; (2 or 3) n m d operations an operand. Every output element is summed by one thread in
// a fixed order: the result doesn't depend on the number of threads.
#include "otkd_fast/cost_matrix.h"

#include "cost_matrix_tiles.h"
#include "otkd_fast/threads.h"
#include "transpose.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr int64_t kDepth = 256;   // depth of a packed panel of y: 32 KiB
constexpr int64_t kParallelWork = 2 * 1000 * 1000;  // terms, about 0.1 ms of one thread

// One problem of the batch after its rows were rewritten.
template <class T>
struct Problem {
    const T *x, *y;                    // (n, d), (m, d)
    const double *norm_x, *norm_y;     // (n,), (m,), cosine only
    const double *scale_x, *scale_y;   // (n,), (m,), cosine only
    T *weights, *weights_t;            // (n, m) and (m, n), backward only
};

template <class T>
bool rewrites(const CostMatrixArgs<T>& args) {
    return args.metric == Metric::cosine || args.temperature_x > 0 || args.temperature_y > 0;
}

template <class T>
Problem<T> problem(const CostMatrixArgs<T>& args, int64_t index) {
    const int64_t rows = args.n + args.m;
    Problem<T> p{args.x + index * args.x_batch_stride, args.y + index * args.y_batch_stride, nullptr, nullptr,
                 nullptr, nullptr, nullptr, nullptr};
    T* free = args.workspace;
    if (args.metric == Metric::cosine) {
        double* norms = reinterpret_cast<double*>(free) + index * 2 * rows;
        p.norm_x = norms;
        p.norm_y = norms + args.n;
        p.scale_x = norms + rows;
        p.scale_y = norms + rows + args.n;
        free += args.batch * 2 * rows * static_cast<int64_t>(sizeof(double) / sizeof(T));
    }
    if (rewrites(args)) {
        p.x = free + index * rows * args.d;
        p.y = p.x + args.n * args.d;
        free += args.batch * rows * args.d;
    }
    p.weights = free + 2 * index * args.n * args.m;
    p.weights_t = p.weights + args.n * args.m;
    return p;
}

// Phase 1: softmax or scale every row of both operands into the workspace.
template <class T>
void rewrite_rows(const CostMatrixArgs<T>& args, const Team& team) {
    if (!rewrites(args) || args.rows_ready) return;
    const int64_t rows = args.n + args.m;
    int64_t begin, end;
    split(args.batch * rows, 1, team.size, team.rank, begin, end);
    for (int64_t r = begin; r < end; ++r) {
        const int64_t index = r / rows, row = r % rows;
        const Problem<T> p = problem(args, index);
        const bool is_x = row < args.n;
        const int64_t i = is_x ? row : row - args.n;
        const T* in = is_x ? args.x + index * args.x_batch_stride + i * args.d
                           : args.y + index * args.y_batch_stride + i * args.d;
        T* out = const_cast<T*>(is_x ? p.x : p.y) + i * args.d;
        const double temperature = is_x ? args.temperature_x : args.temperature_y;
        if (temperature > 0) {
            softmax_row(in, out, args.d, temperature);
        } else {
            std::memcpy(out, in, args.d * sizeof(T));
        }
        if (args.metric == Metric::cosine) {
            double* norms = const_cast<double*>(p.norm_x);
            scale_row(out, out, args.d, norms[row], norms[rows + row]);
        }
    }
    team.barrier();
}

// Rows [begin, end) of one panel of columns of C, before the root or the cosine.
template <class T, bool kL1>
void panel_fwd(const Problem<T>& p, T* cost, int64_t m, int64_t d, int64_t j0, int64_t begin, int64_t end) {
    constexpr int panel = 2 * width<T>;
    const int64_t columns = m - j0 < panel ? m - j0 : panel;
    alignas(64) T packed[kDepth * panel];
    for (int64_t k0 = 0; k0 < d; k0 += kDepth) {
        const int64_t depth = d - k0 < kDepth ? d - k0 : kDepth;
        transpose(p.y + j0 * d + k0, d, packed, panel, columns, depth);
        for (int64_t k = 0; columns < panel && k < depth; ++k) {
            for (int64_t c = columns; c < panel; ++c) packed[k * panel + c] = packed[k * panel];
        }
        for (int64_t i = begin; i < end; i += kRows) {
            const int rows = end - i < kRows ? static_cast<int>(end - i) : kRows;
            const T* x[kRows];
            for (int r = 0; r < kRows; ++r) x[r] = p.x + (i + (r < rows ? r : rows - 1)) * d + k0;
            Vec<T> acc[kRows][2] = {};
            accumulate_tile<T, kL1>(x, packed, depth, acc);
            for (int r = 0; r < rows; ++r) {
                T* out = cost + (i + r) * m + j0;
                if (columns == panel) {
                    store(out, k0 ? load(out) + acc[r][0] : acc[r][0]);
                    store(out + width<T>, k0 ? load(out + width<T>) + acc[r][1] : acc[r][1]);
                } else {
                    for (int64_t c = 0; c < columns; ++c) {
                        const T value = acc[r][c / width<T>][c % width<T>];
                        out[c] = k0 ? out[c] + value : value;
                    }
                }
            }
        }
    }
}

template <class T>
void finish_panel(const CostMatrixArgs<T>& args, const Problem<T>& p, T* cost, int64_t j0, int64_t begin, int64_t end) {
    const int64_t j1 = j0 + 2 * width<T> < args.m ? j0 + 2 * width<T> : args.m;
    for (int64_t i = begin; i < end; ++i) {
        T* row = cost + i * args.m;
        if (args.metric == Metric::l2) {
            for (int64_t j = j0; j < j1; ++j) row[j] = std::sqrt(row[j]);
        } else if (args.metric == Metric::cosine) {
            for (int64_t j = j0; j < j1; ++j) {
                const double nx = p.norm_x[i], ny = p.norm_y[j];
                const double gap = row[j] - (nx - ny) * (nx - ny);
                row[j] = nx * ny == 0 ? T(1) : static_cast<T>((gap < 0 ? 0 : gap) / (2 * nx * ny));
            }
        }
    }
}

// Small calls run on the calling thread: waking a second one costs more than it saves.
template <class T>
int useful_threads(const CostMatrixArgs<T>& args) {
    return args.batch * args.n * args.m * args.d < kParallelWork ? 1 : args.threads;
}

template <class T>
void fwd(const CostMatrixArgs<T>& args) {
    const int64_t panels = (args.m + 2 * width<T> - 1) / (2 * width<T>);
    parallel(useful_threads(args), [&](const Team& team) {
        rewrite_rows(args, team);
        // Enough tasks for the team: rows are cut only where the panels alone don't suffice.
        int64_t cuts = (4 * team.size + args.batch * panels - 1) / (args.batch * panels);
        if (team.size == 1 || cuts < 1) cuts = 1;
        if (cuts > (args.n + 63) / 64) cuts = (args.n + 63) / 64;
        for (int64_t task = team.rank; task < args.batch * panels * cuts; task += team.size) {
            const int64_t index = task / (panels * cuts), j0 = task / cuts % panels * 2 * width<T>;
            const Problem<T> p = problem(args, index);
            T* cost = args.cost + index * args.n * args.m;
            int64_t begin, end;
            split(args.n, kRows, static_cast<int>(cuts), static_cast<int>(task % cuts), begin, end);
            if (args.metric == Metric::l1) {
                panel_fwd<T, true>(p, cost, args.m, args.d, j0, begin, end);
            } else {
                panel_fwd<T, false>(p, cost, args.m, args.d, j0, begin, end);
            }
            finish_panel(args, p, cost, j0, begin, end);
        }
    });
}

// The factor of (x_i - y_j) in the gradient of C_ij, times the incoming gradient.
template <class T>
OTKD_INLINE T weight(const CostMatrixArgs<T>& args, const Problem<T>& p, T grad, T cost, int64_t i, int64_t j) {
    if (args.metric == Metric::sqeuclidean) return 2 * grad;
    if (args.metric == Metric::l2) return cost > 0 ? grad / cost : T(0);
    if (args.metric == Metric::l1) return grad;
    const double norms = p.norm_x[i] * p.norm_y[j];
    return norms == 0 ? T(0) : static_cast<T>(grad / norms);
}

// Phase 2: the weights, and transposed for the gradient of y, so that both sides read along rows. Blocks of 32 rows.
template <class T>
void fill_weights(const CostMatrixArgs<T>& args, const Team& team) {
    constexpr int64_t block = 32;
    const int64_t blocks = (args.n + block - 1) / block;
    for (int64_t task = team.rank; task < args.batch * blocks; task += team.size) {
        const int64_t index = task / blocks, i0 = task % blocks * block;
        const int64_t i1 = i0 + block < args.n ? i0 + block : args.n;
        const Problem<T> p = problem(args, index);
        const T* grad = args.grad_cost + index * args.n * args.m;
        const T* cost = args.cost + index * args.n * args.m;
        for (int64_t i = i0; args.metric != Metric::l1 && i < i1; ++i) {
            for (int64_t j = 0; j < args.m; ++j) {
                p.weights[i * args.m + j] = weight(args, p, grad[i * args.m + j], cost[i * args.m + j], i, j);
            }
        }
        const T* w = args.metric == Metric::l1 ? grad : p.weights;
        if (args.grad_y) transpose(w + i0 * args.m, args.m, p.weights_t + i0, args.n, i1 - i0, args.m);
    }
    team.barrier();
}

// Cosine: from sum_j w_ij (x_i - y_j), rows scaled, to the gradient of row i; the rest is along x_i. `own` is the
// norm of this row, `other` those of the rows across, `scale` the power of two that this row was scaled by.
template <class T>
void cosine_row_bwd(const T* row, T* grad, const T* grad_cost, const T* cost, int64_t stride, int64_t across, int64_t d,
                    double own, const double* other, double scale) {
    double along = 0;
    for (int64_t j = 0; j < across && own > 0; ++j) {
        if (other[j] == 0) continue;
        const double g = grad_cost[j * stride];
        along += g * ((1 / own - 1 / other[j]) - cost[j * stride] / own);
    }
    const T factor = own > 0 ? static_cast<T>(along / own) : T(0), back = static_cast<T>(scale);
    for (int64_t k = 0; k < d; ++k) grad[k] = (grad[k] + factor * row[k]) * back;
}

// Phase 3: through the rewriting of the rows, in place on the gradient.
template <class T>
void rows_bwd(const CostMatrixArgs<T>& args, const Team& team) {
    const int64_t rows = args.n + args.m;
    int64_t begin, end;
    split(args.batch * rows, 1, team.size, team.rank, begin, end);
    for (int64_t r = begin; r < end; ++r) {
        const int64_t index = r / rows, row = r % rows;
        const Problem<T> p = problem(args, index);
        const bool is_x = row < args.n;
        const int64_t i = is_x ? row : row - args.n;
        T* grad = is_x ? args.grad_x : args.grad_y;
        if (!grad) continue;
        grad += (index * (is_x ? args.n : args.m) + i) * args.d;
        const T* own = (is_x ? p.x : p.y) + i * args.d;
        if (args.metric == Metric::cosine) {
            const int64_t offset = index * args.n * args.m + (is_x ? i * args.m : i), stride = is_x ? 1 : args.m;
            cosine_row_bwd(own, grad, args.grad_cost + offset, args.cost + offset, stride, is_x ? args.m : args.n,
                           args.d, p.norm_x[row], is_x ? p.norm_y : p.norm_x, p.scale_x[row]);
        }
        const double temperature = is_x ? args.temperature_x : args.temperature_y;
        if (temperature <= 0) continue;
        if (args.metric == Metric::cosine) {  // the workspace holds the scaled row: the softmax itself is needed here
            const double scale = 1 / p.scale_x[row];
            for (int64_t k = 0; k < args.d; ++k) const_cast<T*>(own)[k] = static_cast<T>(own[k] * scale);
        }
        softmax_row_bwd(own, grad, args.d, temperature);
    }
}

template <class T>
void bwd(const CostMatrixArgs<T>& args) {
    const int64_t depth = 2 * kGroup * width<T>, groups = (args.d + depth - 1) / depth;
    const bool l1 = args.metric == Metric::l1;
    parallel(useful_threads(args), [&](const Team& team) {
        rewrite_rows(args, team);
        fill_weights(args, team);
        const int64_t cuts = team.size == 1 ? 1 : (4 * team.size + args.batch * groups - 1) / (args.batch * groups);
        for (int64_t task = team.rank; task < 2 * args.batch * groups * cuts; task += team.size) {
            const int64_t half = task / (args.batch * groups * cuts), rest = task % (args.batch * groups * cuts);
            const int64_t index = rest / (groups * cuts), k0 = rest / cuts % groups * depth;
            if (!(half ? args.grad_y : args.grad_x)) continue;
            const Problem<T> p = problem(args, index);
            const T* w = l1 ? args.grad_cost + index * args.n * args.m : p.weights;
            Side<T> side{p.x, p.y, w, args.grad_x + index * args.n * args.d, args.n, args.m, args.d, false};
            if (half) side = {p.y, p.x, p.weights_t, args.grad_y + index * args.m * args.d, args.m, args.n, args.d, false};
            int64_t begin, end;
            split(side.na, kGradRows, static_cast<int>(cuts), static_cast<int>(rest % cuts), begin, end);
            l1 ? group_bwd<T, true>(side, k0, begin, end) : group_bwd<T, false>(side, k0, begin, end);
        }
        team.barrier();
        rows_bwd(args, team);
    });
}

}  // namespace

void cost_matrix_fwd(const CostMatrixArgs<float>& args) { fwd(args); }
void cost_matrix_fwd(const CostMatrixArgs<double>& args) { fwd(args); }
void cost_matrix_bwd(const CostMatrixArgs<float>& args) { bwd(args); }
void cost_matrix_bwd(const CostMatrixArgs<double>& args) { bwd(args); }

}  // namespace OTKD_ISA
}  // namespace otkd_fast

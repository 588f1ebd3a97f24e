// Packed problems: the cost matrices between the points of each, by the kernels of cost_matrix.cpp, and small change.
// Threads take a problem each; one with more than a thread's share of all entries is first solved by all of them.
#include "otkd_fast/ragged.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "otkd_fast/dispatch.h"
#include "otkd_fast/threads.h"

namespace otkd_fast {
namespace {

constexpr int64_t kThreadsEntries = 64 * 1024;  // entries times features below which one thread is quicker

void check_offsets(const char* name, const int64_t* offsets, int64_t problems, int64_t last) {
    bool good = offsets[0] == 0 && offsets[problems] == last;
    for (int64_t k = 0; k < problems; ++k) good &= offsets[k] <= offsets[k + 1];
    if (!good) {
        throw std::invalid_argument(std::string(name) + ": expected 0 first, no entry smaller than the one before it, and " +
                                    std::to_string(last) + " last");
    }
}

int64_t size(const int64_t* offsets, int64_t k) { return offsets[k + 1] - offsets[k]; }

int64_t count_entries(const int64_t* row_offsets, const int64_t* column_offsets, int64_t problems) {
    int64_t total = 0;
    for (int64_t k = 0; k < problems; ++k) total += size(row_offsets, k) * size(column_offsets, k);
    return total;
}

// The problems of a call, and how its threads are used.
template <class T>
struct Points {
    const CostMatrixRaggedArgs<T>& args;
    const bool backward;
    const int64_t entries = count_entries(args.row_offsets, args.column_offsets, args.batch);
    const int threads = entries * args.d < kThreadsEntries ? 1 : std::max(1, args.threads);

    bool shared(const CostMatrixArgs<T>& one) const { return threads > 1 && one.n * one.m * threads > entries; }
    CostMatrixArgs<T> at(int64_t k, int64_t before) const {
        CostMatrixArgs<T> one = args;
        one.batch = 1;
        one.n = size(args.row_offsets, k);
        one.m = size(args.column_offsets, k);
        one.x += args.row_offsets[k] * args.d;
        one.y += args.column_offsets[k] * args.d;
        one.cost += before;
        if (one.grad_cost) one.grad_cost += before;
        if (one.grad_x) one.grad_x += args.row_offsets[k] * args.d;
        if (one.grad_y) one.grad_y += args.column_offsets[k] * args.d;
        one.x_batch_stride = one.y_batch_stride = 0;
        one.threads = shared(one) ? threads : 1;
        return one;
    }
    // Calls body(problem) for those whose turn it is, with the number of those before.
    template <class Body>
    void each(Body body) const {
        int64_t before = 0;
        for (int64_t k = 0; k < args.batch; ++k) {
            const CostMatrixArgs<T> one = at(k, before);
            before += one.n * one.m;
            body(one, k);
        }
    }
    int64_t workspace() const {
        int64_t most = 0;
        each([&](const CostMatrixArgs<T>& one, int64_t) { most = std::max(most, cost_matrix_workspace(one, backward)); });
        return (most + 15) / 16 * 16;
    }
    void solve(CostMatrixArgs<T> one, T* memory) const {
        one.workspace = memory;
        if (one.n * one.m > 0) {
            const KernelsOf<T>& run = kernels().of<T>();
            backward ? run.cost_matrix_bwd(one) : run.cost_matrix_fwd(one);
        } else if (backward) {
            if (one.grad_x) std::fill(one.grad_x, one.grad_x + one.n * one.d, T(0));
            if (one.grad_y) std::fill(one.grad_y, one.grad_y + one.m * one.d, T(0));
        }
    }
};

}  // namespace

void check_ragged(const int64_t* row_offsets, const int64_t* column_offsets, int64_t problems, int64_t rows, int64_t columns,
                  int64_t entries) {
    check_offsets("row_offsets", row_offsets, problems, rows);
    check_offsets("column_offsets", column_offsets, problems, columns);
    const int64_t expected = count_entries(row_offsets, column_offsets, problems);
    if (expected != entries) {
        throw std::invalid_argument("cost: expected the " + std::to_string(expected) + " entries that the offsets tell, got " +
                                    std::to_string(entries));
    }
}

template <class T>
void transpose_ragged(const T* in, T* out, const int64_t* row_offsets, const int64_t* column_offsets, int64_t problems) {
    for (int64_t k = 0; k < problems; ++k) {
        const int64_t n = size(row_offsets, k), m = size(column_offsets, k);
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < m; ++j) out[j * n + i] = in[i * m + j];
        }
        in += n * m;
        out += n * m;
    }
}

template <class T>
int64_t cost_matrix_ragged_workspace(const CostMatrixRaggedArgs<T>& args, bool backward) {
    const Points<T> points{args, backward};
    return points.threads * points.workspace();
}

template <class T>
void cost_matrix_ragged(const CostMatrixRaggedArgs<T>& args, bool backward) {
    const Points<T> points{args, backward};
    const int64_t elements = points.workspace();
    points.each([&](const CostMatrixArgs<T>& one, int64_t) {
        if (points.shared(one)) points.solve(one, args.workspace);
    });
    parallel(points.threads, [&](const Team& team) {
        points.each([&](const CostMatrixArgs<T>& one, int64_t k) {
            if (k % team.size == team.rank && !points.shared(one)) points.solve(one, args.workspace + team.rank * elements);
        });
    });
}

#define OTKD_FAST_RAGGED(T)                                                                             \
    template void transpose_ragged(const T*, T*, const int64_t*, const int64_t*, int64_t);              \
    template int64_t cost_matrix_ragged_workspace(const CostMatrixRaggedArgs<T>&, bool);                \
    template void cost_matrix_ragged(const CostMatrixRaggedArgs<T>&, bool);
OTKD_FAST_RAGGED(float)
OTKD_FAST_RAGGED(double)

}  // namespace otkd_fast

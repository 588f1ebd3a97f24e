// Runs every CPU kernel of every instruction set that this processor has, forward and backward, on shapes that hit
// each tail, with workspaces of exactly the size that the core asks for. Built with sanitizers by test_sanitizers.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "otkd_fast/dispatch.h"
#include "otkd_fast/masses.h"
#include "otkd_fast/ragged.h"
#include "otkd_fast/sinkd.h"

using namespace otkd_fast;

// 64-byte aligned memory of exactly `bytes`, so that a sanitizer sees the first one beyond.
struct Workspace {
    void* memory = nullptr;
    explicit Workspace(int64_t bytes) {
        if (posix_memalign(&memory, 64, bytes > 0 ? bytes : 1)) std::abort();
    }
    ~Workspace() { std::free(memory); }
};

template <class T>
std::vector<T> uniform(int64_t count) {
    std::vector<T> values(count);
    for (T& value : values) value = std::rand() / static_cast<T>(RAND_MAX);
    return values;
}

struct Shape {
    int64_t batch, n, m, d;
};

template <class T>
void check_finite(const std::vector<T>& values, const char* what) {
    for (T value : values) {
        if (!std::isfinite(value)) {
            std::printf("%s: not finite\n", what);
            std::exit(1);
        }
    }
}

template <class T>
std::vector<T> cost_matrix(const Shape& s, int threads, Metric metric, double temperature) {
    std::vector<T> x = uniform<T>(s.batch * s.n * s.d), y = uniform<T>(s.batch * s.m * s.d), cost(s.batch * s.n * s.m);
    std::vector<T> grad = uniform<T>(cost.size()), grad_x(x.size()), grad_y(y.size());
    CostMatrixArgs<T> args{};
    args.x = x.data();
    args.y = y.data();
    args.cost = cost.data();
    args.batch = s.batch;
    args.n = s.n;
    args.m = s.m;
    args.d = s.d;
    args.x_batch_stride = s.n * s.d;
    args.y_batch_stride = s.m * s.d;
    args.metric = metric;
    args.temperature_x = args.temperature_y = temperature;
    args.threads = threads;
    Workspace forward(cost_matrix_workspace(args, false) * sizeof(T)), backward(cost_matrix_workspace(args, true) * sizeof(T));
    args.workspace = static_cast<T*>(forward.memory);
    kernels().of<T>().cost_matrix_fwd(args);
    args.workspace = static_cast<T*>(backward.memory);
    args.grad_cost = grad.data();
    args.grad_x = grad_x.data();
    args.grad_y = grad_y.data();
    kernels().of<T>().cost_matrix_bwd(args);
    check_finite(cost, "cost");
    check_finite(grad_x, "grad_x");
    check_finite(grad_y, "grad_y");
    return cost;
}

template <class T>
void sinkhorn(const Shape& s, int threads, const std::vector<T>& cost, double epsilon, Gradient gradient) {
    const int64_t num_iters = 3;
    std::vector<T> a(s.batch * s.n, T(1) / s.n), b(s.batch * s.m, T(1) / s.m), f(a.size()), g(b.size());
    std::vector<T> transport(s.batch), dual(s.batch), error(s.batch), grad_cost(cost.size()), grad_a(a.size()), grad_b(b.size());
    SinkhornArgs<T> args{};
    args.cost = cost.data();
    args.a = a.data();
    args.b = b.data();
    args.batch = s.batch;
    args.n = s.n;
    args.m = s.m;
    args.num_iters = num_iters;
    args.keep = gradient == Gradient::unroll ? Keep::all : gradient == Gradient::last_step ? Keep::last_step : Keep::last;
    args.together = many_small(args);
    std::vector<double> history(s.batch * history_stride(args));
    args.history = history.data();
    args.epsilon = epsilon;
    args.threads = threads;
    args.transport_cost = transport.data();
    args.regularized_cost = dual.data();
    args.f = f.data();
    args.g = g.data();
    args.marginal_error = error.data();
    const auto bytes = kernels().of<T>().sinkhorn_workspace_bytes;
    Workspace forward(bytes(args, false)), backward(bytes(args, true));
    args.workspace = static_cast<unsigned char*>(forward.memory);
    kernels().of<T>().sinkhorn_fwd(args);
    args.workspace = static_cast<unsigned char*>(backward.memory);
    args.gradient = gradient;
    args.grad_transport_cost = gradient == Gradient::envelope ? nullptr : transport.data();
    args.grad_regularized_cost = gradient == Gradient::detach ? nullptr : dual.data();
    args.grad_f = gradient == Gradient::unroll || gradient == Gradient::last_step ? f.data() : nullptr;
    args.grad_g = gradient == Gradient::unroll || gradient == Gradient::last_step ? g.data() : nullptr;
    args.grad_cost = grad_cost.data();
    args.grad_a = gradient == Gradient::detach ? nullptr : grad_a.data();
    args.grad_b = gradient == Gradient::detach ? nullptr : grad_b.data();
    kernels().of<T>().sinkhorn_bwd(args);
    check_finite(transport, "transport_cost");
    check_finite(grad_cost, "grad_cost");
    check_finite(grad_a, "grad_a");
    check_finite(grad_b, "grad_b");
}

// Problems of different sizes: some of each kind (empty, in lanes, alone, shared by the threads).
template <class T>
void sinkhorn_ragged(int threads, double epsilon, Gradient gradient, Metric metric) {
    const std::vector<std::pair<int64_t, int64_t>> sizes{{3, 5}, {0, 4}, {7, 2}, {6, 0}, {40, 33}, {16, 16}, {15, 16}, {14, 13}, {16, 9}, {1, 1},
                                                         {2, 1}, {1, 3}, {4, 4}, {520, 515}, {5, 5}, {6, 6}, {8, 7}, {31, 32}};
    std::vector<int64_t> rows{0}, columns{0};
    int64_t entries = 0;
    for (const auto& [n, m] : sizes) {
        rows.push_back(rows.back() + n);
        columns.push_back(columns.back() + m);
        entries += n * m;
    }
    const int64_t d = 5, problems = sizes.size();
    std::vector<T> x = uniform<T>(rows.back() * d), y = uniform<T>(columns.back() * d), cost(entries), grad_x(x.size()), grad_y(y.size());
    std::vector<T> a(rows.back()), b(columns.back());
    for (int64_t k = 0; k < problems; ++k) {
        for (int64_t i = rows[k]; i < rows[k + 1]; ++i) a[i] = T(1) / sizes[k].first;
        for (int64_t j = columns[k]; j < columns[k + 1]; ++j) b[j] = T(1) / sizes[k].second;
    }
    check_ragged(rows.data(), columns.data(), problems, rows.back(), columns.back(), entries);
    CostMatrixRaggedArgs<T> points{};
    points.x = x.data();
    points.y = y.data();
    points.cost = cost.data();
    points.batch = problems;
    points.d = d;
    points.metric = metric;
    points.threads = threads;
    points.row_offsets = rows.data();
    points.column_offsets = columns.data();
    Workspace costs(cost_matrix_ragged_workspace(points, false) * sizeof(T)), costs_back(cost_matrix_ragged_workspace(points, true) * sizeof(T));
    points.workspace = static_cast<T*>(costs.memory);
    cost_matrix_ragged(points, false);

    std::vector<T> f(a.size()), g(b.size()), transport(problems), dual(problems), error(problems);
    std::vector<T> grad_cost(entries), grad_a(a.size()), grad_b(b.size()), ones(problems, T(1)), flipped(entries);
    std::vector<int64_t> iterations(problems);
    SinkhornRaggedArgs<T> args{};
    args.cost = cost.data();
    args.a = a.data();
    args.b = b.data();
    args.batch = problems;
    args.n = rows.back();
    args.m = columns.back();
    args.num_iters = 3;
    args.keep = gradient == Gradient::unroll ? Keep::all : gradient == Gradient::last_step ? Keep::last_step : Keep::last;
    args.epsilon = epsilon;
    args.threads = threads;
    args.row_offsets = rows.data();
    args.column_offsets = columns.data();
    std::vector<double> history(history_stride(args) + (problems - 1) * kHistoryHeader);
    args.history = history.data();
    args.transport_cost = transport.data();
    args.regularized_cost = dual.data();
    args.f = f.data();
    args.g = g.data();
    args.marginal_error = error.data();
    args.iterations = iterations.data();
    const auto& run = kernels().of<T>();
    Workspace forward(run.sinkhorn_ragged_workspace_bytes(args, false));
    args.workspace = static_cast<unsigned char*>(forward.memory);
    run.sinkhorn_ragged_fwd(args);
    args.gradient = gradient;
    args.grad_transport_cost = gradient == Gradient::envelope ? nullptr : ones.data();
    args.grad_regularized_cost = gradient == Gradient::detach ? nullptr : ones.data();
    args.grad_cost = grad_cost.data();
    args.grad_a = gradient == Gradient::detach ? nullptr : grad_a.data();
    args.grad_b = gradient == Gradient::detach ? nullptr : grad_b.data();
    Workspace backward(run.sinkhorn_ragged_workspace_bytes(args, true));
    args.workspace = static_cast<unsigned char*>(backward.memory);
    run.sinkhorn_ragged_bwd(args);
    check_finite(transport, "ragged transport_cost");
    check_finite(grad_cost, "ragged grad_cost");
    check_finite(grad_a, "ragged grad_a");
    transpose_ragged(cost.data(), flipped.data(), rows.data(), columns.data(), problems);
    points.workspace = static_cast<T*>(costs_back.memory);
    points.grad_cost = grad_cost.data();
    points.grad_x = grad_x.data();
    points.grad_y = grad_y.data();
    cost_matrix_ragged(points, true);
    check_finite(grad_x, "ragged grad_x");
    if (!masses_right<T>(a.data(), nullptr, 1, rows.back(), 1, 1e9)) {
        std::printf("masses: wrong answer\n");
        std::exit(1);
    }
}

// Points, whose costs are computed block by block, kept or not; and the plan applied.
template <class T>
void sinkhorn_points(const Shape& s, int threads, Metric metric, double epsilon, Gradient gradient, bool stored) {
    std::vector<T> x = uniform<T>(s.batch * s.n * s.d), y = uniform<T>(s.batch * s.m * s.d), grad_x(x.size()), grad_y(y.size());
    std::vector<T> f(s.batch * s.n), g(s.batch * s.m), transport(s.batch), dual(s.batch), error(s.batch), ones(s.batch, T(1));
    SinkhornPointsArgs<T> args{};
    args.x = x.data();
    args.y = y.data();
    args.batch = s.batch;
    args.n = s.n;
    args.m = s.m;
    args.d = s.d;
    args.metric = metric;
    args.stored = stored;
    args.num_iters = 3;
    args.keep = gradient == Gradient::unroll ? Keep::all : gradient == Gradient::last_step ? Keep::last_step : Keep::last;
    args.epsilon = epsilon;
    args.threads = threads;
    std::vector<double> history(s.batch * history_stride(args));
    args.history = history.data();
    args.transport_cost = transport.data();
    args.regularized_cost = dual.data();
    args.f = f.data();
    args.g = g.data();
    args.marginal_error = error.data();
    const auto& run = kernels().of<T>();
    args.need_x = args.need_y = true;
    args.gradient = gradient;
    Workspace forward(run.sinkhorn_points_workspace_bytes(args, false)), backward(run.sinkhorn_points_workspace_bytes(args, true));
    args.workspace = static_cast<unsigned char*>(forward.memory);
    run.sinkhorn_points_fwd(args);
    args.grad_transport_cost = gradient == Gradient::envelope ? nullptr : ones.data();
    args.grad_regularized_cost = gradient == Gradient::detach ? nullptr : ones.data();
    args.grad_x = grad_x.data();
    args.grad_y = grad_y.data();
    args.workspace = static_cast<unsigned char*>(backward.memory);
    run.sinkhorn_points_bwd(args);
    check_finite(transport, "points transport_cost");
    check_finite(grad_x, "points grad_x");
    check_finite(grad_y, "points grad_y");

    const int64_t columns = 3;
    std::vector<T> v = uniform<T>(s.batch * s.m * columns), out(s.batch * s.n * columns), grad_out = uniform<T>(out.size());
    PlanApplyArgs<T> apply{};
    apply.x = x.data();
    apply.y = y.data();
    apply.f = f.data();
    apply.g = g.data();
    apply.v = v.data();
    apply.out = out.data();
    apply.batch = s.batch;
    apply.n = s.n;
    apply.m = s.m;
    apply.d = s.d;
    apply.columns = columns;
    apply.metric = metric;
    apply.epsilon = epsilon;
    apply.threads = threads;
    apply.need_x = apply.need_y = true;
    apply.grad_out = grad_out.data();
    apply.grad_x = grad_x.data();
    apply.grad_y = grad_y.data();
    Workspace applying(run.plan_apply_workspace_bytes(apply, false)), back(run.plan_apply_workspace_bytes(apply, true));
    apply.workspace = static_cast<unsigned char*>(applying.memory);
    run.plan_apply(apply);
    apply.workspace = static_cast<unsigned char*>(back.memory);
    run.plan_apply_bwd(apply);
    check_finite(out, "plan_apply");
    check_finite(grad_x, "plan_apply grad_x");
}

template <class T>
void sinkd(const Shape& s, int threads, double epsilon) {
    std::vector<T> rows = uniform<T>(s.batch * s.n * s.d), columns = uniform<T>(s.batch * s.m * s.d), loss(s.batch);
    std::vector<T> grad_rows(rows.size()), grad_columns(columns.size());
    SinkdArgs<T> args{};
    args.rows = rows.data();
    args.columns = columns.data();
    args.batch = s.batch;
    args.n = s.n;
    args.m = s.m;
    args.d = s.d;
    args.num_iters = 3;
    args.temperature_rows = args.temperature_columns = 2;
    args.epsilon = epsilon;
    args.scale = 2;
    args.threads = threads;
    args.transport_cost = loss.data();
    args.grad_rows = grad_rows.data();
    args.grad_columns = grad_columns.data();
    Workspace workspace(sinkd_workspace_bytes(args));
    args.workspace = static_cast<unsigned char*>(workspace.memory);
    sinkd_value_and_grad(args);
    check_finite(loss, "sinkd");
    check_finite(grad_rows, "sinkd grad_rows");
    check_finite(grad_columns, "sinkd grad_columns");
}

#include "exercise_matrices.h"

template <class T>
void exercise(const Shape& shape, int threads) {
    for (Metric metric : {Metric::l1, Metric::l2, Metric::sqeuclidean, Metric::cosine}) {
        for (double temperature : {0.0, 2.0}) {
            const std::vector<T> cost = cost_matrix<T>(shape, threads, metric, temperature);
            if (metric != Metric::l1) continue;
            for (double epsilon : {0.1, 0.005, 0.00005}) {  // float scalings, double scalings, log domain
                for (Gradient gradient : {Gradient::unroll, Gradient::envelope, Gradient::detach, Gradient::last_step}) {
                    sinkhorn<T>(shape, threads, cost, epsilon, gradient);
                }
            }
        }
    }
    sinkd<T>(shape, threads, 0.1);
}

template <class T>
void exercise_ragged(int threads) {
    for (double epsilon : {0.1, 0.005, 0.00005}) {
        for (Gradient gradient : {Gradient::unroll, Gradient::envelope, Gradient::detach, Gradient::last_step, Gradient::implicit}) {
            const Metric metric = gradient == Gradient::envelope ? Metric::cosine : Metric::l1;
            if (gradient != Gradient::implicit || epsilon == 0.1) sinkhorn_ragged<T>(threads, epsilon, gradient, metric);
        }
    }
}

template <class T>
void exercise_points(const Shape& shape, int threads) {
    for (Metric metric : {Metric::l1, Metric::l2, Metric::sqeuclidean, Metric::cosine}) {
        for (double epsilon : {0.5, 0.0005}) {
            for (Gradient gradient : {Gradient::unroll, Gradient::envelope, Gradient::last_step}) {
                for (bool stored : {true, false}) sinkhorn_points<T>(shape, threads, metric, epsilon, gradient, stored);
            }
        }
    }
}

int main() {
    // single entries, tails in every direction, a batch, one problem large enough for the threads to share, small ones apart
    const std::vector<Shape> shapes{{1, 1, 1, 1},    {1, 3, 5, 2},  {2, 17, 33, 100},
                                    {3, 9, 64, 300}, {1, 513, 515, 20}, {40, 40, 41, 30}, {37, 3, 5, 4}, {18, 16, 16, 3}};
    const std::vector<Shape> points{{1, 1, 1, 1}, {2, 17, 33, 5}, {1, 130, 67, 20}};
    for (const std::string& set : instruction_sets()) {
        set_instruction_set(set);
        for (int threads : {1, 3}) {
            for (const Shape& shape : shapes) {
                exercise<float>(shape, threads);
                exercise<double>(shape, threads);
            }
            exercise_matrices<float>(threads);
            exercise_matrices<double>(threads);
            for (const Shape& shape : points) {
                exercise_points<float>(shape, threads);
                exercise_points<double>(shape, threads);
            }
            exercise_ragged<float>(threads);
            exercise_ragged<double>(threads);
        }
        std::printf("%s ok\n", set.c_str());
    }
}

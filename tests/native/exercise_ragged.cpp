// Problems of different sizes, and SinKD.
#include "exercise.h"
#include "otkd_fast/masses.h"
#include "otkd_fast/ragged.h"
#include "otkd_fast/sinkd.h"

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
    args.keep = kept_for(gradient);
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
    const auto right = run.masses_right;
    const std::vector<T> even(40 * 7, T(0.25));
    if (!right({a.data(), rows.back(), rows.back()}, {}, 1, 1e9) || !right({a.data(), 3, 3}, {b.data(), 5, 0}, 1, 1e-5) ||
        !right({even.data(), 4, 7}, {even.data() + 3, 4, 7}, 40, 1e-5) || right({even.data(), 4, 7}, {even.data(), 3, 7}, 40, 1e-5)) {
        std::printf("masses: wrong answer\n");
        std::exit(1);
    }
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

template <class T>
void exercise(int threads) {
    for (double epsilon : {0.1, 0.005, 0.00005}) {  // float scalings, double scalings, log domain
        for (Gradient gradient : {Gradient::unroll, Gradient::envelope, Gradient::detach, Gradient::last_step, Gradient::implicit}) {
            const Metric metric = gradient == Gradient::envelope ? Metric::cosine : Metric::l1;
            if (gradient != Gradient::implicit || epsilon == 0.1) sinkhorn_ragged<T>(threads, epsilon, gradient, metric);
        }
    }
    for (const Shape& shape : std::vector<Shape>{{1, 1, 1, 1}, {2, 17, 33, 20}, {37, 3, 5, 4}}) sinkd<T>(shape, threads, 0.1);
}

int main(int count, char** names) {
    return each_set(count, names, [](int threads) {
        exercise<float>(threads);
        exercise<double>(threads);
    });
}

// The CUDA kernels on the emulator, on buffers of exactly the size that they need: for the sanitizers, without Python.
#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#include "emulator_settings.h"
#include "otkd_fast/cuda.h"

namespace {

using namespace otkd_fast;

const cuda::Target kTarget{0, nullptr};
int failures = 0;

template <class T>
struct Buffer {
    std::unique_ptr<T[]> data;
    int64_t size;
    explicit Buffer(int64_t count, double fill = NAN) : data(new T[count]), size(count) {
        for (int64_t k = 0; k < count; ++k) data[k] = static_cast<T>(fill);
    }
    T* get() { return data.get(); }
    void expect_finite(const char* what) {
        for (int64_t k = 0; k < size; ++k) {
            if (std::isfinite(static_cast<double>(data[k]))) continue;
            std::printf("%s: element %lld of %lld is not finite\n", what, static_cast<long long>(k), static_cast<long long>(size));
            ++failures;
            return;
        }
    }
};

template <class T>
Buffer<T> noise(int64_t count, double low, double high) {
    static uint32_t state = 1;
    Buffer<T> buffer(count);
    for (int64_t k = 0; k < count; ++k) {
        state = state * 1664525u + 1013904223u;
        buffer.data[k] = static_cast<T>(low + (high - low) * (state >> 8) / 16777216.0);
    }
    return buffer;
}

Buffer<unsigned char> workspace(int64_t bytes) { return Buffer<unsigned char>(bytes, 255); }

template <class T>
void costs(Metric metric, int64_t n, int64_t m, int64_t d, double temperature) {
    Buffer<T> x = noise<T>(n * d, -2, 2), y = noise<T>(m * d, -2, 2), cost(n * m), grad = noise<T>(n * m, -1, 1);
    Buffer<T> grad_x(n * d), grad_y(m * d);
    CostMatrixArgs<T> args{};
    args.x = x.get();
    args.y = y.get();
    args.cost = cost.get();
    args.batch = 1;
    args.n = n;
    args.m = m;
    args.d = d;
    args.metric = metric;
    args.temperature_x = args.temperature_y = temperature;
    Buffer<unsigned char> memory = workspace(cuda::cost_matrix_workspace_bytes(args));
    args.workspace = reinterpret_cast<T*>(memory.get());
    cuda::cost_matrix_fwd(args, kTarget);
    args.grad_cost = grad.get();
    args.grad_x = grad_x.get();
    args.grad_y = grad_y.get();
    cuda::cost_matrix_bwd(args, kTarget);
    cost.expect_finite("cost");
    grad_x.expect_finite("grad_x");
    grad_y.expect_finite("grad_y");
}

template <class T>
void solve(int64_t n, int64_t m, double epsilon, Gradient gradient, double penalty, double tol, bool shared) {
    const int64_t batch = 2;
    Buffer<T> cost = noise<T>((shared ? 1 : batch) * n * m, 0, 1), transport(batch), dual(batch), f(batch * n), g(batch * m);
    Buffer<T> error(batch), incoming = noise<T>(batch, 0.5, 1), grad_cost(batch * n * m), grad_a(batch * n), grad_b(batch * m);
    Buffer<int64_t> iterations(batch, 0);
    SinkhornArgs<T> args{};
    args.cost = cost.get();
    args.batch = batch;
    args.n = n;
    args.m = m;
    args.num_iters = 3;
    args.epsilon = epsilon;
    args.penalty_a = penalty;
    args.tol = tol;
    args.keep = gradient == Gradient::unroll ? Keep::all : gradient == Gradient::last_step ? Keep::last_step : Keep::last;
    args.gradient = gradient;
    Buffer<double> history(batch * history_stride(args));
    args.history = history.get();
    args.transport_cost = transport.get();
    args.regularized_cost = dual.get();
    args.f = f.get();
    args.g = g.get();
    args.marginal_error = error.get();
    args.iterations = iterations.get();
    Buffer<unsigned char> memory = workspace(cuda::sinkhorn_workspace_bytes(args, false));
    args.workspace = memory.get();
    cuda::sinkhorn_fwd(args, shared, kTarget);
    Buffer<unsigned char> more = workspace(cuda::sinkhorn_workspace_bytes(args, true));
    args.workspace = more.get();
    args.grad_transport_cost = incoming.get();
    args.grad_cost = grad_cost.get();
    args.grad_a = grad_a.get();
    args.grad_b = grad_b.get();
    cuda::sinkhorn_bwd(args, shared, kTarget);
    for (Buffer<T>* result : {&transport, &dual, &f, &g, &error, &grad_cost, &grad_a, &grad_b}) result->expect_finite("sinkhorn");
}

template <class T>
void loss(int64_t n, int64_t m, int64_t d, double epsilon) {
    const int64_t batch = 2;
    Buffer<T> rows = noise<T>(batch * n * d, -3, 3), columns = noise<T>(batch * m * d, -3, 3), value(batch);
    Buffer<T> grad_rows(batch * n * d), grad_columns(batch * m * d);
    SinkdArgs<T> args{};
    args.rows = rows.get();
    args.columns = columns.get();
    args.batch = batch;
    args.n = n;
    args.m = m;
    args.d = d;
    args.num_iters = 3;
    args.temperature_rows = args.temperature_columns = 2;
    args.epsilon = epsilon;
    args.scale = 2;
    args.transport_cost = value.get();
    args.grad_rows = grad_rows.get();
    args.grad_columns = grad_columns.get();
    Buffer<unsigned char> memory = workspace(cuda::sinkd_workspace_bytes(args, kTarget));
    args.workspace = memory.get();
    cuda::sinkd_value_and_grad(args, kTarget);
    for (Buffer<T>* result : {&value, &grad_rows, &grad_columns}) result->expect_finite("sinkd");
}

template <class T>
void factor(int64_t n, int64_t m) {
    const int64_t batch = 2;
    Buffer<T> matrix = noise<T>(batch * n * m, -3, 3), polar(batch * n * m), norm(batch);
    PolarArgs<T> args{};
    args.matrix = matrix.get();
    args.polar = polar.get();
    args.nuclear_norm = norm.get();
    args.batch = batch;
    args.n = n;
    args.m = m;
    Buffer<unsigned char> memory = workspace(cuda::polar_workspace_bytes(args, kTarget));
    args.workspace = memory.get();
    cuda::polar_fwd(args, kTarget);
    for (Buffer<T>* result : {&polar, &norm}) result->expect_finite("polar");
}

template <class T>
void gaussian(int64_t n, int64_t m, int64_t d, double size) {
    const int64_t batch = 2;
    Buffer<T> x = noise<T>(batch * n * d, -size, size), y = noise<T>(batch * m * d, -size, size), value(batch);
    Buffer<T> grad_x(batch * n * d), grad_y(batch * m * d);
    GaussianSamplesArgs<T> args{};
    args.x = x.get();
    args.y = y.get();
    args.value = value.get();
    args.grad_x = grad_x.get();
    args.grad_y = grad_y.get();
    args.batch = batch;
    args.n = n;
    args.m = m;
    args.d = d;
    Buffer<unsigned char> memory = workspace(cuda::gaussian_samples_workspace_bytes(args, kTarget));
    args.workspace = memory.get();
    cuda::gaussian_samples(args, kTarget);
    for (Buffer<T>* result : {&value, &grad_x, &grad_y}) result->expect_finite("gaussian");
}

template <class T>
void moments(int64_t outer, int64_t rows, int64_t columns, int64_t grid, int64_t inner) {
    const int64_t entries = outer * rows * columns * inner, cells = outer * grid * grid * inner;
    Buffer<T> x = noise<T>(entries, -3, 3), mean(cells), std(cells), grad_x(entries);
    FeatureMomentsArgs<T> args{};
    args.x = x.get();
    args.mean = mean.get();
    args.std = std.get();
    args.outer = outer;
    args.inner = inner;
    const int64_t sizes[] = {1, rows, columns}, grids[] = {1, grid, grid};
    for (int axis = 0; axis < kMomentAxes; ++axis) args.size[axis] = sizes[axis], args.grid[axis] = grids[axis];
    cuda::feature_moments_fwd(args, kTarget);
    args.grad_mean = mean.get();
    args.grad_std = std.get();
    args.grad_x = grad_x.get();
    Buffer<unsigned char> memory = workspace(cuda::feature_moments_workspace_bytes(args, true));
    args.workspace = memory.get();
    cuda::feature_moments_bwd(args, kTarget);
    for (Buffer<T>* result : {&mean, &std, &grad_x}) result->expect_finite("moments");
}

template <class T>
void root(int64_t d, bool inverse, bool products) {
    const int64_t batch = 3;
    Buffer<T> matrix = noise<T>(batch * d * d, -1, 1), root(batch * d * d), aux(batch * (products ? 2 : (d + 1) * d));
    Buffer<T> grad = noise<T>(batch * d * d, -1, 1), grad_matrix(batch * d * d);
    for (int64_t k = 0; k < batch; ++k) {
        for (int64_t i = 0; k > 0 && i < d; ++i) matrix.data[(k * d + i) * d + i] += static_cast<T>(2 * d);  // the first is indefinite
    }
    SqrtmArgs<T> args{};
    args.matrix = matrix.get();
    args.root = root.get();
    args.aux = aux.get();
    args.batch = batch;
    args.d = d;
    args.inverse = inverse;
    Buffer<unsigned char> memory = workspace(cuda::sqrtm_workspace_bytes(args, false, kTarget));
    args.workspace = memory.get();
    products ? cuda::sqrtm_polar_fwd(args, kTarget) : cuda::sqrtm_fwd(args, kTarget);
    args.grad_root = grad.get();
    args.grad_matrix = grad_matrix.get();
    args.workspace = nullptr;
    Buffer<unsigned char> other = workspace(cuda::sqrtm_workspace_bytes(args, true, kTarget));
    args.workspace = other.get();
    products ? cuda::sqrtm_polar_bwd(args, kTarget) : cuda::sqrtm_bwd(args, kTarget);
    for (Buffer<T>* result : {&root, &aux, &grad_matrix}) result->expect_finite("root");
}

template <class T>
void bures(int64_t d) {
    const int64_t batch = 2;
    Buffer<T> a = noise<T>(batch * d * d, -1, 1), b = noise<T>(batch * d * d, -1, 1), value(batch), grad_a(batch * d * d), grad_b(batch * d * d);
    for (int64_t i = 0; i < d; ++i) a.data[i * d + i] += static_cast<T>(2 * d);  // the others are indefinite
    BuresArgs<T> args{a.get(), b.get(), value.get(), grad_a.get(), grad_b.get(), nullptr, batch, d};
    Buffer<unsigned char> memory = workspace(cuda::bures_workspace_bytes(args, kTarget));
    args.workspace = memory.get();
    cuda::bures(args, kTarget);
    for (Buffer<T>* result : {&value, &grad_a, &grad_b}) result->expect_finite("bures");
}

template <class T>
void packed(Metric metric, Gradient gradient, double epsilon) {
    const int64_t rows[] = {3, 0, 40, 2, 130}, columns[] = {5, 2, 35, 40, 3}, problems = 5, d = 6;
    Buffer<int64_t> row_offsets(problems + 1, 0), column_offsets(problems + 1, 0);
    int64_t entries = 0;
    for (int64_t k = 0; k < problems; ++k) {
        row_offsets.data[k + 1] = row_offsets.data[k] + rows[k];
        column_offsets.data[k + 1] = column_offsets.data[k] + columns[k];
        entries += rows[k] * columns[k];
    }
    const int64_t n = row_offsets.data[problems], m = column_offsets.data[problems];
    Buffer<T> x = noise<T>(n * d, -1, 1), y = noise<T>(m * d, -1, 1), cost(entries), grad_cost(entries), grad_x(n * d), grad_y(m * d);
    CostMatrixRaggedArgs<T> points{};
    points.x = x.get();
    points.y = y.get();
    points.cost = cost.get();
    points.batch = problems;
    points.n = n;
    points.m = m;
    points.d = d;
    points.metric = metric;
    points.row_offsets = row_offsets.get();
    points.column_offsets = column_offsets.get();
    Buffer<unsigned char> memory = workspace(cuda::cost_matrix_ragged_workspace_bytes(points, entries));
    points.workspace = reinterpret_cast<T*>(memory.get());
    cuda::cost_matrix_ragged_fwd(points, entries, kTarget);
    Buffer<T> a(n), b(m), transport(problems), f(n), g(m), incoming = noise<T>(problems, 0.5, 1), grad_a(n), grad_b(m);
    for (int64_t k = 0; k < problems; ++k) {
        for (int64_t i = 0; i < rows[k]; ++i) a.data[row_offsets.data[k] + i] = T(1) / static_cast<T>(rows[k]);
        for (int64_t j = 0; j < columns[k]; ++j) b.data[column_offsets.data[k] + j] = T(1) / static_cast<T>(columns[k]);
    }
    SinkhornRaggedArgs<T> args{};
    args.cost = cost.get();
    args.a = a.get();
    args.b = b.get();
    args.batch = problems;
    args.n = n;
    args.m = m;
    args.num_iters = 3;
    args.epsilon = epsilon;
    args.keep = gradient == Gradient::unroll ? Keep::all : Keep::last;
    args.gradient = gradient;
    args.row_offsets = row_offsets.get();
    args.column_offsets = column_offsets.get();
    args.entries = entries;
    SinkhornArgs<T> size = args;
    Buffer<double> history(problems * kHistoryHeader + history_stride(size) - kHistoryHeader);
    args.history = history.get();
    args.transport_cost = transport.get();
    args.f = f.get();
    args.g = g.get();
    Buffer<unsigned char> forward = workspace(cuda::sinkhorn_ragged_workspace_bytes(args, false));
    args.workspace = forward.get();
    cuda::sinkhorn_ragged_fwd(args, kTarget);
    Buffer<unsigned char> backward = workspace(cuda::sinkhorn_ragged_workspace_bytes(args, true));
    args.workspace = backward.get();
    args.grad_transport_cost = incoming.get();
    args.grad_cost = grad_cost.get();
    args.grad_a = grad_a.get();
    args.grad_b = grad_b.get();
    cuda::sinkhorn_ragged_bwd(args, kTarget);
    points.grad_cost = grad_cost.get();
    points.grad_x = grad_x.get();
    points.grad_y = grad_y.get();
    cuda::cost_matrix_ragged_bwd(points, entries, kTarget);
    for (Buffer<T>* result : {&cost, &transport, &grad_cost, &grad_a, &grad_b, &grad_x, &grad_y}) result->expect_finite("packed");
    cuda::transpose_ragged(cost.get(), grad_cost.get(), row_offsets.get(), column_offsets.get(), problems, entries, kTarget);
}

template <class T>
void between_points(int64_t n, int64_t m, int64_t d, Metric metric, double epsilon, Gradient gradient, double tol) {
    const int64_t batch = 2, columns = 3;
    Buffer<T> x = noise<T>(batch * n * d, -1, 1), y = noise<T>(batch * m * d, -1, 1), transport(batch), dual(batch), f(batch * n), g(batch * m);
    Buffer<T> error(batch), incoming = noise<T>(batch, 0.5, 1), grad_x(batch * n * d), grad_y(batch * m * d), grad_a(batch * n), grad_b(batch * m);
    Buffer<int64_t> iterations(batch, 0);
    SinkhornPointsArgs<T> args{};
    args.x = x.get();
    args.y = y.get();
    args.d = d;
    args.metric = metric;
    args.batch = batch;
    args.n = n;
    args.m = m;
    args.num_iters = 3;
    args.epsilon = epsilon;
    args.tol = tol;
    args.keep = gradient == Gradient::unroll ? Keep::all : gradient == Gradient::last_step ? Keep::last_step : Keep::last;
    args.gradient = gradient;
    Buffer<double> history(batch * history_stride(args));
    args.history = history.get();
    args.transport_cost = transport.get();
    args.regularized_cost = dual.get();
    args.f = f.get();
    args.g = g.get();
    args.marginal_error = error.get();
    args.iterations = iterations.get();
    Buffer<unsigned char> memory = workspace(cuda::sinkhorn_points_workspace_bytes(args, false));
    args.workspace = memory.get();
    cuda::sinkhorn_points_fwd(args, kTarget);
    Buffer<unsigned char> more = workspace(cuda::sinkhorn_points_workspace_bytes(args, true));
    args.workspace = more.get();
    args.grad_transport_cost = args.grad_regularized_cost = incoming.get();
    args.grad_x = grad_x.get();
    args.grad_y = grad_y.get();
    args.grad_a = grad_a.get();
    args.grad_b = grad_b.get();
    cuda::sinkhorn_points_bwd(args, kTarget);
    Buffer<T> v = noise<T>(batch * m * columns, -1, 1), out(batch * n * columns), grad_out = noise<T>(batch * n * columns, -1, 1);
    Buffer<T> apply_x(batch * n * d), apply_y(batch * m * d);
    PlanApplyArgs<T> apply{};
    apply.x = args.x;
    apply.y = args.y;
    apply.f = args.f;
    apply.g = args.g;
    apply.v = v.get();
    apply.out = out.get();
    apply.batch = batch;
    apply.n = n;
    apply.m = m;
    apply.d = d;
    apply.columns = columns;
    apply.metric = metric;
    apply.epsilon = epsilon;
    Buffer<unsigned char> rows = workspace(cuda::plan_apply_workspace_bytes(apply));
    apply.workspace = rows.get();
    cuda::plan_apply(apply, kTarget);
    apply.grad_out = grad_out.get();
    apply.grad_x = apply_x.get();
    apply.grad_y = apply_y.get();
    cuda::plan_apply_bwd(apply, kTarget);
    for (Buffer<T>* result : {&transport, &dual, &f, &g, &error, &grad_x, &grad_y, &grad_a, &grad_b, &out, &apply_x, &apply_y}) {
        result->expect_finite("points");
    }
}

template <class T>
void together(int64_t n, int64_t m, double epsilon, Gradient gradient) {
    const int64_t batch = 65;
    Buffer<T> cost = noise<T>(n * m, 0, 1), transport(batch), dual(batch), f(batch * n), g(batch * m), error(batch);
    Buffer<T> incoming = noise<T>(batch, 0.5, 1), grad_cost(n * m), grad_a(batch * n), grad_b(batch * m);
    Buffer<int64_t> iterations(batch, 0);
    SinkhornArgs<T> args{};
    args.cost = cost.get();
    args.batch = batch;
    args.n = n;
    args.m = m;
    args.num_iters = 2;
    args.epsilon = epsilon;
    args.keep = gradient == Gradient::unroll ? Keep::all : gradient == Gradient::last_step ? Keep::last_step : Keep::last;
    args.gradient = gradient;
    Buffer<double> history(batch * history_stride(args));
    args.history = history.get();
    args.transport_cost = transport.get();
    args.regularized_cost = dual.get();
    args.f = f.get();
    args.g = g.get();
    args.marginal_error = error.get();
    args.iterations = iterations.get();
    Buffer<unsigned char> memory = workspace(cuda::sinkhorn_shared_workspace_bytes(args, false));
    args.workspace = memory.get();
    cuda::sinkhorn_shared_fwd(args, kTarget);
    Buffer<unsigned char> more = workspace(cuda::sinkhorn_shared_workspace_bytes(args, true));
    args.workspace = more.get();
    args.grad_transport_cost = args.grad_regularized_cost = incoming.get();
    args.grad_cost = grad_cost.get();
    args.grad_a = grad_a.get();
    args.grad_b = grad_b.get();
    cuda::sinkhorn_shared_bwd(args, kTarget);
    for (Buffer<T>* result : {&transport, &dual, &f, &g, &error, &grad_cost, &grad_a, &grad_b}) result->expect_finite("together");
}

// Clusters of 2 and 4 blocks, with and without room for all of the rows.
template <class T>
void in_clusters() {
    namespace emulator = cuda::emulator;
    const int64_t sizes[][3] = {{9, 193, 99 * 1024}, {40, 200, 20000 + 6000 * int64_t{sizeof(T)}}, {200, 3, 99 * 1024}};
    for (const auto& size : sizes) {
        emulator::set_clusters(4, size[0] == 200 ? 1000 : 0);
        emulator::set_shared_limit(size[2]);
        for (double epsilon : {0.2, 0.0005}) {
            solve<T>(size[0], size[1], epsilon, Gradient::unroll, INFINITY, 0, false);
            solve<T>(size[0], size[1], epsilon, Gradient::last_step, INFINITY, 1e-3, true);
        }
        solve<T>(size[0], size[1], 0.3, Gradient::envelope, 0.5, 1e-4, false);
    }
    emulator::set_clusters(0, 0);
    emulator::set_shared_limit(99 * 1024);
}

template <class T>
void all() {
    in_clusters<T>();
    for (Metric metric : {Metric::l1, Metric::l2, Metric::sqeuclidean, Metric::cosine}) {
        costs<T>(metric, 3, 66, 18, 0);
        costs<T>(metric, 65, 2, 5, 1.5);
        costs<T>(metric, 2, 3, 1030, 0);
    }
    const int64_t sizes[][2] = {{1, 1}, {5, 9}, {18, 30}, {34, 40}, {3, 150}, {3, 200}};
    for (const auto& size : sizes) {
        for (double epsilon : {0.2, 0.002}) {
            solve<T>(size[0], size[1], epsilon, Gradient::unroll, INFINITY, 0, false);
            solve<T>(size[0], size[1], epsilon, Gradient::last_step, INFINITY, 1e-3, true);
        }
        solve<T>(size[0], size[1], 0.3, Gradient::envelope, 0.5, 1e-4, false);
    }
    loss<T>(5, 9, 7, 0.1);
    loss<T>(18, 35, 20, 0.1);
    loss<T>(6, 7, 9, 0.002);
    loss<T>(3, 130, 5, 0.1);
    const int64_t matrices[][2] = {{1, 1}, {7, 13}, {34, 20}, {66, 3}, {3, 163}};
    for (const auto& size : matrices) factor<T>(size[0], size[1]);
    gaussian<T>(5, 7, 33, 2);
    gaussian<T>(9, 3, 2, 1e12);
    gaussian<T>(2, 161, 4, 2);
    gaussian<T>(6, 163, 4, 2);
    for (int64_t d : {1, 5, 16, 19, 32}) root<T>(d, d == 5, false);
    for (int64_t d : {1, 6, 13, 34}) root<T>(d, d == 6, true);
    for (int64_t d : {1, 7, 12}) bures<T>(d);
    packed<T>(Metric::l1, Gradient::unroll, 0.5);
    packed<T>(Metric::cosine, Gradient::unroll, 0.005);
    packed<T>(Metric::l2, Gradient::envelope, 0.5);
    const int64_t clouds[][3] = {{1, 1, 1}, {3, 65, 5}, {70, 130, 3}, {34, 5, 261}};
    for (const auto& size : clouds) {
        for (Metric metric : {Metric::l1, Metric::l2, Metric::sqeuclidean, Metric::cosine}) {
            between_points<T>(size[0], size[1], size[2], metric, 0.1, Gradient::unroll, 0);
        }
        between_points<T>(size[0], size[1], size[2], Metric::l1, 2.0 * size[2], Gradient::unroll, 1e-3);
        between_points<T>(size[0], size[1], size[2], Metric::cosine, 0.3, Gradient::envelope, 0);
        between_points<T>(size[0], size[1], size[2], Metric::cosine, 0.3, Gradient::last_step, 0);
    }
    together<T>(3, 193, 0.2, Gradient::unroll);
    together<T>(200, 2, 0.2, Gradient::last_step);
    together<T>(3, 193, sizeof(T) == sizeof(float) ? 0.01 : 0.001, Gradient::unroll);
    moments<T>(2, 7, 7, 4, 1);
    moments<T>(2, 30, 9, 2, 1);
    moments<T>(1, 5, 70, 3, 9);
}

}  // namespace

int main() {
    for (uint64_t order : {0, 1, 7}) {
        otkd_fast::cuda::emulator::set_order(order);
        all<float>();
        all<double>();
    }
    if (!failures) std::printf("ok\n");
    return failures ? 1 : 0;
}

// The functions of the module's part `cuda`: those of the CPU half with a device and a stream at the end, and without
// threads (where a number of threads is among the arguments that both take, it is ignored). The tests build this file
// once more, on an emulator.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "cuda_place.h"
#include "sinkhorn_problems.h"

namespace otkd_fast {
namespace {

// x, y, cost, workspace; batch, n, m, d, x_batch_stride, y_batch_stride; metric; temperature_x, temperature_y
using Costs = std::tuple<Address, Address, Address, Address, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int,
                         double, double>;
// rows, columns, weights_rows, weights_columns, workspace, transport_cost, grad_rows, grad_columns; batch, n, m, d,
// num_iters; temperature_rows, temperature_columns, epsilon, scale
using Sinkd = std::tuple<Address, Address, Address, Address, Address, Address, Address, Address, int64_t, int64_t, int64_t,
                         int64_t, int64_t, double, double, double, double>;

template <class T>
CostMatrixArgs<T> cost_args(const Costs& costs) {
    CostMatrixArgs<T> args{};
    Address x, y, cost, workspace;
    int metric;
    std::tie(x, y, cost, workspace, args.batch, args.n, args.m, args.d, args.x_batch_stride, args.y_batch_stride, metric,
             args.temperature_x, args.temperature_y) = costs;
    args.x = pointer<T>(x);
    args.y = pointer<T>(y);
    args.cost = pointer<T>(cost);
    args.workspace = pointer<T>(workspace);
    args.metric = static_cast<Metric>(metric);
    return args;
}

int64_t cost_workspace(int dtype, const Costs& costs) {
    return with_type(dtype, [&](auto type) { return cuda::cost_matrix_workspace_bytes(cost_args<decltype(type)>(costs)); });
}

void cost_forward(int dtype, const Costs& costs, const Place& place) {
    with_type(dtype, [&](auto type) { cuda::cost_matrix_fwd(cost_args<decltype(type)>(costs), target_of(place)); });
}

void cost_backward(int dtype, const Costs& costs, Address grad_cost, Address grad_x, Address grad_y, const Place& place) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        CostMatrixArgs<T> args = cost_args<T>(costs);
        args.grad_cost = pointer<T>(grad_cost);
        args.grad_x = pointer<T>(grad_x);
        args.grad_y = pointer<T>(grad_y);
        cuda::cost_matrix_bwd(args, target_of(place));
    });
}

// `gradient` negative: of the forward.
int64_t solve_workspace(const Problems& problems, int gradient) {
    return with_type(dtype_of(problems), [&](auto type) {
        return cuda::sinkhorn_workspace_bytes(solve_args<decltype(type)>(problems, gradient), gradient >= 0);
    });
}

void solve_forward(const Problems& problems, bool shared_cost, const Outputs& outputs, const Place& place) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornArgs<T> args = solve_args<T>(problems, -1);
        set_outputs(args, outputs);
        cuda::sinkhorn_fwd(args, shared_cost, target_of(place));
    });
}

void solve_backward(const Problems& problems, bool shared_cost, int gradient, const Gradients& gradients, const Place& place) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornArgs<T> args = solve_args<T>(problems, gradient);
        set_gradients(args, gradients);
        cuda::sinkhorn_bwd(args, shared_cost, target_of(place));
    });
}

// of rows and of columns; entries of all costs
using Offsets = std::tuple<Address, Address, int64_t>;

template <class T>
SinkhornRaggedArgs<T> ragged_args(const Problems& problems, const Offsets& offsets, int gradient) {
    SinkhornRaggedArgs<T> args{};
    set_problems(args, problems);
    if (gradient >= 0) args.gradient = static_cast<Gradient>(gradient);
    args.row_offsets = pointer<int64_t>(std::get<0>(offsets));
    args.column_offsets = pointer<int64_t>(std::get<1>(offsets));
    args.entries = std::get<2>(offsets);
    return args;
}

int64_t ragged_workspace(const Problems& problems, int gradient) {
    return with_type(dtype_of(problems), [&](auto type) {
        return cuda::sinkhorn_ragged_workspace_bytes(ragged_args<decltype(type)>(problems, {}, gradient), gradient >= 0);
    });
}

void ragged_forward(const Problems& problems, const Offsets& offsets, const Outputs& outputs, const Place& place) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornRaggedArgs<T> args = ragged_args<T>(problems, offsets, -1);
        set_outputs(args, outputs);
        cuda::sinkhorn_ragged_fwd(args, target_of(place));
    });
}

void ragged_backward(const Problems& problems, const Offsets& offsets, int gradient, const Gradients& gradients, const Place& place) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornRaggedArgs<T> args = ragged_args<T>(problems, offsets, gradient);
        set_gradients(args, gradients);
        cuda::sinkhorn_ragged_bwd(args, target_of(place));
    });
}

void ragged_transpose(int dtype, Address in, Address out, const Offsets& offsets, int64_t problems, const Place& place) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        cuda::transpose_ragged(pointer<T>(in), pointer<T>(out), pointer<int64_t>(std::get<0>(offsets)),
                               pointer<int64_t>(std::get<1>(offsets)), problems, std::get<2>(offsets), target_of(place));
    });
}

// x, y, cost, workspace; problems, rows, columns, d; metric
using Points = std::tuple<Address, Address, Address, Address, int64_t, int64_t, int64_t, int64_t, int>;

template <class T>
CostMatrixRaggedArgs<T> points_args(const Points& points, const Offsets& offsets) {
    CostMatrixRaggedArgs<T> args{};
    Address x, y, cost, workspace;
    int metric;
    std::tie(x, y, cost, workspace, args.batch, args.n, args.m, args.d, metric) = points;
    args.x = pointer<T>(x);
    args.y = pointer<T>(y);
    args.cost = pointer<T>(cost);
    args.workspace = pointer<T>(workspace);
    args.metric = static_cast<Metric>(metric);
    args.row_offsets = pointer<int64_t>(std::get<0>(offsets));
    args.column_offsets = pointer<int64_t>(std::get<1>(offsets));
    return args;
}

int64_t points_workspace(int dtype, const Points& points, int64_t entries) {
    return with_type(dtype, [&](auto type) {
        return cuda::cost_matrix_ragged_workspace_bytes(points_args<decltype(type)>(points, {}), entries);
    });
}

void points_forward(int dtype, const Points& points, const Offsets& offsets, const Place& place) {
    with_type(dtype, [&](auto type) {
        cuda::cost_matrix_ragged_fwd(points_args<decltype(type)>(points, offsets), std::get<2>(offsets), target_of(place));
    });
}

// of the costs; then those of x and y
void points_backward(int dtype, const Points& points, const Offsets& offsets, const std::tuple<Address, Address, Address>& grads,
                     const Place& place) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        CostMatrixRaggedArgs<T> args = points_args<T>(points, offsets);
        args.grad_cost = pointer<T>(std::get<0>(grads));
        args.grad_x = pointer<T>(std::get<1>(grads));
        args.grad_y = pointer<T>(std::get<2>(grads));
        cuda::cost_matrix_ragged_bwd(args, std::get<2>(offsets), target_of(place));
    });
}

template <class T>
SinkdArgs<T> sinkd_args(const Sinkd& call) {
    SinkdArgs<T> args{};
    Address rows, columns, weights_rows, weights_columns, workspace, transport_cost, grad_rows, grad_columns;
    std::tie(rows, columns, weights_rows, weights_columns, workspace, transport_cost, grad_rows, grad_columns, args.batch,
             args.n, args.m, args.d, args.num_iters, args.temperature_rows, args.temperature_columns, args.epsilon,
             args.scale) = call;
    args.rows = pointer<T>(rows);
    args.columns = pointer<T>(columns);
    args.weights_rows = pointer<T>(weights_rows);
    args.weights_columns = pointer<T>(weights_columns);
    args.workspace = pointer<unsigned char>(workspace);
    args.transport_cost = pointer<T>(transport_cost);
    args.grad_rows = pointer<T>(grad_rows);
    args.grad_columns = pointer<T>(grad_columns);
    return args;
}

int64_t loss_workspace(int dtype, const Sinkd& call, const Place& place) {
    return with_type(dtype, [&](auto type) {
        return cuda::sinkd_workspace_bytes(sinkd_args<decltype(type)>(call), target_of(place));
    });
}

void loss_and_gradient(int dtype, const Sinkd& call, const Place& place) {
    with_type(dtype, [&](auto type) { cuda::sinkd_value_and_grad(sinkd_args<decltype(type)>(call), target_of(place)); });
}

// matrix, polar, nuclear_norm, workspace; batch, n, m; steps
using Polar = std::tuple<Address, Address, Address, Address, int64_t, int64_t, int64_t, int>;
// x, y, value, grad_x, grad_y, workspace; batch, n, m, d; unbiased
using Samples = std::tuple<Address, Address, Address, Address, Address, Address, int64_t, int64_t, int64_t, int64_t, bool>;
// x, mean, std, grad_mean, grad_std, grad_x, workspace; outer, sizes, grids, inner; unbiased, eps
using Axes = std::array<int64_t, kMomentAxes>;
using Moments = std::tuple<Address, Address, Address, Address, Address, Address, Address, int64_t, Axes, Axes, int64_t, bool, double>;

template <class T>
PolarArgs<T> polar_args(const Polar& call) {
    PolarArgs<T> args{};
    Address matrix, polar, nuclear_norm, workspace;
    std::tie(matrix, polar, nuclear_norm, workspace, args.batch, args.n, args.m, args.steps) = call;
    args.matrix = pointer<T>(matrix);
    args.polar = pointer<T>(polar);
    args.nuclear_norm = pointer<T>(nuclear_norm);
    args.workspace = pointer<unsigned char>(workspace);
    return args;
}

int64_t polar_workspace(int dtype, const Polar& call, const Place& place) {
    return with_type(dtype, [&](auto type) { return cuda::polar_workspace_bytes(polar_args<decltype(type)>(call), target_of(place)); });
}

void polar_forward(int dtype, const Polar& call, const Place& place) {
    with_type(dtype, [&](auto type) { cuda::polar_fwd(polar_args<decltype(type)>(call), target_of(place)); });
}

template <class T>
GaussianSamplesArgs<T> samples_args(const Samples& call) {
    GaussianSamplesArgs<T> args{};
    Address x, y, value, grad_x, grad_y, workspace;
    std::tie(x, y, value, grad_x, grad_y, workspace, args.batch, args.n, args.m, args.d, args.unbiased) = call;
    args.x = pointer<T>(x);
    args.y = pointer<T>(y);
    args.value = pointer<T>(value);
    args.grad_x = pointer<T>(grad_x);
    args.grad_y = pointer<T>(grad_y);
    args.workspace = pointer<unsigned char>(workspace);
    return args;
}

int64_t samples_workspace(int dtype, const Samples& call, const Place& place) {
    return with_type(dtype, [&](auto type) {
        return cuda::gaussian_samples_workspace_bytes(samples_args<decltype(type)>(call), target_of(place));
    });
}

void samples_value_and_gradients(int dtype, const Samples& call, const Place& place) {
    with_type(dtype, [&](auto type) { cuda::gaussian_samples(samples_args<decltype(type)>(call), target_of(place)); });
}

// a, b, value, grad_a, grad_b, workspace; batch, d
using BuresCall = std::tuple<Address, Address, Address, Address, Address, Address, int64_t, int64_t>;

template <class T>
BuresArgs<T> bures_args(const BuresCall& call) {
    BuresArgs<T> args{};
    Address a, b, value, grad_a, grad_b, workspace;
    std::tie(a, b, value, grad_a, grad_b, workspace, args.batch, args.d) = call;
    args.a = pointer<T>(a);
    args.b = pointer<T>(b);
    args.value = pointer<T>(value);
    args.grad_a = pointer<T>(grad_a);
    args.grad_b = pointer<T>(grad_b);
    args.workspace = pointer<unsigned char>(workspace);
    return args;
}

int64_t bures_workspace(int dtype, const BuresCall& call, const Place& place) {
    return with_type(dtype, [&](auto type) { return cuda::bures_workspace_bytes(bures_args<decltype(type)>(call), target_of(place)); });
}

void bures_value_and_gradients(int dtype, const BuresCall& call, const Place& place) {
    with_type(dtype, [&](auto type) { cuda::bures(bures_args<decltype(type)>(call), target_of(place)); });
}

template <class T>
FeatureMomentsArgs<T> moments_args(const Moments& call) {
    FeatureMomentsArgs<T> args{};
    Address x, mean, std, grad_mean, grad_std, grad_x, workspace;
    Axes sizes, grids;
    std::tie(x, mean, std, grad_mean, grad_std, grad_x, workspace, args.outer, sizes, grids, args.inner, args.unbiased, args.eps) = call;
    args.x = pointer<T>(x);
    args.mean = pointer<T>(mean);
    args.std = pointer<T>(std);
    args.grad_mean = pointer<T>(grad_mean);
    args.grad_std = pointer<T>(grad_std);
    args.grad_x = pointer<T>(grad_x);
    args.workspace = pointer<unsigned char>(workspace);
    std::copy(sizes.begin(), sizes.end(), args.size);
    std::copy(grids.begin(), grids.end(), args.grid);
    return args;
}

int64_t moments_workspace(int dtype, const Moments& call) {
    return with_type(dtype, [&](auto type) {
        return cuda::feature_moments_workspace_bytes(moments_args<decltype(type)>(call), std::get<5>(call) != 0);
    });
}

void moments_forward(int dtype, const Moments& call, const Place& place) {
    with_type(dtype, [&](auto type) { cuda::feature_moments_fwd(moments_args<decltype(type)>(call), target_of(place)); });
}

void moments_backward(int dtype, const Moments& call, const Place& place) {
    with_type(dtype, [&](auto type) { cuda::feature_moments_bwd(moments_args<decltype(type)>(call), target_of(place)); });
}

// matrix, root, aux, grad_root, grad_matrix, workspace (0: eigenvectors, of small ones); batch, d; inverse
using Root = std::tuple<Address, Address, Address, Address, Address, Address, int64_t, int64_t, bool>;

template <class T>
SqrtmArgs<T> root_args(const Root& call) {
    SqrtmArgs<T> args{};
    Address matrix, root, aux, grad_root, grad_matrix, workspace;
    std::tie(matrix, root, aux, grad_root, grad_matrix, workspace, args.batch, args.d, args.inverse) = call;
    args.matrix = pointer<T>(matrix);
    args.root = pointer<T>(root);
    args.aux = pointer<T>(aux);
    args.grad_root = pointer<T>(grad_root);
    args.grad_matrix = pointer<T>(grad_matrix);
    args.workspace = pointer<unsigned char>(workspace);
    args.algorithm = workspace ? SqrtmAlgorithm::polar : SqrtmAlgorithm::jacobi;
    return args;
}

int64_t root_workspace(int dtype, const Root& call, bool backward, const Place& place) {
    return with_type(dtype, [&](auto type) { return cuda::sqrtm_workspace_bytes(root_args<decltype(type)>(call), backward, target_of(place)); });
}

void root_forward(int dtype, const Root& call, const Place& place) {
    with_type(dtype, [&](auto type) {
        const auto args = root_args<decltype(type)>(call);
        if (args.workspace) cuda::sqrtm_polar_fwd(args, target_of(place));
        else cuda::sqrtm_fwd(args, target_of(place));
    });
}

void root_backward(int dtype, const Root& call, const Place& place) {
    with_type(dtype, [&](auto type) {
        const auto args = root_args<decltype(type)>(call);
        if (args.workspace) cuda::sqrtm_polar_bwd(args, target_of(place));
        else cuda::sqrtm_bwd(args, target_of(place));
    });
}

}  // namespace

void bind_cuda(pybind11::module_& module) {
    module.def("cost_matrix_workspace", &cost_workspace);
    module.def("cost_matrix_fwd", &cost_forward);
    module.def("cost_matrix_bwd", &cost_backward);
    module.def("sinkhorn_workspace", &solve_workspace);
    module.def("sinkhorn_fwd", &solve_forward);
    module.def("sinkhorn_bwd", &solve_backward);
    module.def("sinkhorn_ragged_workspace", &ragged_workspace);
    module.def("sinkhorn_ragged_fwd", &ragged_forward);
    module.def("sinkhorn_ragged_bwd", &ragged_backward);
    module.def("ragged_transpose", &ragged_transpose);
    module.def("cost_matrix_ragged_workspace", &points_workspace);
    module.def("cost_matrix_ragged_fwd", &points_forward);
    module.def("cost_matrix_ragged_bwd", &points_backward);
    bind_cuda_sinkhorn(module);
    module.def("sinkd_workspace", &loss_workspace);
    module.def("sinkd_value_and_grad", &loss_and_gradient);
    module.def("polar_workspace", &polar_workspace);
    module.def("polar_fwd", &polar_forward);
    module.def("sqrtm_workspace", &root_workspace);
    module.def("sqrtm_fwd", &root_forward);
    module.def("sqrtm_bwd", &root_backward);
    module.def("gaussian_samples_workspace", &samples_workspace);
    module.def("gaussian_samples", &samples_value_and_gradients);
    module.def("bures_workspace", &bures_workspace);
    module.def("bures", &bures_value_and_gradients);
    module.def("feature_moments_workspace", &moments_workspace);
    module.def("feature_moments_fwd", &moments_forward);
    module.def("feature_moments_bwd", &moments_backward);
}

}  // namespace otkd_fast

#include "otkd_fast/ragged.h"
#include "sinkhorn_problems.h"

namespace otkd_fast {
namespace {

// of rows and of columns
using Offsets = std::tuple<Address, Address>;
template <class T>
SinkhornRaggedArgs<T> ragged_args(const Problems& problems, const Offsets& offsets) {
    SinkhornRaggedArgs<T> args{};
    set_problems(args, problems);
    args.row_offsets = pointer<int64_t>(std::get<0>(offsets));
    args.column_offsets = pointer<int64_t>(std::get<1>(offsets));
    return args;
}

// `gradient` negative: of the forward.
int64_t workspace_bytes(const Problems& problems, const Offsets& offsets, int gradient) {
    return with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornRaggedArgs<T> args = ragged_args<T>(problems, offsets);
        if (gradient >= 0) args.gradient = static_cast<Gradient>(gradient);
        return kernels().of<T>().sinkhorn_ragged_workspace_bytes(args, gradient >= 0);
    });
}

void forward(const Problems& problems, const Offsets& offsets, const Outputs& outputs) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornRaggedArgs<T> args = ragged_args<T>(problems, offsets);
        set_outputs(args, outputs);
        kernels().of<T>().sinkhorn_ragged_fwd(args);
    });
}

void backward(const Problems& problems, const Offsets& offsets, int gradient, const Gradients& gradients) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornRaggedArgs<T> args = ragged_args<T>(problems, offsets);
        args.gradient = static_cast<Gradient>(gradient);
        set_gradients(args, gradients);
        kernels().of<T>().sinkhorn_ragged_bwd(args);
    });
}

void check(const Offsets& offsets, int64_t problems, int64_t rows, int64_t columns, int64_t entries) {
    check_ragged(pointer<int64_t>(std::get<0>(offsets)), pointer<int64_t>(std::get<1>(offsets)), problems, rows, columns, entries);
}

void transpose(int dtype, Address in, Address out, const Offsets& offsets, int64_t problems) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        transpose_ragged(pointer<T>(in), pointer<T>(out), pointer<int64_t>(std::get<0>(offsets)),
                         pointer<int64_t>(std::get<1>(offsets)), problems);
    });
}

// x, y, cost, workspace; problems, d; metric, threads
using Points = std::tuple<Address, Address, Address, Address, int64_t, int64_t, int, int>;

template <class T>
CostMatrixRaggedArgs<T> points_args(const Points& points, const Offsets& offsets) {
    const auto& [x, y, cost, workspace, problems, d, metric, threads] = points;
    CostMatrixRaggedArgs<T> args{};
    args.x = pointer<T>(x);
    args.y = pointer<T>(y);
    args.cost = pointer<T>(cost);
    args.workspace = pointer<T>(workspace);
    args.batch = problems;
    args.d = d;
    args.metric = static_cast<Metric>(metric);
    args.threads = threads;
    args.row_offsets = pointer<int64_t>(std::get<0>(offsets));
    args.column_offsets = pointer<int64_t>(std::get<1>(offsets));
    return args;
}

int64_t points_workspace(int dtype, const Points& points, const Offsets& offsets, bool backward) {
    return with_type(dtype, [&](auto type) {
        return cost_matrix_ragged_workspace(points_args<decltype(type)>(points, offsets), backward);
    });
}

void points_forward(int dtype, const Points& points, const Offsets& offsets) {
    with_type(dtype, [&](auto type) { cost_matrix_ragged(points_args<decltype(type)>(points, offsets), false); });
}

// of the costs; then those of x and y
void points_backward(int dtype, const Points& points, const Offsets& offsets, const std::tuple<Address, Address, Address>& grads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        CostMatrixRaggedArgs<T> args = points_args<T>(points, offsets);
        args.grad_cost = pointer<T>(std::get<0>(grads));
        args.grad_x = pointer<T>(std::get<1>(grads));
        args.grad_y = pointer<T>(std::get<2>(grads));
        cost_matrix_ragged(args, true);
    });
}

}  // namespace

void bind_sinkhorn_ragged(pybind11::module_& module) {
    module.def("sinkhorn_ragged_workspace", &workspace_bytes);
    module.def("sinkhorn_ragged_fwd", &forward);
    module.def("sinkhorn_ragged_bwd", &backward);
    module.def("ragged_check", &check);
    module.def("ragged_transpose", &transpose);
    module.def("cost_matrix_ragged_workspace", &points_workspace);
    module.def("cost_matrix_ragged_fwd", &points_forward);
    module.def("cost_matrix_ragged_bwd", &points_backward);
}

}  // namespace otkd_fast

#include "sinkhorn_problems.h"

namespace otkd_fast {
namespace {

// `gradient` negative: of the forward.
int64_t sinkhorn_workspace_bytes(const Problems& problems, int gradient) {
    return with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        return kernels().of<T>().sinkhorn_workspace_bytes(solve_args<T>(problems, gradient), gradient >= 0);
    });
}

// a_stride, b_stride: of masses that do not lie one behind the other, in calls for many small problems; 0: they do.
void sinkhorn_fwd(const Problems& problems, const Outputs& outputs, int64_t a_stride, int64_t b_stride) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornArgs<T> args = solve_args<T>(problems, -1);
        set_outputs(args, outputs);
        args.a_stride = a_stride;
        args.b_stride = b_stride;
        kernels().of<T>().sinkhorn_fwd(args);
    });
}

void sinkhorn_bwd(const Problems& problems, int gradient, const Gradients& gradients, int64_t a_stride, int64_t b_stride) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornArgs<T> args = solve_args<T>(problems, gradient);
        set_gradients(args, gradients);
        args.a_stride = a_stride;
        args.b_stride = b_stride;
        kernels().of<T>().sinkhorn_bwd(args);
    });
}

// address, size and stride of the rows
using Rows = std::tuple<Address, int64_t, int64_t>;

template <class T>
bool are_right(const Rows& a, const Rows& b, int64_t batch, double tolerance) {
    const auto masses = [](const Rows& rows) {
        return Masses<T>{pointer<T>(std::get<0>(rows)), std::get<1>(rows), std::get<2>(rows)};
    };
    return kernels().of<T>().masses_right(masses(a), masses(b), batch, tolerance);
}

// Without giving up the interpreter lock: it takes a few microseconds.
bool are_masses_right(int dtype, const Rows& a, const Rows& b, int64_t batch, double tolerance) {
    const bool single = dtype == static_cast<int>(DType::float32);
    return single ? are_right<float>(a, b, batch, tolerance) : are_right<double>(a, b, batch, tolerance);
}

}  // namespace

void bind_sinkhorn(pybind11::module_& module) {
    module.def("sinkhorn_workspace", &sinkhorn_workspace_bytes);
    using pybind11::arg;
    module.def("sinkhorn_fwd", &sinkhorn_fwd, arg("problems"), arg("outputs"), arg("a_stride") = 0, arg("b_stride") = 0);
    module.def("sinkhorn_bwd", &sinkhorn_bwd, arg("problems"), arg("gradient"), arg("gradients"), arg("a_stride") = 0,
               arg("b_stride") = 0);
    module.def("masses_right", &are_masses_right);
}

}  // namespace otkd_fast

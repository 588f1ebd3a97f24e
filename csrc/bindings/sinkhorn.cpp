#include "otkd_fast/masses.h"
#include "sinkhorn_problems.h"

namespace otkd_fast {
namespace {

// of transport_cost, regularized_cost, f, g; then those of cost, a, b
using Gradients = std::tuple<Address, Address, Address, Address, Address, Address, Address>;

// `gradient` negative: of the forward.
int64_t sinkhorn_workspace_bytes(const Problems& problems, int gradient) {
    return with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornArgs<T> args{};
        set_problems(args, problems);
        if (gradient >= 0) args.gradient = static_cast<Gradient>(gradient);
        return kernels().of<T>().sinkhorn_workspace_bytes(args, gradient >= 0);
    });
}

void sinkhorn_fwd(const Problems& problems, const Outputs& outputs) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornArgs<T> args{};
        set_problems(args, problems);
        set_outputs(args, outputs);
        kernels().of<T>().sinkhorn_fwd(args);
    });
}

void sinkhorn_bwd(const Problems& problems, int gradient, const Gradients& gradients) {
    with_type(dtype_of(problems), [&](auto type) {
        using T = decltype(type);
        SinkhornArgs<T> args{};
        set_problems(args, problems);
        args.gradient = static_cast<Gradient>(gradient);
        args.grad_transport_cost = pointer<T>(std::get<0>(gradients));
        args.grad_regularized_cost = pointer<T>(std::get<1>(gradients));
        args.grad_f = pointer<T>(std::get<2>(gradients));
        args.grad_g = pointer<T>(std::get<3>(gradients));
        args.grad_cost = pointer<T>(std::get<4>(gradients));
        args.grad_a = pointer<T>(std::get<5>(gradients));
        args.grad_b = pointer<T>(std::get<6>(gradients));
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
    return masses_right(masses(a), masses(b), batch, tolerance);
}

// Without giving up the interpreter lock: it takes a few microseconds.
bool are_masses_right(int dtype, const Rows& a, const Rows& b, int64_t batch, double tolerance) {
    const bool single = dtype == static_cast<int>(DType::float32);
    return single ? are_right<float>(a, b, batch, tolerance) : are_right<double>(a, b, batch, tolerance);
}

}  // namespace

void bind_sinkhorn(pybind11::module_& module) {
    module.def("sinkhorn_workspace", &sinkhorn_workspace_bytes);
    module.def("sinkhorn_fwd", &sinkhorn_fwd);
    module.def("sinkhorn_bwd", &sinkhorn_bwd);
    module.def("masses_right", &are_masses_right);
}

}  // namespace otkd_fast

#include "bindings.h"
#include "otkd_fast/polar_schedule.h"

namespace otkd_fast {
namespace {

template <class T>
PolarArgs<T> polar_args(Address matrix, Address polar, Address nuclear_norm, Address workspace, int64_t batch, int64_t n,
                        int64_t m, int steps, int threads) {
    PolarArgs<T> args{};
    args.matrix = pointer<T>(matrix);
    args.polar = pointer<T>(polar);
    args.nuclear_norm = pointer<T>(nuclear_norm);
    args.workspace = pointer<unsigned char>(workspace);
    args.batch = batch;
    args.n = n;
    args.m = m;
    args.steps = steps;
    args.threads = threads;
    return args;
}

int64_t polar_workspace(int dtype, int64_t batch, int64_t n, int64_t m, int threads) {
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        return kernels().of<T>().polar_workspace_bytes(polar_args<T>(0, 0, 0, 0, batch, n, m, 0, threads));
    });
}

void polar_fwd(int dtype, Address matrix, Address polar, Address nuclear_norm, Address workspace, int64_t batch, int64_t n,
               int64_t m, int steps, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        kernels().of<T>().polar_fwd(polar_args<T>(matrix, polar, nuclear_norm, workspace, batch, n, m, steps, threads));
    });
}

// The rows (a, b, c, top, lowest) of the schedule.
pybind11::list polar_schedule_rows(int dtype) {
    const PolarSchedule schedule = dtype == static_cast<int>(DType::float32) ? polar_schedule<float>() : polar_schedule<double>();
    pybind11::list rows;
    for (int k = 0; k < schedule.count; ++k) {
        const PolarStep& step = schedule.step[k];
        rows.append(pybind11::make_tuple(step.a, step.b, step.c, step.top, step.lowest));
    }
    return rows;
}

}  // namespace

void bind_polar(pybind11::module_& module) {
    module.def("polar_workspace", &polar_workspace);
    module.def("polar_fwd", &polar_fwd);
    module.def("polar_schedule", &polar_schedule_rows);
}

}  // namespace otkd_fast

#include "bindings.h"

namespace otkd_fast {
namespace {

int64_t gaussian_samples_workspace(int dtype, int64_t batch, int64_t n, int64_t m, int64_t d, int threads) {
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        GaussianSamplesArgs<T> args{};
        args.batch = batch;
        args.n = n;
        args.m = m;
        args.d = d;
        args.threads = threads;
        return kernels().of<T>().gaussian_samples_workspace_bytes(args);
    });
}

void gaussian_samples(int dtype, Address x, Address y, Address value, Address grad_x, Address grad_y, Address workspace,
                      int64_t batch, int64_t n, int64_t m, int64_t d, bool unbiased, int threads) {
    with_type(dtype, [&](auto type) {
        using T = decltype(type);
        GaussianSamplesArgs<T> args{};
        args.x = pointer<T>(x);
        args.y = pointer<T>(y);
        args.value = pointer<T>(value);
        args.grad_x = pointer<T>(grad_x);
        args.grad_y = pointer<T>(grad_y);
        args.workspace = pointer<unsigned char>(workspace);
        args.batch = batch;
        args.n = n;
        args.m = m;
        args.d = d;
        args.unbiased = unbiased;
        args.threads = threads;
        kernels().of<T>().gaussian_samples(args);
    });
}

}  // namespace

void bind_gaussian(pybind11::module_& module) {
    module.def("gaussian_samples_workspace", &gaussian_samples_workspace);
    module.def("gaussian_samples", &gaussian_samples);
}

}  // namespace otkd_fast

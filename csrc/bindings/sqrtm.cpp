#include <algorithm>

#include "bindings.h"

namespace otkd_fast {
namespace {

template <class T>
SqrtmArgs<T> sqrtm_args(Address root, Address aux, Address unsolved, Address workspace, int64_t batch, int64_t d,
                        bool inverse, int algorithm, int threads) {
    SqrtmArgs<T> args{};
    args.root = pointer<T>(root);
    args.aux = pointer<T>(aux);
    args.unsolved = pointer<unsigned char>(unsolved);
    args.workspace = pointer<unsigned char>(workspace);
    args.batch = batch;
    args.d = d;
    args.inverse = inverse;
    args.algorithm = static_cast<SqrtmAlgorithm>(algorithm);
    args.threads = threads;
    return args;
}

int64_t sqrtm_workspace(int dtype, int64_t d, int algorithm, int threads, bool backward) {
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        return kernels().of<T>().sqrtm_workspace_bytes(sqrtm_args<T>(0, 0, 0, 0, 1, d, false, algorithm, threads), backward);
    });
}

// Both return how many matrices are left unsolved.
int64_t sqrtm_fwd(int dtype, Address matrix, Address root, Address aux, Address unsolved, Address workspace, int64_t batch,
                  int64_t d, bool inverse, int algorithm, int threads) {
    return with_type(dtype, [&](auto type) -> int64_t {
        using T = decltype(type);
        SqrtmArgs<T> args = sqrtm_args<T>(root, aux, unsolved, workspace, batch, d, inverse, algorithm, threads);
        args.matrix = pointer<T>(matrix);
        kernels().of<T>().sqrtm_fwd(args);
        return std::count(args.unsolved, args.unsolved + batch, 1);
    });
}

int64_t sqrtm_bwd(int dtype, Address root, Address aux, Address grad_root, Address grad_matrix, Address unsolved,
                  Address workspace, int64_t batch, int64_t d, bool inverse, int algorithm, int threads) {
    return with_type(dtype, [&](auto type) -> int64_t {
        using T = decltype(type);
        SqrtmArgs<T> args = sqrtm_args<T>(root, aux, unsolved, workspace, batch, d, inverse, algorithm, threads);
        args.grad_root = pointer<T>(grad_root);
        args.grad_matrix = pointer<T>(grad_matrix);
        kernels().of<T>().sqrtm_bwd(args);
        return std::count(args.unsolved, args.unsolved + batch, 1);
    });
}

}  // namespace

void bind_sqrtm(pybind11::module_& module) {
    module.def("sqrtm_workspace", &sqrtm_workspace);
    module.def("sqrtm_fwd", &sqrtm_fwd);
    module.def("sqrtm_bwd", &sqrtm_bwd);
}

}  // namespace otkd_fast

// The module: what it was built with, which instruction set and threads it uses, and the families of kernels.
#include <pybind11/stl.h>

#include "bindings.h"
#include "otkd_fast/threads.h"
#ifdef OTKD_FAST_WITH_CUDA
#include "otkd_fast/device_info.h"
#endif

namespace py = pybind11;

#ifndef OTKD_FAST_VERSION
#define OTKD_FAST_VERSION "unknown"
#endif
#ifndef OTKD_FAST_COMPILER
#define OTKD_FAST_COMPILER "unknown"
#endif

namespace otkd_fast {
namespace {

py::dict build_info() {
    py::dict info;
    info["version"] = OTKD_FAST_VERSION;
    info["compiler"] = OTKD_FAST_COMPILER;
#ifdef OTKD_FAST_WITH_CUDA
    info["cuda"] = OTKD_FAST_CUDA_VERSION;
    info["cuda_architectures"] = OTKD_FAST_CUDA_ARCHITECTURES;
#else
    info["cuda"] = py::none();
    info["cuda_architectures"] = py::none();
#endif
#if defined(__x86_64__)
    info["instruction_sets"] = std::vector<std::string>{"baseline", "avx2", "avx512"};
#else
    info["instruction_sets"] = std::vector<std::string>{"baseline"};
#endif
    return info;
}

#ifdef OTKD_FAST_WITH_CUDA
py::dict cuda_info_dict() {
    const CudaInfo found = cuda_info();
    py::dict info;
    info["runtime_version"] = found.runtime_version;
    info["driver_version"] = found.driver_version;
    info["error"] = found.error;
    py::list devices;
    for (const CudaDevice& device : found.devices) {
        py::dict entry;
        entry["name"] = device.name;
        entry["capability"] = py::make_tuple(device.major, device.minor);
        entry["total_memory"] = device.total_memory;
        entry["processors"] = device.processors;
        devices.append(entry);
    }
    info["devices"] = devices;
    return info;
}
#endif

}  // namespace
}  // namespace otkd_fast

PYBIND11_MODULE(_C, module) {
    using namespace otkd_fast;
    module.doc() = "Native core of otkd_fast: raw addresses in, called by otkd_fast.ops only.";
    module.def("build_info", &build_info);
    module.def("instruction_sets", &instruction_sets, "Instruction sets that this processor can run.");
    module.def("instruction_set", [] { return kernels().name; }, "The instruction set in use.");
    module.def("set_instruction_set", [](const std::string& name) {
        if (!set_instruction_set(name)) {
            std::string known;
            for (const std::string& set : instruction_sets()) known += (known.empty() ? "" : ", ") + set;
            throw std::invalid_argument("instruction set must be one of " + known + " on this processor, got " + name);
        }
    });
    module.def("thread_source", &thread_source);
#ifdef OTKD_FAST_WITH_CUDA
    module.def("cuda_info", &cuda_info_dict);
    pybind11::module_ cuda_part = module.def_submodule("cuda", "The CUDA kernels: addresses on a device, a stream.");
    bind_cuda(cuda_part);
#endif
    bind_cost_matrix(module);
    bind_sinkhorn(module);
    bind_sinkhorn_shared(module);
    bind_sinkhorn_ragged(module);
    bind_sinkhorn_points(module);
    bind_sinkd(module);
    bind_gaussian(module);
    bind_moments(module);
    bind_polar(module);
    bind_sqrtm(module);
}

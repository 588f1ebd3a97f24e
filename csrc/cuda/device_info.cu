// What GPUs there are: count, names, compute capabilities, driver version. No kernel, no context, no allocation.

#include "otkd_fast/device_info.h"

#include <cuda_runtime_api.h>

namespace otkd_fast {

namespace {

std::string words(cudaError_t status) {
    return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

}  // namespace

CudaInfo cuda_info() {
    CudaInfo info{CUDART_VERSION, 0, {}, ""};
    if (cudaDriverGetVersion(&info.driver_version) != cudaSuccess) info.driver_version = 0;

    int count = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    for (int i = 0; status == cudaSuccess && i < count; ++i) {
        cudaDeviceProp properties;
        status = cudaGetDeviceProperties(&properties, i);
        if (status == cudaSuccess)
            info.devices.push_back({properties.name, properties.major, properties.minor,
                                    static_cast<int64_t>(properties.totalGlobalMem), properties.multiProcessorCount});
    }
    if (status != cudaSuccess) {
        info.error = words(status);
        cudaGetLastError();  // the runtime keeps the error; torch's next check must not find it
    }
    return info;
}

}  // namespace otkd_fast

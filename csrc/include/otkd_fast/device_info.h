// The CUDA devices as the statically linked runtime sees them. Compiled where OTKD_FAST_WITH_CUDA is defined.
//
// Asking creates no context and allocates nothing on a device; it does initialise the driver in this process, so
// it is never done at import (a process that forks its workers afterwards could not use CUDA in them).

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace otkd_fast {

struct CudaDevice {
    std::string name;
    int major;             // compute capability
    int minor;
    int64_t total_memory;  // bytes
    int processors;        // streaming multiprocessors
};

struct CudaInfo {
    int runtime_version;              // 13000 is 13.0: the runtime in this module
    int driver_version;               // newest CUDA that the driver serves, same form; 0: no driver
    std::vector<CudaDevice> devices;  // empty where `error` says why
    std::string error;                // empty: none
};

// Never throws for want of a driver or a device.
CudaInfo cuda_info();

}  // namespace otkd_fast

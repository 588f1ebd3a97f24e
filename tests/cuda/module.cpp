// The CUDA half of the core on the emulator, as a Python module, with the emulator's own switches.
#include "emulator_settings.h"

#include <pybind11/stl.h>

#include "../../csrc/bindings/bindings.h"

PYBIND11_MODULE(otkd_fast_emulated, module) {
    namespace emulator = otkd_fast::cuda::emulator;
    otkd_fast::bind_cuda(module);
    module.def("set_order", &emulator::set_order, "Of threads and blocks: 0 rising, 1 falling, else random.");
    module.def("set_shared_limit", &emulator::set_shared_limit, "Bytes of shared memory that a block may ask for.");
    module.def("set_clusters", &emulator::set_clusters, "Blocks that a cluster may have (0: no clusters), and multiprocessors.");
    module.def("launches", &emulator::launches, "Kernels that were launched so far.");
    module.def("last_cluster", &emulator::last_cluster, "Blocks of a cluster in the last launch.");
    module.def("faulty", &emulator::faulty);
    module.def("faulty_cluster", &emulator::faulty_cluster);
}

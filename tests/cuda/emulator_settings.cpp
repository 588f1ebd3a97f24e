#include "emulator_settings.h"

#include "runtime.h"

namespace otkd_fast {
namespace cuda {
namespace emulator {

void set_order(uint64_t order) { Machine::get().order = order; }
void set_shared_limit(int64_t bytes) { Machine::get().shared_limit = bytes; }
void set_clusters(int largest, int processors) {
    Machine::get().cluster_limit = largest;
    Machine::get().processors = processors;
}
int last_cluster() { return Machine::get().cluster(); }
int64_t launches() { return Machine::get().launches; }

}  // namespace emulator
}  // namespace cuda
}  // namespace otkd_fast

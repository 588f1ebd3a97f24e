// The switches of emulator.h for files that do not include it.
#pragma once
#include <cstdint>
#include <vector>

namespace otkd_fast {
namespace cuda {
namespace emulator {

void set_order(uint64_t order);
void set_shared_limit(int64_t bytes);
void set_clusters(int largest, int processors);
int64_t launches();
int last_cluster();
std::vector<float> faulty(int kind);  // faulty.cpp
std::vector<float> faulty_cluster(int fault, int size);

}  // namespace emulator
}  // namespace cuda
}  // namespace otkd_fast

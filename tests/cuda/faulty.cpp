// Kernels with the faults that the emulator is there to find.
#include "emulator_settings.h"

#include <vector>

#include "runtime.h"

namespace otkd_fast {
namespace cuda {
namespace emulator {
namespace {

// Each warp's first lane sums what the others wrote, with or without a barrier between.
OTKD_KERNEL(64) sum_of_all(float* out, bool with_barrier) {
    float* values = reinterpret_cast<float*>(shared_memory());
    values[thread_id()] = 1.0f;
    if (with_barrier) barrier();
    float total = 0;
    for (int k = 0; k < block_threads(); ++k) total += values[k] == values[k] ? values[k] : 0.0f;
    out[thread_id()] = total;
}

OTKD_KERNEL(64) beyond_shared_memory(float* out) {
    float* values = reinterpret_cast<float*>(shared_memory());
    values[thread_id() + 1] = 1.0f;
    out[thread_id()] = 1.0f;
}

OTKD_KERNEL(64) reads_what_nobody_wrote(float* out) {
    out[thread_id()] = reinterpret_cast<float*>(shared_memory())[thread_id()];
}

OTKD_KERNEL(64) barrier_of_some(float* out) {
    if (thread_id() < 40) barrier();
    out[thread_id()] = warp_sum(1.0f);
}

OTKD_KERNEL(64) shuffle_of_some(float* out) {
    if (lane_id() == 3) return;
    out[thread_id()] = warp_sum(1.0f);
}

// Each block hands a number to the next one of its cluster, with the faults that `fault` names.
enum Fault : int { kNone, kNoBarrierBefore, kNoBarrierAfter, kNoBarrierAtAll, kEarlyAddress, kBeyondTheCluster, kSomeArrive };

OTKD_KERNEL(64) ring(float* out, Fault fault) {
    float* own = reinterpret_cast<float*>(shared_memory());
    const int size = cluster_size(), next = (cluster_rank() + 1) % size;
    const bool none_before = fault == kNoBarrierBefore || fault == kNoBarrierAtAll;
    float* other = fault == kEarlyAddress ? in_block(own, next) : nullptr;
    if (fault != kNoBarrierAtAll) cluster_barrier();  // all have begun
    own[thread_id()] = static_cast<float>(100 * cluster_rank() + thread_id());
    other = in_block(own, fault == kBeyondTheCluster ? size : next);
    if (fault == kSomeArrive && thread_id() < 40) return;
    if (!none_before) cluster_barrier();
    const float value = other[thread_id() ^ 32];
    if (fault != kNoBarrierAfter && fault != kNoBarrierAtAll) cluster_barrier();
    out[block_id() * block_threads() + thread_id()] = value == value ? value : -2.0f;
}

}  // namespace

std::vector<float> faulty_cluster(int fault, int size) {
    std::vector<float> out(64 * 4, -1.0f);
    launch("ring", ring, Grid(4, size), 64, 64 * 4, Target{0, nullptr}, out.data(), static_cast<Fault>(fault));
    return out;
}

std::vector<float> faulty(int kind) {
    std::vector<float> out(64, -1.0f);
    const Target target{0, nullptr};
    if (kind == 0) launch("sum_of_all", sum_of_all, 1, 64, 64 * 4, target, out.data(), true);
    if (kind == 1) launch("sum_of_all", sum_of_all, 1, 64, 64 * 4, target, out.data(), false);
    if (kind == 2) launch("beyond_shared_memory", beyond_shared_memory, 1, 64, 64 * 4, target, out.data());
    if (kind == 3) launch("reads_what_nobody_wrote", reads_what_nobody_wrote, 1, 64, 64 * 4, target, out.data());
    if (kind == 4) launch("barrier_of_some", barrier_of_some, 1, 64, 0, target, out.data());
    if (kind == 5) launch("shuffle_of_some", shuffle_of_some, 1, 64, 0, target, out.data());
    if (kind == 6) launch("sum_of_all", sum_of_all, 1, 63, 64 * 4, target, out.data(), true);
    return out;
}

}  // namespace emulator
}  // namespace cuda
}  // namespace otkd_fast

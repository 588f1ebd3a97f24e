#include "otkd_fast/dispatch.h"

#include <atomic>

namespace otkd_fast {
namespace {

#define OTKD_FAST_KERNELS_OF(ISA)                                                                 \
    {ISA::cost_matrix_fwd,     ISA::cost_matrix_bwd,     ISA::sinkhorn_fwd,                       \
     ISA::sinkhorn_bwd,        ISA::sinkhorn_workspace_bytes,                                     \
     ISA::sinkhorn_ragged_fwd, ISA::sinkhorn_ragged_bwd, ISA::sinkhorn_ragged_workspace_bytes,    \
     ISA::sinkhorn_shared_fwd, ISA::sinkhorn_shared_bwd, ISA::sinkhorn_shared_workspace_bytes,    \
     ISA::polar_fwd,           ISA::polar_workspace_bytes,                                        \
     ISA::gaussian_samples,    ISA::gaussian_samples_workspace_bytes,                             \
     ISA::feature_moments_fwd, ISA::feature_moments_bwd,                                          \
     ISA::sqrtm_fwd,           ISA::sqrtm_bwd,           ISA::sqrtm_workspace_bytes,              \
     ISA::sinkhorn_points_fwd, ISA::sinkhorn_points_bwd, ISA::sinkhorn_points_workspace_bytes,    \
     ISA::plan_apply,          ISA::plan_apply_bwd,      ISA::plan_apply_workspace_bytes,         \
     ISA::masses_right}
#define OTKD_FAST_KERNELS(ISA) {#ISA, OTKD_FAST_KERNELS_OF(ISA), OTKD_FAST_KERNELS_OF(ISA)}

const Kernels kBaseline = OTKD_FAST_KERNELS(baseline);
#if defined(__x86_64__)
const Kernels kAvx2 = OTKD_FAST_KERNELS(avx2);
const Kernels kAvx512 = OTKD_FAST_KERNELS(avx512);

// The features of x86-64-v3 and -v4, which those objects are compiled for.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
#endif

std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> sets{&kBaseline};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (has_avx2()) sets.push_back(&kAvx2);
    if (has_avx512()) sets.push_back(&kAvx512);
#endif
    return sets;
}

std::atomic<const Kernels*>& current() {
    static std::atomic<const Kernels*> set{usable().back()};
    return set;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* set : usable()) names.push_back(set->name);
    return names;
}

bool set_instruction_set(const std::string& name) {
    for (const Kernels* set : usable()) {
        if (name == set->name) {
            current().store(set);
            return true;
        }
    }
    return false;
}

}  // namespace otkd_fast

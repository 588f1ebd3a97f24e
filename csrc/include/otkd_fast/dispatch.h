// Which instruction set runs: the widest that this processor has, unless a test names another.
#pragma once
#include <string>
#include <type_traits>
#include <vector>

#include "otkd_fast/cost_matrix.h"
#include "otkd_fast/gaussian.h"
#include "otkd_fast/masses.h"
#include "otkd_fast/moments.h"
#include "otkd_fast/polar.h"
#include "otkd_fast/sinkhorn.h"
#include "otkd_fast/sinkhorn_shared.h"
#include "otkd_fast/sqrtm.h"
#include "otkd_fast/sinkhorn_points.h"

namespace otkd_fast {

// The kernels of one instruction set for one type.
template <class T>
struct KernelsOf {
    void (*cost_matrix_fwd)(const CostMatrixArgs<T>&);
    void (*cost_matrix_bwd)(const CostMatrixArgs<T>&);
    void (*sinkhorn_fwd)(const SinkhornArgs<T>&);
    void (*sinkhorn_bwd)(const SinkhornArgs<T>&);
    int64_t (*sinkhorn_workspace_bytes)(const SinkhornArgs<T>&, bool backward);
    void (*sinkhorn_ragged_fwd)(const SinkhornRaggedArgs<T>&);
    void (*sinkhorn_ragged_bwd)(const SinkhornRaggedArgs<T>&);
    int64_t (*sinkhorn_ragged_workspace_bytes)(const SinkhornRaggedArgs<T>&, bool backward);
    int64_t (*sinkhorn_shared_fwd)(const SinkhornSharedArgs<T>&);
    void (*sinkhorn_shared_bwd)(const SinkhornSharedArgs<T>&);
    int64_t (*sinkhorn_shared_workspace_bytes)(const SinkhornSharedArgs<T>&, bool backward);
    void (*polar_fwd)(const PolarArgs<T>&);
    int64_t (*polar_workspace_bytes)(const PolarArgs<T>&);
    void (*gaussian_samples)(const GaussianSamplesArgs<T>&);
    int64_t (*gaussian_samples_workspace_bytes)(const GaussianSamplesArgs<T>&);
    void (*feature_moments_fwd)(const FeatureMomentsArgs<T>&);
    void (*feature_moments_bwd)(const FeatureMomentsArgs<T>&);
    void (*sqrtm_fwd)(const SqrtmArgs<T>&);
    void (*sqrtm_bwd)(const SqrtmArgs<T>&);
    int64_t (*sqrtm_workspace_bytes)(const SqrtmArgs<T>&, bool backward);
    void (*sinkhorn_points_fwd)(const SinkhornPointsArgs<T>&);
    void (*sinkhorn_points_bwd)(const SinkhornPointsArgs<T>&);
    int64_t (*sinkhorn_points_workspace_bytes)(const SinkhornPointsArgs<T>&, bool backward);
    void (*plan_apply)(const PlanApplyArgs<T>&);
    void (*plan_apply_bwd)(const PlanApplyArgs<T>&);
    int64_t (*plan_apply_workspace_bytes)(const PlanApplyArgs<T>&, bool backward);
    bool (*masses_right)(const Masses<T>& a, const Masses<T>& b, int64_t batch, double tolerance);
};

struct Kernels {
    const char* name;
    KernelsOf<float> f32;
    KernelsOf<double> f64;

    template <class T>
    const KernelsOf<T>& of() const {
        if constexpr (std::is_same_v<T, float>) return f32;
        else return f64;
    }
};

const Kernels& kernels();                          // the set in use
std::vector<std::string> instruction_sets();       // the sets that this processor can run, narrowest first
bool set_instruction_set(const std::string& name); // false: not one of instruction_sets()

}  // namespace otkd_fast

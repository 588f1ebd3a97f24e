// The CUDA half of the core: the calls of the CPU half with device pointers, a device and a stream. Everything is
// enqueued on that stream; nothing is allocated and nothing waits. Failures throw std::runtime_error.
#pragma once
#include "otkd_fast/cost_matrix.h"
#include "otkd_fast/gaussian.h"
#include "otkd_fast/moments.h"
#include "otkd_fast/polar.h"
#include "otkd_fast/ragged.h"
#include "otkd_fast/sinkd.h"
#include "otkd_fast/sinkhorn.h"
#include "otkd_fast/sinkhorn_points.h"
#include "otkd_fast/sqrtm.h"

namespace otkd_fast {
namespace cuda {

struct Target {
    int device;
    void* stream;  // cudaStream_t
};

template <class T>
int64_t cost_matrix_workspace_bytes(const CostMatrixArgs<T>& args);
template <class T>
void cost_matrix_fwd(const CostMatrixArgs<T>& args, const Target& target);
template <class T>
void cost_matrix_bwd(const CostMatrixArgs<T>& args, const Target& target);

// `shared_cost`: all problems have the one cost (n, m); grad_cost is (batch, n, m) all the same.
template <class T>
int64_t sinkhorn_workspace_bytes(const SinkhornArgs<T>& args, bool backward);
template <class T>
void sinkhorn_fwd(const SinkhornArgs<T>& args, bool shared_cost, const Target& target);
template <class T>
void sinkhorn_bwd(const SinkhornArgs<T>& args, bool shared_cost, const Target& target);

// A part of the two above: the problem by a cluster of blocks in one launch. False: nothing was launched, the device or the
// size are not for it. The workspace is the same.
template <class T>
bool sinkhorn_cluster_fwd(const SinkhornArgs<T>& args, bool shared_cost, const Target& target);
template <class T>
bool sinkhorn_cluster_bwd(const SinkhornArgs<T>& args, bool shared_cost, const Target& target);

// The same with one cost for all problems, by products of matrices with exp(-C / epsilon); grad_cost is (n, m), their sum. The workspace is
// negative where these kernels do not serve: few problems, small ones, and options other than plain iterations.
template <class T>
int64_t sinkhorn_shared_workspace_bytes(const SinkhornArgs<T>& args, bool backward);
template <class T>
void sinkhorn_shared_fwd(const SinkhornArgs<T>& args, const Target& target);
template <class T>
void sinkhorn_shared_bwd(const SinkhornArgs<T>& args, const Target& target);

// Costs are always computed again: `stored` changes nothing. `gradient` may not be implicit.
template <class T>
int64_t sinkhorn_points_workspace_bytes(const SinkhornPointsArgs<T>& args, bool backward);
template <class T>
void sinkhorn_points_fwd(const SinkhornPointsArgs<T>& args, const Target& target);
template <class T>
void sinkhorn_points_bwd(const SinkhornPointsArgs<T>& args, const Target& target);
template <class T>
int64_t plan_apply_workspace_bytes(const PlanApplyArgs<T>& args);
template <class T>
void plan_apply(const PlanApplyArgs<T>& args, const Target& target);
template <class T>
void plan_apply_bwd(const PlanApplyArgs<T>& args, const Target& target);

// Packed problems: offsets are on the device, too. Of the costs, n and m are the numbers of all rows and all columns.
template <class T>
int64_t cost_matrix_ragged_workspace_bytes(const CostMatrixRaggedArgs<T>& args, int64_t entries);
template <class T>
void cost_matrix_ragged_fwd(const CostMatrixRaggedArgs<T>& args, int64_t entries, const Target& target);
template <class T>
void cost_matrix_ragged_bwd(const CostMatrixRaggedArgs<T>& args, int64_t entries, const Target& target);
template <class T>
int64_t sinkhorn_ragged_workspace_bytes(const SinkhornRaggedArgs<T>& args, bool backward);
template <class T>
void sinkhorn_ragged_fwd(const SinkhornRaggedArgs<T>& args, const Target& target);
template <class T>
void sinkhorn_ragged_bwd(const SinkhornRaggedArgs<T>& args, const Target& target);
template <class T>
void transpose_ragged(const T* in, T* out, const int64_t* row_offsets, const int64_t* column_offsets, int64_t problems,
                      int64_t entries, const Target& target);

template <class T>
int64_t sinkd_workspace_bytes(const SinkdArgs<T>& args, const Target& target);
template <class T>
void sinkd_value_and_grad(const SinkdArgs<T>& args, const Target& target);

template <class T>
int64_t polar_workspace_bytes(const PolarArgs<T>& args, const Target& target);
template <class T>
void polar_fwd(const PolarArgs<T>& args, const Target& target);

// SqrtmAlgorithm::jacobi for d <= kLargestJacobi, without a workspace, or polar; no matrix is left unsolved. The backward reads `matrix`, too.
constexpr int64_t kLargestJacobi = 32;
template <class T>
int64_t sqrtm_workspace_bytes(const SqrtmArgs<T>& args, bool backward, const Target& target);
template <class T>
void sqrtm_polar_fwd(const SqrtmArgs<T>& args, const Target& target);
template <class T>
void sqrtm_polar_bwd(const SqrtmArgs<T>& args, const Target& target);
template <class T>
void sqrtm_fwd(const SqrtmArgs<T>& args, const Target& target);
template <class T>
void sqrtm_bwd(const SqrtmArgs<T>& args, const Target& target);

template <class T>
int64_t gaussian_samples_workspace_bytes(const GaussianSamplesArgs<T>& args, const Target& target);
template <class T>
void gaussian_samples(const GaussianSamplesArgs<T>& args, const Target& target);
template <class T>
int64_t bures_workspace_bytes(const BuresArgs<T>& args, const Target& target);
template <class T>
void bures(const BuresArgs<T>& args, const Target& target);

template <class T>
int64_t feature_moments_workspace_bytes(const FeatureMomentsArgs<T>& args, bool backward);
template <class T>
void feature_moments_fwd(const FeatureMomentsArgs<T>& args, const Target& target);
template <class T>
void feature_moments_bwd(const FeatureMomentsArgs<T>& args, const Target& target);

}  // namespace cuda
}  // namespace otkd_fast

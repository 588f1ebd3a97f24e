// What the CUDA sources need of the machine, and nothing else of it is used: indices of a thread, barriers, shuffles, one
// block of shared memory, clusters of blocks that reach into one another's, and launches. With OTKD_FAST_EMULATOR (the
// name of a header of the tests) the same sources are plain C++ that runs on the host. Blocks, clusters and grids have one
// dimension; a block has a multiple of 32 threads, and all lanes of a warp take part in a shuffle.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>

#include "otkd_fast/cuda.h"

#ifdef OTKD_FAST_EMULATOR
#include OTKD_FAST_EMULATOR
#else

#include <cuda_runtime.h>

#define OTKD_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define OTKD_ROLLED _Pragma("unroll 1")
#define OTKD_DEVICE __device__ __forceinline__
#define OTKD_BOTH __host__ __device__ __forceinline__
#define OTKD_CALL __device__ __noinline__
#define OTKD_CONSTANT const __grid_constant__
#define OTKD_UNROLL _Pragma("unroll")
#define OTKD_UNROLL_4 _Pragma("unroll 4")

namespace otkd_fast {
namespace cuda {

OTKD_DEVICE int thread_id() { return threadIdx.x; }
OTKD_DEVICE int block_threads() { return blockDim.x; }
OTKD_DEVICE int64_t block_id() { return blockIdx.x; }
OTKD_DEVICE int64_t block_count() { return gridDim.x; }
OTKD_DEVICE void barrier() { __syncthreads(); }
OTKD_DEVICE bool barrier_any(bool mine) { return __syncthreads_or(mine); }
template <class S>
OTKD_DEVICE S shuffle(S value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
template <class S>
OTKD_DEVICE S shuffle_xor(S value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
// Clusters: bodies of their kernels are there where OTKD_CLUSTERS is 1, that is from architecture 90 on. A block may
// reach into another's shared memory after a barrier of the cluster, and until one that the other takes part in.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define OTKD_CLUSTERS 0
#else
#define OTKD_CLUSTERS 1
OTKD_DEVICE int cluster_size() {
    unsigned count;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
    return static_cast<int>(count);
}
OTKD_DEVICE int cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}
// Of all threads of all blocks; what was written before, to global memory too, is seen after it.
OTKD_DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Where `own`, in the shared memory of this block, lies in that of the block of this rank.
template <class S>
OTKD_DEVICE S* in_block(S* own, int rank) {
    uint64_t address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(own), "r"(rank));
    return reinterpret_cast<S*>(address);
}
#endif
// The dynamic shared memory of the block, 16-byte aligned.
OTKD_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

// The device of a call is current while this lives.
class DeviceGuard {
  public:
    explicit DeviceGuard(const Target& target) : changed_(false), before_(0) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (before_ == target.device) return;
        check(cudaSetDevice(target.device), "cudaSetDevice");
        changed_ = true;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

    static void check(cudaError_t status, const std::string& what) {
        if (status == cudaSuccess) return;
        cudaGetLastError();
        throw std::runtime_error(what + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
    }

  private:
    bool changed_;
    int before_;
};

// Bytes of shared memory that a block can ask for on the current device.
inline int64_t shared_memory_limit(const Target& target) {
    int bytes = 0;
    DeviceGuard::check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, target.device),
                       "shared memory limit");
    return bytes;
}

template <class T>
struct Same {
    using Type = T;
};

// Blocks of a launch, in clusters of `cluster`, which divides them.
struct Grid {
    int64_t blocks;
    int cluster;
    Grid(int64_t count, int of_cluster = 1) : blocks(count), cluster(of_cluster) {}
};

constexpr int kPortableCluster = 8;  // beyond, a kernel has to ask

// What a kernel asks of the device besides its launch.
template <class Kernel>
cudaError_t prepare(Kernel kernel, Grid grid, int64_t shared_bytes) {
    cudaError_t status = cudaSuccess;
    if (shared_bytes > 48 * 1024) {
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    }
    if (status == cudaSuccess && grid.cluster > kPortableCluster) {
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    return status;
}

// A launch in clusters; `attribute` has to outlive what is returned.
inline cudaLaunchConfig_t cluster_config(Grid grid, int threads, int64_t shared_bytes, const Target& target,
                                         cudaLaunchAttribute& attribute) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(target.stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    return config;
}

template <class... P>
bool ask_for_clusters(void (*kernel)(P...), Grid grid, int threads, int64_t shared_bytes, const Target& target) {
    int clusters = 0;
    if (cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, target.device) != cudaSuccess || !clusters) return false;
    if (shared_bytes > shared_memory_limit(target)) return false;
    cudaFuncAttributes compiled = {};
    int active = 0;
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = cluster_config(Grid(grid.cluster, grid.cluster), threads, shared_bytes, target, attribute);
    const bool asked = cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess && compiled.ptxVersion >= 90 &&
                       prepare(kernel, grid, shared_bytes) == cudaSuccess &&
                       cudaOccupancyMaxActiveClusters(&active, kernel, &config) == cudaSuccess;
    if (!asked) cudaGetLastError();
    return asked && active > 0;
}
// Whether the device can run such clusters of this kernel, and the kernel was compiled for clusters. A yes is remembered.
template <class... P>
bool admits(void (*kernel)(P...), Grid grid, int threads, int64_t shared_bytes, const Target& target) {
    static std::mutex mutex;
    static std::set<std::tuple<void (*)(P...), int, int, int, int64_t>> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto key = std::make_tuple(kernel, target.device, grid.cluster, threads, shared_bytes);
    if (known.count(key)) return true;
    if (!ask_for_clusters(kernel, grid, threads, shared_bytes, target)) return false;
    known.insert(key);
    return true;
}

inline int processor_count(const Target& target) {
    int count = 0;
    DeviceGuard::check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, target.device), "multiprocessors");
    return count;
}

template <class... P>
void launch(const char* name, void (*kernel)(P...), Grid grid, int threads, int64_t shared_bytes, const Target& target,
            typename Same<P>::Type... arguments) {
    if (grid.blocks <= 0) return;
    const std::string what = std::string("kernel ") + name + " with " + std::to_string(grid.blocks) + " blocks of " +
                             std::to_string(threads) + " threads and " + std::to_string(shared_bytes) +
                             " bytes of shared memory" +
                             (grid.cluster > 1 ? " in clusters of " + std::to_string(grid.cluster) : "");
    if (grid.blocks > std::numeric_limits<int32_t>::max()) {
        throw std::runtime_error(what + ": too many blocks for one launch");
    }
    DeviceGuard::check(prepare(kernel, grid, shared_bytes), what);
    if (grid.cluster > 1) {
        cudaLaunchAttribute attribute;
        const cudaLaunchConfig_t config = cluster_config(grid, threads, shared_bytes, target, attribute);
        DeviceGuard::check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
    } else {
        kernel<<<static_cast<unsigned>(grid.blocks), threads, shared_bytes, static_cast<cudaStream_t>(target.stream)>>>(
            arguments...);
    }
    DeviceGuard::check(cudaGetLastError(), what);
}

}  // namespace cuda
}  // namespace otkd_fast

#endif

namespace otkd_fast {
namespace cuda {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kLog2E = 1.4426950408889634074;

OTKD_DEVICE int lane_id() { return thread_id() & 31; }
OTKD_DEVICE int warp_id() { return thread_id() >> 5; }
OTKD_DEVICE int block_warps() { return block_threads() >> 5; }

OTKD_DEVICE float exp_of(float x) { return expf(x); }
OTKD_DEVICE double exp_of(double x) { return exp(x); }
OTKD_DEVICE float exp2_of(float x) { return exp2f(x); }
OTKD_DEVICE double exp2_of(double x) { return exp2(x); }

template <class S>
OTKD_BOTH S larger(S a, S b) {
    return a > b ? a : b;
}
template <class S>
OTKD_BOTH S smaller(S a, S b) {
    return a < b ? a : b;
}

// Sum over the lanes of a warp, the same in all of them. For the ends of long loops: five steps, not unrolled.
template <class S>
OTKD_DEVICE S warp_sum(S value) {
    OTKD_ROLLED
    for (int offset = 16; offset > 0; offset >>= 1) value += shuffle_xor(value, offset);
    return value;
}
template <class S>
OTKD_DEVICE S warp_max(S value) {
    OTKD_ROLLED
    for (int offset = 16; offset > 0; offset >>= 1) value = larger(value, shuffle_xor(value, offset));
    return value;
}

// Sums or largest of a few values over the block, the same in all threads; `scratch` holds 32 values of each. Two barriers.
// The loops stay loops: these are called in many places, and none of them is hot.
template <class S, int kCount, class Join>
OTKD_DEVICE void block_join(S (&values)[kCount], S* scratch, S nothing, Join join) {
    OTKD_ROLLED
    for (int offset = 16; offset > 0; offset >>= 1) {
        OTKD_UNROLL
        for (int k = 0; k < kCount; ++k) values[k] = join(values[k], shuffle_xor(values[k], offset));
    }
    OTKD_UNROLL
    for (int k = 0; k < kCount; ++k) {
        if (lane_id() == 0) scratch[k * 32 + warp_id()] = values[k];
    }
    barrier();
    OTKD_UNROLL
    for (int k = 0; k < kCount; ++k) values[k] = lane_id() < block_warps() ? scratch[k * 32 + lane_id()] : nothing;
    OTKD_ROLLED
    for (int offset = 16; offset > 0; offset >>= 1) {
        OTKD_UNROLL
        for (int k = 0; k < kCount; ++k) values[k] = join(values[k], shuffle_xor(values[k], offset));
    }
    OTKD_UNROLL
    for (int k = 0; k < kCount; ++k) values[k] = shuffle(values[k], 0);  // lanes differ where one value is NaN
    barrier();
}
template <class S>
OTKD_DEVICE S block_sum(S value, S* scratch) {
    S values[1] = {value};
    block_join(values, scratch, S(0), [](S a, S b) { return a + b; });
    return values[0];
}
template <class S>
OTKD_DEVICE S block_max(S value, S* scratch) {
    S values[1] = {value};
    block_join(values, scratch, static_cast<S>(-kInfinity), [](S a, S b) { return larger(a, b); });
    return values[0];
}

inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }
inline int64_t round_up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }

}  // namespace cuda
}  // namespace otkd_fast

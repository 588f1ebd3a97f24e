// The tiles that small problems are solved on, and what a kernel needs to be launched on one.
#pragma once
#include "sinkhorn_log_bwd.h"
#include "sinkhorn_tile_bwd.h"
#include "sinkhorn_tile_fwd.h"

namespace otkd_fast {
namespace cuda {
namespace {

template <int kGroups_, int kRows_, int kColumns_, int kWarps_>
struct Shape {
    static constexpr int kGroups = kGroups_, kRows = kRows_, kColumns = kColumns_, kThreads = 32 * kWarps_;
    static int warps(int64_t n) { return static_cast<int>(ceil_div(n, kGroups * kRows)); }
    static bool fits(int64_t n, int64_t m) { return warps(n) <= kWarps_ && m <= 32 * kColumns; }
};
using Tiny = Shape<1, 16, 1, 1>;
using Narrow = Shape<1, 8, 1, 8>;
template <class T>
using Middle = Shape<sizeof(T) / 4, 8, 4, 64 / sizeof(T)>;  // 128 x 128, in double by half of the warps
using Wide = Shape<2, 8, 6, 12>;

template <class S, class T>
int64_t tile_shared_bytes(int warps) {
    return larger(TileMemory<T, S::kColumns>::bytes(warps), log_shared_bytes(warps * 32));
}

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

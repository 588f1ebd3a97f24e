// Packed problems of different sizes on the device: which entries are those of one.
#pragma once
#include "runtime.h"

namespace otkd_fast {
namespace cuda {
namespace {

// Problem k: rows [r0, r1), columns [c0, c1), entry (i, j) of its matrix at start + (i - r0) (c1 - c0) + j - c0.
struct Packed {
    int64_t r0, r1, c0, c1;
    OTKD_DEVICE Packed(const int64_t* row_offsets, const int64_t* column_offsets, int64_t k)
        : r0(row_offsets[k]), r1(row_offsets[k + 1]), c0(column_offsets[k]), c1(column_offsets[k + 1]) {}
    OTKD_DEVICE int64_t rows() const { return r1 - r0; }
    OTKD_DEVICE int64_t columns() const { return c1 - c0; }
    // Whether the offsets, which nobody has read on the host, stay inside tensors of these sizes.
    OTKD_DEVICE bool inside(int64_t n, int64_t m) const {
        return 0 <= r0 && r0 <= r1 && r1 <= n && 0 <= c0 && c0 <= c1 && c1 <= m;
    }
    OTKD_DEVICE bool inside(int64_t n, int64_t m, int64_t before, int64_t entries) const {
        return inside(n, m) && 0 <= before && before <= entries && rows() * columns() <= entries - before;
    }
};

// Entries of the matrices before that of problem k, by the whole block. `scratch` holds 32 values.
OTKD_DEVICE int64_t entries_before(const int64_t* row_offsets, const int64_t* column_offsets, int64_t k, int64_t* scratch) {
    int64_t entries = 0;
    for (int64_t l = thread_id(); l < k; l += block_threads()) {
        entries += (row_offsets[l + 1] - row_offsets[l]) * (column_offsets[l + 1] - column_offsets[l]);
    }
    return block_sum(entries, scratch);
}

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast

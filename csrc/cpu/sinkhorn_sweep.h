// One pass over the kernel, the work of an iteration: a block of rows is read once for a product from either side.
#pragma once
#include "sinkhorn_rows.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// kBlock rows of the kernel at `k`: s_r = sum_j K_rj vector_j.
template <class S>
OTKD_INLINE void dot_rows(const S* k, int64_t ld, const S* vector, S* s) {
    Vec<S> dot[kBlock][2] = {};
    for (int64_t j = 0; j < ld; j += 2 * width<S>) {
        const Vec<S> x0 = load(vector + j), x1 = load(vector + j + width<S>);
        for (int r = 0; r < kBlock; ++r) {
            dot[r][0] += load(k + r * ld + j) * x0;
            dot[r][1] += load(k + r * ld + j + width<S>) * x1;
        }
    }
    typedef S Block __attribute__((vector_size(kBlock * sizeof(S))));
    Block total;  // one store: what follows loads it as a vector
    for (int r = 0; r < kBlock; ++r) total[r] = sum<S>(dot[r][0] + dot[r][1]);
    std::memcpy(s, &total, sizeof total);
}

// The same rows: sums_j += sum_r K_rj weight_r, one short dependency from block to block.
template <class S>
OTKD_INLINE void add_rows(const S* k, int64_t ld, const S* weights, S* sums) {
    Vec<S> weight[kBlock];
    for (int r = 0; r < kBlock; ++r) weight[r] = splat<S>(weights[r]);
    for (int64_t j = 0; j < ld; j += width<S>) {
        Vec<S> total = load(k + j) * weight[0];
        for (int r = 1; r < kBlock; ++r) total += load(k + r * ld + j) * weight[r];
        store(sums + j, load(sums + j) + total);
    }
}

// Rows [begin, end), kBlock at a time: s = K vector; then sums += K^T weights, where value(i, s) returns the weights of the
// rows from i on. Sweeps over a kernel larger than the cache take turns in their direction: what the last sweep read last is
// still there.
template <class Rows, class S, class Value>
void sweep(Rows& rows, int64_t ld, const S* vector, S* sums, int64_t begin, int64_t end, bool reversed, Value value) {
    for_blocks(begin, end, rows.block(), reversed, [&](int64_t i0, int64_t count) {
        const S* k = rows.kernel(i0, count);
        for (int64_t done = 0; done < count; done += kBlock) {
            const int64_t i = reversed ? count - kBlock - done : done;
            S s[kBlock];
            dot_rows(k + i * ld, ld, vector, s);
            add_rows(k + i * ld, ld, value(i0 + i, s), sums);
        }
    });
}

// s = K vector alone: value(i, s) for kBlock rows at a time.
template <class Rows, class S, class Value>
void dot_sweep(Rows& rows, int64_t ld, const S* vector, int64_t begin, int64_t end, bool reversed, Value value) {
    for_blocks(begin, end, rows.block(), reversed, [&](int64_t i0, int64_t count) {
        const S* k = rows.kernel(i0, count);
        for (int64_t i = 0; i < count; i += kBlock) {
            S s[kBlock];
            dot_rows(k + i * ld, ld, vector, s);
            value(i0 + i, s);
        }
    });
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

// Triangular factors on panels: from a Cholesky factorisation, and their inverses.
#pragma once
#include "cholesky.h"
#include "panels.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// f (n, n) = R D, upper triangular, columns in the order of the pivots: A = P f^T f P^T. Rows beyond the rank are 0.
template <class T>
void store_factor(const Cholesky<T>& cholesky, const Panels<T>& f) {
    const int64_t n = cholesky.n;
    std::memset(f.data, 0, panels_of<T>(n) * f.stride() * sizeof(T));
    for (int64_t k = 0; k < cholesky.rank; ++k) {
        for (int64_t j = k; j < n; ++j) f.at(k, j) = static_cast<T>(cholesky.factor(k, j));
    }
}

// Rows [i, i + kTile) of kPanels panels of f^-T from panel p on, the rows before them being there.
template <class T, int kPanels>
void inverse_tile(const Panels<T>& f, const Panels<T>& inverse, int64_t n, int64_t i, int64_t p) {
    constexpr int kVectors = kPanels * kPanelVectors<T>;
    const int64_t stride = f.stride(), begin = p * kPanel<T>;
    Vec<T> acc[kTile][kVectors];
    for (int r = 0; r < kTile; ++r) {
        for (int v = 0; v < kVectors; ++v) acc[r][v] = Vec<T>{};
    }
    accumulate<T, true, kPanels>(f.data + f.offset(0, i), inverse.data + p * stride, stride, begin, i, acc);
    const int64_t rows = n - i < kTile ? n - i : kTile;
    for (int64_t r = 0; r < rows; ++r) {
        const T reciprocal = 1 / f.at(i + r, i + r);
        for (int v = 0; v < kVectors; ++v) {
            const int64_t offset = (p + v / kPanelVectors<T>) * stride + v % kPanelVectors<T> * width<T>;
            Vec<T> sum = -acc[r][v];
            for (int64_t q = 0; q < r; ++q) sum -= f.at(i + q, i + r) * load(inverse.data + offset + (i + q) * kPanel<T>);
            const int64_t diagonal = i + r - begin - v * width<T>;
            if (diagonal >= 0 && diagonal < width<T>) sum[diagonal] += 1;
            store(inverse.data + offset + (i + r) * kPanel<T>, sum * reciprocal);
        }
    }
}

// inverse = f^-T, lower triangular, f (n, n) upper triangular and regular; the caller waits for the team.
template <class T>
void invert_transposed(const Panels<T>& f, const Panels<T>& inverse, int64_t n, const Team& team) {
    const int64_t panels = panels_of<T>(n);
    if (team.rank == 0) std::memset(inverse.data, 0, panels * inverse.stride() * sizeof(T));
    team.barrier();
    int64_t group = 0;
    for (int64_t p = 0, count; p < panels; p += count, ++group) {
        count = group_at(p, panels);
        if (group % team.size != team.rank) continue;
        for (int64_t i = p * kPanel<T>; i < n; i += kTile) {
            if (count == 1) inverse_tile<T, 1>(f, inverse, n, i, p);
            else if (count < kGroup) inverse_tile<T, kGroup - 1 + (kGroup == 1)>(f, inverse, n, i, p);
            else inverse_tile<T, kGroup>(f, inverse, n, i, p);
        }
    }
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

// Dense matrices stored by panels, and their products with a tile of the result in registers.
//
// A panel is kPanel columns, one cache line a row: entry (i, j) lies at (j / kPanel * rows + i) * kPanel + j % kPanel. So both operands
// of A^T B and of A B are read along cache lines, no product packs or transposes anything, and columns beyond the last
// one are padding that never reaches an entry of the matrix. Products whose result is symmetric compute its lower blocks
// and mirror them: exactly symmetric. The threads of a team share the rows of a result in blocks of kPanel; every entry is summed
// by one thread in one order, so the bits do not depend on their number.
#pragma once
#include "magnitude.h"
#include "otkd_fast/threads.h"
#include "simd.h"
#include "transpose.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

// Register tiles: kTile rows by up to kGroup panels.
#if defined(__AVX512F__)
constexpr int kTile = 8, kGroup = 3;
#elif defined(__AVX2__)
constexpr int kTile = 4, kGroup = 1;
#else
constexpr int kTile = 2, kGroup = 1;
#endif
constexpr int64_t kDepth = 256;  // rows of B between two visits of a tile, so that a group of panels stays in cache

// Terms that are summed one after the other. Equal terms are all rounded to one side: a sum of n is then off by up to n u / 3. So sums
// of float are summed again, three levels with kDepth.
template <class T>
constexpr int64_t kRun = sizeof(T) == sizeof(float) ? 16 : kDepth;

constexpr double kNormMargin = 1.001;

template <class T>
constexpr int kPanel = 64 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kPanelVectors = kPanel<T> / width<T>;

template <class T>
int64_t panels_of(int64_t columns) {
    return (columns + kPanel<T> - 1) / kPanel<T>;
}

// A matrix of up to `rows` rows; every matrix of a computation has the same `rows`, a multiple of kPanel.
template <class T>
struct Panels {
    T* data;
    int64_t rows;
    int64_t stride() const { return rows * kPanel<T>; }
    int64_t offset(int64_t i, int64_t j) const {
        return (j / kPanel<T> * rows + i) * kPanel<T> + j % kPanel<T>;
    }
    T& at(int64_t i, int64_t j) const { return data[offset(i, j)]; }
};

// acc += A^T B (kTransposeA) or A B over the depth [begin, end), which starts at a multiple of kPanel for A B. `a` is where
// row 0 of the tile's columns (A^T B) or column 0 of the tile's rows lies, `b` row 0 of its first panel.
template <class T, bool kTransposeA, int kPanels>
OTKD_INLINE void accumulate(const T* a, const T* b, int64_t stride, int64_t begin, int64_t end,
                            Vec<T> (&acc)[kTile][kPanels * kPanelVectors<T>]) {
    const auto step = [&](const T* scalars, int64_t k) {
        Vec<T> row[kPanels * kPanelVectors<T>];
        for (int p = 0; p < kPanels; ++p) {
            for (int v = 0; v < kPanelVectors<T>; ++v) {
                row[p * kPanelVectors<T> + v] = load(b + p * stride + k * kPanel<T> + v * width<T>);
            }
        }
        for (int r = 0; r < kTile; ++r) {
            const Vec<T> scalar = splat(scalars[kTransposeA ? r : r * kPanel<T>]);
            for (int v = 0; v < kPanels * kPanelVectors<T>; ++v) acc[r][v] += scalar * row[v];
        }
    };
    if constexpr (kTransposeA) {
        for (int64_t k = begin; k < end; ++k) step(a + k * kPanel<T>, k);
    } else {
        for (int64_t k0 = begin; k0 < end; k0 += kPanel<T>) {
            const T* block = a + k0 / kPanel<T> * stride;
            const int64_t k1 = k0 + kPanel<T> < end ? k0 + kPanel<T> : end;
            for (int64_t k = k0; k < k1; ++k) step(block + (k - k0), k);
        }
    }
}

// The depth [begin, end) that the entries of a block of rows and a group of panels need.
struct Span {
    int64_t begin, end;
};

// Spans by first row of the block and end of the group's columns: of full factors, of products U^T B with B upper triangular
// (lower half wanted) and of products L^T B with L lower triangular, or U B with U upper triangular.
struct FullDepth {
    int64_t depth;
    Span operator()(int64_t, int64_t) const { return {0, depth}; }
};
struct UpperDepth {
    int64_t depth;
    Span operator()(int64_t, int64_t column_end) const { return {0, column_end < depth ? column_end : depth}; }
};
struct LowerDepth {
    int64_t depth;
    Span operator()(int64_t row, int64_t) const { return {row, depth}; }
};

// The part of a span that lies in [k, k + kDepth), and whether it is the first, the last one.
struct Slice {
    int64_t begin, end;
    bool first, last;
    Slice(Span span, int64_t k)
        : begin(span.begin > k ? span.begin : k), end(span.end < k + kDepth ? span.end : k + kDepth),
          first(begin == span.begin), last(end == span.end) {}
    bool empty() const { return begin >= end; }
};

// Rows [i, i + kTile) of kPanels panels of the result from panel p on; finish(sum, offset) gives what is stored at an offset.
template <class T, bool kTransposeA, int kPanels, class Finish>
void tile(const Panels<T>& a, const Panels<T>& b, const Panels<T>& c, int64_t i, int64_t p, const Slice& slice,
          const Finish& finish) {
    const int64_t stride = a.stride();
    const T* left = a.data + (kTransposeA ? i / kPanel<T> * stride + i % kPanel<T> : i * kPanel<T>);
    constexpr int kVectors = kPanels * kPanelVectors<T>;
    Vec<T> sums[kTile][kVectors] = {};
    for (int64_t k = slice.begin, end; k < slice.end; k = end) {
        end = k + kRun<T> < slice.end ? k + kRun<T> : slice.end;
        Vec<T> acc[kTile][kVectors];
        for (int r = 0; r < kTile; ++r) {
            for (int v = 0; v < kVectors; ++v) acc[r][v] = Vec<T>{};
        }
        accumulate<T, kTransposeA, kPanels>(left, b.data + p * stride, stride, k, end, acc);
        for (int r = 0; r < kTile; ++r) {
            for (int v = 0; v < kVectors; ++v) sums[r][v] += acc[r][v];
        }
    }
    for (int r = 0; r < kTile; ++r) {
        for (int v = 0; v < kVectors; ++v) {
            const int64_t offset = (p + v / kPanelVectors<T>) * stride + (i + r) * kPanel<T> + v % kPanelVectors<T> * width<T>;
            Vec<T> sum = sums[r][v];
            if (!slice.first) sum += load(c.data + offset);
            store(c.data + offset, slice.last ? finish(sum, offset) : sum);
        }
    }
}

template <class T, bool kTransposeA, class Finish>
void tiles(const Panels<T>& a, const Panels<T>& b, const Panels<T>& c, int64_t i0, int64_t i1, int64_t p, int64_t panels,
           const Slice& slice, const Finish& finish) {
    for (int64_t i = i0; i < i1; i += kTile) {
        if (panels == 1) tile<T, kTransposeA, 1>(a, b, c, i, p, slice, finish);
        else if (panels < kGroup) tile<T, kTransposeA, kGroup - 1 + (kGroup == 1)>(a, b, c, i, p, slice, finish);
        else tile<T, kTransposeA, kGroup>(a, b, c, i, p, slice, finish);
    }
}

// Panels of the group that starts at panel p: groups of kGroup, the last two evened out.
inline int64_t group_at(int64_t p, int64_t panels) {
    const int64_t left = panels - p;
    if (left <= kGroup) return left;
    return left < 2 * kGroup ? (left + 1) / 2 : kGroup;
}

// C = A B, (rows, columns); the caller waits for the team.
template <class T, class Depth, class Finish>
void multiply(const Panels<T>& a, const Panels<T>& b, const Panels<T>& c, int64_t rows, int64_t columns, Depth depth,
              const Team& team, const Finish& finish) {
    const int64_t panels = panels_of<T>(columns);
    for (int64_t p = 0, count; p < panels; p += count) {
        count = group_at(p, panels);
        for (int64_t k = 0; k < depth.depth; k += kDepth) {
            for (int64_t i = team.rank * kPanel<T>; i < rows; i += team.size * kPanel<T>) {
                const Slice slice(depth(i, (p + count) * kPanel<T>), k);
                if (slice.empty()) continue;
                tiles<T, false>(a, b, c, i, i + kPanel<T> < rows ? i + kPanel<T> : rows, p, count, slice, finish);
            }
        }
    }
}

// Block (j, i) = block (i, j)^T, blocks of kPanel rows.
template <class T>
void mirror(const Panels<T>& c, int64_t i, int64_t j) {
    const T* in = c.data + c.offset(i, j);
    T* out = c.data + c.offset(j, i);
    for (int r = 0; r < kPanel<T>; r += 4) {
        for (int s = 0; s < kPanel<T>; s += 4) transpose_4x4(in + r * kPanel<T> + s, kPanel<T>, out + s * kPanel<T> + r, kPanel<T>);
    }
}

// The upper triangle of the block of kPanel rows at (i, i) from its lower one.
template <class T>
void mirror_diagonal(const Panels<T>& c, int64_t i) {
    T* block = c.data + c.offset(i, i);
    for (int r = 1; r < kPanel<T>; ++r) {
        for (int s = 0; s < r; ++s) block[s * kPanel<T> + r] = block[r * kPanel<T> + s];
    }
}

// C = A^T B where that is symmetric, (size, size); the caller waits for the team.
template <class T, class Depth, class Finish>
void multiply_symmetric(const Panels<T>& a, const Panels<T>& b, const Panels<T>& c, int64_t size, Depth depth,
                        const Team& team, const Finish& finish) {
    const int64_t panels = panels_of<T>(size);
    for (int64_t p = 0, count; p < panels; p += count) {
        count = group_at(p, panels);
        for (int64_t k = 0; k < depth.depth; k += kDepth) {
            for (int64_t q = p; q < panels; ++q) {
                if (q % team.size != team.rank) continue;
                const int64_t i = q * kPanel<T>, lower = q - p + 1 < count ? q - p + 1 : count;
                const Slice slice(depth(i, (p + lower) * kPanel<T>), k);
                if (slice.empty()) continue;
                tiles<T, true>(a, b, c, i, i + kPanel<T> < size ? i + kPanel<T> : size, p, lower, slice, finish);
                for (int64_t s = p; slice.last && s < p + lower && s < q; ++s) mirror(c, i, s * kPanel<T>);
                // of A^T A they come out symmetric
                if (slice.last && q < p + lower && a.data != b.data) mirror_diagonal(c, i);
            }
        }
    }
}

// The diagonal plus `value`; entry (i, i) by the thread that computed its block.
template <class T>
void add_to_diagonal(const Panels<T>& c, int64_t size, T value, const Team& team) {
    for (int64_t i = 0; i < size; ++i) {
        if (i / kPanel<T> % team.size == team.rank) c.at(i, i) += value;
    }
}

// x (rows, columns) from `in`, (rows, columns) or, transposed, (columns, rows), times a power of two; zeros elsewhere.
template <class T>
void load_panels(const T* in, int64_t rows, int64_t columns, bool transposed, PowerOfTwo<T> scale, const Panels<T>& x) {
    const int64_t ld = transposed ? rows : columns;
    std::memset(x.data, 0, panels_of<T>(columns) * x.stride() * sizeof(T));
    for (int64_t j = 0; j < columns; j += kPanel<T>) {
        const int64_t count = columns - j < kPanel<T> ? columns - j : kPanel<T>;
        T* panel = x.data + x.offset(0, j);
        if (transposed) {
            transpose(in + j * ld, ld, panel, int64_t{kPanel<T>}, count, rows);
        } else {
            for (int64_t i = 0; i < rows; ++i) std::memcpy(panel + i * kPanel<T>, in + i * ld + j, count * sizeof(T));
        }
        for (int64_t k = 0; k < rows * kPanel<T>; k += width<T>) {
            store(panel + k, load(panel + k) * scale.first * scale.second);
        }
    }
}

// The inverse of load_panels, unscaled.
template <class T>
void store_panels(const Panels<T>& x, int64_t rows, int64_t columns, bool transposed, T* out) {
    const int64_t ld = transposed ? rows : columns;
    for (int64_t j = 0; j < columns; j += kPanel<T>) {
        const int64_t count = columns - j < kPanel<T> ? columns - j : kPanel<T>;
        const T* panel = x.data + x.offset(0, j);
        if (transposed) {
            transpose(panel, int64_t{kPanel<T>}, out + j * ld, ld, rows, count);
        } else {
            for (int64_t i = 0; i < rows; ++i) std::memcpy(out + i * ld + j, panel + i * kPanel<T>, count * sizeof(T));
        }
    }
}

// Multiplies every entry of x.
template <class T>
void scale_panels(const Panels<T>& x, int64_t rows, int64_t columns, T factor) {
    for (int64_t p = 0; p < panels_of<T>(columns); ++p) {
        T* panel = x.data + p * x.stride();
        for (int64_t k = 0; k < rows * kPanel<T>; k += width<T>) store(panel + k, load(panel + k) * factor);
    }
}

// Upper bound of the spectral norm, tight to rounding for a multiple of a partial permutation or of rank one:
// min(Frobenius norm, sqrt(largest column sum * largest row sum)) and a margin for the rounding of both. `row_sums`: rows * kPanel entries.
template <class T>
double norm_bound(const Panels<T>& x, int64_t rows, int64_t columns, T* row_sums) {
    double squares = 0;
    T top_row = 0, top_column = 0;
    std::memset(row_sums, 0, rows * kPanel<T> * sizeof(T));
    for (int64_t p = 0; p < panels_of<T>(columns); ++p) {
        const T* panel = x.data + p * x.stride();
        for (int v = 0; v < kPanel<T>; v += width<T>) {
            Vec<T> column = {}, square = {};
            for (int64_t k = v; k < rows * kPanel<T>; k += kPanel<T>) {
                const Vec<T> entry = load(panel + k), size = abs<T>(entry);
                column += size;
                square += entry * entry;
                store(row_sums + k, load(row_sums + k) + size);
            }
            top_column = std::fmax(top_column, largest<T>(column));
            squares += sum<T>(square);
        }
    }
    for (int64_t i = 0; i < rows; ++i) {
        T total = 0;
        for (int v = 0; v < kPanel<T>; v += width<T>) total += sum<T>(load(row_sums + i * kPanel<T> + v));
        top_row = std::fmax(top_row, total);
    }
    const double product = static_cast<double>(top_row) * top_column;
    return kNormMargin * std::sqrt(product < squares ? product : squares);
}

// |A - shift I|^2, Frobenius, A (size, size).
template <class T>
double squared_norm(const Panels<T>& a, int64_t size, T shift) {
    double total = 0;
    for (int64_t p = 0; p < panels_of<T>(size); ++p) {
        const T* panel = a.data + p * a.stride();
        Vec<T> squares[kPanelVectors<T>] = {};
        for (int64_t i = 0; i < size; ++i) {
            for (int v = 0; v < kPanelVectors<T>; ++v) {
                const Vec<T> entry = load(panel + i * kPanel<T> + v * width<T>);
                squares[v] += entry * entry;
            }
        }
        for (int v = 0; v < kPanelVectors<T>; ++v) total += sum<T>(squares[v]);
    }
    for (int64_t i = 0; shift != 0 && i < size; ++i) {
        const double entry = a.at(i, i);
        total += shift * (shift - 2 * entry);
    }
    return total;
}

// Estimate from below of the spectral norm of A (size, size) by power iteration, infinite or NaN where its square overflows a double;
// `scratch`: 18 * rows entries.
template <class T>
double norm_estimate(const Panels<T>& a, int64_t size, T* scratch) {
    constexpr int kIterations = 6;
    const int64_t panels = panels_of<T>(size), padded = panels * kPanel<T>;
    T *v = scratch, *image = scratch + padded, *lanes = scratch + 2 * padded;
    for (int64_t j = 0; j < padded; ++j) v[j] = static_cast<T>(j < size ? (j * 7919 % 13 < 6 ? 1 : -1) * (1 + 0.1 * (j % 7)) : 0);
    double before = 0, after = 0;
    for (int64_t j = 0; j < size; ++j) before += static_cast<double>(v[j]) * v[j];
    double estimate = 0;
    for (int round = 0; round < kIterations; ++round) {
        const T unit = static_cast<T>(1 / std::sqrt(before));
        for (int64_t j = 0; j < padded; ++j) v[j] *= unit;
        std::memset(lanes, 0, size * kPanel<T> * sizeof(T));
        for (int64_t p = 0; p < panels; ++p) {
            const T* panel = a.data + p * a.stride();
            for (int64_t k = 0; k < size * kPanel<T>; k += width<T>) {
                store(lanes + k, load(lanes + k) + load(panel + k) * load(v + p * kPanel<T> + k % kPanel<T>));
            }
        }
        after = 0;
        for (int64_t i = 0; i < size; ++i) {
            T total = 0;
            for (int l = 0; l < kPanel<T>; l += width<T>) total += sum<T>(load(lanes + i * kPanel<T> + l));
            image[i] = total;
            after += static_cast<double>(total) * total;
        }
        estimate = std::sqrt(after);
        for (int64_t i = 0; i < size; ++i) image[i] = static_cast<T>(image[i] / estimate);  // A^T A of a unit vector may overflow
        before = 0;
        for (int64_t p = 0; p < panels; ++p) {
            const T* panel = a.data + p * a.stride();
            for (int l = 0; l < kPanel<T>; l += width<T>) {
                Vec<T> acc = {};
                for (int64_t i = 0; i < size; ++i) acc += splat(image[i]) * load(panel + i * kPanel<T> + l);
                store(v + p * kPanel<T> + l, acc);
                for (int lane = 0; lane < width<T>; ++lane) before += static_cast<double>(acc[lane]) * acc[lane];
            }
        }
        if (!(before > 0)) break;
    }
    return estimate;
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

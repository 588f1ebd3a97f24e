// One matrix of a batch, or as many as a vector has lanes: scaling, polar iteration, nuclear norm (polar.cpp says what and why).
#pragma once
#include <algorithm>

#include "arena.h"
#include "otkd_fast/polar.h"
#include "polar_iteration.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr int64_t kLaneSize = 24;

template <class T>
struct PolarShape {
    int64_t n, m;  // n >= m
    bool transposed, in_lanes;
    explicit PolarShape(const PolarArgs<T>& args)
        : n(args.n < args.m ? args.m : args.n), m(args.n < args.m ? args.n : args.m), transposed(args.n < args.m),
          in_lanes(n <= kLaneSize && 2 * args.batch >= width<T>) {}
    int64_t entries() const { return n * m; }
};

template <class T>
LanePolarIteration<T> lane_iteration(const PolarShape<T>& s, Arena& memory) {
    constexpr int64_t apart = 1344;  // bytes, so that no two matrices start at the same place of a page
    Lanes<T> pieces[3];
    for (Lanes<T>& piece : pieces) {
        piece = {memory.take<T>(s.entries() * width<T>), s.m};
        memory.take<unsigned char>(apart);
    }
    return {pieces[0], pieces[1], pieces[2], s.n, s.m};
}

template <class T>
PolarIteration<T> panel_iteration(const PolarShape<T>& s, Arena& memory) {
    const int64_t rows = round_up(s.n, kPanel<T>), entries = rows * panels_of<T>(s.m) * kPanel<T>;
    Panels<T> pieces[3];
    for (Panels<T>& piece : pieces) piece = {memory.take<T>(entries), rows};
    return {pieces[0], pieces[1], pieces[2], s.n, s.m};
}

template <class T>
int64_t bytes_a_thread(const PolarShape<T>& s) {
    Arena counter{nullptr};
    if (s.in_lanes) lane_iteration(s, counter);
    else panel_iteration(s, counter);
    return counter.used;
}

// x times the power of two and the factor that bring the norm of each lane to at most `top`; NaN where it is not finite.
template <class T>
void normalise_lanes(const LanePolarIteration<T>& it, double top) {
    const int64_t entries = it.n * it.m;
    VecInt<T> best = {};
    for (int64_t k = 0; k < entries; ++k) {
        const VecInt<T> bits = magnitude_bits<T>(load(it.x.data + k * width<T>));
        best = bits > best ? bits : best;
    }
    const Vec<T> size = (Vec<T>)best;
    Vec<T> first, second;
    for (int l = 0; l < width<T>; ++l) {
        const PowerOfTwo<T> scale(-exponent_of(size[l]));
        first[l] = scale.first;
        second[l] = scale.second;
    }
    Vec<T> squares = {}, top_row = {}, top_column = {};
    for (int64_t i = 0; i < it.n; ++i) {
        Vec<T> row = {};
        for (int64_t j = 0; j < it.m; ++j) {
            const Vec<T> entry = it.x.get(i, j) * first * second;
            it.x.set(i, j, entry);
            squares += entry * entry;
            row += abs<T>(entry);
        }
        top_row = max<T>(top_row, row);
    }
    for (int64_t j = 0; j < it.m; ++j) {
        Vec<T> column = {};
        for (int64_t i = 0; i < it.n; ++i) column += abs<T>(it.x.get(i, j));
        top_column = max<T>(top_column, column);
    }
    const Vec<T> bound = static_cast<T>(kNormMargin) * sqrt<T>(min<T>(top_row * top_column, squares));
    const Vec<T> factor = bound == Vec<T>{} ? Vec<T>{} : static_cast<T>(top) / bound;
    for (int64_t k = 0; k < entries; ++k) store(it.x.data + k * width<T>, load(it.x.data + k * width<T>) * factor);
}

// out (columns, rows) = in (rows, columns)^T in every lane
template <class T>
void transpose_lanes(const T* in, T* out, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) store(out + (j * rows + i) * width<T>, load(in + (i * columns + j) * width<T>));
    }
}

// Matrices [begin, begin + count), one in each lane.
template <class T>
void solve_lanes(const PolarArgs<T>& args, const PolarSchedule& schedule, const PolarShape<T>& s, LanePolarIteration<T> it,
                 int64_t begin, int64_t count) {
    const int64_t entries = s.entries();
    load_lanes(args.matrix + begin * entries, entries, count, entries, s.transposed ? it.gram.data : it.x.data);
    if (s.transposed) transpose_lanes(it.gram.data, it.x.data, s.m, s.n);
    normalise_lanes(it, schedule.step[0].top);
    it.run(schedule);
    it.refine();
    if (s.transposed) {
        transpose_lanes(it.x.data, it.gram.data, s.n, s.m);
        std::swap(it.x, it.gram);
    }
    store_lanes(it.x.data, entries, count, entries, args.polar + begin * entries);
    for (int64_t index = begin; index < begin + count; ++index) {
        const T* matrix = args.matrix + index * entries;
        const int exponent = exponent_of(largest_magnitude(matrix, entries));
        args.nuclear_norm[index] = static_cast<T>(inner_product(matrix, args.polar + index * entries, entries, exponent));
    }
}

// x = K / bound(|K|) * top, K scaled by 2^-exponent first; zeros in the other buffers' padding.
template <class T>
void load_normalised(const T* matrix, const PolarShape<T>& s, const PolarIteration<T>& it, int exponent, double top) {
    const int64_t entries = panels_of<T>(s.m) * it.gram.stride();
    std::memset(it.gram.data, 0, entries * sizeof(T));
    std::memset(it.polynomial.data, 0, entries * sizeof(T));
    load_panels(matrix, s.n, s.m, s.transposed, PowerOfTwo<T>(-exponent), it.x);
    scale_panels(it.x, s.n, s.m, static_cast<T>(top / norm_bound(it.x, s.n, s.m, it.gram.data)));
}

// One matrix by the whole team.
template <class T>
void solve_panels(const PolarArgs<T>& args, const PolarSchedule& schedule, const PolarShape<T>& s, PolarIteration<T> it,
                  int64_t index, const Team& team) {
    const T* matrix = args.matrix + index * s.entries();
    T* polar = args.polar + index * s.entries();
    const T largest = largest_magnitude(matrix, s.entries());  // by each thread: nothing to share
    if (!(largest > 0) || !std::isfinite(largest)) {
        const T fill = largest == 0 ? T(0) : std::numeric_limits<T>::quiet_NaN();
        if (team.rank == 0) {
            std::fill(polar, polar + s.entries(), fill);
            args.nuclear_norm[index] = fill;
        }
        return;
    }
    const int exponent = exponent_of(largest);
    if (team.rank == 0) load_normalised(matrix, s, it, exponent, schedule.step[0].top);
    team.barrier();
    it.run(schedule, team);
    it.refine(team);
    if (team.rank == 0) {
        store_panels(it.x, s.n, s.m, s.transposed, polar);
        args.nuclear_norm[index] = static_cast<T>(inner_product(matrix, polar, s.entries(), exponent));
    }
    team.barrier();
}

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

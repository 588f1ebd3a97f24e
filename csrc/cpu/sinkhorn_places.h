// Problems of a packed batch one by one: where each of them lies, and the solver of sinkhorn.cpp for it.
#pragma once
#include "otkd_fast/sinkhorn.h"
#include "otkd_fast/threads.h"
#include "simd.h"

namespace otkd_fast {
namespace OTKD_ISA {

// Sizes of one problem and what lies before it in the packed arrays.
struct Place {
    int64_t n, m;
    int64_t entries, rows, columns;  // of costs, of row and of column vectors
    int64_t history, history_size;   // in doubles
    int64_t index;                   // of the problem
};

// Where problems lie: a list, or (without one) `first` and those behind it in memory, all of its size.
struct Places {
    const Place* list;
    Place first;
    bool listed() const { return list != nullptr; }
    OTKD_INLINE Place operator[](int64_t k) const {
        if (list) return list[k];
        Place place = first;
        place.entries += k * first.n * first.m;
        place.rows += k * first.n;
        place.columns += k * first.m;
        place.history += k * first.history_size;
        place.index += k;
        return place;
    }
};

// The problem by itself.
template <class T>
SinkhornArgs<T> problem_at(const SinkhornArgs<T>& all, const Place& place) {
    const auto from = [](auto* pointer, int64_t offset) { return pointer ? pointer + offset : pointer; };
    SinkhornArgs<T> one = all;
    one.n = place.n;
    one.m = place.m;
    one.batch = 1;
    one.cost = from(all.cost, place.entries);
    one.grad_cost = from(all.grad_cost, place.entries);
    one.a = from(all.a, all.a_stride ? place.index * all.a_stride : place.rows);
    one.initial_f = from(all.initial_f, place.rows);
    one.f = from(all.f, place.rows);
    one.grad_f = from(all.grad_f, place.rows);
    one.grad_a = from(all.grad_a, place.rows);
    one.b = from(all.b, all.b_stride ? place.index * all.b_stride : place.columns);
    one.initial_g = from(all.initial_g, place.columns);
    one.g = from(all.g, place.columns);
    one.grad_g = from(all.grad_g, place.columns);
    one.grad_b = from(all.grad_b, place.columns);
    one.history = from(all.history, place.history);
    one.transport_cost = from(all.transport_cost, place.index);
    one.regularized_cost = from(all.regularized_cost, place.index);
    one.marginal_error = from(all.marginal_error, place.index);
    one.iterations = from(all.iterations, place.index);
    one.a_stride = one.b_stride = 0;
    one.grad_transport_cost = from(all.grad_transport_cost, place.index);
    one.grad_regularized_cost = from(all.grad_regularized_cost, place.index);
    return one;
}

// A batch of one problem on a team of at most `threads`, with memory of that many bytes.
void solve_one(const SinkhornArgs<float>& one, bool backward, int threads, const Team& team, unsigned char* memory);
void solve_one(const SinkhornArgs<double>& one, bool backward, int threads, const Team& team, unsigned char* memory);
int64_t solve_one_bytes(const SinkhornArgs<float>& one, bool backward, int threads);
int64_t solve_one_bytes(const SinkhornArgs<double>& one, bool backward, int threads);

// A batch of many small problems (many_small), all of one size.
void solve_many(const SinkhornArgs<float>& args, bool backward);
void solve_many(const SinkhornArgs<double>& args, bool backward);
int64_t solve_many_bytes(const SinkhornArgs<float>& args, bool backward);
int64_t solve_many_bytes(const SinkhornArgs<double>& args, bool backward);

}  // namespace OTKD_ISA
}  // namespace otkd_fast

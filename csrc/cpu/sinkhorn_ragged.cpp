// Many Sinkhorn problems in one call: packed, of different sizes (sinkhorn_ragged), or a batch of small ones of one size
// (sinkhorn with SinkhornArgs::together).
//
// Each is solved as sinkhorn.cpp solves it, with the same choice of method by the range of its exponents. The heavy ones go
// first, threads take one task after the other: a problem, or a group of small ones that share vectors. Problems do not
// touch each other, so results do not depend on who solves them. Bytes: those of the costs, twice, for a small problem; for
// others as in sinkhorn.cpp.
#include <tuple>

#include "sinkhorn_many.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class T>
struct Uniform {
    const SinkhornArgs<T>& args;
    int64_t group() const { return Many<T>::lanes(args.n, args.m); }
    int64_t tasks() const { return (args.batch + group() - 1) / group(); }
    int threads() const {
        if (args.batch * args.n * args.m * args.num_iters < kThreadsWork) return 1;
        return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(args.threads, tasks())));
    }
    Place place(int64_t k) const {
        const int64_t stride = history_stride(args);
        return {args.n, args.m, k * args.n * args.m, k * args.n, k * args.m, k * stride, stride, k};
    }
};

template <class T>
void run_uniform(const SinkhornArgs<T>& args, bool backward) {
    const Uniform<T> batch{args};
    const Many<T> many(args, backward);
    const int64_t bytes = many.bytes_together(args.n, args.m), group = batch.group(), tasks = batch.tasks();
    parallel(batch.threads(), [&](const Team& team) {
        int64_t begin, end;
        split(tasks, 1, team.size, team.rank, begin, end);
        for (int64_t task = begin; task < end; ++task) {
            const Places places{nullptr, batch.place(task * group)};
            many.run(places, std::min(group, args.batch - task * group), args.workspace + team.rank * bytes);
        }
    });
}

template <class T>
int64_t uniform_bytes(const SinkhornArgs<T>& args, bool backward) {
    return Uniform<T>{args}.threads() * Many<T>(args, backward).bytes_together(args.n, args.m);
}

// Where the problems lie, heavy ones first, small ones of like sizes side by side; and the tasks. In the workspace.
template <class T>
class Packed {
  public:
    Packed(const SinkhornRaggedArgs<T>& args, bool backward, Arena& arena) : args_(args), many_(args, backward) {
        places_ = arena.take<Place>(args.batch);
        starts_ = arena.take<int64_t>(args.batch + 1);
    }

    void plan() {
        place_problems();
        std::sort(places_, places_ + args_.batch, [](const Place& one, const Place& other) { return key(one) < key(other); });
        while (shared_ < args_.batch && is_shared(places_[shared_].n, places_[shared_].m)) ++shared_;
        for (int64_t k = shared_; k < args_.batch; ++tasks_) {
            starts_[tasks_] = k;
            k += task_size(k);
        }
        starts_[tasks_] = args_.batch;
    }

    // Memory of one thread, and of all together while they share a problem.
    void measure(int64_t& apart, int64_t& together) const {
        apart = together = 0;
        int64_t n = 0, m = 0;
        for (int64_t k = 0; k < args_.batch; ++k) {
            const int64_t rows = size(args_.row_offsets, k), columns = size(args_.column_offsets, k);
            if (is_small(rows, columns)) {
                n = std::max(n, rows);
                m = std::max(m, columns);
            } else if (is_shared(rows, columns)) {
                together = std::max(together, many_.bytes_alone(rows, columns, args_.threads));
            } else if (rows && columns) {
                apart = std::max(apart, many_.bytes_alone(rows, columns, 1));
            }
        }
        if (n == 0 || m == 0) return;
        // groups of one and of several vectors
        apart = std::max(apart, many_.bytes_together(bucket(n), m));
        for (int64_t rows = 4; rows <= bucket(n); rows += 4) {
            apart = std::max(apart, many_.bytes_together(rows, std::min(m, kManyEntries / rows)));
        }
    }

    int threads() const { return work() * args_.num_iters < kThreadsWork ? 1 : std::max(1, args_.threads); }

    void run(const Team& team, std::atomic<int64_t>& next, int64_t bytes, unsigned char* memory) const {
        for (int64_t k = 0; k < shared_; ++k) many_.alone(places_[k], args_.threads, team, memory);
        if (shared_ > 0) team.barrier();
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks_;) {
            many_.run(Places{places_ + starts_[task], {}}, starts_[task + 1] - starts_[task], memory + team.rank * bytes);
        }
    }

  private:
    static int64_t size(const int64_t* offsets, int64_t k) { return offsets[k + 1] - offsets[k]; }
    int64_t work() const {
        int64_t total = 0;
        for (int64_t k = 0; k < args_.batch; ++k) total += size(args_.row_offsets, k) * size(args_.column_offsets, k);
        return total;
    }
    // More than one thread's fair share of all.
    bool is_shared(int64_t n, int64_t m) const {
        return args_.threads > 1 && n * m >= kSharedEntries && n * m * args_.threads > work();
    }
    static auto key(const Place& place) {
        const bool small = is_small(place.n, place.m);
        return std::make_tuple(is_empty(place), small, small ? -bucket(place.n) : -place.n * place.m, -place.m, place.index);
    }
    void place_problems() {
        SinkhornArgs<T> one = args_;
        int64_t entries = 0, history = 0;
        for (int64_t k = 0; k < args_.batch; ++k) {
            one.n = size(args_.row_offsets, k);
            one.m = size(args_.column_offsets, k);
            const int64_t kept = history_stride(one);
            places_[k] = {one.n, one.m, entries, args_.row_offsets[k], args_.column_offsets[k], history, kept, k};
            entries += one.n * one.m;
            history += kept;
        }
    }
    // Problems from k on that make a task: of one bucket of rows, none with less than half of the columns of the first.
    int64_t task_size(int64_t k) const {
        const Place& first = places_[k];
        if (!is_small(first.n, first.m)) return 1;
        const int64_t most = std::max<int64_t>(Many<T>::lanes(bucket(first.n), first.m), 1);
        int64_t count = 1;
        for (; count < most && k + count < args_.batch; ++count) {
            const Place& other = places_[k + count];
            if (bucket(other.n) != bucket(first.n) || 2 * other.m < first.m || is_empty(other) != is_empty(first)) break;
        }
        return count;
    }

    const SinkhornRaggedArgs<T>& args_;
    const Many<T> many_;
    Place* places_;
    int64_t* starts_;
    int64_t shared_ = 0, tasks_ = 0;
};

template <class T>
int64_t ragged_bytes(const SinkhornRaggedArgs<T>& args, bool backward) {
    Arena arena{nullptr};
    const Packed<T> packed(args, backward, arena);
    int64_t apart, together;
    packed.measure(apart, together);
    return arena.used + std::max(packed.threads() * apart, together);
}

template <class T>
void run_ragged(const SinkhornRaggedArgs<T>& args, bool backward) {
    if (args.batch == 0) return;
    Arena arena{args.workspace};
    Packed<T> packed(args, backward, arena);
    packed.plan();
    int64_t apart, together;
    packed.measure(apart, together);
    std::atomic<int64_t> next{0};
    parallel(packed.threads(), [&](const Team& team) { packed.run(team, next, apart, args.workspace + arena.used); });
}

}  // namespace

void solve_many(const SinkhornArgs<float>& args, bool backward) { run_uniform(args, backward); }
void solve_many(const SinkhornArgs<double>& args, bool backward) { run_uniform(args, backward); }
int64_t solve_many_bytes(const SinkhornArgs<float>& args, bool backward) { return uniform_bytes(args, backward); }
int64_t solve_many_bytes(const SinkhornArgs<double>& args, bool backward) { return uniform_bytes(args, backward); }

void sinkhorn_ragged_fwd(const SinkhornRaggedArgs<float>& args) { run_ragged(args, false); }
void sinkhorn_ragged_fwd(const SinkhornRaggedArgs<double>& args) { run_ragged(args, false); }
void sinkhorn_ragged_bwd(const SinkhornRaggedArgs<float>& args) { run_ragged(args, true); }
void sinkhorn_ragged_bwd(const SinkhornRaggedArgs<double>& args) { run_ragged(args, true); }
int64_t sinkhorn_ragged_workspace_bytes(const SinkhornRaggedArgs<float>& args, bool backward) {
    return ragged_bytes(args, backward);
}
int64_t sinkhorn_ragged_workspace_bytes(const SinkhornRaggedArgs<double>& args, bool backward) {
    return ragged_bytes(args, backward);
}

}  // namespace OTKD_ISA
}  // namespace otkd_fast

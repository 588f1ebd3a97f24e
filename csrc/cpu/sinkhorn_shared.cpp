// Sinkhorn with one cost for a batch of marginals (reference/sinkhorn.py with an expanded cost, which is never built).
//
//   K = exp(-C / eps) once;   U = A / (V K^T),   V = B / (U K),   T times: two matrix products an iteration
//
// in float (exponents up to 60) or double (up to 600). Problems that leave that range are named to the caller, which hands
// them to the dense solver; with guards double takes all of them. Problems lie in the lanes of vectors, a block of one or two vectors at a time; threads take a
// block each, and share the blocks that are left over. 4 B n m T operations forward, the same again backward.
#include "otkd_fast/sinkhorn_shared.h"

#include <algorithm>
#include <type_traits>

#include "otkd_fast/threads.h"
#include "sinkhorn_shared_bwd.h"
#include "sinkhorn_shared_fwd.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr double kFloatRange = 60, kDoubleRange = 600;
constexpr int64_t kSharedWork = 4 << 20;  // entries times iterations from which threads share a block

template <class S, class T>
class SharedSolver {
  public:
    explicit SharedSolver(const SinkhornSharedArgs<T>& args)
        : args_(args),
          lanes_(kMaxVectors * width<S>),
          blocks_((args.count + lanes_ - 1) / lanes_),
          share_(args.threads > 1 && args.n * args.m * args.num_iters >= kSharedWork),
          threads_(share_ ? args.threads : static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(args.threads, blocks_)))) {}

    // Problems that left the range.
    int64_t forward() const {
        Arena arena{args_.workspace};
        unsigned char* left = arena.take<unsigned char>(blocks_ * lanes_);
        const SharedKernel<S, T> shared(args_, arena, threads_);
        const double limit = sizeof(S) == 4 ? kFloatRange : shared.guarded() ? kInfinity : kDoubleRange;
        bool in_range = true;
        parallel(threads_, [&](const Team& team) {
            SharedKernel<S, T> kernel = shared;
            if (!kernel.start(team, limit)) {
                if (team.rank == 0) in_range = false;
                return;
            }
            for_blocks<SharedForward<S, T>>(team, kernel, arena, [&](auto solver, int64_t first, const Team& members) {
                solver.solve(members, left + first);
            });
        });
        int64_t count = 0;
        for (int64_t k = 0; k < args_.count; ++k) {
            if (!in_range || left[k]) args_.left[count++] = args_.problems ? args_.problems[k] : k;
        }
        return count;
    }

    void backward() const {
        Arena arena{args_.workspace};
        const SharedKernel<S, T> shared(args_, arena, threads_);
        S* outer = arena.take<S>(threads_ * outer_entries());
        parallel(threads_, [&](const Team& team) {
            S* own = args_.grad_cost ? outer + team.rank * outer_entries() : nullptr;
            if (own) std::memset(own, 0, outer_entries() * sizeof(S));
            SharedKernel<S, T> kernel = shared;
            kernel.start(team, kInfinity, args_.gradient == Gradient::unroll || args_.gradient == Gradient::last_step);
            for_blocks<SharedBackward<S, T>>(team, kernel, arena, [&](auto solver, int64_t, const Team& members) {
                solver.solve(members, members.size > 1 && own ? outer : own);
            });
            if (own) cost_gradient(team, kernel, outer);
        });
    }

    int64_t bytes(bool backward) const {
        Arena arena{nullptr};
        arena.take<unsigned char>(blocks_ * lanes_);
        const SharedKernel<S, T> kernel(args_, arena, threads_);
        if (!backward) return arena.used + team_bytes<SharedForward<S, T>>(kernel);
        arena.take<S>(threads_ * outer_entries());
        return arena.used + team_bytes<SharedBackward<S, T>>(kernel);
    }

  private:
    // Of the sum whose product with K is the gradient of the cost, one a thread.
    int64_t outer_entries() const { return args_.grad_cost ? padded(args_.n) * outer_stride<S>(args_.m) : 0; }

    // Adds K o (the sum over the threads) / epsilon to the cost's gradient.
    void cost_gradient(const Team& team, const SharedKernel<S, T>& kernel, const S* outer) const {
        const int64_t stride = outer_stride<S>(args_.m);
        const Vec<S> zero = {};
        const S inverse = static_cast<S>(1.0 / args_.epsilon);
        team.barrier();
        int64_t begin, end;
        split(args_.n, 1, team.size, team.rank, begin, end);
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t j = 0; j < args_.m; j += width<S>) {
                Vec<S> sum = {};
                for (int r = 0; r < team.size; ++r) sum += load(outer + r * outer_entries() + i * stride + j);
                const Vec<S> k = kernel.row(i, j, args_.m - j), value = k > zero ? k * (sum * inverse) : zero;
                T* out = args_.grad_cost + i * args_.m + j;
                for (int64_t w = 0; w < width<S> && j + w < args_.m; ++w) out[w] += static_cast<T>(value[w]);
            }
        }
    }

    template <class Solver>
    int64_t team_bytes(const SharedKernel<S, T>& kernel) const {
        return std::max(threads_ * block_bytes<Solver>(kernel, 1), block_bytes<Solver>(kernel, threads_));
    }
    template <class Solver>
    int64_t block_bytes(const SharedKernel<S, T>& kernel, int threads) const {
        Arena arena{nullptr};
        Solver(block(0), kernel, arena, threads);
        return arena.used;
    }
    Block<S, T> block(int64_t index) const {
        const int64_t first = index * lanes_, count = std::min(lanes_, args_.count - first);
        return {args_, first, count, static_cast<int>((count + width<S> - 1) / width<S>)};
    }
    // Calls body(solver, first problem, team) for each block: whole rounds with a block a thread, the rest together where it pays.
    template <class Solver, class Body>
    void for_blocks(const Team& team, const SharedKernel<S, T>& kernel, const Arena& rest, Body body) const {
        Team::Shared alone;
        const Team self{0, 1, &alone};
        const int64_t apart = share_ ? blocks_ / team.size * team.size : blocks_;
        const int64_t stride = block_bytes<Solver>(kernel, 1);
        for (int64_t index = team.rank; index < apart; index += team.size) {
            Arena arena{rest.base + rest.used + team.rank * stride};
            body(Solver(block(index), kernel, arena, 1), index * lanes_, self);
        }
        if (apart < blocks_) team.barrier();
        for (int64_t index = apart; index < blocks_; ++index) {
            Arena arena = rest;
            body(Solver(block(index), kernel, arena, team.size), index * lanes_, team);
        }
    }

    const SinkhornSharedArgs<T>& args_;
    const int64_t lanes_, blocks_;
    const bool share_;
    const int threads_;
};

template <class T, class Body>
int64_t with_scalar(const SinkhornSharedArgs<T>& args, Body body) {
    if constexpr (std::is_same_v<T, float>) {
        if (args.method == Method::scaling_float) return body(SharedSolver<float, float>(args));
    }
    return body(SharedSolver<double, T>(args));
}

template <class T>
int64_t forward(const SinkhornSharedArgs<T>& args) {
    return with_scalar(args, [](const auto& solver) { return solver.forward(); });
}
template <class T>
void backward(const SinkhornSharedArgs<T>& args) {
    with_scalar(args, [](const auto& solver) {
        solver.backward();
        return int64_t{0};
    });
}
template <class T>
int64_t workspace_bytes(const SinkhornSharedArgs<T>& args, bool backward) {
    return with_scalar(args, [&](const auto& solver) { return solver.bytes(backward); });
}

}  // namespace

int64_t sinkhorn_shared_fwd(const SinkhornSharedArgs<float>& args) { return forward(args); }
int64_t sinkhorn_shared_fwd(const SinkhornSharedArgs<double>& args) { return forward(args); }
void sinkhorn_shared_bwd(const SinkhornSharedArgs<float>& args) { backward(args); }
void sinkhorn_shared_bwd(const SinkhornSharedArgs<double>& args) { backward(args); }
int64_t sinkhorn_shared_workspace_bytes(const SinkhornSharedArgs<float>& args, bool backward) {
    return workspace_bytes(args, backward);
}
int64_t sinkhorn_shared_workspace_bytes(const SinkhornSharedArgs<double>& args, bool backward) {
    return workspace_bytes(args, backward);
}

}  // namespace OTKD_ISA
}  // namespace otkd_fast

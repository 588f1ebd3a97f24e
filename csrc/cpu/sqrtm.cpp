// Square roots of symmetric positive semidefinite matrices and their adjoint (reference/sqrtm.py).
//
//   forward    S = A^(1/2), or A^(-1/2)
//   backward   S X + X S = G for the gradient G of S; for the inverse root R, X = -R^2 Y R^2 with R Y + Y R = G
//
// Three ways, each with its own aux for the backward: 'jacobi', small matrices, one a lane, with eigenvectors (sqrtm_jacobi.h);
// 'tridiagonal', batches of middle ones, eigenvectors in double (sqrtm_tridiagonal.h); 'polar', larger ones on panels, products only (sqrtm_polar.h,
// lyapunov.h; small ones, one a lane: sqrtm_lanes.h), a matrix a thread, those that do not come out even and single ones by all threads together. A is scaled by an even power of two
// first. What these ways cannot do is marked `unsolved`.
#include "otkd_fast/sqrtm.h"

#include "lyapunov.h"
#include "sqrtm_halves.h"
#include "sqrtm_jacobi.h"
#include "sqrtm_lanes.h"
#include "sqrtm_polar.h"
#include "sqrtm_tridiagonal.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

constexpr int64_t kLanesRoot = 96;             // largest float32 matrices whose eigenvectors are computed with one in each lane (ops/sqrtm.py)
constexpr int64_t kParallelWork = 500 * 1000;  // multiply-adds, about 10 us of one thread

// Whether products run with a matrix in each lane.
template <class T>
bool in_lanes(const SqrtmArgs<T>& args, bool backward) {
    return args.algorithm == SqrtmAlgorithm::polar && !backward && !args.inverse && args.d <= kLaneRoot && 2 * args.batch >= width<T>;
}

// Whether the eigenvectors of a tridiagonal form come from those of its halves, a matrix a thread.
template <class T>
bool halved(const SqrtmArgs<T>& args) {
    return std::is_same_v<T, float> && args.algorithm == SqrtmAlgorithm::tridiagonal && args.d > kLanesRoot;
}

template <class Work>
int64_t bytes_of(int64_t d) {
    Arena counter{nullptr};
    Work(d, counter);
    return counter.used;
}

// The same whatever the batch and `inverse`.
template <class T>
int64_t bytes_a_thread(const SqrtmArgs<T>& args, bool backward) {
    const int64_t d = args.d;
    if (args.algorithm == SqrtmAlgorithm::jacobi) return bytes_of<JacobiRoot<T>>(d);
    if (halved(args) && !backward) return bytes_of<HalvesRoot<float>>(d);
    if (args.algorithm == SqrtmAlgorithm::tridiagonal) return backward ? bytes_of<TridiagonalAdjoint<T>>(d) : bytes_of<TridiagonalRoot<T>>(d);
    if (backward) return bytes_of<Lyapunov<T>>(d);
    return d <= kLaneRoot ? std::max(bytes_of<PolarRoot<T>>(d), bytes_of<LaneRoot<T>>(d)) : bytes_of<PolarRoot<T>>(d);
}

template <class T>
void fill(T* out, int64_t count, T value) {
    for (int64_t k = 0; k < count; ++k) out[k] = value;
}

// One matrix by the whole team.
template <class T>
void forward(const SqrtmArgs<T>& args, PolarRoot<T>& work, int64_t index, const Team& team) {
    const int64_t entries = args.d * args.d;
    const T* a = args.matrix + index * entries;
    T *root = args.root + index * entries, *aux = args.aux + 2 * index;
    const T largest = largest_magnitude(a, entries);  // by each thread: nothing to share
    if (team.rank == 0) args.unsolved[index] = 0;
    if (!(largest > 0) || !std::isfinite(largest)) {
        if (team.rank != 0) return;
        fill(root, entries, largest - largest);
        fill(aux, 2, largest - largest);
        return;
    }
    const int exponent = (exponent_of(largest) + 1) / 2 * 2;
    const Definiteness kind = work.solve(a, exponent, args.inverse, team);
    if (team.rank == 0) {
        const bool singular = work.lower_bound() == 0;
        args.unsolved[index] = kind == Definiteness::indefinite || (args.inverse && singular);
        if (!args.unsolved[index]) work.store(root, std::ldexp(T(1), args.inverse ? -exponent / 2 : exponent / 2));
        aux[0] = static_cast<T>(std::ldexp(work.upper_bound(), exponent / 2));
        aux[1] = static_cast<T>(std::ldexp(work.lower_bound(), exponent / 2));
    }
    team.barrier();
}

template <class T>
void backward(const SqrtmArgs<T>& args, Lyapunov<T>& work, int64_t index, const Team& team) {
    const int64_t entries = args.d * args.d;
    T* out = args.grad_matrix + index * entries;
    const double upper = args.aux[2 * index], lower = args.aux[2 * index + 1];
    if (team.rank == 0) args.unsolved[index] = upper > 0 && lower == 0;
    if (!(lower > 0)) {
        if (team.rank == 0) fill(out, entries, static_cast<T>(upper - upper));
        return;
    }
    const double top = args.inverse ? 1 / lower : upper, bottom = args.inverse ? 1 / upper : lower;
    const int exponent = std::ilogb(top) + 1;
    const T* root = args.root + index * entries;
    work.solve(root, args.grad_root + index * entries, exponent, std::ldexp(bottom, -exponent), std::ldexp(top, -exponent), team);
    if (args.inverse) work.times_squares(root, exponent, team);
    if (team.rank == 0) {
        store_panels(work.x, args.d, args.d, false, out);
        const PowerOfTwo<T> back(args.inverse ? 3 * exponent : -exponent);
        for (int64_t k = 0; k < entries; ++k) out[k] = out[k] * back.first * back.second;
    }
    team.barrier();
}

// Calls one(work, index, team) for every matrix: a matrix a thread, then all threads for each of the rest.
template <class Work, class T, class One>
void for_matrices(const SqrtmArgs<T>& args, int64_t bytes, const Team& team, const One& one) {
    const int64_t apart = args.batch / team.size * team.size;
    if (apart > 0) {
        Arena memory{args.workspace + team.rank * bytes};
        Work work(args.d, memory);
        for (int64_t index = team.rank; index < apart; index += team.size) one(args, work, index, Team{0, 1, nullptr});
    }
    team.barrier();
    for (int64_t index = apart; index < args.batch; ++index) {
        Arena memory{args.workspace};
        Work work(args.d, memory);
        one(args, work, index, team);
        team.barrier();
    }
}

// Calls one(work, begin, count) for pieces of the batch; a thread has neighbouring ones, so that no two write to one cache line for long.
template <class Work, class T, class One>
void for_pieces(const SqrtmArgs<T>& args, int64_t bytes, int64_t piece, const Team& team, const One& one) {
    Arena memory{args.workspace + team.rank * bytes};
    Work own(args.d, memory);
    int64_t begin, end;
    split(args.batch, piece, team.size, team.rank, begin, end);
    for (; begin < end; begin += piece) one(own, begin, end - begin < piece ? end - begin : piece);
}

template <class T>
void run(const SqrtmArgs<T>& args, bool adjoint) {
    const int64_t bytes = bytes_a_thread(args, adjoint);
    const int64_t work = 16 * args.batch * args.d * args.d * args.d;
    parallel(work < kParallelWork ? 1 : args.threads, [&](const Team& team) {
        switch (args.algorithm) {
            case SqrtmAlgorithm::polar:
                if (in_lanes(args, adjoint)) {
                    for_pieces<LaneRoot<T>>(args, bytes, width<T>, team, [&](auto& work, int64_t begin, int64_t count) {
                        work.forward(args, begin, count);
                    });
                } else if (adjoint) {
                    for_matrices<Lyapunov<T>>(args, bytes, team, backward<T>);
                } else {
                    for_matrices<PolarRoot<T>>(args, bytes, team, forward<T>);
                }
                break;
            case SqrtmAlgorithm::tridiagonal:
                if (adjoint) {
                    for_matrices<TridiagonalAdjoint<T>>(args, bytes, team, [](const auto& a, auto& work, int64_t index, const Team& own) {
                        work.solve(a, index, own);
                    });
                } else if (halved(args)) {
                    if constexpr (std::is_same_v<T, float>) {
                        for_pieces<HalvesRoot<T>>(args, bytes, 1, team, [&](auto& work, int64_t index, int64_t) { work.forward(args, index); });
                    }
                } else {
                    for_pieces<TridiagonalRoot<T>>(args, bytes, LaneEigen::kMatrices, team, [&](auto& work, int64_t begin, int64_t count) {
                        work.forward(args, begin, count);
                    });
                }
                break;
            case SqrtmAlgorithm::jacobi:
                for_pieces<JacobiRoot<T>>(args, bytes, width<T>, team, [&](auto& work, int64_t begin, int64_t count) {
                    adjoint ? work.backward(args, begin, count) : work.forward(args, begin, count);
                });
        }
    });
}

}  // namespace

void sqrtm_fwd(const SqrtmArgs<float>& args) { run(args, false); }
void sqrtm_fwd(const SqrtmArgs<double>& args) { run(args, false); }
void sqrtm_bwd(const SqrtmArgs<float>& args) { run(args, true); }
void sqrtm_bwd(const SqrtmArgs<double>& args) { run(args, true); }
int64_t sqrtm_workspace_bytes(const SqrtmArgs<float>& args, bool backward) { return args.threads * bytes_a_thread(args, backward); }
int64_t sqrtm_workspace_bytes(const SqrtmArgs<double>& args, bool backward) { return args.threads * bytes_a_thread(args, backward); }

}  // namespace OTKD_ISA
}  // namespace otkd_fast

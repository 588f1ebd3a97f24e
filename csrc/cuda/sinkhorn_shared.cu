// Sinkhorn with one cost for a batch of marginals (reference/sinkhorn.py), forward and backward, for many problems beyond the tiles of
// sinkhorn.cu; plain iterations, rows first.
//
//   K = exp(-(C - low) / eps) once;   U = A / (V K^T),   V = B / (U K),   T times: two products (batch, n) x (n, m), exact in T
//   backward: the adjoint loop in as many products; dC = K o (one product of depth 2 T batch)
//
// A block has 32 problems x 64 entries of a product and a piece of its depth (point_tile.h), 2 n m operations a problem and half-iteration;
// a launch over the entries joins the pieces and updates. K, K^T, K o (C - low) and its transpose are in the workspace: 4 n m, nothing of the size
// batch n m. A problem whose exponents reach beyond 60 (double: 600), or whose sums leave the safe range, is found on the device and
// solved in the log domain by a block of its own, in one launch; its gradients likewise.
#include "otkd_fast/cuda.h"

#include "sinkhorn_shared.h"
#include "sinkhorn_shapes.h"

namespace otkd_fast {
namespace cuda {
namespace {

constexpr int64_t kFewestProblems = 64, kMostRangeBlocks = 256, kEntriesOfABlock = 4096, kWantedPieces = 528, kLeastDepth = 128;
constexpr int kMatrixLine = kMatrixTile + 1;

template <class T>
OTKD_KERNEL(kOnceThreads) shared_range(OTKD_CONSTANT SharedBatch<T> all) {
    double* scratch = reinterpret_cast<double*>(shared_memory());
    const int64_t entries = all.batch.args.n * all.batch.args.m;
    double low = -kInfinity, high = -kInfinity;  // of -C and of C
    for (int64_t e = block_id() * kOnceThreads + thread_id(); e < entries; e += block_count() * kOnceThreads) {
        const double cost = static_cast<double>(all.batch.args.cost[e]);
        low = larger(low, -cost);
        high = cost < kInfinity ? larger(high, cost) : high;
    }
    low = block_max(low, scratch);
    high = block_max(high, scratch);
    if (thread_id() != 0) return;
    all.ranges[2 * block_id()] = low;
    all.ranges[2 * block_id() + 1] = high;
}

// One block: the range of all.
template <class T>
OTKD_KERNEL(kOnceThreads) shared_summary(OTKD_CONSTANT SharedBatch<T> all) {
    double* scratch = reinterpret_cast<double*>(shared_memory());
    double low = -kInfinity, high = -kInfinity;
    for (int64_t k = thread_id(); k < all.range_blocks; k += kOnceThreads) {
        low = larger(low, all.ranges[2 * k]);
        high = larger(high, all.ranges[2 * k + 1]);
    }
    low = block_max(low, scratch);
    high = block_max(high, scratch);
    if (thread_id() != 0) return;
    all.range[0] = -low;
    all.range[1] = high;
}

// A tile of 32 x 32 of the matrices, both ways round.
template <class T>
OTKD_KERNEL(kOnceThreads) shared_matrices(OTKD_CONSTANT SharedBatch<T> all) {
    T *kernel = reinterpret_cast<T*>(shared_memory()), *moved = kernel + kMatrixTile * kMatrixLine;
    const int64_t n = all.batch.args.n, m = all.batch.args.m;
    const uint32_t tiles = static_cast<uint32_t>((m + kMatrixTile - 1) / kMatrixTile), block = static_cast<uint32_t>(block_id());
    const int64_t i0 = block / tiles * int64_t{kMatrixTile}, j0 = block % tiles * int64_t{kMatrixTile};
    const T low = static_cast<T>(all.range[0]), inverse = static_cast<T>(1 / all.batch.args.epsilon);
    for (int e = thread_id(); e < kMatrixTile * kMatrixTile; e += kOnceThreads) {
        const int r = e / kMatrixTile, c = e % kMatrixTile;
        const int64_t i = i0 + r, j = j0 + c;
        if (i >= n || j >= m) continue;
        const T above = all.batch.args.cost[i * m + j] - low, k = exp_of(-above * inverse), product = k != 0 ? k * above : T(0);
        all.kernel[i * m + j] = kernel[r * kMatrixLine + c] = k;
        all.moved[i * m + j] = moved[r * kMatrixLine + c] = product;
    }
    barrier();
    for (int e = thread_id(); e < kMatrixTile * kMatrixTile; e += kOnceThreads) {
        const int c = e / kMatrixTile, r = e % kMatrixTile;
        const int64_t i = i0 + r, j = j0 + c;
        if (i >= n || j >= m) continue;
        all.kernel_t[j * n + i] = kernel[r * kMatrixLine + c];
        if (all.moved_t) all.moved_t[j * n + i] = moved[r * kMatrixLine + c];
    }
}

enum class Turn : int { begin, finish, marginals };

// The scalings to start from, and, forward, whether scalings do. One block.
template <class T>
OTKD_DEVICE void begin_shared(const SharedBatch<T>& all, const Problem<T>& p, double* scratch) {
    for (int64_t j = thread_id(); j < p.m; j += block_threads()) {
        all.v[p.index * p.m + j] = p.mass_b(j) > 0 ? static_cast<T>(exp(p.start_gamma(j))) : T(0);
    }
    if (!all.left) return;
    const double range = all.range[1] - all.range[0], reach = range / p.args.epsilon + given_range(p, scratch);
    if (thread_id() == 0) all.left[p.index] = !(range >= 0 && reach <= Limits<T>::kRange);
}

// Outputs and history of a problem that was solved on scalings. One block.
template <class T>
OTKD_DEVICE void finish_shared(const SharedBatch<T>& all, const Problem<T>& p, double* scratch) {
    if (all.left[p.index]) return;
    const int64_t ran = p.args.num_iters;
    const Vectors<T> u = forward_u(all, ran - 1), v = forward_v(all, ran - 1);
    const double shift = all.range[0] / p.args.epsilon;
    double moved = 0;
    for (int64_t i = thread_id(); i < p.n; i += block_threads()) {
        p.phi()[i] = log(static_cast<double>(u.at(p.index, i))) + shift;
        moved += p.row_moved()[i];
    }
    for (int64_t j = thread_id(); j < p.m; j += block_threads()) p.gamma()[j] = log(static_cast<double>(v.at(p.index, j)));
    barrier();
    SideSums rows, columns;
    log_sides(p, true, rows, columns, scratch);
    write_scalars(p, rows, columns, block_sum(moved, scratch), ran);
    close_history<T>(p, Method::scaling_float, ran);
    if (!p.history() || all.keeps_all()) return;
    const int64_t slot = p.last_slot(ran);
    for (int64_t i = thread_id(); i < p.n; i += block_threads()) p.template kept_u<T>(slot)[i] = u.at(p.index, i);
    for (int64_t j = thread_id(); j < p.m; j += block_threads()) p.template kept_v<T>(slot)[j] = v.at(p.index, j);
}

template <class T>
OTKD_DEVICE void shared_marginals(const SharedBatch<T>& all, const Problem<T>& p, double* scratch) {
    if (p.history()[0] == static_cast<int>(Method::log)) return;
    const Kept<T> kept(all);
    const bool through = all.batch.steps > 0;
    const double of_dual = p.incoming(p.args.grad_regularized_cost), shift = all.range[0] / p.args.epsilon;
    const double of_low = through ? p.incoming(p.args.grad_transport_cost) * all.range[0] : 0.0;  // <P, C> = <P, C - low> + low sum(b)
    double mass_a = 0, mass_b = 0;
    for (int64_t i = thread_id(); i < p.n; i += block_threads()) mass_a += p.mass_a(i);
    for (int64_t j = thread_id(); j < p.m; j += block_threads()) mass_b += p.mass_b(j);
    mass_a = block_sum(mass_a, scratch);
    mass_b = block_sum(mass_b, scratch);
    for (int64_t i = thread_id(); p.args.grad_a && i < p.n; i += block_threads()) {
        const double own = p.mass_a(i), phi = log(static_cast<double>(kept.u(kept.last).at(p.index, i))) + shift;
        p.args.grad_a[p.index * p.n + i] =
            marginal_gradient<T>(own, phi, through ? p.sum_phi()[i] / own : 0.0, p.penalty_a(), of_dual, mass_b);
    }
    for (int64_t j = thread_id(); p.args.grad_b && j < p.m; j += block_threads()) {
        const double own = p.mass_b(j), gamma = log(static_cast<double>(kept.v(kept.last).at(p.index, j)));
        const double by_mass = (through ? p.sum_gamma()[j] / own : 0.0) + of_low;
        p.args.grad_b[p.index * p.m + j] = marginal_gradient<T>(own, gamma, by_mass, p.penalty_b(), of_dual, mass_a);
    }
}

template <class T>
OTKD_KERNEL(kOnceThreads) shared_turn(OTKD_CONSTANT SharedBatch<T> all, Turn turn) {
    double* scratch = reinterpret_cast<double*>(shared_memory());
    const Problem<T> p(all.batch, block_id(), all.batch.args.cost, nullptr);
    if (turn == Turn::begin) begin_shared(all, p, scratch);
    if (turn == Turn::finish) finish_shared(all, p, scratch);
    if (turn == Turn::marginals) shared_marginals(all, p, scratch);
}

// Problems that are left: all iterations, or the adjoints and the gradients of the masses, by a block each.
template <class T>
OTKD_KERNEL(kOnceThreads) shared_left(OTKD_CONSTANT SharedBatch<T> all, bool backward) {
    const int64_t index = block_id();
    double* shared = reinterpret_cast<double*>(shared_memory());
    if (!backward) {
        if (all.left[index]) log_solve(all.batch, index, all.batch.args.cost, shared);
        return;
    }
    const Problem<T> p(all.batch, index, all.batch.args.cost, nullptr);
    if (p.history()[0] == static_cast<int>(Method::log)) log_backward<T>(all.batch, index, all.batch.args.cost, nullptr, shared);
}

// Their part of the cost's gradient, an entry a thread, added up in the order of the problems.
template <class T>
OTKD_KERNEL(kOnceThreads) shared_left_cost(OTKD_CONSTANT SharedBatch<T> all) {
    const SinkhornArgs<T>& args = all.batch.args;
    bool any = false;
    for (int64_t b = thread_id(); b < args.batch; b += kOnceThreads) {
        any |= args.history[b * all.batch.history_stride] == static_cast<int>(Method::log);
    }
    if (!barrier_any(any)) return;
    const int64_t at = block_id() * kOnceThreads + thread_id();
    if (at >= args.n * args.m) return;
    double total = 0;
    for (int64_t b = 0; b < args.batch; ++b) {
        const Problem<T> p(all.batch, b, args.cost, nullptr);
        if (p.history()[0] != static_cast<int>(Method::log)) continue;
        total += cost_gradient_entry(Trace<T>(p), p.incoming(args.grad_transport_cost), p.incoming(args.grad_regularized_cost), at / args.m,
                                     at % args.m);
    }
    args.grad_cost[at] += static_cast<T>(total);
}

// Vector number q of the sum over problems and steps, an entry of each side: (u_k, w_k), (z_k, v before k) for all k, then the plan's
// (u, v) times eps (d_transport + d_dual); or, `slope`, only the plan's times d_transport.
template <class T>
OTKD_DEVICE T pair_entry(const SharedBatch<T>& all, const Kept<T>& kept, bool slope, int64_t q, bool of_rows, int64_t i) {
    const SinkhornArgs<T>& args = all.batch.args;
    const uint32_t pairs = slope ? 1u : static_cast<uint32_t>(2 * all.batch.steps + 1);
    const uint32_t b = static_cast<uint32_t>(q) / pairs, s = static_cast<uint32_t>(q) % pairs, k = s / 2;
    if (args.history[b * all.batch.history_stride] == static_cast<int>(Method::log)) return T(0);
    if (s + 1 < pairs) {
        if (s % 2 == 0) return of_rows ? kept.u_of(k).at(b, i) : kept.w(k).at(b, i);
        return of_rows ? kept.z(k).at(b, i) : kept.before(k).at(b, i);
    }
    if (!of_rows) return kept.v(kept.last).at(b, i);
    const double transport = args.grad_transport_cost ? static_cast<double>(args.grad_transport_cost[b]) : 0.0;
    const double dual = args.grad_regularized_cost ? static_cast<double>(args.grad_regularized_cost[b]) : 0.0;
    return kept.u(kept.last).at(b, i) * static_cast<T>(slope ? transport : args.epsilon * (transport + dual));
}

template <class T>
OTKD_DEVICE void pair_sums(const SharedBatch<T>& all, const Kept<T>& kept, bool slope, int64_t i0, int64_t j0, T* shared, T (&total)[4][4]) {
    const SinkhornArgs<T>& args = all.batch.args;
    T *own_rows = shared, *other_rows = shared + kFeatures * kOwnLine;
    T part[4][4] = {};
    OTKD_UNROLL
    for (int r = 0; r < 4; ++r) {
        OTKD_UNROLL
        for (int c = 0; c < 4; ++c) total[r][c] = 0;
    }
    const int64_t depth = args.batch * (slope ? 1 : 2 * all.batch.steps + 1);
    for (int64_t q0 = 0; q0 < depth; q0 += kFeatures) {
        OTKD_ROLLED
        for (int e = thread_id(); e < (kOwn + kOther) * kFeatures; e += kPointThreads) {
            const bool of_rows = e < kOwn * kFeatures;
            const int at = of_rows ? e : e - kOwn * kFeatures, width = of_rows ? kOwn : kOther, k = at / width, r = at % width;
            const int64_t i = (of_rows ? i0 : j0) + r;
            const bool inside = i < (of_rows ? args.n : args.m) && q0 + k < depth;
            (of_rows ? own_rows[k * kOwnLine + r] : other_rows[k * kOtherLine + r]) =
                inside ? pair_entry(all, kept, slope, q0 + k, of_rows, i) : T(0);
        }
        barrier();
        OTKD_UNROLL_4
        for (int k = 0; k < kFeatures; ++k) {
            const Four<T> x = four(own_rows + k * kOwnLine + own_of_thread()), y = four(other_rows + k * kOtherLine + other_of_thread());
            OTKD_UNROLL
            for (int r = 0; r < 4; ++r) {
                OTKD_UNROLL
                for (int c = 0; c < 4; ++c) part[r][c] += x.v[r] * y.v[c];
            }
        }
        barrier();
        if (q0 % kSumDepth != kSumDepth - kFeatures && q0 + kFeatures < depth) continue;
        OTKD_UNROLL
        for (int r = 0; r < 4; ++r) {
            OTKD_UNROLL
            for (int c = 0; c < 4; ++c) {
                total[r][c] += part[r][c];
                part[r][c] = 0;
            }
        }
    }
}

template <class T>
OTKD_KERNEL(kPointThreads, 2) shared_cost_gradient(OTKD_CONSTANT SharedBatch<T> all) {
    const SinkhornArgs<T>& args = all.batch.args;
    const uint32_t tiles = static_cast<uint32_t>((args.m + kOther - 1) / kOther), block = static_cast<uint32_t>(block_id());
    const int64_t i0 = block / tiles * int64_t{kOwn}, j0 = block % tiles * int64_t{kOther};
    const Kept<T> kept(all);
    T* shared = reinterpret_cast<T*>(shared_memory());
    T sums[4][4], slopes[4][4] = {};
    pair_sums(all, kept, false, i0, j0, shared, sums);
    if (all.batch.steps > 0 && args.grad_transport_cost) pair_sums(all, kept, true, i0, j0, shared, slopes);
    const T inverse = static_cast<T>(1 / args.epsilon);
    OTKD_UNROLL
    for (int r = 0; r < 4; ++r) {
        OTKD_UNROLL
        for (int c = 0; c < 4; ++c) {
            const int64_t i = i0 + own_of_thread() + r, j = j0 + other_of_thread() + c, at = i * args.m + j;
            if (i >= args.n || j >= args.m) continue;
            const T k = all.kernel[at], moved = all.moved[at];
            args.grad_cost[at] = k > 0 ? (k * sums[r][c] - moved * slopes[r][c]) * inverse : T(0);
        }
    }
}

// The workspace laid out, negative: these kernels do not serve; with a null one the pointers mean nothing.
template <class T>
SharedBatch<T> make_shared(const SinkhornArgs<T>& args, bool backward, int64_t& bytes) {
    SharedBatch<T> all{};
    const bool tile = sizeof(T) == sizeof(float) ? Wide::fits(args.n, args.m) : Middle<T>::fits(args.n, args.m);
    const bool plain = args.tol == 0 && args.relaxation == 1 && args.penalty_a == kInfinity && args.penalty_b == kInfinity;
    bytes = -1;
    if (tile || !plain || args.batch < kFewestProblems || args.num_iters < 1) return all;
    all.batch = make_batch(args, true, backward);
    const int64_t n = args.n, m = args.m, entries = n * m;
    all.longest = larger(n, m);
    all.range_blocks = smaller(kMostRangeBlocks, ceil_div(entries, kEntriesOfABlock));
    auto cut = [&](int64_t outputs, int64_t depth, int64_t& a_piece, int64_t& pieces) {
        const int64_t blocks = ceil_div(args.batch, kOwn) * ceil_div(outputs, kOther);
        const int64_t wanted = smaller(ceil_div(kWantedPieces, blocks), ceil_div(depth, kLeastDepth));
        a_piece = round_up(ceil_div(depth, wanted), kFeatures);
        pieces = ceil_div(depth, a_piece);
    };
    cut(n, m, all.row_depth, all.row_pieces);
    cut(m, n, all.column_depth, all.column_pieces);
    int64_t used = 0;
    auto take = [&](int64_t size) {
        unsigned char* piece = args.workspace ? args.workspace + used : nullptr;
        used += round_up(size, 64);
        return piece;
    };
    constexpr int64_t size = sizeof(T);
    take(args.batch * all.batch.workspace_stride * 8);
    all.range = reinterpret_cast<double*>(take(16));
    all.ranges = reinterpret_cast<double*>(take(16 * all.range_blocks));
    all.left = backward ? nullptr : reinterpret_cast<int*>(take(args.batch * 4));
    all.kernel = reinterpret_cast<T*>(take(entries * size));
    all.kernel_t = reinterpret_cast<T*>(take(entries * size));
    all.moved = reinterpret_cast<T*>(take(entries * size));
    all.moved_t = backward ? reinterpret_cast<T*>(take(entries * size)) : nullptr;
    all.u = backward ? nullptr : reinterpret_cast<T*>(take(args.batch * n * size));
    all.v = reinterpret_cast<T*>(take(args.batch * m * size));
    all.partial = reinterpret_cast<T*>(take(larger(all.row_pieces, all.column_pieces) * args.batch * all.longest * size));
    bytes = used;
    return all;
}

template <class T>
struct SharedLaunches {
    const SharedBatch<T>& all;
    const Target& target;
    static constexpr int64_t kScratchBytes = 64 * int64_t{sizeof(double)};

    void matrices() const {
        const SinkhornArgs<T>& args = all.batch.args;
        launch("shared_range", shared_range<T>, all.range_blocks, kOnceThreads, kScratchBytes, target, all);
        launch("shared_summary", shared_summary<T>, 1, kOnceThreads, kScratchBytes, target, all);
        launch("shared_matrices", shared_matrices<T>, ceil_div(args.n, kMatrixTile) * ceil_div(args.m, kMatrixTile), kOnceThreads,
               2 * kMatrixTile * kMatrixLine * int64_t{sizeof(T)}, target, all);
        turn(Turn::begin);
    }
    void turn(Turn what) const {
        launch("shared_turn", shared_turn<T>, all.batch.args.batch, kOnceThreads, kScratchBytes, target, all, what);
    }
    void product(Product what, int64_t k) const {
        const SinkhornArgs<T>& args = all.batch.args;
        const int64_t count = over_rows(what) ? args.m : args.n, pieces = over_rows(what) ? all.column_pieces : all.row_pieces;
        launch("shared_product", shared_product<T>, ceil_div(args.batch, kOwn) * ceil_div(count, kOther) * pieces, kPointThreads,
               kStageValues * int64_t{sizeof(T)}, target, all, what, k);
        launch("shared_join", shared_join<T>, args.batch * ceil_div(count, kOnceThreads), kOnceThreads, 0, target, all, what, k);
    }
    void left(bool backward) const {
        launch("shared_left", shared_left<T>, all.batch.args.batch, kOnceThreads, log_shared_bytes(kOnceThreads), target, all, backward);
    }
    void cost_gradient() const {
        const SinkhornArgs<T>& args = all.batch.args;
        launch("shared_cost_gradient", shared_cost_gradient<T>, ceil_div(args.n, kOwn) * ceil_div(args.m, kOther), kPointThreads,
               kStageValues * int64_t{sizeof(T)}, target, all);
        launch("shared_left_cost", shared_left_cost<T>, ceil_div(args.n * args.m, kOnceThreads), kOnceThreads, 0, target, all);
    }
};

}  // namespace

template <class T>
int64_t sinkhorn_shared_workspace_bytes(const SinkhornArgs<T>& args, bool backward) {
    int64_t bytes;
    make_shared(args, backward, bytes);
    return bytes;
}

template <class T>
void sinkhorn_shared_fwd(const SinkhornArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    int64_t bytes;
    const SharedBatch<T> all = make_shared(args, false, bytes);
    const SharedLaunches<T> launches{all, target};
    launches.matrices();
    for (int64_t k = 0; k < args.num_iters; ++k) {
        launches.product(Product::rows, k);
        launches.product(Product::columns, k);
    }
    launches.product(Product::mass_rows, args.num_iters - 1);
    launches.product(Product::moved_rows, args.num_iters - 1);
    launches.turn(Turn::finish);
    launches.left(false);
}

template <class T>
void sinkhorn_shared_bwd(const SinkhornArgs<T>& args, const Target& target) {
    const DeviceGuard guard(target);
    int64_t bytes;
    const SharedBatch<T> all = make_shared(args, true, bytes);
    const SharedLaunches<T> launches{all, target};
    launches.matrices();
    if (all.batch.steps > 0) {
        launches.product(Product::first_moved, 0);
        launches.product(Product::first_mass, 0);
        launches.product(Product::first_columns, 0);
    }
    for (int64_t k = all.batch.steps - 1; k >= 0; --k) {
        launches.product(Product::adjoint_rows, k);
        if (k > 0) launches.product(Product::adjoint_columns, k);
    }
    launches.turn(Turn::marginals);
    launches.left(true);
    if (args.grad_cost) launches.cost_gradient();
}

#define OTKD_INSTANTIATE(T)                                                        \
    template int64_t sinkhorn_shared_workspace_bytes(const SinkhornArgs<T>&, bool); \
    template void sinkhorn_shared_fwd(const SinkhornArgs<T>&, const Target&);       \
    template void sinkhorn_shared_bwd(const SinkhornArgs<T>&, const Target&);
OTKD_INSTANTIATE(float)
OTKD_INSTANTIATE(double)
#undef OTKD_INSTANTIATE

}  // namespace cuda
}  // namespace otkd_fast

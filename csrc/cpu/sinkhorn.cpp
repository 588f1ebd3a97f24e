// Sinkhorn iterations on a dense cost, forward and backward (reference/sinkhorn.py).
//
//   f_i = eps log a_i - eps LSE_j((g_j - C_ij) / eps),   g_j = eps log b_j - eps LSE_i((f_i - C_ij) / eps),   T times
//
// How one problem is solved depends on the range of its exponents, (max C - min C) / eps plus the log range of the
// marginals: up to 60 on float scalings, up to 600 on double scalings, beyond that in the log domain in double.
// Sums that leave the safe range on the way move the problem on to the next method. All three give the result of
// the log-domain loop to rounding (sinkhorn_solver.h chooses). Batches run a problem a thread; a single large problem is
// shared by the threads, and of many small ones each takes a lane of the vectors (sinkhorn_ragged.cpp).
#include "otkd_fast/sinkhorn.h"

#include "sinkhorn_places.h"
#include "sinkhorn_solver.h"

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

template <class T>
void run(const SinkhornArgs<T>& args, bool backward) {
    args.together ? solve_many(args, backward) : run_solver<Stored, T>(args, backward);
}

template <class T>
int64_t workspace_bytes(const SinkhornArgs<T>& args, bool backward) {
    return args.together ? solve_many_bytes(args, backward) : solver_workspace_bytes<Stored, T>(args, backward);
}

}  // namespace

void sinkhorn_fwd(const SinkhornArgs<float>& args) { run(args, false); }
void sinkhorn_fwd(const SinkhornArgs<double>& args) { run(args, false); }
void sinkhorn_bwd(const SinkhornArgs<float>& args) { run(args, true); }
void sinkhorn_bwd(const SinkhornArgs<double>& args) { run(args, true); }
int64_t sinkhorn_workspace_bytes(const SinkhornArgs<float>& args, bool backward) { return workspace_bytes(args, backward); }
int64_t sinkhorn_workspace_bytes(const SinkhornArgs<double>& args, bool backward) { return workspace_bytes(args, backward); }

void solve_one(const SinkhornArgs<float>& one, bool backward, int threads, const Team& team, unsigned char* memory) {
    Solver<Stored, float>{one, backward, threads}.run(0, team, memory);
}
void solve_one(const SinkhornArgs<double>& one, bool backward, int threads, const Team& team, unsigned char* memory) {
    Solver<Stored, double>{one, backward, threads}.run(0, team, memory);
}
int64_t solve_one_bytes(const SinkhornArgs<float>& one, bool backward, int threads) {
    return Solver<Stored, float>{one, backward, threads}.bytes_a_problem();
}
int64_t solve_one_bytes(const SinkhornArgs<double>& one, bool backward, int threads) {
    return Solver<Stored, double>{one, backward, threads}.bytes_a_problem();
}

}  // namespace OTKD_ISA
}  // namespace otkd_fast

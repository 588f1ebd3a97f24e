// Sinkhorn iterations on a dense cost, forward and backward (reference/sinkhorn.py).
//
//   f_i = eps log a_i - eps LSE_j((g_j - C_ij) / eps),   g_j = eps log b_j - eps LSE_i((f_i - C_ij) / eps),   T times
//
// How one problem is solved depends on the range of its exponents, (max C - min C) / eps plus the log range of the
// marginals: up to 60 on float scalings, up to 600 on double scalings, beyond that in the log domain in double.
// Sums that leave the safe range on the way move the problem on to the next method. All three give the result of
// the log-domain loop to rounding (sinkhorn_solver.h chooses). Batches run a problem a thread; a single large problem is
// shared by the threads.
#include "otkd_fast/sinkhorn.h"

#include "sinkhorn_solver.h"

namespace otkd_fast {
namespace OTKD_ISA {

void sinkhorn_fwd(const SinkhornArgs<float>& args) { run_solver<Stored, float>(args, false); }
void sinkhorn_fwd(const SinkhornArgs<double>& args) { run_solver<Stored, double>(args, false); }
void sinkhorn_bwd(const SinkhornArgs<float>& args) { run_solver<Stored, float>(args, true); }
void sinkhorn_bwd(const SinkhornArgs<double>& args) { run_solver<Stored, double>(args, true); }
int64_t sinkhorn_workspace_bytes(const SinkhornArgs<float>& args, bool backward) {
    return solver_workspace_bytes<Stored, float>(args, backward);
}
int64_t sinkhorn_workspace_bytes(const SinkhornArgs<double>& args, bool backward) {
    return solver_workspace_bytes<Stored, double>(args, backward);
}

}  // namespace OTKD_ISA
}  // namespace otkd_fast

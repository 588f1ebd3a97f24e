// Which instruction set runs: the widest that this processor has, unless a test names another.
#pragma once
#include <string>
#include <vector>

#include "otkd_fast/cost_matrix.h"
#include "otkd_fast/sinkhorn.h"

namespace otkd_fast {

struct Kernels {
    const char* name;
    void (*cost_matrix_fwd_float)(const CostMatrixArgs<float>&);
    void (*cost_matrix_fwd_double)(const CostMatrixArgs<double>&);
    void (*cost_matrix_bwd_float)(const CostMatrixArgs<float>&);
    void (*cost_matrix_bwd_double)(const CostMatrixArgs<double>&);
    void (*sinkhorn_fwd_float)(const SinkhornArgs<float>&);
    void (*sinkhorn_fwd_double)(const SinkhornArgs<double>&);
    void (*sinkhorn_bwd_float)(const SinkhornArgs<float>&);
    void (*sinkhorn_bwd_double)(const SinkhornArgs<double>&);
    int64_t (*sinkhorn_bytes_float)(const SinkhornArgs<float>&, bool);
    int64_t (*sinkhorn_bytes_double)(const SinkhornArgs<double>&, bool);
};

const Kernels& kernels();                          // the set in use
std::vector<std::string> instruction_sets();       // the sets that this processor can run, narrowest first
bool set_instruction_set(const std::string& name); // false: not one of instruction_sets()

}  // namespace otkd_fast

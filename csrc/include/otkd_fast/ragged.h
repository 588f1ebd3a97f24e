// Problems of different sizes packed one after the other, on the CPU: what they need besides a solver. Offsets (problems + 1,)
// of rows and of columns start at 0 and do not decrease.
#pragma once
#include <cstdint>

#include "otkd_fast/cost_matrix.h"

namespace otkd_fast {

// std::invalid_argument, naming the argument, for offsets that do not fit the sizes of the packed tensors.
void check_ragged(const int64_t* row_offsets, const int64_t* column_offsets, int64_t problems, int64_t rows, int64_t columns,
                  int64_t entries);

// out: the matrices (n_k, m_k) of `in`, each as (m_k, n_k).
template <class T>
void transpose_ragged(const T* in, T* out, const int64_t* row_offsets, const int64_t* column_offsets, int64_t problems);

// Cost matrices of each problem's points, and the gradient: of the base, x is (N, d), y (M, d), cost and grad_cost (E,),
// batch the number of problems; n, m and the strides are not used.
template <class T>
struct CostMatrixRaggedArgs : CostMatrixArgs<T> {
    const int64_t* row_offsets;
    const int64_t* column_offsets;
};

template <class T>
int64_t cost_matrix_ragged_workspace(const CostMatrixRaggedArgs<T>& args, bool backward);  // elements
template <class T>
void cost_matrix_ragged(const CostMatrixRaggedArgs<T>& args, bool backward);

}  // namespace otkd_fast

// Products of a batch of matrices of any size (matrix_product.cu), for the other CUDA files.
#pragma once
#include "otkd_fast/cuda.h"

namespace otkd_fast {
namespace cuda {

// out = alpha 2^e A B + beta 2^f C + diagonal I + a row for each problem. Strides in elements; out and C are contiguous.
template <class T>
struct ProductArgs {
    const T *a, *b;  // (batch, n, k), (batch, k, m), by strides
    T* out;          // (batch, n, m)
    int64_t batch, n, m, k;
    int64_t a_batch, a_row, a_depth, b_batch, b_depth, b_column;
    const T* c = nullptr;  // (batch, n, m)
    double alpha = 1, beta = 0, diagonal = 0;
    const T* row = nullptr;  // (batch, m)
    const int* exponents = nullptr;  // (batch, 2): e and f are the entries number `of_sum` and `of_c`; null: both 0
    int of_sum = 0, of_c = 0;
    const int* steps = nullptr;  // (batch,): a problem is left alone where this is not above `step`
    int step = 0;
};

template <class T>
void matrix_product(const ProductArgs<T>& args, const Target& target);

}  // namespace cuda
}  // namespace otkd_fast

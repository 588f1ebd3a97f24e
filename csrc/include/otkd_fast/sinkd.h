// SinKD in one call: softmax, L1 cost, Sinkhorn rows first, <P, C>, and its gradient while everything is at hand.
#pragma once
#include <cstdint>

namespace otkd_fast {

template <class T>
struct SinkdArgs {
    const T* rows;             // (batch, n, d)
    const T* columns;          // (batch, m, d)
    const T* weights_rows;     // (batch, n) or null: uniform
    const T* weights_columns;  // (batch, m) or null: uniform
    unsigned char* workspace;  // sinkd_workspace_bytes bytes, 64-byte aligned
    int64_t batch, n, m, d, num_iters;
    double temperature_rows, temperature_columns;  // 0: rows as they are
    double epsilon;
    double scale;       // of the value and the gradients
    int threads;
    T* transport_cost;  // (batch,)
    T* grad_rows;       // (batch, n, d) or null
    T* grad_columns;    // (batch, m, d) or null
};

template <class T>
int64_t sinkd_workspace_bytes(const SinkdArgs<T>& args);
template <class T>
void sinkd_value_and_grad(const SinkdArgs<T>& args);

}  // namespace otkd_fast

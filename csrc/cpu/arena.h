// Pieces of a workspace.
#pragma once
#include <cstdint>

namespace otkd_fast {
namespace OTKD_ISA {
namespace {

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Hands out 64-byte aligned pieces of the workspace; with a null base it only counts.
struct Arena {
    unsigned char* base;
    int64_t used = 0;
    template <class S>
    S* take(int64_t count) {
        S* piece = base ? reinterpret_cast<S*>(base + used) : nullptr;
        used += round_up(count * static_cast<int64_t>(sizeof(S)), 64);
        return piece;
    }
};

}  // namespace
}  // namespace OTKD_ISA
}  // namespace otkd_fast

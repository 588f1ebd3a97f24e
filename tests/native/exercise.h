// What the programs share that run the CPU kernels under sanitizers (test_sanitizers.py): forward and backward, with
// workspaces of exactly the size that the core asks for. The arguments of a program are instruction sets.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "otkd_fast/dispatch.h"

using namespace otkd_fast;

constexpr double kNone = std::numeric_limits<double>::infinity();

// 64-byte aligned memory of exactly `bytes`, so that a sanitizer sees the first one beyond.
struct Workspace {
    void* memory = nullptr;
    explicit Workspace(int64_t bytes) {
        if (posix_memalign(&memory, 64, bytes > 0 ? bytes : 1)) std::abort();
    }
    ~Workspace() { std::free(memory); }
    Workspace(const Workspace&) = delete;
    unsigned char* bytes() const { return static_cast<unsigned char*>(memory); }
};

template <class T>
std::vector<T> uniform(int64_t count) {
    std::vector<T> values(count);
    for (T& value : values) value = std::rand() / static_cast<T>(RAND_MAX);
    return values;
}

// (batch, n) masses of total 1; `holes`: every third is 0 (but the first).
template <class T>
std::vector<T> masses(int64_t batch, int64_t n, bool holes = false) {
    std::vector<T> values(batch * n);
    for (int64_t b = 0; b < batch; ++b) {
        T total = 0;
        for (int64_t i = 0; i < n; ++i) {
            const T own = T(1) + std::rand() / static_cast<T>(RAND_MAX);
            total += values[b * n + i] = holes && i % 3 == 2 ? T(0) : own;
        }
        for (int64_t i = 0; i < n; ++i) values[b * n + i] /= total;
    }
    return values;
}

struct Shape {
    int64_t batch, n, m, d;
};

template <class T>
void check_finite(const std::vector<T>& values, const char* what) {
    for (T value : values) {
        if (!std::isfinite(value)) {
            std::printf("%s: not finite\n", what);
            std::exit(1);
        }
    }
}

inline Keep kept_for(Gradient gradient) {
    return gradient == Gradient::unroll ? Keep::all : gradient == Gradient::last_step ? Keep::last_step : Keep::last;
}

// body(threads) for each instruction set that is named and that this processor has.
template <class Body>
int each_set(int count, char** names, const Body& body) {
    const std::vector<std::string> usable = instruction_sets();
    for (int k = 1; k < count; ++k) {
        bool found = false;
        for (const std::string& set : usable) found |= set == names[k];
        if (!found) continue;
        set_instruction_set(names[k]);
        for (int threads : {1, 3}) body(threads);
        std::printf("%s ok\n", names[k]);
    }
    return 0;
}

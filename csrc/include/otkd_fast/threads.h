// Threads for one call. The team is the host program's own OpenMP pool when one is loaded (PyTorch's),
// found at run time through the ABI that libgomp, libomp and libiomp5 share, else plain std::thread:
// the module links no OpenMP runtime, so a process never ends up with two pools that fight for the cores.
#pragma once
#include <atomic>
#include <cstdint>

namespace otkd_fast {

// The threads that run one call together. `size` is what was really given, at most what was asked for.
struct Team {
    int rank;
    int size;
    struct Shared {
        std::atomic<int> waiting{0};
        std::atomic<int> generation{0};
    }* shared;

    // All threads of the team meet here; memory written before is visible after.
    void barrier() const;
};

using TeamFunction = void (*)(void* data, const Team& team);

// Runs `function` on up to `threads` threads at once and returns when all are done.
void run_team(int threads, TeamFunction function, void* data);

template <class Body>
void parallel(int threads, Body&& body) {
    run_team(
        threads, [](void* data, const Team& team) { (*static_cast<Body*>(data))(team); }, &body);
}

// Splits [0, count) into `parts` nearly equal ranges, each but the last a multiple of `grain`.
inline void split(int64_t count, int64_t grain, int parts, int rank, int64_t& begin, int64_t& end) {
    const int64_t groups = (count + grain - 1) / grain;
    begin = groups * rank / parts * grain;
    end = groups * (rank + 1) / parts * grain;
    if (begin > count) begin = count;
    if (end > count) end = count;
}

// "openmp: <library>" or "std::thread": where the threads come from, for diagnostics.
const char* thread_source();

}  // namespace otkd_fast

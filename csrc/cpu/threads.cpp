#include "otkd_fast/threads.h"

#include <string>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#define OTKD_FAST_HAS_DLSYM 1
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace otkd_fast {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using GetInt = int (*)();

struct OpenMP {
    GompParallel parallel = nullptr;
    GetInt thread_num = nullptr;
    GetInt num_threads = nullptr;
    std::string name = "std::thread";
};

OpenMP find_openmp() {
    OpenMP found;
#ifdef OTKD_FAST_HAS_DLSYM
    void* symbols[3] = {dlsym(RTLD_DEFAULT, "GOMP_parallel"), dlsym(RTLD_DEFAULT, "omp_get_thread_num"),
                        dlsym(RTLD_DEFAULT, "omp_get_num_threads")};
    Dl_info info[3];
    for (int i = 0; i < 3; ++i) {
        if (!symbols[i] || !dladdr(symbols[i], &info[i])) return found;
        if (info[i].dli_fbase != info[0].dli_fbase) return found;  // two runtimes: their threads would not match
    }
    found.parallel = reinterpret_cast<GompParallel>(symbols[0]);
    found.thread_num = reinterpret_cast<GetInt>(symbols[1]);
    found.num_threads = reinterpret_cast<GetInt>(symbols[2]);
    const std::string path = info[0].dli_fname ? info[0].dli_fname : "?";
    found.name = "openmp: " + path.substr(path.find_last_of('/') + 1);
#endif
    return found;
}

const OpenMP& openmp() {
    static const OpenMP found = find_openmp();
    return found;
}

struct Call {
    TeamFunction function;
    void* data;
    Team::Shared shared;
};

void openmp_entry(void* pointer) {
    Call& call = *static_cast<Call*>(pointer);
    call.function(call.data, Team{openmp().thread_num(), openmp().num_threads(), &call.shared});
}

}  // namespace

void Team::barrier() const {
    if (size == 1) return;
    const int generation = shared->generation.load(std::memory_order_relaxed);
    if (shared->waiting.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
        shared->waiting.store(0, std::memory_order_relaxed);
        shared->generation.store(generation + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; shared->generation.load(std::memory_order_acquire) == generation; ++spins) {
        if (spins > 2000) {
            std::this_thread::yield();  // more threads than cores: let the one we wait for run
            continue;
        }
#if defined(__x86_64__)
        _mm_pause();
#endif
    }
}

void run_team(int threads, TeamFunction function, void* data) {
    Call call{function, data, {}};
    if (threads <= 1) {
        function(data, Team{0, 1, &call.shared});
        return;
    }
    if (openmp().parallel) {
        openmp().parallel(openmp_entry, &call, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    for (int rank = 1; rank < threads; ++rank) {
        others.emplace_back([&, rank] { function(data, Team{rank, threads, &call.shared}); });
    }
    function(data, Team{0, threads, &call.shared});
    for (std::thread& other : others) other.join();
}

const char* thread_source() { return openmp().name.c_str(); }

}  // namespace otkd_fast

// Runs the CUDA sources on the host, for tests: csrc/cuda/runtime.h includes this file in place of the CUDA runtime.
//
// The threads of a block are fibers: one runs until it waits at a barrier or a shuffle, then the scheduler picks
// another, in rising, falling or random order (set_order). Blocks run one after the other, in that order too, but those of
// a cluster at once, their threads mixed. A result that depends on the order is a race. Shared memory starts as NaN for
// each block, has guard bands, and is an allocation of its own, so that AddressSanitizer sees its ends; it is NaN again
// when the block has ended, for the others of its cluster. It is an error if a thread waits for ever (others have left,
// or wait elsewhere), and if one asks for the memory of a block that has not begun, or has ended. It emulates semantics,
// not speed.
#pragma once
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define OTKD_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define OTKD_ASAN 1
#endif
#endif
#ifdef OTKD_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include "fibers.h"

#define OTKD_KERNEL(...) inline void
#define OTKD_ROLLED
#define OTKD_DEVICE inline
#define OTKD_BOTH inline
#define OTKD_CALL inline
#define OTKD_CONSTANT const
#define OTKD_UNROLL
#define OTKD_UNROLL_4
#define OTKD_CLUSTERS 1

namespace otkd_fast {
namespace cuda {
namespace emulator {

constexpr size_t kGuardBytes = 256;
constexpr unsigned char kGuard = 0xA5, kPoison = 0xFF;

// A place where threads meet: the 32 lanes of a warp, a block, or a cluster.
struct Meeting {
    std::vector<int> waiting;
    const char* what = nullptr;
};

struct Thread {
    Context context;
    std::unique_ptr<unsigned char[]> stack;
    void* fake_stack = nullptr;
    Meeting* at = nullptr;
    bool done = false, arrived = false;
    int barrier_turn = 0;
};

struct Warp {
    Meeting meeting;
    uint64_t slot[2][32];  // of this shuffle and the one before, which slower lanes may still read
    int turn[32];          // which of the two each lane writes next
};

struct Block {
    int64_t id = 0;
    std::unique_ptr<unsigned char[]> memory;
    unsigned char* shared = nullptr;
    Meeting meeting;
    bool votes[2] = {false, false};
    int alive = 0;
    bool begun = false;
};

class Machine {
  public:
    uint64_t order = 0;
    int64_t shared_limit = 99 * 1024;  // what the smallest of the supported devices has
    int cluster_limit = 0, processors = 0;  // blocks of a cluster: 0, a device without; and how many blocks run at once
    int64_t launches = 0;

    static Machine& get() {
        static Machine machine;
        return machine;
    }
    int thread() const { return in_block_; }
    int threads() const { return threads_; }
    int64_t block() const { return own_->id; }
    int64_t blocks() const { return blocks_; }
    unsigned char* shared() { return own_->shared; }
    int cluster() const { return cluster_; }

    void run(const std::string& name, int64_t blocks, int cluster, int threads, int64_t shared_bytes,
             const std::function<void()>& body) {
        if (threads % 32 != 0 || threads < 32 || threads > 1024) fail(name + ": " + std::to_string(threads) + " threads");
        if (shared_bytes > shared_limit) fail(name + ": " + std::to_string(shared_bytes) + " bytes of shared memory");
        if (cluster < 1 || cluster > larger_of(cluster_limit, 1) || blocks % cluster != 0) {
            fail(name + ": " + std::to_string(blocks) + " blocks in clusters of " + std::to_string(cluster));
        }
        launches += 1;
        name_ = name;
        body_ = &body;
        blocks_ = blocks;
        threads_ = threads;
        cluster_ = cluster;
        shared_bytes_ = shared_bytes;
        random_ = order * 0x9E3779B97F4A7C15u + 1;
        while (static_cast<int>(pool_.size()) < threads * cluster) {
            pool_.emplace_back();
            pool_.back().stack.reset(new unsigned char[kStackBytes]);
        }
        std::vector<int64_t> turns(blocks / cluster);
        const int64_t count = static_cast<int64_t>(turns.size());
        for (int64_t k = 0; k < count; ++k) turns[k] = order == 1 ? count - 1 - k : k;
        for (int64_t k = count - 1; order > 1 && k > 0; --k) std::swap(turns[k], turns[next() % (k + 1)]);
        for (int64_t turn : turns) run_cluster(turn);
    }

    // Waits for the others that meet here, `expected` as far as they have not left; the last one wakes all.
    void meet(Meeting& meeting, const char* what, int expected) {
        if (!meeting.waiting.empty() && meeting.what != what) stop(std::string(what) + " meets " + meeting.what);
        meeting.what = what;
        meeting.waiting.push_back(current_);
        if (static_cast<int>(meeting.waiting.size()) < expected) {
            pool_[current_].at = &meeting;
            leave();
            return;
        }
        wake(meeting);
    }
    // A barrier of the block; whether any thread has voted. Votes of two barriers in a row are kept apart.
    bool barrier(bool vote) {
        Block& block = *own_;
        const int turn = pool_[current_].barrier_turn;
        pool_[current_].barrier_turn ^= 1;
        if (block.meeting.waiting.empty()) block.votes[turn] = false;
        block.votes[turn] |= vote;
        meet(block.meeting, "barrier", block.alive);
        return block.votes[turn];
    }
    // The two halves of a barrier of the cluster. Nobody gets through the second before all have been at the first.
    void cluster_arrive() {
        if (pool_[current_].arrived) stop("arrives twice at a barrier of the cluster");
        pool_[current_].arrived = true;
        arrived_ += 1;
        if (arrived_ < alive_) return;
        arrived_ = 0;
        for (Thread& thread : pool_) thread.arrived = false;
        generation_ += 1;
        wake(cluster_meeting_);
    }
    void cluster_wait(int64_t generation) {
        if (generation_ != generation) return;
        if (!pool_[current_].arrived) stop("waits at a barrier of the cluster without having arrived");
        cluster_meeting_.waiting.push_back(current_);
        pool_[current_].at = &cluster_meeting_;
        leave();
    }
    int64_t generation() const { return generation_; }
    // Where `pointer` into the own shared memory lies in that of the block of this rank.
    unsigned char* in_block(const void* pointer, int rank) {
        const int64_t offset = static_cast<const unsigned char*>(pointer) - own_->shared;
        if (offset < 0 || offset >= shared_bytes_) stop("asks for what is not in its shared memory in another block");
        if (rank < 0 || rank >= cluster_) stop("asks for block " + std::to_string(rank) + " of its cluster");
        if (!blocks_running_[rank].begun) stop("asks for shared memory of a block that has not begun");
        if (blocks_running_[rank].alive == 0) stop("asks for shared memory of a block that has ended");
        return blocks_running_[rank].shared + offset;
    }
    Warp& warp() { return warps_[current_ / 32]; }
    int warp_alive() const {
        int count = 0;
        for (int k = current_ / 32 * 32, end = k + 32; k < end; ++k) count += !pool_[k].done;
        return count;
    }
    [[noreturn]] void stop(const std::string& why) {  // in a fiber
        error_ = why + " (thread " + std::to_string(current_) + ")";
        leave();
        std::abort();
    }

  private:
#ifdef OTKD_ASAN
    static constexpr size_t kBand = 0;
#else
    static constexpr size_t kBand = kGuardBytes;
#endif
    static int larger_of(int a, int b) { return a > b ? a : b; }
    void wake(Meeting& meeting) {
        for (int other : meeting.waiting) {
            if (other != current_) ready_.push_back(other);
            pool_[other].at = nullptr;
        }
        meeting.waiting.clear();
    }
    void begin_block(Block& block, int64_t id) {
        block.id = id;
        block.alive = threads_;
        block.memory.reset(new unsigned char[shared_bytes_ + 2 * kBand]);
        std::memset(block.memory.get(), kGuard, shared_bytes_ + 2 * kBand);
        block.shared = block.memory.get() + kBand;
        std::memset(block.shared, kPoison, shared_bytes_);
    }
    // Its memory is nothing to rely on any more, but stays where it is until the whole cluster has ended.
    void end_block(Block& block) {
        for (size_t k = 0; k < kBand; ++k) {
            if (block.memory[k] == kGuard && block.shared[shared_bytes_ + k] == kGuard) continue;
            fail(name_ + ": wrote beside its shared memory");
        }
        std::memset(block.shared, kPoison, shared_bytes_);
#ifdef OTKD_ASAN
        __asan_poison_memory_region(block.shared, shared_bytes_);
#endif
    }
    void run_cluster(int64_t turn) {
        blocks_running_.clear();
        blocks_running_.resize(cluster_);
        for (int k = 0; k < cluster_; ++k) begin_block(blocks_running_[k], turn * cluster_ + k);
        const int count = threads_ * cluster_;
        warps_.assign(count / 32, Warp());
        for (Warp& warp : warps_) std::memset(warp.turn, 0, sizeof warp.turn);
        cluster_meeting_ = Meeting();
        arrived_ = 0;
        ready_.clear();
        error_.clear();
        alive_ = count;
        for (int k = 0; k < count; ++k) {
            Thread& thread = pool_[k];
            thread.done = thread.arrived = false;
            thread.at = nullptr;
            thread.fake_stack = nullptr;
            thread.barrier_turn = 0;
            thread.context.prepare(thread.stack.get(), &Machine::entry);
            ready_.push_back(k);
        }
        while (alive_ > 0) {
            if (ready_.empty()) fail(name_ + ": " + std::to_string(alive_) + " threads wait for ever");
            const int thread = pick();
            blocks_running_[thread / threads_].begun = true;
            enter(thread);
            if (!error_.empty()) fail(name_ + ": " + error_);
            if (own_->alive == 0) end_block(*own_);
        }
#ifdef OTKD_ASAN
        for (Block& block : blocks_running_) __asan_unpoison_memory_region(block.shared, shared_bytes_);
#endif
    }
    int pick() {
        size_t at = 0;
        for (size_t k = 1; order < 2 && k < ready_.size(); ++k) {
            if (order == 0 ? ready_[k] < ready_[at] : ready_[k] > ready_[at]) at = k;
        }
        if (order > 1) at = next() % ready_.size();
        const int picked = ready_[at];
        ready_[at] = ready_.back();
        ready_.pop_back();
        return picked;
    }
    uint64_t next() {
        random_ ^= random_ << 13;
        random_ ^= random_ >> 7;
        random_ ^= random_ << 17;
        return random_ >> 11;
    }
    void enter(int thread) {
        current_ = thread;
        in_block_ = thread % threads_;
        own_ = &blocks_running_[thread / threads_];
#ifdef OTKD_ASAN
        void* fake = nullptr;
        __sanitizer_start_switch_fiber(&fake, pool_[thread].stack.get(), kStackBytes);
#endif
        scheduler_.switch_to(pool_[thread].context);
#ifdef OTKD_ASAN
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    }
    void leave() {
        Thread& own = pool_[current_];
#ifdef OTKD_ASAN
        __sanitizer_start_switch_fiber(own.done ? nullptr : &own.fake_stack, scheduler_bottom_, scheduler_bytes_);
#endif
        own.context.switch_to(scheduler_);
#ifdef OTKD_ASAN
        __sanitizer_finish_switch_fiber(own.fake_stack, &scheduler_bottom_, &scheduler_bytes_);
#endif
    }
    static void entry() {
        Machine& machine = get();
#ifdef OTKD_ASAN
        __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_bottom_, &machine.scheduler_bytes_);
#endif
        (*machine.body_)();
        machine.pool_[machine.current_].done = true;
        machine.own_->alive -= 1;
        machine.alive_ -= 1;
        machine.leave();
        std::abort();
    }
    [[noreturn]] static void fail(const std::string& why) { throw std::runtime_error("emulator: kernel " + why); }

    std::vector<Thread> pool_;
    std::vector<Warp> warps_;
    std::vector<int> ready_;
    std::vector<Block> blocks_running_;  // the cluster
    Meeting cluster_meeting_;
    Context scheduler_;
    const std::function<void()>* body_ = nullptr;
    std::string name_, error_;
    const void* scheduler_bottom_ = nullptr;
    size_t scheduler_bytes_ = 0;
    uint64_t random_ = 1;
    int64_t blocks_ = 0, shared_bytes_ = 0, generation_ = 0;
    int threads_ = 32, cluster_ = 1, current_ = 0, in_block_ = 0, alive_ = 0, arrived_ = 0;
    Block* own_ = nullptr;  // of the thread that runs
};

}  // namespace emulator

OTKD_DEVICE int thread_id() { return emulator::Machine::get().thread(); }
OTKD_DEVICE int block_threads() { return emulator::Machine::get().threads(); }
OTKD_DEVICE int64_t block_id() { return emulator::Machine::get().block(); }
OTKD_DEVICE int64_t block_count() { return emulator::Machine::get().blocks(); }
OTKD_DEVICE unsigned char* shared_memory() { return emulator::Machine::get().shared(); }
OTKD_DEVICE void barrier() { emulator::Machine::get().barrier(false); }
OTKD_DEVICE bool barrier_any(bool mine) { return emulator::Machine::get().barrier(mine); }
OTKD_DEVICE int cluster_size() { return emulator::Machine::get().cluster(); }
OTKD_DEVICE int cluster_rank() { return static_cast<int>(block_id() % cluster_size()); }
OTKD_DEVICE void cluster_barrier() {
    emulator::Machine& machine = emulator::Machine::get();
    const int64_t generation = machine.generation();
    machine.cluster_arrive();
    machine.cluster_wait(generation);
}
template <class S>
OTKD_DEVICE S* in_block(S* own, int rank) {
    return reinterpret_cast<S*>(emulator::Machine::get().in_block(own, rank));
}
template <class S>
OTKD_DEVICE S shuffle(S value, int lane) {
    emulator::Machine& machine = emulator::Machine::get();
    emulator::Warp& warp = machine.warp();
    const int own = machine.thread() % 32, turn = warp.turn[own];
    warp.turn[own] ^= 1;
    if (lane < 0 || lane > 31) machine.stop("a shuffle from lane " + std::to_string(lane));
    if (machine.warp_alive() < 32) machine.stop("a shuffle of a warp that some lanes have left");
    std::memcpy(&warp.slot[turn][own], &value, sizeof value);
    machine.meet(warp.meeting, "shuffle", 32);
    std::memcpy(&value, &warp.slot[turn][lane], sizeof value);
    return value;
}
template <class S>
OTKD_DEVICE S shuffle_xor(S value, int mask) {
    return shuffle(value, (thread_id() % 32) ^ mask);
}

class DeviceGuard {
  public:
    explicit DeviceGuard(const Target&) {}
};

inline int64_t shared_memory_limit(const Target&) { return emulator::Machine::get().shared_limit; }

template <class T>
struct Same {
    using Type = T;
};

struct Grid {
    int64_t blocks;
    int cluster;
    Grid(int64_t count, int of_cluster = 1) : blocks(count), cluster(of_cluster) {}
};

template <class... P>
void launch(const char* name, void (*kernel)(P...), Grid grid, int threads, int64_t shared_bytes, const Target&,
            typename Same<P>::Type... arguments) {
    if (grid.blocks <= 0) return;
    emulator::Machine::get().run(name, grid.blocks, grid.cluster, threads, shared_bytes, [&] { kernel(arguments...); });
}

template <class... P>
bool admits(void (*)(P...), Grid grid, int, int64_t shared_bytes, const Target&) {
    const emulator::Machine& machine = emulator::Machine::get();
    return grid.cluster <= machine.cluster_limit && shared_bytes <= machine.shared_limit;
}
inline int processor_count(const Target&) { return emulator::Machine::get().processors; }

}  // namespace cuda
}  // namespace otkd_fast

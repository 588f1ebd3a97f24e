// Runs the CUDA sources on the host, for tests: csrc/cuda/runtime.h includes this file in place of the CUDA runtime.
//
// The threads of a block are fibers: one runs until it waits at a barrier or a shuffle, then the scheduler picks
// another, in rising, falling or random order (set_order). Blocks run one after the other, in that order too. A result that
// depends on the order is a race. Shared memory starts as NaN for each block, has guard bands, and is an allocation of
// its own, so that AddressSanitizer sees its ends. It is an error if a thread waits for ever (others have left, or wait
// elsewhere). It emulates semantics, not speed.
#pragma once
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#define OTKD_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define OTKD_ASAN 1
#endif
#endif
#ifdef OTKD_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

#define OTKD_KERNEL(...) inline void
#define OTKD_ROLLED
#define OTKD_DEVICE inline
#define OTKD_BOTH inline
#define OTKD_CALL inline
#define OTKD_CONSTANT const
#define OTKD_UNROLL
#define OTKD_UNROLL_4

namespace otkd_fast {
namespace cuda {
namespace emulator {

constexpr size_t kStackBytes = 128 * 1024, kGuardBytes = 256;
constexpr unsigned char kGuard = 0xA5, kPoison = 0xFF;

#if defined(__x86_64__)
// Saves the registers that a call keeps on the stack, and goes on where `to` was left.
asm(R"(
.text
.p2align 4
.local otkd_emulator_switch
.type otkd_emulator_switch, @function
otkd_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size otkd_emulator_switch, .-otkd_emulator_switch
)");
extern "C" void otkd_emulator_switch(void** from, void* to);
#endif

struct Context {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
    void prepare(unsigned char* stack, void (*entry)()) {
        void** top = reinterpret_cast<void**>(stack + kStackBytes) - 3;  // entered as by a call: aligned to 16 bytes, less 8
        *top-- = nullptr;
        *top-- = reinterpret_cast<void*>(entry);
        for (int k = 0; k < 5; ++k) *top-- = nullptr;
        *top = nullptr;
        stack_pointer = top;
    }
    void switch_to(Context& other) { otkd_emulator_switch(&stack_pointer, other.stack_pointer); }
#else
    ucontext_t context;
    void prepare(unsigned char* stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = kStackBytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    void switch_to(Context& other) { swapcontext(&context, &other.context); }
#endif
};

// A place where threads meet: the 32 lanes of a warp, or a block.
struct Meeting {
    std::vector<int> waiting;
    const char* what = nullptr;
};

struct Thread {
    Context context;
    std::unique_ptr<unsigned char[]> stack;
    void* fake_stack = nullptr;
    Meeting* at = nullptr;
    bool done = false;
};

struct Warp {
    Meeting meeting;
    uint64_t slot[2][32];  // of this shuffle and the one before, which slower lanes may still read
    int turn[32];          // which of the two each lane writes next
};

class Machine {
  public:
    uint64_t order = 0;
    int64_t shared_limit = 99 * 1024;  // what the smallest of the supported devices has
    int64_t launches = 0;

    static Machine& get() {
        static Machine machine;
        return machine;
    }
    int thread() const { return current_; }
    int threads() const { return threads_; }
    int64_t block() const { return block_; }
    int64_t blocks() const { return blocks_; }
    unsigned char* shared() { return shared_; }

    void run(const std::string& name, int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& body) {
        if (threads % 32 != 0 || threads < 32 || threads > 1024) fail(name + ": " + std::to_string(threads) + " threads");
        if (shared_bytes > shared_limit) fail(name + ": " + std::to_string(shared_bytes) + " bytes of shared memory");
        launches += 1;
        name_ = name;
        body_ = &body;
        blocks_ = blocks;
        threads_ = threads;
        random_ = order * 0x9E3779B97F4A7C15u + 1;
        while (static_cast<int>(pool_.size()) < threads) {
            pool_.emplace_back();
            pool_.back().stack.reset(new unsigned char[kStackBytes]);
        }
        std::vector<int64_t> turns(blocks);
        for (int64_t k = 0; k < blocks; ++k) turns[k] = order == 1 ? blocks - 1 - k : k;
        for (int64_t k = blocks - 1; order > 1 && k > 0; --k) std::swap(turns[k], turns[next() % (k + 1)]);
        for (int64_t turn : turns) run_block(turn, shared_bytes);
    }

    // Waits for the others that meet here, `expected` as far as they have not left; the last one wakes all.
    void meet(Meeting& meeting, const char* what, bool whole_block) {
        if (!meeting.waiting.empty() && meeting.what != what) stop(std::string(what) + " meets " + meeting.what);
        meeting.what = what;
        meeting.waiting.push_back(current_);
        const int expected = whole_block ? alive_ : warp_alive(current_ / 32);
        if (static_cast<int>(meeting.waiting.size()) < expected) {
            pool_[current_].at = &meeting;
            leave();
            return;
        }
        for (int other : meeting.waiting) {
            if (other != current_) ready_.push_back(other);
            pool_[other].at = nullptr;
        }
        meeting.waiting.clear();
    }
    // A barrier of the block; whether any thread has voted. Votes of two barriers in a row are kept apart.
    bool barrier(bool vote) {
        const int turn = barrier_turn_[current_];
        barrier_turn_[current_] ^= 1;
        if (block_meeting_.waiting.empty()) votes_[turn] = false;
        votes_[turn] |= vote;
        meet(block_meeting_, "barrier", true);
        return votes_[turn];
    }
    Warp& warp() { return warps_[current_ / 32]; }
    int warp_alive(int warp) const {
        int count = 0;
        for (int k = warp * 32; k < warp * 32 + 32; ++k) count += !pool_[k].done;
        return count;
    }
    [[noreturn]] void stop(const std::string& why) {  // in a fiber
        error_ = why + " (thread " + std::to_string(current_) + ")";
        leave();
        std::abort();
    }

  private:
    void run_block(int64_t block, int64_t shared_bytes) {
        block_ = block;
        std::unique_ptr<unsigned char[]> memory;
#ifdef OTKD_ASAN
        const size_t guard = 0;
#else
        const size_t guard = kGuardBytes;
#endif
        memory.reset(new unsigned char[shared_bytes + 2 * guard]);
        std::memset(memory.get(), kGuard, shared_bytes + 2 * guard);
        shared_ = memory.get() + guard;
        std::memset(shared_, kPoison, shared_bytes);
        warps_.assign(threads_ / 32, Warp());
        for (Warp& warp : warps_) std::memset(warp.turn, 0, sizeof warp.turn);
        block_meeting_ = Meeting();
        barrier_turn_.assign(threads_, 0);
        ready_.clear();
        error_.clear();
        alive_ = threads_;
        for (int k = 0; k < threads_; ++k) {
            Thread& thread = pool_[k];
            thread.done = false;
            thread.at = nullptr;
            thread.fake_stack = nullptr;
            thread.context.prepare(thread.stack.get(), &Machine::entry);
            ready_.push_back(k);
        }
        while (alive_ > 0) {
            if (ready_.empty()) fail(name_ + ": " + std::to_string(alive_) + " threads wait for ever");
            enter(pick());
            if (!error_.empty()) fail(name_ + ": " + error_);
        }
        for (size_t k = 0; k < guard; ++k) {
            if (memory[k] != kGuard || shared_[shared_bytes + k] != kGuard) fail(name_ + ": wrote beside its shared memory");
        }
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
        machine.alive_ -= 1;
        machine.leave();
        std::abort();
    }
    [[noreturn]] static void fail(const std::string& why) { throw std::runtime_error("emulator: kernel " + why); }

    std::vector<Thread> pool_;
    std::vector<Warp> warps_;
    std::vector<int> ready_, barrier_turn_;
    bool votes_[2] = {false, false};
    Meeting block_meeting_;
    Context scheduler_;
    const std::function<void()>* body_ = nullptr;
    std::string name_, error_;
    unsigned char* shared_ = nullptr;
    const void* scheduler_bottom_ = nullptr;
    size_t scheduler_bytes_ = 0;
    uint64_t random_ = 1;
    int64_t block_ = 0, blocks_ = 0;
    int threads_ = 0, current_ = 0, alive_ = 0;
};

}  // namespace emulator

OTKD_DEVICE int thread_id() { return emulator::Machine::get().thread(); }
OTKD_DEVICE int block_threads() { return emulator::Machine::get().threads(); }
OTKD_DEVICE int64_t block_id() { return emulator::Machine::get().block(); }
OTKD_DEVICE int64_t block_count() { return emulator::Machine::get().blocks(); }
OTKD_DEVICE unsigned char* shared_memory() { return emulator::Machine::get().shared(); }
OTKD_DEVICE void barrier() { emulator::Machine::get().barrier(false); }
OTKD_DEVICE bool barrier_any(bool mine) { return emulator::Machine::get().barrier(mine); }
template <class S>
OTKD_DEVICE S shuffle(S value, int lane) {
    emulator::Machine& machine = emulator::Machine::get();
    emulator::Warp& warp = machine.warp();
    const int own = machine.thread() % 32, turn = warp.turn[own];
    warp.turn[own] ^= 1;
    if (lane < 0 || lane > 31) machine.stop("a shuffle from lane " + std::to_string(lane));
    if (machine.warp_alive(machine.thread() / 32) < 32) machine.stop("a shuffle of a warp that some lanes have left");
    std::memcpy(&warp.slot[turn][own], &value, sizeof value);
    machine.meet(warp.meeting, "shuffle", false);
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

template <class... P>
void launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, const Target&,
            typename Same<P>::Type... arguments) {
    if (blocks <= 0) return;
    emulator::Machine::get().run(name, blocks, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace cuda
}  // namespace otkd_fast

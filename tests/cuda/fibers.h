// Fibers: the threads of emulator.h. A fiber has a stack of its own, and runs until it switches to another.
#pragma once
#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace otkd_fast {
namespace cuda {
namespace emulator {

constexpr size_t kStackBytes = 128 * 1024;

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

}  // namespace emulator
}  // namespace cuda
}  // namespace otkd_fast

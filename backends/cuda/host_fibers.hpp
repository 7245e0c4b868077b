// Fibers: stacks out of a pool, and switches between them that save only what a call saves.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace {

[[noreturn]] void fiber_main();  // where each fiber begins

constexpr size_t PAGE_BYTES = 4096;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK_BYTES = (512 << 10) + PAGE_BYTES;  // its frames are several times as large
#else
constexpr size_t STACK_BYTES = (64 << 10) + PAGE_BYTES;
#endif

#if defined(__x86_64__) && !defined(TG_UCONTEXT)
struct Context {
    void* stack_pointer;
};
asm(R"(
    .text
    .type tg_switch, @function
tg_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
    .size tg_switch, . - tg_switch
)");
extern "C" __attribute__((visibility("hidden"))) void tg_switch(Context* from, Context* to);

void prepare(Context& context, unsigned char*, unsigned char* top) {
    void** frame = (void**)top;
    *--frame = nullptr;  // where fiber_main would return to; the stack is aligned as after a call
    *--frame = (void*)fiber_main;
    for (int i = 0; i < 6; i++) *--frame = nullptr;
    context.stack_pointer = frame;
}
#else
struct Context {
    ucontext_t machine;
};
void tg_switch(Context* from, Context* to) { swapcontext(&from->machine, &to->machine); }
void prepare(Context& context, unsigned char* low, unsigned char* top) {
    getcontext(&context.machine);
    context.machine.uc_stack.ss_sp = low;
    context.machine.uc_stack.ss_size = top - low;
    makecontext(&context.machine, fiber_main, 0);
}
#endif

#ifdef __SANITIZE_ADDRESS__
const void* scheduler_low;  // the caller's own stack, as the first fiber finds it; null before
size_t scheduler_bytes;
void arrived_on_stack(void* fake = nullptr) {
    const void* low;
    size_t bytes;
    __sanitizer_finish_switch_fiber(fake, &low, &bytes);
    if (scheduler_low == nullptr) scheduler_low = low, scheduler_bytes = bytes;
}
// A stack of null is the caller's own.
void switch_to(Context& from, Context& to, unsigned char* stack, bool for_ever = false) {
    void* fake = nullptr;
    size_t bytes = stack ? STACK_BYTES : scheduler_bytes;
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake, stack ? stack : scheduler_low, bytes);
    tg_switch(&from, &to);
    arrived_on_stack(fake);
}
#else
void arrived_on_stack() {}
void switch_to(Context& from, Context& to, unsigned char*, bool = false) { tg_switch(&from, &to); }
#endif

unsigned char* map_memory(size_t size_bytes) {
    void* at = mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? nullptr : (unsigned char*)at;
}

class Stacks {
public:
    bool reserve(unsigned most) {
        return low_ != nullptr || (low_ = map_memory(STACK_BYTES * (most_ = most))) != nullptr;
    }
    unsigned char* take() {
        if (free_.empty()) {
            free_.push_back(low_ + STACK_BYTES * made_++);
            mprotect(free_.back(), PAGE_BYTES, PROT_NONE);  // a fiber that needs more stack faults here
        }
        unsigned char* stack = free_.back();
        free_.pop_back();
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(stack + PAGE_BYTES, STACK_BYTES - PAGE_BYTES);
#endif
        return stack;
    }
    void give_back(unsigned char* stack) { free_.push_back(stack); }
    bool contains(const void* at) const { return at >= low_ && at < low_ + STACK_BYTES * most_; }
    // Where a fiber begins: tops differ by odd numbers of cache lines, or those of all stacks would share a few cache sets.
    void prepare_on(unsigned char* stack, Context& context) const {
        prepare(context, stack + PAGE_BYTES, stack + STACK_BYTES - (stack - low_) / STACK_BYTES % 16 * 576);
    }

private:
    unsigned char* low_ = nullptr;
    unsigned most_ = 0, made_ = 0;
    std::vector<unsigned char*> free_;
};

}  // namespace

// Runs kernels that host.hpp made host code of: each CUDA thread is a fiber, all on the calling OS thread. A fiber runs until it
// waits for others, at a barrier or a warp operation, or returns; then the schedule says which ready one is next: 0 the lowest
// thread, 1 the highest, any other number is the seed of a random order. Blocks run one after another, in such an order too.
//
// What a GPU would leave undefined ends the launch with a text. Threads that returned count as arrived at a barrier, but not at a
// warp operation, and a barrier is one line of the kernel for the whole block.
#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "host_fibers.hpp"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
unsigned char* tg_dynamic_shared;

namespace {

using u64 = unsigned long long;
constexpr unsigned MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / 32;
constexpr size_t MAX_SHARED_BYTES = 227 << 10;  // of sm_90
constexpr size_t MARGIN_BYTES = 512;            // on either side of dynamic shared memory, which nobody may write

struct Operation {
    const char* name;
    void (*combine)(void* const* requests, unsigned mask);  // of a warp: requests[lane], for the lanes of the mask
};

struct Copy {
    void* to;
    const void* from;
    unsigned group;
};

struct Thread {
    Context context;
    unsigned char* stack;  // null before it starts and after it returns
    uint3 index;
    const Operation* at;  // what it waits for, in which line, with which mask
    int line;
    unsigned mask;
    void* request;
    unsigned groups;  // of asynchronous copies: committed so far
    std::vector<Copy> copies;
};

struct Module {
    const char* begin;
    char *shared, *end;
};

Context scheduler;
Stacks stacks;
std::vector<Module> modules;
void (*entry)(const long long*);
const long long* entry_args;
u64 schedule, random_state;
char error[2400];

void hide_stored(), show_stored();

// Of the block that runs. Lanes are bits of one number for each warp.
Thread threads[MAX_THREADS];
Thread* current;  // null outside of kernels
unsigned thread_count, live;
unsigned ready[MAX_WARPS], ready_warps, waiting[MAX_WARPS], in_barrier[MAX_WARPS], returned[MAX_WARPS];
bool copies_used;

struct Barrier {
    const Operation* kind;
    int line;
    unsigned arrived, agreed;  // threads, and those whose predicate holds
};
Barrier barrier, last_barrier;

int poison() { return schedule & 1 ? 0x7f : 0xcc; }  // large and negative as floats: a maximum or a minimum shows one of them

// --- what is next ----------------------------------------------------------------------------------------------------------

u64 next_random() {  // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * 0x2545f4914f6cdd1dull >> 16;
}

unsigned choose(unsigned mask) {
    if (schedule == 0) return __builtin_ctz(mask);
    if (schedule == 1) return 31 - __builtin_clz(mask);
    unsigned turn = next_random() & 31, turned = mask >> turn | mask << (-turn & 31);
    return (__builtin_ctz(turned) + turn) & 31;
}

Thread* take_ready() {
    if (ready_warps == 0) return nullptr;
    unsigned warp = choose(ready_warps), lane = choose(ready[warp]);
    ready[warp] &= ~(1u << lane);
    if (ready[warp] == 0) ready_warps &= ~(1u << warp);
    return &threads[warp * 32 + lane];
}

void make_ready(unsigned warp, unsigned lanes) {
    ready[warp] |= lanes;
    if (lanes) ready_warps |= 1u << warp;
}

void resume(Context& from, Thread& next, bool for_ever = false) {
    current = &next;
    threadIdx = next.index;
    if (next.stack == nullptr) {
        next.stack = stacks.take();
        stacks.prepare_on(next.stack, next.context);
    }
    switch_to(from, next.context, next.stack, for_ever);
}

// --- errors ----------------------------------------------------------------------------------------------------------------

void say(bool of_thread, const char* format, va_list args) {
    Dl_info found;
    const char* name = dladdr((void*)entry, &found) && found.dli_sname ? found.dli_sname : "kernel";
    int length = strlen(name), used;
    if (length > 6 && strcmp(name + length - 6, "__host") == 0) length -= 6;
    used = sprintf(error, "[%.*s] wanted ", length < 200 ? length : 200, name);
    used += vsnprintf(error + used, 2000, format, args);
    used += sprintf(error + used, "; in ");
    if (of_thread) used += sprintf(error + used, "thread (%u, %u, %u) of ", threadIdx.x, threadIdx.y, threadIdx.z);
    sprintf(error + used, "block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
}

void say(bool of_thread, const char* format, ...) {
    va_list args;
    va_start(args, format);
    say(of_thread, format, args);
    va_end(args);
}

// Ends the launch. The other fibers are left as they are.
[[noreturn]] void leave() {
    Context nowhere;
    switch_to(nowhere, scheduler, nullptr, true);
    __builtin_unreachable();
}

[[noreturn]] void fail(const char* format, ...) {
    va_list args;
    va_start(args, format);
    say(true, format, args);
    va_end(args);
    leave();
}

// What each thread waits for, those that wait for the same together: "threads 0-15 at __syncthreads of line 9, ...".
[[noreturn]] void fail_stuck() {
    char text[1600] = "";
    int used = 0, groups = 0;
    auto state = [](unsigned i) { return returned[i / 32] >> i % 32 & 1 ? nullptr : threads[i].at; };
    for (unsigned first = 0, end; first < thread_count && groups < 8; first = end, groups++) {
        const Thread& one = threads[first];
        const Operation* at = state(first);
        for (end = first + 1; end < thread_count && state(end) == at; end++) {
            if (at && (threads[end].line != one.line || threads[end].mask != one.mask)) break;
        }
        used += sprintf(text + used, first ? ", %u" : "%u", first);
        if (end - first > 1) used += sprintf(text + used, "-%u", end - 1);
        used += at ? sprintf(text + used, " at %s of line %d", at->name, one.line) : sprintf(text + used, " returned");
        if (at && at->combine) used += sprintf(text + used, " with mask 0x%08x", one.mask);
    }
    say(false, "every lane of a mask at the same operation and line; got none of %u threads that can go on: %s%s", thread_count,
        text, groups < 8 ? "" : ", ...");
    leave();
}

#include "host_signals.hpp"

// --- meeting ---------------------------------------------------------------------------------------------------------------

void wait() {
    Thread& me = *current;
    Thread* next = take_ready();
    if (next == nullptr) fail_stuck();
    if (next != &me) resume(me.context, *next);
}

// A warp operation: the last lane of the mask that arrives does the work of all, on the requests that lie on their stacks.
void meet(const Operation& operation, unsigned mask, void* request, int line) {
    Thread& me = *current;
    unsigned warp = (&me - threads) / 32, bit = 1u << (&me - threads) % 32;
    if (!(mask & bit)) fail("a mask that names its own lane at %s of line %d; got 0x%08x", operation.name, line, mask);
    me.at = &operation, me.line = line, me.mask = mask, me.request = request;
    waiting[warp] |= bit;
    if ((waiting[warp] & mask) == mask) {
        void* requests[32];
        unsigned same = 0;
        for (unsigned rest = mask; rest; rest &= rest - 1) {
            unsigned lane = __builtin_ctz(rest);
            const Thread& other = threads[warp * 32 + lane];
            same += other.at == &operation && other.line == line && other.mask == mask;
            requests[lane] = other.request;
        }
        if (same == (unsigned)__builtin_popcount(mask)) {
            operation.combine(requests, mask);
            waiting[warp] &= ~mask;
            make_ready(warp, mask);
        }
    }
    wait();
}

void open_barrier() {
    last_barrier = barrier;
    barrier = {};
    for (unsigned warp = 0; warp * 32 < thread_count; warp++) {
        make_ready(warp, in_barrier[warp]);
        in_barrier[warp] = 0;
    }
}

void fiber_main() {
    arrived_on_stack();
    for (;;) {
        entry(entry_args);
        Thread& me = *current;
        returned[(&me - threads) / 32] |= 1u << (&me - threads) % 32;
        live--;
        if (live != 0 && live == barrier.arrived) open_barrier();
        Thread* next = take_ready();
        if (next == nullptr && live != 0) fail_stuck();
        unsigned char* stack = me.stack;
        me.stack = nullptr;
        if (next != nullptr && next->stack == nullptr) {  // one that has not begun does so here, without a switch
            next->stack = stack;
            current = next;
            threadIdx = next->index;
            continue;
        }
        stacks.give_back(stack);
        Context nowhere;
        if (next != nullptr) resume(nowhere, *next, true);
        switch_to(nowhere, scheduler, nullptr, true);
    }
}

// --- launches --------------------------------------------------------------------------------------------------------------

void fill(void* at, size_t size_bytes) {
#ifdef __SANITIZE_ADDRESS__  // its memset would complain about what lies between variables
    auto* byte = (volatile unsigned char*)at;
    [=]() __attribute__((no_sanitize("address"))) { for (size_t i = 0; i < size_bytes; i++) byte[i] = poison(); }();
#else
    memset(at, poison(), size_bytes);
#endif
}

bool intact(const unsigned char* margin) {
    return margin[0] == poison() && memcmp(margin, margin + 1, MARGIN_BYTES - 1) == 0;
}

void run_block(const Module* module, size_t shared_bytes) {
    unsigned char* shared = tg_dynamic_shared;
    if (module != nullptr) fill(module->shared, module->end - module->shared);
    if (shared_bytes != 0) fill(shared - MARGIN_BYTES, shared_bytes + 2 * MARGIN_BYTES);
    for (unsigned warp = 0; warp * 32 < thread_count; warp++) {
        unsigned lanes = thread_count - warp * 32;
        waiting[warp] = in_barrier[warp] = returned[warp] = ready[warp] = 0;
        make_ready(warp, lanes < 32 ? (1u << lanes) - 1 : ~0u);
    }
    live = thread_count;
    barrier = {};
    if (copies_used) {
        for (Thread& thread : threads) thread.copies.clear(), thread.groups = 0;
        copies_used = false;
    }
    resume(scheduler, *take_ready());
    current = nullptr;
    hide_stored();
#ifndef __SANITIZE_ADDRESS__
    if (error[0] == 0 && shared_bytes != 0 && !(intact(shared - MARGIN_BYTES) && intact(shared + shared_bytes))) {
        say(false, "writes within %zu bytes of dynamic shared memory; got some beyond", shared_bytes);
    }
#endif
}

void run_grid(u64 blocks, size_t shared_bytes) {
    const Module* module = nullptr;
    for (const Module& one : modules) {
        if ((const char*)entry >= one.begin && (const char*)entry < one.end) module = &one;
    }
    u64 stride = 1, first = 0;
    random_state = schedule * 0x9e3779b97f4a7c15ull | 1;
    if (schedule > 1) {  // a stride without a common divisor visits each block once
        auto divisor = [](u64 a, u64 b) { while (b) { u64 rest = a % b; a = b, b = rest; } return a; };
        first = next_random() % blocks;
        do stride = next_random() % blocks; while (divisor(stride, blocks) != 1 && blocks > 1);
    }
    for (u64 i = 0; i < blocks && error[0] == 0; i++) {
        u64 block = schedule == 0 ? i : schedule == 1 ? blocks - 1 - i : (first + (unsigned __int128)stride * i) % blocks;
        u64 row = block / gridDim.x;
        blockIdx = {unsigned(block % gridDim.x), unsigned(row % gridDim.y), unsigned(row / gridDim.y)};
        run_block(module, shared_bytes);
    }
}

bool prepare_launch(size_t shared_bytes) {
    static unsigned char* shared;
    if (shared == nullptr) shared = map_memory(MAX_SHARED_BYTES + 2 * PAGE_BYTES);
    if (shared == nullptr || !stacks.reserve(MAX_THREADS)) return false;
    tg_dynamic_shared = shared + PAGE_BYTES;
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(shared, MAX_SHARED_BYTES + 2 * PAGE_BYTES);
    __asan_unpoison_memory_region(tg_dynamic_shared, shared_bytes);
    scheduler_low = nullptr;
#endif
    unsigned i = 0;
    for (unsigned z = 0; z < blockDim.z; z++)
        for (unsigned y = 0; y < blockDim.y; y++)
            for (unsigned x = 0; x < blockDim.x; x++) threads[i++].index = {x, y, z};
    thread_count = i;
    if (error[0] != 0) {  // the launch before left some
        for (Thread& thread : threads) {
            if (thread.stack != nullptr) stacks.give_back(thread.stack);
            thread.stack = nullptr;
        }
        ready_warps = 0;
        error[0] = 0;
    }
    return true;
}

}  // namespace

extern "C" void tg_host_register(const char* module, char* shared, char* end) { modules.push_back({module, shared, end}); }

// Null, or what went wrong, which lasts until the next launch; a launch that takes more seconds of processor time goes wrong.
// `kernel` calls the kernel with its parameters.
extern "C" const char* tg_launch(void (*kernel)(const long long*), const long long* args, unsigned gx, unsigned gy, unsigned gz,
                                 unsigned bx, unsigned by, unsigned bz, unsigned long shared_bytes, unsigned long order,
                                 unsigned seconds) {
    entry = kernel, entry_args = args, schedule = order;
    gridDim = {gx, gy, gz}, blockDim = {bx, by, bz};
    u64 count = (u64)bx * by * bz, blocks = (u64)gx * gy * gz;
    if (count == 0 || bx > MAX_THREADS || by > MAX_THREADS || bz > 64 || count > MAX_THREADS) {
        return "[launch] wanted a block of 1 to 1024 threads, its z at most 64; got another";
    }
    if (blocks == 0 || gx >> 31 || gy > 65535 || gz > 65535) {
        return "[launch] wanted a grid of 1 to 2147483647 x 65535 x 65535 blocks; got another";
    }
    if (shared_bytes > MAX_SHARED_BYTES) return "[launch] wanted at most 232448 bytes of dynamic shared memory; got more";
    if (!prepare_launch(shared_bytes)) return "[launch] wanted 64 MiB of addresses for stacks; got none";
#ifdef __SANITIZE_ADDRESS__
    run_grid(blocks, shared_bytes);
#else
    catch_signals(seconds);
    if (sigsetjmp(escape, 0) == 0) run_grid(blocks, shared_bytes);
    current = nullptr;
    release_signals();
#endif
    show_stored();
    return error[0] ? error : nullptr;
}

#include "host_operations.hpp"

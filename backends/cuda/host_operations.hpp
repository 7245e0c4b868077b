// What threads that meet do: barriers, votes, shuffles, products of matrices; and copies that happen at the wait for them.
// And stores that other blocks see only if they are told of them. The end of host_runtime.cpp.
#pragma once

namespace {

[[noreturn]] void fail_barrier(const Operation& kind, int line) {
    fail("one barrier for the whole block; got %s of line %d while %u threads wait at %s of line %d", kind.name, line,
         barrier.arrived, barrier.kind->name, barrier.line);
}

struct Vote {
    int predicate;
    unsigned ballot;
};

void combine_nothing(void* const*, unsigned) {}

void combine_votes(void* const* requests, unsigned mask) {
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1) ballot |= unsigned(((Vote*)requests[lane])->predicate != 0) << lane;
    }
    for (unsigned rest = mask; rest; rest &= rest - 1) ((Vote*)requests[__builtin_ctz(rest)])->ballot = ballot;
}

struct Shuffle {
    u64 bits, result;
    int by, width;
};

template <tg_shuffle_mode MODE> unsigned source_lane(unsigned lane, unsigned by, unsigned width) {
    unsigned first = lane & ~(width - 1), last = first + width - 1, source;
    if (MODE == TG_SHUFFLE_INDEX) return first | (by & (width - 1));
    if (MODE == TG_SHUFFLE_UP) return lane < first + (by & 31) ? lane : lane - (by & 31);
    source = MODE == TG_SHUFFLE_DOWN ? lane + (by & 31) : lane ^ (by & 31);
    return source > last ? lane : source;
}

template <tg_shuffle_mode MODE> void combine_shuffles(void* const* requests, unsigned mask) {
    for (unsigned rest = mask; rest; rest &= rest - 1) {
        unsigned lane = __builtin_ctz(rest);
        Shuffle& mine = *(Shuffle*)requests[lane];
        unsigned source = source_lane<MODE>(lane, mine.by, mine.width);
        // What a lane outside of the mask holds is undefined, but reductions read it where they do not use it.
        mine.result = mask >> source & 1 ? ((Shuffle*)requests[source])->bits : 0x0101010101010101ull * poison();
    }
}

struct Mma {
    void* d;
    const unsigned *a, *b;
};

float element(tg_mma_mode mode, unsigned bits, unsigned j) {
    if (mode == TG_MMA_F16) return tg_half_to_float(bits >> 16 * j);
    if (mode == TG_MMA_BF16) return __uint_as_float(bits >> 16 * j << 16);
    return __uint_as_float(bits & ~0x1fffu);  // tf32: the low bits are not looked at
}

// Products are exact and summed in double, or in int modulo 2^32; the layout is host.hpp's.
template <tg_mma_mode MODE, class D, class Sum> void combine_mma(void* const* requests, unsigned) {
    constexpr unsigned E = MODE == TG_MMA_S8 ? 4 : MODE == TG_MMA_TF32 ? 1 : 2;
    Sum a[16][8 * E], b[8][8 * E];  // b transposed
    auto value = [](unsigned bits, unsigned j) -> Sum {
        if constexpr (MODE == TG_MMA_S8) return (signed char)(bits >> 8 * j);
        else return element(MODE, bits, j);
    };
    for (unsigned lane = 0; lane < 32; lane++) {
        const Mma& one = *(Mma*)requests[lane];
        unsigned g = lane / 4, t = lane % 4;
        for (unsigned j = 0; j < E; j++) {
            for (unsigned r = 0; r < 4; r++) a[g + 8 * (r % 2)][E * t + j + 4 * E * (r / 2)] = value(one.a[r], j);
            for (unsigned r = 0; r < 2; r++) b[g][E * t + j + 4 * E * r] = value(one.b[r], j);
        }
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        D* d = (D*)((Mma*)requests[lane])->d;
        for (unsigned i = 0; i < 4; i++) {
            const Sum *row = a[lane / 4 + 8 * (i / 2)], *column = b[2 * (lane % 4) + i % 2];
            Sum sum = d[i];
            for (unsigned k = 0; k < 8 * E; k++) sum += row[k] * column[k];
            d[i] = sum;
        }
    }
}

struct Ldmatrix {
    unsigned* r;
    const void* row;
};

template <unsigned COUNT, bool TRANSPOSED> void combine_ldmatrix(void* const* requests, unsigned) {
    unsigned short m[COUNT][8][8];
    for (unsigned i = 0; i < 8 * COUNT; i++) memcpy(m[i / 8][i % 8], ((Ldmatrix*)requests[i])->row, 16);
    for (unsigned lane = 0; lane < 32; lane++) {
        unsigned g = lane / 4, t = 2 * (lane % 4);
        for (unsigned i = 0; i < COUNT; i++) {
            unsigned low = TRANSPOSED ? m[i][t][g] : m[i][g][t], high = TRANSPOSED ? m[i][t + 1][g] : m[i][g][t + 1];
            ((Ldmatrix*)requests[lane])->r[i] = high << 16 | low;
        }
    }
}

const Operation BARRIERS[] = {{"__syncthreads", nullptr}, {"__syncthreads_count", nullptr}, {"__syncthreads_and", nullptr},
                              {"__syncthreads_or", nullptr}};
const Operation SYNCWARP = {"__syncwarp", combine_nothing};
const Operation VOTES[] = {{"__ballot_sync", combine_votes}, {"__any_sync", combine_votes}, {"__all_sync", combine_votes}};
const Operation SHUFFLES[] = {{"__shfl_sync", combine_shuffles<TG_SHUFFLE_INDEX>},
                              {"__shfl_up_sync", combine_shuffles<TG_SHUFFLE_UP>},
                              {"__shfl_down_sync", combine_shuffles<TG_SHUFFLE_DOWN>},
                              {"__shfl_xor_sync", combine_shuffles<TG_SHUFFLE_XOR>}};
const Operation MMAS[] = {{"tg_mma_s8_16832", combine_mma<TG_MMA_S8, int, int>},
                          {"tg_mma_f16_16816", combine_mma<TG_MMA_F16, float, double>},
                          {"tg_mma_bf16_16816", combine_mma<TG_MMA_BF16, float, double>},
                          {"tg_mma_tf32_1688", combine_mma<TG_MMA_TF32, float, double>}};
const Operation LDMATRICES[] = {{"tg_ldmatrix_x2", combine_ldmatrix<2, false>},
                                {"tg_ldmatrix_x4", combine_ldmatrix<4, false>},
                                {"tg_ldmatrix_x4_trans", combine_ldmatrix<4, true>}};

void want_multiple_of_16(const void* address, const char* what, int line) {
    if ((size_t)address % 16) fail("a multiple of 16 at %s of line %d; got %p", what, line, address);
}

}  // namespace

void tg_host_trap(int line) { fail("no __trap; got that of line %d", line); }

int tg_host_barrier(tg_barrier_mode mode, int predicate, int line) {
    Thread& me = *current;
    const Operation& kind = BARRIERS[mode];
    if (barrier.arrived != 0 && (barrier.line != line || barrier.kind != &kind)) fail_barrier(kind, line);
    me.at = &kind, me.line = line, me.mask = 0;
    in_barrier[(&me - threads) / 32] |= 1u << (&me - threads) % 32;
    barrier = {&kind, line, barrier.arrived + 1, barrier.agreed + (predicate != 0)};
    if (barrier.arrived == live) open_barrier();
    wait();
    if (mode == TG_BARRIER_AND) return last_barrier.agreed == last_barrier.arrived;
    return mode == TG_BARRIER_OR ? last_barrier.agreed != 0 : last_barrier.agreed;
}

void tg_host_syncwarp(unsigned mask, int line) { meet(SYNCWARP, mask, nullptr, line); }

unsigned tg_host_vote(tg_vote_mode mode, unsigned mask, int predicate, int line) {
    Vote vote = {predicate, 0};
    meet(VOTES[mode], mask, &vote, line);
    return mode == TG_BALLOT ? vote.ballot : mode == TG_ANY ? vote.ballot != 0 : vote.ballot == mask;
}

unsigned long long tg_host_shuffle(tg_shuffle_mode mode, unsigned mask, u64 bits, int by, int width, int line) {
    Shuffle shuffle = {bits, 0, by, width};
    const Operation& kind = SHUFFLES[mode];
    if (width < 1 || width > 32 || (width & (width - 1))) {
        fail("a width of 1, 2, 4, 8, 16 or 32 at %s of line %d; got %d", kind.name, line, width);
    }
    meet(kind, mask, &shuffle, line);
    return shuffle.result;
}

void tg_host_mma(tg_mma_mode mode, void* d, const unsigned* a, const unsigned* b, int line) {
    Mma mma = {d, a, b};
    meet(MMAS[mode], ~0u, &mma, line);
}

void tg_host_ldmatrix(tg_matrix_mode mode, unsigned* r, const void* row, int line) {
    unsigned lane = (current - threads) % 32;
    if (mode != TG_MATRIX_X2 || lane < 16) want_multiple_of_16(row, LDMATRICES[mode].name, line);
    Ldmatrix request = {r, row};
    meet(LDMATRICES[mode], ~0u, &request, line);
}

void tg_host_copy16(void* shared, const void* global, int line) {
    want_multiple_of_16(shared, "tg_cp_async16", line);
    want_multiple_of_16(global, "tg_cp_async16", line);
    memset(shared, poison(), 16);
    copies_used = true;
    current->copies.push_back({shared, global, current->groups});
}

void tg_host_copy_commit() {
    current->groups++;
    copies_used = true;
}

// Does the copies of all committed groups but the last so many.
void tg_host_copy_wait(int groups) {
    std::vector<Copy>& copies = current->copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group + groups < current->groups; done++) {
        memcpy(copies[done].to, copies[done].from, 16);
    }
    copies.erase(copies.begin(), copies.begin() + done);
}

namespace {

// What a thread stored past its multiprocessor's cache. The blocks that run later in the launch see poison instead, unless the
// thread fenced and its block did an atomic operation after that, by which they may know that it is there.
struct Stored {
    unsigned char *to, content[16];
    unsigned size_bytes;
};
std::vector<Stored> stored[MAX_THREADS], fenced, hidden;  // of threads since their last fence; of the block; of the launch

void hide(std::vector<Stored>& some) {
    for (Stored& one : some) memcpy(one.content, one.to, one.size_bytes);
    hidden.insert(hidden.end(), some.begin(), some.end());
    some.clear();
}

void hide_stored() {
    size_t first = hidden.size();
    hide(fenced);
    for (unsigned i = 0; i < thread_count; i++) hide(stored[i]);
    for (; first < hidden.size(); first++) memset(hidden[first].to, poison(), hidden[first].size_bytes);
}

void show_stored() {  // when a launch is over, however it ended
    for (const Stored& one : hidden) memcpy(one.to, one.content, one.size_bytes);
    hidden.clear();
    fenced.clear();
    for (unsigned i = 0; i < thread_count; i++) stored[i].clear();
}

}  // namespace

void tg_host_stored(void* to, unsigned size_bytes) { stored[current - threads].push_back({(unsigned char*)to, {}, size_bytes}); }

void tg_host_fence() {
    std::vector<Stored>& mine = stored[current - threads];
    fenced.insert(fenced.end(), mine.begin(), mine.end());
    mine.clear();
}

void tg_host_atomic() { fenced.clear(); }

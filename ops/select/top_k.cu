#include "tensorgraph.ops.select:selection.cuh"
// top_k in three ways, by how long rows are and how many. A row is read once (by several blocks: twice, the second time from the
// cache) and little else is; what limits short rows are the exchanges within a warp, and long ones memory.

// A warp for each row of up to 32 * PER elements, held in registers, as those of routers are: the best of all lanes is taken k
// times, k <= 32.
template <int PER, typename X, typename Y> __device__ void top_k_of_warps(const X x, const Y y, int k) {
    using K = typename KeyOf<typename X::type>::type;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, n = row_length(x);
    const i64 n_rows = row_count(y);
    for (i64 at = (i64)blockIdx.x * warps + warp; at < n_rows; at += (i64)gridDim.x * warps) {
        const auto* row = row_at(x, at);
        K keys[PER];
#pragma unroll
        for (int j = 0; j < PER; ++j) {
            int i = 32 * j + lane;
            keys[j] = i < n ? ordered_key<true, K>(float_bits(row[i * row_stride(x)])) : ~(K)0;
        }
        int own = -1;
        for (int place = 0; place < k; ++place) {
            K best = ~(K)0;
            unsigned id = 0;
#pragma unroll
            for (int j = 0; j < PER; ++j) {
                if (keys[j] < best) {
                    best = keys[j];
                    id = 32 * j + lane;
                }
            }
#pragma unroll
            for (int by = 16; by > 0; by /= 2) {
                K other = __shfl_xor_sync(~0u, best, by);
                unsigned other_id = __shfl_xor_sync(~0u, id, by);
                if (is_before(other, other_id, best, id)) {
                    best = other;
                    id = other_id;
                }
            }
            if (best >= Bits<K>::UNABLE) break;
            if (lane == place) own = (int)id;
#pragma unroll
            for (int j = 0; j < PER; ++j)
                if (id == (unsigned)(32 * j + lane)) keys[j] = ~(K)0;
        }
        if (lane < k) row_at(y, at)[lane * row_stride(y)] = own;
    }
}

// The places after the last that was selected are -1.
template <int THREADS> __device__ __forceinline__ void write_ids(const unsigned* ids, int n, int* to, i64 stride, int k) {
    for (int i = threadIdx.x; i < k; i += THREADS) to[i * stride] = i < n ? (int)ids[i] : -1;
}

// A block for each row.
template <int THREADS, typename X, typename Y> __device__ void top_k_of_blocks(const X x, const Y y, int k, int room) {
    using T = typename X::type;
    using K = typename KeyOf<T>::type;
    using Chosen = Best<K, THREADS>;
    constexpr int EACH = 8;
    __shared__ typename Chosen::Shared shared;
    TG_DYNAMIC_SHARED(memory);
    Chosen best(memory, shared, room, k);
    const int n = row_length(x);
    const i64 n_rows = row_count(y);
    for (i64 at = blockIdx.x; at < n_rows; at += gridDim.x) {
        RowKeys<T, THREADS, EACH, true> row(row_at(x, at), row_stride(x), n);
        best.begin();
        for (int first = 0; first < n; first += THREADS * EACH) {
            K keys[EACH];
            unsigned ids[EACH], there = row.load(first, keys, ids);
            best.offer(keys, ids, there);
        }
        int found = best.finish();
        write_ids<THREADS>(best.ids, found, row_at(y, at), row_stride(y), k);
    }
}

// Several blocks for each row, in two launches, of keys of 32 bits. The first counts the highest bits of keys (a digit: a sign,
// an exponent and three bits more) in parts of rows. By these counts each block of the second knows the digit of the k-th least
// key: it lists those of its part that have a lower one, and those that have the same; the block that is the last of its row
// selects from the lists. Where the second list is too long (most keys are nearly alike), it looks through the row instead.
constexpr int PART_THREADS = 512, PART = 2048, DIGITS = 4096, COUNTERS = 16, LISTED = 16384;

struct RowLists {
    unsigned *counts, *n_chosen, *n_listed, *n_done, *chosen, *listed;

    __device__ __forceinline__ static int size(int k) { return DIGITS + COUNTERS + (k + 3) / 4 * 4 + LISTED; }
    __device__ __forceinline__ RowLists(u8* memory, i64 row, int k) {
        counts = (unsigned*)memory + row * size(k);
        n_chosen = counts + DIGITS;
        n_listed = n_chosen + 1;
        n_done = n_chosen + 2;
        chosen = n_chosen + COUNTERS;
        listed = chosen + (k + 3) / 4 * 4;
    }
};

// By all threads of a grid, in a launch before.
__device__ __forceinline__ void clear_lists(u8* memory, i64 n_rows, int k) {
    const int n = DIGITS + COUNTERS;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < n_rows * n; i += (i64)gridDim.x * blockDim.x) {
        i64 row = tg_udiv(i, n);
        RowLists(memory, row, k).counts[i - row * n] = 0;
    }
}
template <typename M, typename Y> __device__ void top_k_clear(const M memory, const Y y, int k) {
    clear_lists(memory.data, row_count(y), k);
}

template <typename X, typename Y, typename M> __device__ void top_k_count(const X x, const Y y, const M memory, int k) {
    constexpr int EACH = PART / PART_THREADS;
    __shared__ unsigned counts[DIGITS];
    const int n = row_length(x), parts = (n + PART) / PART;
    const i64 items = row_count(y) * parts;
    for (i64 item = blockIdx.x; item < items; item += gridDim.x) {
        const i64 at = tg_udiv(item, parts);
        RowKeys<typename X::type, PART_THREADS, EACH, true> row(row_at(x, at), row_stride(x), n);
        for (int i = threadIdx.x; i < DIGITS; i += PART_THREADS) counts[i] = 0;
        __syncthreads();
        const int first = (int)(item - at * parts) * PART;
        if (first < n) {
            unsigned keys[EACH], ids[EACH], there = row.load(first, keys, ids);
#pragma unroll
            for (int j = 0; j < EACH; ++j)
                if ((there >> j & 1) && keys[j] < Bits<unsigned>::UNABLE) atomicAdd(&counts[keys[j] >> 20], 1u);
        }
        __syncthreads();
        unsigned* to = RowLists(memory.data, at, k).counts;
        for (int i = threadIdx.x; i < DIGITS; i += PART_THREADS)
            if (unsigned count = counts[i]) atomicAdd(&to[i], count);
        __syncthreads();
    }
}

template <typename X, typename Y, typename M>
__device__ void top_k_choose(const X x, const Y y, const M memory, int k, int room) {
    using T = typename X::type;
    using Chosen = Best<unsigned, PART_THREADS>;
    constexpr int EACH = PART / PART_THREADS, OWN = DIGITS / PART_THREADS;
    __shared__ typename Chosen::Shared shared;
    __shared__ unsigned digit_of_last, done;
    TG_DYNAMIC_SHARED(chosen_memory);
    Chosen best(chosen_memory, shared, room, k);
    const int n = row_length(x), parts = (n + PART) / PART;
    const i64 items = row_count(y) * parts;
    for (i64 item = blockIdx.x; item < items; item += gridDim.x) {
        const i64 at = tg_udiv(item, parts);
        const RowLists lists(memory.data, at, k);
        RowKeys<T, PART_THREADS, EACH, true> row(row_at(x, at), row_stride(x), n);
        unsigned own[OWN], total = 0;
#pragma unroll
        for (int j = 0; j < OWN; j += 4) {
            const uint4 four = *(const uint4*)(lists.counts + threadIdx.x * OWN + j);
            own[j] = four.x, own[j + 1] = four.y, own[j + 2] = four.z, own[j + 3] = four.w;
            total += four.x + four.y + four.z + four.w;
        }
        if (threadIdx.x == 0) digit_of_last = DIGITS;  // where there are fewer than k
        unsigned before = sum_before<PART_THREADS>(total, shared.sums);
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
            if (before < (unsigned)k && (unsigned)k <= before + own[j]) digit_of_last = threadIdx.x * OWN + j;
            before += own[j];
        }
        __syncthreads();
        const unsigned digit = digit_of_last;
        const int first = (int)(item - at * parts) * PART;
        if (first < n) {
            unsigned keys[EACH], ids[EACH], there = row.load(first, keys, ids), lower = 0, same = 0;
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                if (!(there >> j & 1) || keys[j] >= Bits<unsigned>::UNABLE) continue;
                if (keys[j] >> 20 < digit) lower |= 1u << j;
                if (keys[j] >> 20 == digit) same |= 1u << j;
            }
            Places<EACH> chosen(lower, lists.n_chosen), listed(same, lists.n_listed);
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                unsigned to = chosen.next(j), to_listed = listed.next(j);
                if (lower >> j & 1) lists.chosen[to] = ids[j];
                if ((same >> j & 1) && to_listed < LISTED) lists.listed[to_listed] = ids[j];
            }
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) done = atomicAdd(lists.n_done, 1u) + 1;
        __syncthreads();
        if (done != (unsigned)parts) continue;
        __threadfence();
        const int n_chosen = (int)__ldcg(lists.n_chosen), n_listed = (int)__ldcg(lists.n_listed);
        const bool listed = n_listed <= LISTED;
        const int rest = listed ? n_listed : n;
        best.begin();
        for (int i = 0; i < n_chosen + rest; i += PART_THREADS) {
            int j = i + (int)threadIdx.x;
            unsigned id[1] = {0}, key[1] = {~0u};
            if (j < n_chosen + rest) {
                id[0] = j < n_chosen ? __ldcg(lists.chosen + j) : listed ? __ldcg(lists.listed + (j - n_chosen)) : j - n_chosen;
                key[0] = ordered_key<true, unsigned>(float_bits(row.row[id[0] * row.stride]));
            }
            best.offer(key, id, j < n_chosen || key[0] >> 20 == digit);
        }
        int found = best.finish();
        write_ids<PART_THREADS>(best.ids, found, row_at(y, at), row_stride(y), k);
    }
}

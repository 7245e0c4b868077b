// y[t, u] = a[ids[t, u]] @ b[t, u]. A pair is a token and one of its experts, counted as y's rows are. Few pairs: each reads its
// expert's weights by itself (`mul_mat_id_few`). More: `mul_mat_id_sort` orders them by expert, in one block, and cuts each
// expert's into pieces of as many as a tile has; blocks then walk over pieces, whose number only the device knows: on rows in
// 16 bits (`mul_mat_id_rows`, `mul_mat_id_many`), or in f32 (`mul_mat_id_exact`).
#include "tensorgraph.ops.products:tiles.cuh"

// The expert of a pair, or -1 where it has none or names one that is not there, which is refused.
template <typename I>
__device__ __forceinline__ int expert_of(const Tensor<I, 2>& ids, unsigned pair, i64 n_experts, u64* status, i64 code) {
    unsigned n = (unsigned)ids.shape[1], token = pair / n;
    i64 id = tg_whole(*ids.at(token, pair - token * n));
    if (id >= 0 && id < n_experts) return (int)id;
    if (id != -1 && status != nullptr) tg_refuse(status, code, id, n_experts, 0);
    return -1;
}

// Which row of b, counted over its first two axes, a pair multiplies.
template <typename T, typename I> struct Pairs {
    const Tensor<T, 3>& b;
    unsigned used, each;

    __device__ __forceinline__ Pairs(const Tensor<T, 3>& b, const Tensor<I, 2>& ids)
        : b(b), used((unsigned)ids.shape[1]), each(b.shape[1] == ids.shape[1] ? 1u : (unsigned)ids.shape[1]) {}
    __device__ __forceinline__ unsigned source(unsigned pair) const { return pair / each; }
};

// How pairs are ordered, as ints: the number of pieces; from the fourth on, of each piece its expert, its first place and how
// many places it has; behind the most pieces that there can be, the pair at each place.
struct Order {
    int* words;
    i64 most;

    __device__ __forceinline__ Order(u8* at, i64 n_pairs, i64 n_experts, int tokens)
        : words((int*)at), most(n_pairs / tokens + n_experts) {}
    __device__ __forceinline__ int n_pieces() const { return words[0]; }
    __device__ __forceinline__ int4* piece(i64 n) const { return (int4*)words + 1 + n; }
    __device__ __forceinline__ int* pairs() const { return words + 4 + 4 * most; }
};

template <int LANES, int DEPTH, int ROWS, typename X, typename A, typename T, typename I>
__device__ __forceinline__ void mul_mat_id_few(const A a, const Tensor<T, 3> b, const Tensor<I, 2> ids, const Tensor<float, 3> y,
                                               i64 chunk, u64* status, i64 code) {
    TG_DYNAMIC_SHARED(shared);
    __shared__ float exchange[tg_exchange_floats<LANES, ROWS, 1>()];
    const Pairs<T, I> pairs(b, ids);
    const unsigned height = (unsigned)y.shape[2], per_block = Team<LANES>::teams() * ROWS;
    const unsigned tiles = (height + per_block - 1) / per_block;
    const int n_units = (int)((b.shape[2] + X::unit - 1) / X::unit);
    const X x(shared, (int)chunk);
    i64 held = -1;
    for (i64 item = blockIdx.x; item < tiles * ids.shape[0] * ids.shape[1]; item += gridDim.x) {
        const unsigned pair = (unsigned)item / tiles, tile = (unsigned)item - pair * tiles;
        const unsigned first_row = tile * per_block + Team<LANES>::team() * ROWS;
        const int expert = expert_of(ids, pair, a.shape[0], threadIdx.x == 0 ? status : nullptr, code);
        float* to = y.data + (i64)pair * height;
        if (expert < 0) {
            const unsigned stop = min(height, (tile + 1) * per_block);
            for (unsigned row = tile * per_block + threadIdx.x; row < stop; row += blockDim.x) to[row] = 0.0f;
            continue;
        }
        const auto matrix = tg_matrix(a, expert * tg_step(a, 0));
        const RowsFrom<T, 3> rows{b, pairs.source(pair)};
        float sums[ROWS][1] = {};
        tg_mat_vec<LANES, DEPTH>(sums, matrix, first_row, height, x, n_units, (int)chunk, [&](int first, int count) {
            i64 wanted = (i64)rows.first * n_units + first;
            if (wanted == held) return;
            __syncthreads();
            x.fill(rows, 1, first, count);
            __syncthreads();
            held = wanted;
        });
        tg_finish<LANES>(sums, first_row, height, 1, exchange, [&](int, i64 row, float sum) { to[row] = sum; });
    }
}

// One block. Shared memory: an int for each expert.
template <typename I>
__device__ __forceinline__ void mul_mat_id_sort(const Tensor<I, 2> ids, const Tensor<u8, 1> to, i64 n_experts, i64 tokens,
                                                u64* status, i64 code) {
    TG_DYNAMIC_SHARED(shared);
    int* counts = (int*)shared;  // of each expert's pairs; then its next free place
    const unsigned n_pairs = (unsigned)(ids.shape[0] * ids.shape[1]);
    const Order order(to.data, n_pairs, n_experts, (int)tokens);
    const int experts = (int)n_experts, each = (int)tokens, lane = threadIdx.x & 31;
    if (blockIdx.x > 0) return;
    for (int e = threadIdx.x; e < experts; e += blockDim.x) counts[e] = 0;
    __syncthreads();
    for (unsigned pair = threadIdx.x; pair < n_pairs; pair += blockDim.x) {
        int e = expert_of(ids, pair, n_experts, status, code);
        if (e >= 0) atomicAdd(&counts[e], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        int places = 0, before = 0;
        for (int from = 0; from < experts; from += 32) {
            int e = from + lane, count = e < experts ? counts[e] : 0, own = (count + each - 1) / each, sum = count, all = own;
#pragma unroll
            for (int apart = 1; apart < 32; apart *= 2) {
                int more = __shfl_up_sync(~0u, sum, apart), others = __shfl_up_sync(~0u, all, apart);
                if (lane >= apart) sum += more, all += others;
            }
            int first = places + sum - count, number = before + all - own;
            if (e < experts) {
                counts[e] = first;
                for (int i = 0; i < own; ++i)
                    *order.piece(number + i) = make_int4(e, first + i * each, min(count - i * each, each), 0);
            }
            places += __shfl_sync(~0u, sum, 31);
            before += __shfl_sync(~0u, all, 31);
        }
        if (lane == 0) order.words[0] = before;
    }
    __syncthreads();
    for (unsigned pair = threadIdx.x; pair < n_pairs; pair += blockDim.x) {
        int e = expert_of(ids, pair, n_experts, nullptr, code);
        if (e >= 0) order.pairs()[atomicAdd(&counts[e], 1)] = (int)pair;
    }
}

// Zeros for pairs without an expert; all threads of a block.
template <typename I>
__device__ __forceinline__ void clear_pair(const Tensor<I, 2>& ids, const Tensor<float, 3>& y, unsigned pair, i64 n_experts) {
    if (expert_of(ids, pair, n_experts, nullptr, 0) >= 0) return;
    for (i64 row = threadIdx.x; row < y.shape[2]; row += blockDim.x) y.data[pair * y.shape[2] + row] = 0.0f;
}

// Rows of b in 16 bits, and results of pairs without an expert.
template <bool BRAIN, typename T, typename I>
__device__ __forceinline__ void mul_mat_id_rows(const Tensor<T, 3> b, const Tensor<I, 2> ids, i64 n_experts,
                                                const Tensor<u8, 1> to, const Tensor<float, 3> y, i64 padded) {
    const i64 n_rows = b.shape[0] * b.shape[1], n_pairs = ids.shape[0] * ids.shape[1];
    const Prepared x(to.data, n_rows, padded);
    for (i64 item = blockIdx.x; item < n_rows + n_pairs; item += gridDim.x) {
        if (item < n_rows) x.write<BRAIN>(item, tg_row(b, (unsigned)item));
        else clear_pair(ids, y, (unsigned)(item - n_rows), n_experts);
    }
}

template <int BN, int BM, int WARPS_N, int STAGES, int DEPTH, typename A, typename T, typename I>
__device__ __forceinline__ void mul_mat_id_many(const A a, const Tensor<T, 3> b, const Tensor<I, 2> ids,
                                                const Tensor<u8, 1> order_of, const Tensor<u8, 1> rows, const Tensor<float, 3> y,
                                                i64 padded) {
    const i64 height = y.shape[2];
    const Order order(order_of.data, ids.shape[0] * ids.shape[1], a.shape[0], BN);
    const Pairs<T, I> pairs(b, ids);
    const Prepared x(rows.data, b.shape[0] * b.shape[1], padded);
    const unsigned across = (unsigned)((height + BM - 1) / BM);
    for (unsigned item = blockIdx.x; item < (unsigned)order.n_pieces() * across; item += gridDim.x) {
        const unsigned number = item / across;
        const int4 piece = *order.piece(number);
        const unsigned row = (item - number * across) * BM;
        const int* mine = order.pairs() + piece.y;
        const auto matrix = tg_matrix(a, piece.x * tg_step(a, 0));
        const auto weights = tg_tile_of(matrix, row, height);
        auto place = [&](int n) { return (i64)pairs.source((unsigned)mine[n]); };
        auto store = [&](int n, int m, float u, float v) {
            tg_store_two(y.data + (unsigned)mine[n] * height, row + m, height, u, v);
        };
        tg_mma_tile<BN, BM, WARPS_N, STAGES, DEPTH>(weights, x, (int)(padded / TG_STEP), piece.z, place, store);
    }
}

template <typename A, typename T, typename I>
__device__ __forceinline__ void mul_mat_id_exact(const A a, const Tensor<T, 3> b, const Tensor<I, 2> ids,
                                                 const Tensor<u8, 1> order_of, const Tensor<float, 3> y) {
    const i64 height = y.shape[2];
    const unsigned n_pairs = (unsigned)(ids.shape[0] * ids.shape[1]);
    const Order order(order_of.data, n_pairs, a.shape[0], TG_SIDE);
    const Pairs<T, I> pairs(b, ids);
    const unsigned across = (unsigned)((height + TG_SIDE - 1) / TG_SIDE);
    for (i64 item = blockIdx.x; item < (i64)order.n_pieces() * across; item += gridDim.x) {
        const unsigned number = (unsigned)item / across;
        const int4 piece = *order.piece(number);
        const i64 row = (i64)((unsigned)item - number * across) * TG_SIDE;
        const int* mine = order.pairs() + piece.y;
        const auto matrix = tg_matrix(a, piece.x * tg_step(a, 0));
        auto weights = tg_fma_of(matrix, row, height);
        auto row_of = [&](int n) { return tg_row(b, pairs.source((unsigned)mine[n])); };
        auto store = [&](int n, int m, float4 sums) {
            tg_store_four(y.data + (unsigned)mine[n] * height, row + m, height, sums);
        };
        tg_fma_tile(weights, row_of, (int)((b.shape[2] + TG_STEP - 1) / TG_STEP), piece.z, store);
    }
    for (unsigned pair = blockIdx.x; pair < n_pairs; pair += gridDim.x) clear_pair(ids, y, pair, a.shape[0]);
}

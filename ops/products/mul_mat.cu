// y[*B, N, M] = b[*B, N, K] @ a[*A, M, K]^T. Few rows of b: `mul_mat_few`, which reads the weights once and is limited by that
// (mat_vec.cuh); rows that are too long for shared memory are made ready by `mul_mat_x`. Many: `mul_mat_rows` puts b into 16 bits
// for `mul_mat_many`, by tensor cores; or `mul_mat_exact` in f32 (tiles.cuh). SINGLE: there is one matrix, and all axes of b but
// the last count as rows.
#include "tensorgraph.ops.products:tiles.cuh"

template <bool SINGLE, typename T, int N> struct Batch {
    i64 count, tokens;

    __device__ __forceinline__ Batch(const Tensor<T, N>& b) : count(1), tokens(SINGLE ? 1 : b.shape[N - 2]) {
#pragma unroll
        for (int i = 0; i < N - (SINGLE ? 1 : 2); ++i) (SINGLE ? tokens : count) *= b.shape[i];
    }
};

template <bool SINGLE, typename A, typename B>
__device__ __forceinline__ auto matrix_of(const A& a, const B& b, unsigned number) {
    if constexpr (SINGLE) return tg_matrix(a, 0);
    else return tg_matrix_of(a, b, number);
}

constexpr int MUL_MAT_PIECE = 64;  // units of a row that a block makes ready

// Bytes of the rows of one entry of a batch that are made ready: the next entry's begin at a multiple of 16, too.
template <typename X> __device__ __forceinline__ i64 ready_bytes(int n_units) {
    return ((i64)(X::tokens * X::unit_bytes) * n_units + 15) / 16 * 16;
}

template <typename X, bool SINGLE, typename T, int N>
__device__ __forceinline__ void mul_mat_x(const Tensor<T, N> b, const Tensor<u8, 1> to) {
    const Batch<SINGLE, T, N> batch(b);
    const int n_units = (int)((b.shape[N - 1] + X::unit - 1) / X::unit);
    const unsigned pieces = (unsigned)((n_units + MUL_MAT_PIECE - 1) / MUL_MAT_PIECE), tokens = (unsigned)batch.tokens;
    for (i64 item = blockIdx.x; item < batch.count * tokens * pieces; item += gridDim.x) {
        const unsigned row = (unsigned)item / pieces, number = row / tokens;
        const int first = (int)((unsigned)item - row * pieces) * MUL_MAT_PIECE;
        const X x(to.data + number * ready_bytes<X>(n_units), n_units);
        x.from((int)(row - number * tokens), first).fill(RowsFrom<T, N>{b, row}, 1, first, min(MUL_MAT_PIECE, n_units - first));
    }
}

template <int LANES, int DEPTH, int ROWS, typename X, bool SINGLE, typename A, typename T, int N, typename Ready>
__device__ __forceinline__ void mul_mat_few(const A a, const Tensor<T, N> b, const Ready ready, const Tensor<float, N> y,
                                            i64 chunk) {
    TG_DYNAMIC_SHARED(shared);
    __shared__ float exchange[tg_exchange_floats<LANES, ROWS, X::tokens>()];
    const Batch<SINGLE, T, N> batch(b);
    const unsigned height = (unsigned)y.shape[N - 1], per_block = Team<LANES>::teams() * ROWS;
    const unsigned tiles = (height + per_block - 1) / per_block;
    const int n_units = (int)((b.shape[N - 1] + X::unit - 1) / X::unit), tokens = (int)batch.tokens;
    i64 held = -1;
    for (i64 item = blockIdx.x; item < tiles * batch.count; item += gridDim.x) {
        const unsigned number = (unsigned)item / tiles, tile = (unsigned)item - number * tiles;
        const unsigned first_row = tile * per_block + Team<LANES>::team() * ROWS;
        const auto matrix = matrix_of<SINGLE>(a, b, number);
        const RowsFrom<T, N> rows{b, number * (unsigned)tokens};
        float sums[ROWS][X::tokens] = {};
        if constexpr (tg_is_absent((const Ready*)nullptr)) {
            const X x(shared, (int)chunk);
            tg_mat_vec<LANES, DEPTH>(sums, matrix, first_row, height, x, n_units, (int)chunk, [&](int first, int count) {
                i64 wanted = (i64)number * n_units + first;
                if (wanted == held) return;
                __syncthreads();
                x.fill(rows, tokens, first, count);
                __syncthreads();
                held = wanted;
            });
        } else {
            const X x(ready.data + number * ready_bytes<X>(n_units), n_units);
            tg_mat_vec<LANES, DEPTH>(sums, matrix, first_row, height, x, n_units, n_units, [](int, int) {});
        }
        float* to = y.data + (i64)number * tokens * height;
        tg_finish<LANES>(sums, first_row, height, tokens, exchange,
                         [&](int token, i64 row, float sum) { to[token * (i64)height + row] = sum; });
    }
}

template <bool BRAIN, typename T, int N>
__device__ __forceinline__ void mul_mat_rows(const Tensor<T, N> b, const Tensor<u8, 1> to, i64 padded) {
    const Batch<true, T, N> all(b);
    const Prepared x(to.data, all.tokens, padded);
    for (i64 number = blockIdx.x; number < all.tokens; number += gridDim.x) x.write<BRAIN>(number, tg_row(b, (unsigned)number));
}

// Tiles of a batch's results: those of one row of tiles of weights are neighbours.
template <int BN, int BM> struct Tiles {
    unsigned across, each;

    __device__ __forceinline__ Tiles(i64 tokens, i64 height)
        : across((unsigned)((height + BM - 1) / BM)), each((unsigned)((tokens + BN - 1) / BN) * across) {}
    __device__ __forceinline__ void at(unsigned item, unsigned& number, i64& token, i64& row) const {
        number = item / each;
        unsigned tile = item - number * each, down = tile / across;
        token = (i64)down * BN;
        row = (i64)(tile - down * across) * BM;
    }
};

template <int BN, int BM, int WARPS_N, int STAGES, int DEPTH, bool SINGLE, typename A, typename T, int N>
__device__ __forceinline__ void mul_mat_many(const A a, const Tensor<T, N> b, const Tensor<u8, 1> rows, const Tensor<float, N> y,
                                             i64 padded) {
    const Batch<SINGLE, T, N> batch(b);
    const i64 height = y.shape[N - 1], tokens = batch.tokens;
    const Tiles<BN, BM> tiles(tokens, height);
    const Prepared x(rows.data, batch.count * tokens, padded);
    for (i64 item = blockIdx.x; item < batch.count * tiles.each; item += gridDim.x) {
        unsigned number;
        i64 token, row;
        tiles.at((unsigned)item, number, token, row);
        const i64 first = number * tokens + token;
        const auto matrix = matrix_of<SINGLE>(a, b, number);
        const auto weights = tg_tile_of(matrix, row, height);
        const int count = tokens - token < BN ? (int)(tokens - token) : BN;
        auto place = [&](int n) { return first + n; };
        auto store = [&](int n, int m, float u, float v) { tg_store_two(y.data + (first + n) * height, row + m, height, u, v); };
        tg_mma_tile<BN, BM, WARPS_N, STAGES, DEPTH>(weights, x, (int)(padded / TG_STEP), count, place, store);
    }
}

template <bool SINGLE, typename A, typename T, int N>
__device__ __forceinline__ void mul_mat_exact(const A a, const Tensor<T, N> b, const Tensor<float, N> y) {
    const Batch<SINGLE, T, N> batch(b);
    const i64 height = y.shape[N - 1], tokens = batch.tokens;
    const Tiles<TG_SIDE, TG_SIDE> tiles(tokens, height);
    for (i64 item = blockIdx.x; item < batch.count * tiles.each; item += gridDim.x) {
        unsigned number;
        i64 token, row;
        tiles.at((unsigned)item, number, token, row);
        const i64 first = number * tokens + token;
        const auto matrix = matrix_of<SINGLE>(a, b, number);
        auto weights = tg_fma_of(matrix, row, height);
        const int count = tokens - token < TG_SIDE ? (int)(tokens - token) : TG_SIDE;
        auto row_of = [&](int n) { return tg_row(b, (unsigned)(first + n)); };
        auto store = [&](int n, int m, float4 sums) { tg_store_four(y.data + (first + n) * height, row + m, height, sums); };
        tg_fma_tile(weights, row_of, (int)((b.shape[N - 1] + TG_STEP - 1) / TG_STEP), count, store);
    }
}

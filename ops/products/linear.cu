// Products of a few rows with several matrices in one launch, with what comes before them and what follows: an RMS norm of the rows;
// bias, gate, rotation of neighbours, residual, and rows that are appended to streams.
//
// Each block makes the rows for itself in shared memory, once, while its first weights are on their way: of a few rows of 16 KB that
// is less than what a launch of its own costs. Blocks take tiles of rows of weights over all parts in turn; a thread that has a
// result has its neighbour's too, so that pairs are rotated where they are. Weights are limited by memory, as in mat_vec.cuh.
#include "tensorgraph.ops.products:mat_vec.cuh"

// Rows of activations as they are, or divided by the root of the mean of their squares and weighed.
template <typename T, typename W> struct NormedRows {
    const Tensor<T, 2>& x;
    const W& weight;
    const float* scales;

    struct One {
        Row<T> row;
        const W& weight;
        float scale;
        __device__ __forceinline__ float4 four(int k) const {
            float4 v = row.four(k);
            v = make_float4(v.x * scale, v.y * scale, v.z * scale, v.w * scale);
            if constexpr (!tg_is_absent((const W*)nullptr)) {
                Row<typename W::type> by(weight.data, weight.strides[0], (int)weight.shape[0]);
                float4 w = by.four(k);
                v = make_float4(v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w);
            }
            return v;
        }
    };
    __device__ __forceinline__ One row(int token) const { return {tg_row(x, token), weight, scales[token]}; }
};

// 1 / sqrt(mean of squares + eps) of each row, by all threads of the block.
template <int TOKENS, typename T>
__device__ __forceinline__ void norm_scales(float* scales, float* shared, const Tensor<T, 2>& x, int n_tokens, float eps) {
    int width = (int)x.shape[1], lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll 1
    for (int token = 0; token < n_tokens; ++token) {
        Row<T> row = tg_row(x, token);
        float sum = 0.0f;
        for (int k = 4 * threadIdx.x; k < width; k += 4 * blockDim.x) {
            float4 v = row.four(k);
            sum = tg_dot(v, v, sum);
        }
#pragma unroll
        for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
        if (lane == 0) shared[warp] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            float total = shared[0];
            for (int w = 1; w < blockDim.x / 32; ++w) total += shared[w];
            scales[token] = 1.0f / sqrtf(total / (float)width + eps);
        }
        __syncthreads();
    }
}

// One result: the rows of `w` (of `w` and `v`, a gate and what it gates), and what is done to them.
template <int LANES, int DEPTH, int TURN, typename W, typename V, typename Bias, typename Residual, typename Table, typename Y> struct Part {
    const W& w;
    const V& v;
    const Bias& bias;
    const Residual& residual;
    const Table& table;
    const Y& y;
    static constexpr bool GATED = !tg_is_absent((const V*)nullptr), TURNED = TURN > 0;
    static constexpr int ROWS = TURNED ? 2 : 1;

    __device__ __forceinline__ unsigned height() const { return (unsigned)w.shape[0]; }
    __device__ __forceinline__ unsigned per_block() const { return blockDim.x / LANES * ROWS; }
    __device__ __forceinline__ unsigned tiles() const { return (height() + per_block() - 1) / per_block(); }

    template <typename X, typename Fill>
    __device__ __forceinline__ void run(unsigned tile, const X& x, int n_units, int chunk, int n_tokens, const Fill& fill) const {
        const unsigned first_row = tile * per_block() + Team<LANES>::team() * ROWS;
        float sums[ROWS][X::tokens] = {}, others[GATED ? ROWS : 1][X::tokens] = {};
        tg_mat_vec<LANES, DEPTH>(sums, tg_matrix(w, 0), first_row, height(), x, n_units, chunk, fill);
        all_lanes(sums);
        if constexpr (GATED) {
            tg_mat_vec<LANES, DEPTH>(others, tg_matrix(v, 0), first_row, height(), x, n_units, chunk, fill);
            all_lanes(others);
        }
        constexpr int count = ROWS * X::tokens;
#pragma unroll
        for (int from = 0; from < count; from += LANES) {
            int i = from + Team<LANES>::lane(), token = i / ROWS, row = (int)first_row + i % ROWS;
            float value = 0.0f, beside = 0.0f, gated = 0.0f;
#pragma unroll
            for (int j = from; j < count && j < from + LANES; ++j) {
                value = i == j ? sums[j % ROWS][j / ROWS] : value;
                if (TURNED) beside = i == j ? sums[(j % ROWS) ^ (ROWS - 1)][j / ROWS] : beside;
                if (GATED) gated = i == j ? others[j % ROWS][j / ROWS] : gated;
            }
            if (i < count && token < n_tokens && row < (int)height()) finish(token, row, value, beside, gated);
        }
    }

    template <int N, int M> static __device__ __forceinline__ void all_lanes(float (&sums)[N][M]) {
#pragma unroll
        for (int r = 0; r < N; ++r)
#pragma unroll
            for (int t = 0; t < M; ++t)
#pragma unroll
                for (int apart = LANES / 2; apart > 0; apart /= 2) sums[r][t] += __shfl_xor_sync(~0u, sums[r][t], apart);
    }

    __device__ __forceinline__ void finish(int token, int row, float value, float beside, float gated) const {
        if constexpr (!tg_is_absent((const Bias*)nullptr)) {
            value += tg_float(*bias.at(row));
            if (TURNED) beside += tg_float(*bias.at(row ^ 1));
        }
        if constexpr (GATED) value = tg_unit(value, gated);
        if constexpr (TURNED) {
            const float* angle = table.data + (i64)token * TURN + row % TURN / 2 * 2;
            value = fmaf(value, angle[0], row & 1 ? beside * angle[1] : -(beside * angle[1]));
        }
        if constexpr (!tg_is_absent((const Residual*)nullptr)) value += *residual.at(token, row);
        put(y, token, row, value);
    }
    template <typename T> static __device__ __forceinline__ void put(const Tensor<T, 2>& y, int token, int row, float value) {
        tg_set(*y.at(token, row), value);
    }
    template <typename T, int N> static __device__ __forceinline__ void put(const Stream<T, N>& y, int token, int row, float value) {
        tg_set(y.added(token)[row], value);
    }
};

template <int LANES, int DEPTH, int TURN, typename W, typename V, typename Bias, typename Residual, typename Table, typename Y>
__device__ __forceinline__ Part<LANES, DEPTH, TURN, W, V, Bias, Residual, Table, Y> part(
    const W& w, const V& v, const Bias& bias, const Residual& residual, const Table& table, const Y& y) {
    return {w, v, bias, residual, table, y};
}

__device__ __forceinline__ unsigned all_tiles() { return 0; }
template <typename First, typename... Rest> __device__ __forceinline__ unsigned all_tiles(const First& first, const Rest&... rest) {
    return first.tiles() + all_tiles(rest...);
}
template <typename X, typename Fill>
__device__ __forceinline__ void run_tile(unsigned tile, const X& x, int n_units, int chunk, int n_tokens, const Fill& fill) {}
template <typename X, typename Fill, typename First, typename... Rest>
__device__ __forceinline__ void run_tile(unsigned tile, const X& x, int n_units, int chunk, int n_tokens, const Fill& fill,
                                         const First& first, const Rest&... rest) {
    unsigned own = first.tiles();
    if (tile < own) first.run(tile, x, n_units, chunk, n_tokens, fill);
    else run_tile(tile - own, x, n_units, chunk, n_tokens, fill, rest...);
}

template <typename X, bool NORM, typename T, typename W, typename... Parts>
__device__ __forceinline__ void linear(const Tensor<T, 2>& x, const W& weight, float eps, i64 chunk, const Parts&... parts) {
    TG_DYNAMIC_SHARED(shared);
    __shared__ float scales[X::tokens], partial[32];
    const X rows(shared, (int)chunk);
    const int n_tokens = (int)x.shape[0], n_units = (int)((x.shape[1] + X::unit - 1) / X::unit);
    if (NORM) norm_scales<X::tokens>(scales, partial, x, n_tokens, eps);
    int held = -1;
    auto fill = [&](int first, int count) {
        if (first == held) return;
        __syncthreads();
        if constexpr (NORM) rows.fill(NormedRows<T, W>{x, weight, scales}, n_tokens, first, count);
        else rows.fill(RowsFrom<T, 2>{x, 0}, n_tokens, first, count);
        __syncthreads();
        held = first;
    };
    for (unsigned tile = blockIdx.x; tile < all_tiles(parts...); tile += gridDim.x)
        run_tile(tile, rows, n_units, (int)chunk, n_tokens, fill, parts...);
}

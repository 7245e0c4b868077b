// A mixture of experts for a few tokens in two launches: gate, up and their unit for each pair of a token and one of its experts; then
// down, weighed and summed over a token's experts, with what is added to it. Weights are read where they lie, once for each pair that
// names their expert; what limits it is memory, as in mat_vec.cuh. A block has one row of activations in shared memory at a time.
#include "tensorgraph.ops.products:mul_mat_id.cu"

// The sums of all lanes of a team that is at most a warp, in each of them.
template <int LANES> __device__ __forceinline__ float lane_sum(float sum) {
#pragma unroll
    for (int apart = LANES / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
    return sum;
}

template <typename Bias> __device__ __forceinline__ float bias_of(const Bias& bias, int expert, unsigned row) {
    if constexpr (tg_is_absent((const Bias*)nullptr)) return 0.0f;
    else return tg_float(*bias.at(expert, row));
}

// units [T * U, M] in f32.
template <int LANES, int DEPTH, typename X, typename T, typename I, typename Gate, typename Up, typename GateBias, typename UpBias>
__device__ __forceinline__ void expert_units(const Tensor<T, 3> b, const Tensor<I, 2> ids, const Gate gate, const Up up,
                                             const GateBias gate_bias, const UpBias up_bias, const Tensor<u8, 1> units, i64 chunk,
                                             u64* status, i64 code) {
    TG_DYNAMIC_SHARED(shared);
    const Pairs<T, I> pairs(b, ids);
    const unsigned height = (unsigned)gate.shape[1], per_block = Team<LANES>::teams(), tiles = (height + per_block - 1) / per_block;
    const int n_units = (int)((b.shape[2] + X::unit - 1) / X::unit);
    const X x(shared, (int)chunk);
    i64 held = -1;
    for (i64 item = blockIdx.x; item < tiles * ids.shape[0] * ids.shape[1]; item += gridDim.x) {
        const unsigned pair = (unsigned)item / tiles, tile = (unsigned)item - pair * tiles;
        const unsigned row = tile * per_block + Team<LANES>::team();
        const int expert = expert_of(ids, pair, gate.shape[0], threadIdx.x == 0 ? status : nullptr, code);
        if (expert < 0) continue;
        const RowsFrom<T, 3> rows{b, pairs.source(pair)};
        auto fill = [&](int first, int count) {
            i64 wanted = (i64)rows.first * n_units + first;
            if (wanted == held) return;
            __syncthreads();
            x.fill(rows, 1, first, count);
            __syncthreads();
            held = wanted;
        };
        float sums[1][1] = {}, others[1][1] = {};
        tg_mat_vec<LANES, DEPTH>(sums, tg_matrix(gate, expert * tg_step(gate, 0)), row, height, x, n_units, (int)chunk, fill);
        tg_mat_vec<LANES, DEPTH>(others, tg_matrix(up, expert * tg_step(up, 0)), row, height, x, n_units, (int)chunk, fill);
        float a = lane_sum<LANES>(sums[0][0]), b_sum = lane_sum<LANES>(others[0][0]);
        if (row < height && Team<LANES>::lane() == 0) {
            a += bias_of(gate_bias, expert, row), b_sum += bias_of(up_bias, expert, row);
            ((float*)units.data)[(i64)pair * height + row] = tg_unit(a, b_sum);
        }
    }
}

template <typename More> __device__ __forceinline__ float more_of(const More& more, unsigned token, unsigned row) {
    if constexpr (tg_is_absent((const More*)nullptr)) return 0.0f;
    else return *more.at(token, row);
}

// A row of units.
struct UnitsRow {
    const float* units;
    int width;
    __device__ __forceinline__ Row<float> row(int) const { return {units, 1, width}; }
};

template <int LANES, int DEPTH, typename X, typename I, typename Down, typename Bias, typename W, typename More0, typename More1>
__device__ __forceinline__ void expert_sums(const Tensor<u8, 1> units, const Tensor<I, 2> ids, const Down down, const Bias bias,
                                            const Tensor<W, 3> w, const More0 more0, const More1 more1, const Tensor<float, 2> y,
                                            i64 chunk) {
    TG_DYNAMIC_SHARED(shared);
    const unsigned height = (unsigned)down.shape[1], per_block = Team<LANES>::teams(), tiles = (height + per_block - 1) / per_block;
    const int width = (int)down.shape[2], n_used = (int)ids.shape[1], n_units = (width + X::unit - 1) / X::unit;
    const X x(shared, (int)chunk);
    i64 held = -1;
    for (i64 item = blockIdx.x; item < tiles * ids.shape[0]; item += gridDim.x) {
        const unsigned token = (unsigned)item / tiles, tile = (unsigned)item - token * tiles;
        const unsigned row = tile * per_block + Team<LANES>::team();
        float total = 0.0f;
#pragma unroll 1
        for (int u = 0; u < n_used; ++u) {
            const unsigned pair = token * n_used + u;
            const int expert = expert_of(ids, pair, down.shape[0], nullptr, 0);
            if (expert < 0) continue;
            float sums[1][1] = {};
            tg_mat_vec<LANES, DEPTH>(sums, tg_matrix(down, expert * tg_step(down, 0)), row, height, x, n_units, (int)chunk,
                                     [&](int first, int count) {
                                         i64 wanted = (i64)pair * n_units + first;
                                         if (wanted == held) return;
                                         __syncthreads();
                                         x.fill(UnitsRow{(const float*)units.data + (i64)pair * width, width}, 1, first, count);
                                         __syncthreads();
                                         held = wanted;
                                     });
            float sum = lane_sum<LANES>(sums[0][0]);
            if (row < height) total = fmaf(tg_float(*w.at(token, u, 0)), sum + bias_of(bias, expert, row), total);
        }
        if (row < height && Team<LANES>::lane() == 0)
            *y.at(token, row) = total + more_of(more0, token, row) + more_of(more1, token, row);
    }
}

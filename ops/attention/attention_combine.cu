#include "tensorgraph.ops.attention:attention.cuh"
// The parts of what each query sees, put together; a sink is one more logit. TWOS: logits are those of powers of two.
//
// A block is 128 channels of one query of one head. Its four warps each read a fourth of the splits, of those that saw a row,
// several at a time: what this takes is the time of a few reads one after another.

template <int TOKENS, int HEADS, int ROWS, int SLOTS, bool TWOS, typename Sinks>
__device__ __forceinline__ void combine(const Tensor<u8, 1> partial, const Sinks sinks, const Tensor<float, 3> y, i64 n_kv) {
    constexpr int WARPS = 4, CHANNELS = 128;
    __shared__ float weights[SLOTS], sums[WARPS][CHANNELS];
    const Cut<TOKENS, HEADS, ROWS, SLOTS> cut((int)y.shape[0], y.shape[1], n_kv);
    if (cut.splits <= 1) return;
    i64 d_v = y.shape[2], apart = (i64)cut.parts * ROWS;  // partial results of neighbouring splits
    unsigned chunks = (unsigned)((d_v + CHANNELS - 1) / CHANNELS), n_items = (unsigned)cut.n_tokens * cut.n_heads * chunks;
    int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    for (unsigned item = blockIdx.x; item < n_items; item += gridDim.x) {
        unsigned channel = item % chunks * CHANNELS, rest = item / chunks, head = rest % cut.n_heads, token = rest / cut.n_heads;
        unsigned within = head % cut.group, part = head / cut.group * cut.pieces + within / HEADS;
        unsigned row = token % TOKENS * HEADS + within % HEADS;
        i64 first = cut.partial(token / TOKENS, 0, part, row);
        const float *from = floats(partial) + first * d_v, *tops = floats(partial) + cut.tops(d_v) + 2 * first;
        if (warp == 0) {
            float top = nothing(), total = 0.0f, sink = nothing();
            if constexpr (is_here<Sinks>) sink = tg_float(*sinks.at(head)) * (TWOS ? LOG2_E : 1.0f);
            for (unsigned i = lane; i < cut.splits; i += 32) top = fmaxf(top, tops[2 * i * apart]);
#pragma unroll
            for (int by = 16; by > 0; by /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, by));
            top = fmaxf(top, sink);
            float base = top == nothing() ? 0.0f : top;
            for (unsigned i = lane; i < cut.splits; i += 32) {
                float own = tops[2 * i * apart + 1], weight = tops[2 * i * apart] - base;
                weight = own == 0.0f ? 0.0f : TWOS ? exp2f(weight) : expf(weight);
                weights[i] = weight;
                total += own == 0.0f ? 0.0f : own * weight;
            }
#pragma unroll
            for (int by = 16; by > 0; by /= 2) total += __shfl_xor_sync(~0u, total, by);
            total += TWOS ? exp2f(sink - base) : expf(sink - base);
            float factor = 1.0f / (total == 0.0f ? 1.0f : total);
            for (unsigned i = lane; i < cut.splits; i += 32) weights[i] *= factor;
        }
        __syncthreads();
        float sum[CHANNELS / 32] = {};
#pragma unroll 4
        for (unsigned i = warp; i < cut.splits; i += WARPS) {
            float weight = weights[i];
#pragma unroll
            for (int j = 0; j < CHANNELS / 32; ++j) {
                unsigned own = channel + j * 32 + lane;
                if (weight != 0.0f && own < d_v) sum[j] = fmaf(weight, from[i * apart * d_v + own], sum[j]);
            }
        }
#pragma unroll
        for (int j = 0; j < CHANNELS / 32; ++j) sums[warp][j * 32 + lane] = sum[j];
        __syncthreads();
        unsigned own = channel + thread;
        if (own < d_v) *y.at(token, head, own) = sums[0][thread] + sums[1][thread] + sums[2][thread] + sums[3][thread];
        __syncthreads();
    }
}

#include "tensorgraph.ops.attention:attention.cuh"
// The parts of what each query sees, put together; a sink is one more logit. A block is one query of one head: it reads as much
// as the splits wrote, of those that saw a row. TWOS: logits are those of powers of two.

template <int TOKENS, int HEADS, int ROWS, int SLOTS, bool TWOS, typename Sinks>
__device__ __forceinline__ void combine(const Tensor<u8, 1> partial, const Sinks sinks, const Tensor<float, 3> y, i64 n_kv) {
    __shared__ float weights[SLOTS];
    const Cut<TOKENS, HEADS, ROWS, SLOTS> cut(y.shape[0], y.shape[1], n_kv);
    i64 d_v = y.shape[2];
    const float *sums = (const float*)partial.data, *tops = sums + cut.tops(d_v);
    int thread = threadIdx.x;
    for (i64 item = blockIdx.x; item < (cut.splits > 1 ? y.shape[0] * y.shape[1] : 0); item += gridDim.x) {
        unsigned token = (unsigned)item / cut.n_heads, head = (unsigned)item % cut.n_heads, tile = token / TOKENS;
        unsigned kv = head / cut.group, within = head % cut.group, part = kv * cut.pieces + within / HEADS;
        unsigned row = token % TOKENS * HEADS + within % HEADS;
        if (thread < 32) {
            float top = nothing(), total = 0.0f;
            for (unsigned i = thread; i < cut.splits; i += 32) top = fmaxf(top, tops[2 * cut.partial(tile, i, part, row)]);
#pragma unroll
            for (int by = 16; by > 0; by /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, by));
            float sink = nothing();
            if constexpr (is_here<Sinks>) sink = tg_float(*sinks.at(head)) * (TWOS ? LOG2_E : 1.0f);
            top = fmaxf(top, sink);
            float base = top == nothing() ? 0.0f : top;
            for (unsigned i = thread; i < cut.splits; i += 32) {
                const float* own = tops + 2 * cut.partial(tile, i, part, row);
                float weight = own[1] == 0.0f ? 0.0f : TWOS ? exp2f(own[0] - base) : expf(own[0] - base);
                weights[i] = weight;
                total += own[1] == 0.0f ? 0.0f : own[1] * weight;
            }
#pragma unroll
            for (int by = 16; by > 0; by /= 2) total += __shfl_xor_sync(~0u, total, by);
            total += TWOS ? exp2f(sink - base) : expf(sink - base);
            float factor = 1.0f / (total == 0.0f ? 1.0f : total);
            for (unsigned i = thread; i < cut.splits; i += 32) weights[i] *= factor;
        }
        __syncthreads();
        for (i64 channel = thread; channel < d_v; channel += blockDim.x) {
            float sum = 0.0f;
#pragma unroll 4
            for (unsigned i = 0; i < cut.splits; ++i) {
                float weight = weights[i];
                if (weight != 0.0f) sum = fmaf(weight, sums[cut.partial(tile, i, part, row) * d_v + channel], sum);
            }
            *y.at(token, head, channel) = sum;
        }
        __syncthreads();
    }
}

// The parts of what a tile's queries see, put together in the launch that leaves them, by the block that leaves the last of them.
// It is for few queries of a tile: one block reads the parts of all of them. Of more, attention_combine.cu has a block for each.

template <typename T> constexpr bool is_counters = false;
template <> constexpr bool is_counters<unsigned*> = true;

// What is given behind all segments, where it is.
__device__ __forceinline__ unsigned* counters_of() { return nullptr; }
__device__ __forceinline__ unsigned* counters_of(unsigned* counters) { return counters; }
template <typename First, typename... Rest>
__device__ __forceinline__ unsigned* counters_of(const First&, const Rest&... rest) { return counters_of(rest...); }

// Whether this block is the last of `n` that count here; what all of them wrote before may be read then. The counter is 0 again.
__device__ __forceinline__ bool is_last(unsigned* counter, unsigned n) {
    __threadfence();  // what this thread wrote is there for all before its block is counted
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
        last = atomicAdd(counter, 1u) == n - 1;
        if (last) *counter = 0;
    }
    last = __syncthreads_or(last);
    if (last) __threadfence();  // and what is read is read after that
    return last;
}

// N numbers side by side, as other blocks left them: not out of this multiprocessor's own cache.
template <int N> struct Several { float of[N]; };
template <int N> __device__ __forceinline__ Several<N> fetched(const float* at) {
    if constexpr (N == 4) {
        uint4 x = __ldcg((const uint4*)at);
        return {__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)};
    } else if constexpr (N == 2) {
        uint2 x = __ldcg((const uint2*)at);
        return {__uint_as_float(x.x), __uint_as_float(x.y)};
    } else {
        return {__ldcg(at)};
    }
}

// Each warp puts together the results of every WARPS-th query of a tile, in the order of splits whichever block does it. A lane
// has the weights of one or two splits, and N of every 32 N channels, of AHEAD splits at once. TWOS: as in `combine`.
template <int WARPS, int N, bool TWOS, typename C, typename Sinks>
__device__ __forceinline__ void put_together(const C& cut, const Piece& p, unsigned part, int d_v, const float* partial,
                                             const Sinks& sinks, const Tensor<float, 3>& y) {
    static_assert(C::SLOTS <= 64, "a lane has the weights of two splits");
    constexpr int AHEAD = 16;  // what a part takes is the time of reads one after another
    int lane = threadIdx.x % 32;
    i64 apart = (i64)cut.parts * C::ROWS;
#pragma unroll 1
    for (int r = threadIdx.x / 32; r < C::ROWS; r += WARPS) {
        int t = r / C::HEADS, h = r % C::HEADS;
        if (t >= p.n_tokens || h >= p.n_heads) continue;
        i64 first = cut.partial((unsigned)p.token / C::TOKENS, 0, part, r);
        float tops[2] = {nothing(), nothing()}, totals[2] = {};
        unsigned used = 0;  // splits up to the last that saw a row
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            unsigned split = k * 32 + lane;
            if (split < cut.splits) {
                auto found = fetched<2>(partial + p.tops + 2 * (first + split * apart));
                tops[k] = found.of[0], totals[k] = found.of[1];
            }
            unsigned saw = __ballot_sync(~0u, totals[k] != 0.0f);
            if (saw != 0) used = k * 32 + 32 - __clz((int)saw);
        }
        float sink = nothing(), top = fmaxf(tops[0], tops[1]);
        if constexpr (is_here<Sinks>) sink = tg_float(*sinks.at(p.head + h)) * (TWOS ? LOG2_E : 1.0f);
#pragma unroll
        for (int by = 16; by > 0; by /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, by));
        top = fmaxf(top, sink);
        float base = top == nothing() ? 0.0f : top, weights[2], total = 0.0f;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            float own = TWOS ? exp2f(tops[k] - base) : expf(tops[k] - base);
            weights[k] = totals[k] == 0.0f ? 0.0f : own;
            total += totals[k] == 0.0f ? 0.0f : totals[k] * own;
        }
#pragma unroll
        for (int by = 16; by > 0; by /= 2) total += __shfl_xor_sync(~0u, total, by);
        total += TWOS ? exp2f(sink - base) : expf(sink - base);
        float factor = 1.0f / (total == 0.0f ? 1.0f : total);
        weights[0] *= factor, weights[1] *= factor;
        const float* from = partial + first * d_v;
        float* to = y.at(p.token + t, p.head + h);
#pragma unroll 1
        for (int channel = lane * N; channel - lane * N < d_v; channel += 32 * N) {
            Several<N> sum = {};
#pragma unroll 1
            for (unsigned i = 0; i < used; i += AHEAD) {
                Several<N> x[AHEAD];
                float weight[AHEAD];
#pragma unroll
                for (int j = 0; j < AHEAD; ++j) {
                    weight[j] = __shfl_sync(~0u, i < 32 ? weights[0] : weights[1], (i + j) % 32);
                    x[j] = {};  // of a split that saw nothing no channel was written
                    if (weight[j] != 0.0f && channel < d_v) x[j] = fetched<N>(from + (i + j) * apart * d_v + channel);
                }
#pragma unroll
                for (int j = 0; j < AHEAD; ++j)
#pragma unroll
                    for (int n = 0; n < N; ++n) sum.of[n] = fmaf(weight[j], x[j].of[n], sum.of[n]);
            }
#pragma unroll
            for (int n = 0; n < N; ++n)
                if (channel < d_v) to[(channel + n) * y.strides[2]] = sum.of[n];
        }
    }
}

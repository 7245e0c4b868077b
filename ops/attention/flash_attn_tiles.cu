#include "tensorgraph.ops.attention:attention_products.cuh"
#include "tensorgraph.ops.attention:attention_last.cuh"
// flash_attn by tensor cores: keys and values of f16 or bf16 as they are, of f32 rounded to tf32; queries and weights rounded to
// the same, sums in f32. f16 has no room for large queries, so each is brought to 1..2 first by a power of two.
//
// A tile is 16 WM queries by BLOCK candidates, for WM x WN warps. Logits: each warp has 16 queries and BLOCK / WN candidates;
// sums: 16 queries and 1 / WN of the channels, in registers. Where WN is 1, weights stay in registers too; else all warps of the
// same queries exchange maxima and weights through shared memory. One token has WM = 1 and WN = 4: the rows of its kv head are
// read once for all of its heads, and the many channels of a latent are shared by the warps. Prompts have WM = 4, WN = 1 (2, 4
// where values are wide).
//
// Rows are copied asynchronously, those of the next tile while this one is computed (STAGES = 2), by 16 bytes; one that no token
// sees is not read but cleared, so that nothing in it counts. A row that only some of the tokens see may still hold an infinite
// number, which no weight makes 0: where a result is not finite the tile is computed again, token by token.

// Dynamic shared memory: queries, weights and maxima [WN][ROWS] that warps exchange, rows.
template <typename S, bool OWN_VALUES> struct Places {
    static constexpr int WEIGHTS = S::ROWS * S::Q_BYTES, TOPS = WEIGHTS + (S::WN > 1 ? S::ROWS * S::P_BYTES : 0);
    static constexpr int STAGES = TOPS + (S::WN > 1 ? S::WN * S::ROWS * 4 : 0);
    static constexpr int STAGE_BYTES = S::BLOCK * (S::K_BYTES + (OWN_VALUES ? S::V_BYTES : 0));
    char* q;

    __device__ __forceinline__ char* weights() const { return q + WEIGHTS; }
    __device__ __forceinline__ float* tops() const { return (float*)(q + TOPS); }
    __device__ __forceinline__ char* keys(int stage) const { return q + STAGES + stage * STAGE_BYTES; }
    __device__ __forceinline__ char* values(int stage) const { return keys(stage) + S::BLOCK * S::K_BYTES; }
};

// What is small, and static. Much of it is here to be out of registers.
template <typename S, typename C, typename N, int SEGMENTS> struct Small {
    static constexpr int COUNT = SEGMENTS;
    u64 seen[3][S::BLOCK];  // of three tiles: one may be computed, one copied, one looked for
    int numbers[3][S::BLOCK];
    const char *keys[S::BLOCK], *values[S::BLOCK];
    float factors[S::ROWS];
    N limits[C::TOKENS][3];
    u64 active;  // tokens
    View<N> view;
    int end, n_tokens, rows[SEGMENTS];
    Piece piece;
};

// Logits become weights, and what was summed is brought to the new maxima.
template <typename S, typename C, typename L, typename Segment, typename Room>
__device__ __forceinline__ void weigh(const Segment& segment, const Room& small, float* exchanged, int slot, bool all,
                                      float (&s)[S::LOGITS][4], State<S>& state) {
    const auto [lane, wm, wn] = Stand<S>();
    float tops[2] = {nothing(), nothing()};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int r = wm * 16 + half * 8 + lane / 4, t = r / C::HEADS, h = r % C::HEADS;
        float factor = small.factors[r];
#pragma unroll
        for (int n = 0; n < S::LOGITS; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                int column = (wn * S::LOGITS + n) * 8 + lane % 4 * 2 + j;
                float x = s[n][half * 2 + j] * factor;
                if constexpr (L::CAPPED) x = L::cap() * LOG2_E * tanhf(x / L::cap());
                if (!all || Segment::MASKED) {
                    bool sees = small.seen[slot][column] >> t & 1;
                    if constexpr (Segment::MASKED) {
                        const Piece& p = small.piece;
                        if (sees && h < p.n_heads)
                            x = fmaf(added(segment.mask, p.head + h, p.token + t, small.numbers[slot][column]), LOG2_E, x);
                    }
                    x = sees ? x : nothing();
                }
                s[n][half * 2 + j] = x;
                tops[half] = fmaxf(tops[half], x);
            }
        tops[half] = fmaxf(tops[half], __shfl_xor_sync(~0u, tops[half], 1));
        tops[half] = fmaxf(tops[half], __shfl_xor_sync(~0u, tops[half], 2));
        if (S::WN > 1 && lane % 4 == 0) exchanged[wn * S::ROWS + r] = tops[half];
    }
    if constexpr (S::WN > 1) __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int r = wm * 16 + half * 8 + lane / 4;
        if constexpr (S::WN > 1) {
#pragma unroll
            for (int i = 0; i < S::WN; ++i) tops[half] = fmaxf(tops[half], exchanged[i * S::ROWS + r]);
        }
        float top = fmaxf(tops[half], state.tops[half]), base = top == nothing() ? 0.0f : top;
        float factor = exp2f(state.tops[half] - base), lower = base - S::Math::SHIFT, total = 0.0f;
        state.tops[half] = top;
#pragma unroll
        for (int n = 0; n < S::LOGITS; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float weight = exp2f(s[n][half * 2 + j] - lower);
                s[n][half * 2 + j] = weight;
                total += weight;
            }
        state.totals[half] = fmaf(state.totals[half], factor, total);
#pragma unroll
        for (int n = 0; n < S::SUMS; ++n) state.sums[n][half * 2] *= factor, state.sums[n][half * 2 + 1] *= factor;
    }
}

template <typename S, typename C, typename L, typename N, typename Q, typename Room, typename Where>
__device__ __forceinline__ void attend(const End&, const Q&, const Where&, Room&, State<S>&, int) {}

// A piece's candidates of the segments that are left, `before` being those of the others, for the tokens that are active.
template <typename S, typename C, typename L, typename N, typename Q, typename Room, typename Where, typename First,
          typename Next>
__device__ __forceinline__ void attend(const Chain<First, Next>& chain, const Q& queries, const Where& places, Room& small,
                                       State<S>& state, int before) {
    constexpr int SEGMENT = Room::COUNT - Chain<First, Next>::COUNT;
    const First& segment = chain.segment;
    int thread = threadIdx.x;
    __syncthreads();  // what is small may be in use
    {
        const View<N> view = survey<N, C>(segment, small.rows[SEGMENT], queries, small.piece, small.limits);
        if (thread == 0) small.view = view, small.end = min(small.piece.to - before, view.to - view.from);
    }
    __syncthreads();
    int next = max(small.piece.from - before, 0);
    i64 k_step = step_of(segment.k), v_step = k_step;
    bool whole_k = in_sixteens(segment.k), whole_v = whole_k;
    if constexpr (First::OWN_VALUES) v_step = step_of(segment.v), whole_v = in_sixteens(segment.v);
    int slot = 0, stage = 0;
    bool whole = true;  // whether all of the active tokens see this thread's candidate

    auto find = [&](int to) -> bool {  // the next tile with rows that are seen
        int thread = afresh(threadIdx.x);
#pragma unroll 1
        while (next < small.end) {
            bool seen = false;
            whole = true;
            if (thread < S::BLOCK) {
                Candidate found = {0, 0, nullptr, nullptr};
                if (next + thread < small.end)
                    found = look<C, N>(segment, queries, small.piece, small.view, small.limits, small.view.from + next + thread,
                                       small.active);
                small.seen[to][thread] = found.seen;
                small.keys[thread] = found.key;
                if constexpr (First::OWN_VALUES) small.values[thread] = found.value;
                if constexpr (First::MASKED) small.numbers[to][thread] = found.number;
                seen = found.seen != 0, whole = found.seen == (small.active & first_bits(small.piece.n_tokens));
            }
            next += S::BLOCK;
            if (__syncthreads_or(seen)) return true;
        }
        return false;
    };
    auto copy = [&](int to) {
        copy_rows<S, S::D_K>(places.keys(to), S::K_BYTES, small.keys, whole_k, k_step);
        if constexpr (First::OWN_VALUES) copy_rows<S, S::D_V>(places.values(to), S::V_BYTES, small.values, whole_v, v_step);
        tg_cp_async_commit();
    };

    bool more = find(slot);
    if constexpr (S::STAGES == 2) {
        if (more) copy(stage);
        __syncthreads();  // before addresses are those of the next tile
    }
#pragma unroll 1
    while (more) {
        bool all = whole;
        int following = slot == 2 ? 0 : slot + 1;
        if constexpr (S::STAGES == 2) {
            more = find(following);
            if (more) {
                copy(stage ^ 1);
                tg_cp_async_wait<1>();
            } else {
                tg_cp_async_wait<0>();
            }
        } else {
            copy(stage);
            tg_cp_async_wait<0>();
        }
        all = __syncthreads_and(all);
        float s[S::LOGITS][4] = {};
        multiply_keys<S>(places.q, places.keys(stage), s);
        weigh<S, C, L>(segment, small, places.tops(), slot, all, s, state);
        if constexpr (S::WN > 1) {
            leave_weights<S>(places.weights(), s);
            __syncthreads();
        }
        const char* values = First::OWN_VALUES ? places.values(stage) : places.keys(stage);
        multiply_values<S>(values, First::OWN_VALUES ? S::V_BYTES : S::K_BYTES, places.weights(), s, state);
        if constexpr (S::STAGES == 2) stage ^= 1;
        else more = find(following);
        slot = following;
    }
    attend<S, C, L, N>(chain.next, queries, places, small, state, before + small.view.to - small.view.from);
}

// Totals over a query's candidates, of all warps; whether all that was summed is finite.
template <typename S> __device__ __forceinline__ bool finish(float* exchanged, State<S>& state) {
    constexpr float BACK = 1.0f / (1 << S::Math::SHIFT);
    const auto [lane, wm, wn] = Stand<S>();
    float rest = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float total = state.totals[half] * BACK;
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        state.totals[half] = total;
    }
    if constexpr (S::WN > 1) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (lane % 4 == 0) exchanged[wn * S::ROWS + wm * 16 + half * 8 + lane / 4] = state.totals[half];
        __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            state.totals[half] = 0.0f;
#pragma unroll
            for (int i = 0; i < S::WN; ++i) state.totals[half] += exchanged[i * S::ROWS + wm * 16 + half * 8 + lane / 4];
        }
    }
#pragma unroll
    for (int n = 0; n < S::SUMS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) rest = fmaf(state.sums[n][i], 0.0f, rest), state.sums[n][i] *= BACK;
    return rest == 0.0f;
}

// y [T, H, Dv], or parts of it in `partial` where there are splits, of logits that are those of powers of two; where counters
// are given too, the last block of a tile's puts them together.
template <typename S, int TOKENS, int HEADS, int SLOTS, typename L, typename R, typename Q, typename Sinks, typename Pos,
          typename Seq, typename Partial, typename... Given>
__device__ __forceinline__ void flash_attn_tiles(const Q q, const Sinks sinks, const Pos pos, const Seq seq,
                                                 const Tensor<float, 3> y, const Partial partial, i64 n_kv,
                                                 const Given... given) {
    using C = Cut<TOKENS, HEADS, S::ROWS, SLOTS>;
    TG_DYNAMIC_SHARED(smem);
    const auto segments = chain(R{}, given...);
    const Queries<Q, Pos, Seq> queries = {q, pos, seq};
    using N = typename Chosen<decltype(segments)::WIDE || decltype(queries)::WIDE, i64, int>::type;
    __shared__ Small<S, C, N, decltype(segments)::COUNT> small;
    using Where = Places<S, decltype(segments)::OWN_VALUES>;
    const Where places = {(char*)smem};
    int thread = threadIdx.x;
    for (int i = thread; i < S::STAGES * Where::STAGE_BYTES / 16; i += S::THREADS)  // what is beside rows is read, but not copied
        ((uint4*)places.keys(0))[i] = make_uint4(0, 0, 0, 0);
    if (thread == 0) small.n_tokens = (int)q.shape[0], note_rows(segments, small.rows);
    __syncthreads();
    for (unsigned item = blockIdx.x;; item += gridDim.x) {
        const C cut(small.n_tokens, q.shape[1], n_kv);
        if (item >= cut.tiles * cut.splits * cut.parts) break;
        __syncthreads();
        {
            const Piece p = shared_out<S::BLOCK, N>(cut, item, S::D_V, segments, small.rows, queries, small.limits);
            if (thread == 0) small.piece = p;
        }
        __syncthreads();
        const Piece& p = small.piece;
        load_queries<S, C, L>(q, p, places.q, small.factors);
        bool again = false;
#pragma unroll 1
        for (int attempt = -1; attempt < (again ? p.n_tokens : 0); ++attempt) {
            State<S> state = {};
            state.tops[0] = state.tops[1] = nothing();
            if (attempt > 0) __syncthreads();  // of the one before, what is left may be being written
            if (thread == 0) small.active = attempt < 0 ? ~0ull : 1ull << attempt;
            attend<S, C, L, N>(segments, queries, places, small, state, 0);
            bool fine = finish<S>(places.tops(), state);
            if (TOKENS > 1 && attempt < 0) again = __syncthreads_or(!fine);
            if (again && attempt < 0) continue;
            const auto [lane, wm, wn] = Stand<S>();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int r = wm * 16 + half * 8 + lane / 4, t = r / HEADS, h = r % HEADS;
                if (t >= p.n_tokens || h >= p.n_heads || !(small.active >> t & 1)) continue;
                float factor = 1.0f, total = state.totals[half];
                float* row;
                if (p.divided) {
                    float* tops = floats(partial) + p.tops + 2 * (p.partial + r);
                    if (wn == 0 && lane % 4 == 0) __stcg(tops, state.tops[half]), __stcg(tops + 1, total);
                    if (total == 0.0f) continue;  // of what saw nothing no more is read
                    row = floats(partial) + (p.partial + r) * S::D_V;
                } else {
                    if constexpr (is_here<Sinks>) {
                        float sink = tg_float(*sinks.at(p.head + h)) * LOG2_E, top = fmaxf(state.tops[half], sink);
                        float base = top == nothing() ? 0.0f : top;
                        factor = exp2f(state.tops[half] - base);
                        total = fmaf(total, factor, exp2f(sink - base));
                    }
                    factor /= total == 0.0f ? 1.0f : total;
                    row = y.at(p.token + t, p.head + h);
                }
#pragma unroll
                for (int n = 0; n < S::SUMS; ++n)
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        int channel = (wn * S::SUMS + n) * 8 + lane % 4 * 2 + j;
                        if (channel < S::D_V) __stcg(row + channel, state.sums[n][half * 2 + j] * factor);
                    }
            }
        }
        if constexpr ((is_counters<Given> || ...)) {
            const C cut(small.n_tokens, q.shape[1], n_kv);
            unsigned part = item % cut.parts, tile = (unsigned)p.token / TOKENS;
            constexpr int N = S::D_V % 4 == 0 && S::D_V > 64 ? 4 : S::D_V % 2 == 0 && S::D_V > 32 ? 2 : 1;
            if (p.divided && is_last(counters_of(given...) + tile * cut.parts + part, cut.splits))
                put_together<S::THREADS / 32, N, true>(cut, p, part, S::D_V, floats(partial), sinks, y);
        }
    }
}

#include "tensorgraph.ops.attention:attention.cuh"
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

struct HalfMath {
    using Element = u16;
    static constexpr bool SCALED = true;
    static constexpr int SHIFT = 14;  // weights are at most 2 to this, so that small ones do not vanish
    static __device__ __forceinline__ u16 rounded(float x) { return tg_float_to_half(x); }
    static __device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
        const unsigned b[2] = {b0, b1};
        tg_mma_f16_16816(d, a, b);
    }
};
struct BrainMath {
    using Element = u16;
    static constexpr bool SCALED = false;
    static constexpr int SHIFT = 0;
    static __device__ __forceinline__ u16 rounded(float x) {
        Brain y;
        tg_set(y, x);
        return y.bits;
    }
    static __device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
        const unsigned b[2] = {b0, b1};
        tg_mma_bf16_16816(d, a, b);
    }
};
struct FloatMath {
    using Element = float;
    static constexpr bool SCALED = false;
    static constexpr int SHIFT = 0;
    static __device__ __forceinline__ float rounded(float x) { return __uint_as_float(tg_float_to_tf32(x)); }
    static __device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
        const unsigned b[2] = {tg_float_to_tf32(__uint_as_float(b0)), tg_float_to_tf32(__uint_as_float(b1))};
        tg_mma_tf32_1688(d, a, b);
    }
};

// The shape of tiles, and where things lie in shared memory. Rows there end 16 bytes after a multiple of 32, so that those of a
// matrix of 8 x 16 bytes lie in different banks. SHARED: values are the first channels of keys, in some segment.
template <typename Math_, int WM_, int WN_, int BLOCK_, int STAGES_, int D_K_, int D_V_, bool SHARED_> struct Shape {
    using Math = Math_;
    using Element = typename Math::Element;
    static constexpr int WM = WM_, WN = WN_, BLOCK = BLOCK_, STAGES = STAGES_, D_K = D_K_, D_V = D_V_, SIZE = sizeof(Element);
    static constexpr int THREADS = 32 * WM * WN, ROWS = 16 * WM, STEP = 32 / SIZE;  // channels of a product
    static constexpr int WIDE_K = (D_K + STEP - 1) / STEP * STEP, WIDE_V = (D_V + 16 * WN - 1) / (16 * WN) * (16 * WN);
    static constexpr int LONGER = SHARED_ && WIDE_V > WIDE_K ? WIDE_V : WIDE_K;
    static constexpr int Q_BYTES = WIDE_K * SIZE + 16, K_BYTES = LONGER * SIZE + 16, V_BYTES = WIDE_V * SIZE + 16;
    static constexpr int P_BYTES = BLOCK * SIZE + 16;
    static constexpr int LOGITS = BLOCK / 8 / WN, SUMS = WIDE_V / 8 / WN;  // of a warp, by 8
    static_assert(LOGITS == 1 || LOGITS % 2 == 0, "candidates of a warp");
};

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
template <typename S, typename C, typename N> struct Small {
    u64 seen[3][S::BLOCK];  // of three tiles: one may be computed, one copied, one looked for
    int numbers[3][S::BLOCK];
    const char *keys[S::BLOCK], *values[S::BLOCK];
    float factors[S::ROWS];
    N limits[C::TOKENS][3];
    u64 active;  // tokens
    View<N> view;
    int end;
    Piece piece;
};

template <typename S> struct State {
    float sums[S::SUMS][4], tops[2], totals[2];  // of queries lane / 4 and lane / 4 + 8 of this warp's
};

// Where a thread stands: its lane, and its warp along queries and along candidates or channels.
template <typename S> struct Stand {
    int lane, wm, wn;
    __device__ __forceinline__ Stand() {
        int thread = afresh(threadIdx.x);
        lane = thread % 32, wm = thread / 32 % S::WM, wn = thread / 32 / S::WM;
    }
};

// Copies of rows of WIDTH elements, `step` apart where they do not lie side by side; zeros for those that are not there.
template <typename S, int WIDTH>
__device__ __forceinline__ void copy_rows(char* to, int row_bytes, const char* const* from, bool whole, i64 step) {
    using Element = typename S::Element;
    if (whole) {
        constexpr int PIECES = WIDTH * S::SIZE / 16 > 0 ? WIDTH * S::SIZE / 16 : 1, UNROLL = S::SUMS >= 16 ? 1 : 2;
#pragma unroll UNROLL
        for (int i = afresh(threadIdx.x); i < S::BLOCK * PIECES; i += S::THREADS) {
            int row = i / PIECES, at = i % PIECES * 16;
            const char* source = from[row];
            if (source != nullptr) tg_cp_async16(to + row * row_bytes + at, source + at);
            else *(uint4*)(to + row * row_bytes + at) = make_uint4(0, 0, 0, 0);
        }
    } else {
#pragma unroll 1
        for (int i = afresh(threadIdx.x); i < S::BLOCK * WIDTH; i += S::THREADS) {
            int row = i / WIDTH, at = i % WIDTH;
            const Element* source = (const Element*)from[row];
            ((Element*)(to + row * row_bytes))[at] = source != nullptr ? source[at * step] : (Element)0;
        }
    }
}

// Queries of a tile, rounded; those that are not there are 0. `factors` is what logits are multiplied by. A warp has a few
// queries at a time in registers, so that it waits for memory once for all of them.
template <typename S, typename C, typename L, typename Q>
__device__ __forceinline__ void load_queries(const Q& q, const Piece& p, char* to, float* factors) {
    constexpr int EACH = (S::WIDE_K + 31) / 32, AT_ONCE = EACH <= 4 ? 4 : EACH <= 8 ? 2 : 1, WARPS = S::THREADS / 32;
    static_assert(S::ROWS / WARPS % AT_ONCE == 0, "queries of a warp");
    int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = threadIdx.x / 32 * AT_ONCE; first < S::ROWS; first += WARPS * AT_ONCE) {
        float x[AT_ONCE][EACH];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            int t = (first + j) / C::HEADS, h = (first + j) % C::HEADS;
            bool there = t < p.n_tokens && h < p.n_heads;
            const auto* row = q.at(there ? p.token + t : 0, there ? p.head + h : 0);
#pragma unroll
            for (int i = 0; i < EACH; ++i)
                x[j][i] = there && i * 32 + lane < S::D_K ? tg_float(row[(i * 32 + lane) * q.strides[2]]) : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
            float by = 1.0f, back = 1.0f;
            if constexpr (S::Math::SCALED) {
                float most = 0.0f;
#pragma unroll
                for (int i = 0; i < EACH; ++i) most = fmaxf(most, fabsf(x[j][i]));
#pragma unroll
                for (int other = 16; other > 0; other /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, other));
                int power = __float_as_int(most) >> 23;  // 0 and 255: nothing to bring anywhere
                if (power > 0 && power < 254) by = __int_as_float((254 - power) << 23), back = __int_as_float(power << 23);
            }
            auto* row = (typename S::Element*)(to + (first + j) * S::Q_BYTES);
#pragma unroll
            for (int i = 0; i < EACH; ++i)
                if (i * 32 + lane < S::WIDE_K) row[i * 32 + lane] = S::Math::rounded(x[j][i] * by);
            if (lane == 0) factors[first + j] = back * L::scale() * (L::CAPPED ? 1.0f : LOG2_E);
        }
    }
}

// Logits of this warp's queries and candidates, not yet scaled.
template <typename S>
__device__ __forceinline__ void multiply_keys(const char* q, const char* keys, float (&s)[S::LOGITS][4]) {
    const auto [lane, wm, wn] = Stand<S>();
    const char* a_at = q + (wm * 16 + lane % 16) * S::Q_BYTES + lane / 16 * 16;
    const char* b_at = keys + (wn * S::LOGITS * 8 + lane % 8 + (S::LOGITS > 1 ? lane / 16 * 8 : 0)) * S::K_BYTES + lane / 8 % 2 * 16;
#pragma unroll 4
    for (int k = 0; k < S::WIDE_K / S::STEP; ++k) {
        unsigned a[4];
        tg_ldmatrix_x4(a, a_at + k * 32);
        if constexpr (S::LOGITS == 1) {
            unsigned b[2];
            tg_ldmatrix_x2(b, b_at + k * 32);
            S::Math::multiply(s[0], a, b[0], b[1]);
        } else {
#pragma unroll
            for (int n = 0; n < S::LOGITS; n += 2) {
                unsigned b[4];
                tg_ldmatrix_x4(b, b_at + n * 8 * S::K_BYTES + k * 32);
                S::Math::multiply(s[n], a, b[0], b[1]);
                S::Math::multiply(s[n + 1], a, b[2], b[3]);
            }
        }
    }
}

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
                        if (sees && h < small.piece.n_heads)
                            x = fmaf(added(segment.mask, small.piece.head + h, small.piece.token + t, small.numbers[slot][column]), LOG2_E, x);
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

template <typename S> __device__ __forceinline__ unsigned pair(float a, float b) {
    return (unsigned)S::Math::rounded(a) | (unsigned)S::Math::rounded(b) << 16;
}
template <typename S> __device__ __forceinline__ unsigned bits(float x) { return __float_as_uint(S::Math::rounded(x)); }

// Weights [16 WM, BLOCK] for all warps. Of f32, two neighbours stand 4 apart, as `multiply_values` takes them.
template <typename S> __device__ __forceinline__ void leave_weights(char* to, const float (&s)[S::LOGITS][4]) {
    const auto [lane, wm, wn] = Stand<S>();
#pragma unroll
    for (int n = 0; n < S::LOGITS; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            char* row = to + (wm * 16 + half * 8 + lane / 4) * S::P_BYTES + (wn * S::LOGITS + n) * 8 * S::SIZE;
            float a = s[n][half * 2], b = s[n][half * 2 + 1];
            if constexpr (S::SIZE == 2) *(unsigned*)(row + lane % 4 * 4) = pair<S>(a, b);
            else ((unsigned*)row)[lane % 4] = bits<S>(a), ((unsigned*)row)[lane % 4 + 4] = bits<S>(b);
        }
}

// Sums of this warp's channels. A product goes over STEP candidates; in f32 its columns t and t + 4 are candidates 2 t and
// 2 t + 1, as a lane has them of the logits.
template <typename S>
__device__ __forceinline__ void multiply_values(const char* values, int row_bytes, const char* weights,
                                                const float (&s)[S::LOGITS][4], State<S>& state) {
    const auto [lane, wm, wn] = Stand<S>();
    const char* a_at = weights + (wm * 16 + lane % 16) * S::P_BYTES + lane / 16 * 16;
    const char* b_at = values + wn * S::SUMS * 8 * S::SIZE;
    b_at += S::SIZE == 2 ? lane % 16 * row_bytes + lane / 16 * 16 : lane % 4 * 2 * row_bytes + lane / 4 * 4;
    constexpr int UNROLL = S::WN > 1 && S::SUMS >= 16 ? 1 : S::BLOCK / S::STEP;  // registers are few where sums are many
#pragma unroll UNROLL
    for (int k = 0; k < S::BLOCK / S::STEP; ++k) {
        unsigned a[4];
        if constexpr (S::WN > 1) {
            tg_ldmatrix_x4(a, a_at + k * 32);
        } else if constexpr (S::SIZE == 2) {
            a[0] = pair<S>(s[2 * k][0], s[2 * k][1]), a[1] = pair<S>(s[2 * k][2], s[2 * k][3]);
            a[2] = pair<S>(s[2 * k + 1][0], s[2 * k + 1][1]), a[3] = pair<S>(s[2 * k + 1][2], s[2 * k + 1][3]);
        } else {
            a[0] = bits<S>(s[k][0]), a[1] = bits<S>(s[k][2]), a[2] = bits<S>(s[k][1]), a[3] = bits<S>(s[k][3]);
        }
        const char* rows = b_at + k * S::STEP * row_bytes;
#pragma unroll
        for (int n = 0; n < S::SUMS; n += 2) {
            if constexpr (S::SIZE == 2) {
                unsigned b[4];
                tg_ldmatrix_x4_trans(b, rows + n * 16);
                S::Math::multiply(state.sums[n], a, b[0], b[1]);
                S::Math::multiply(state.sums[n + 1], a, b[2], b[3]);
            } else {
#pragma unroll
                for (int i = n; i < n + 2; ++i)
                    S::Math::multiply(state.sums[i], a, *(const unsigned*)(rows + i * 32), *(const unsigned*)(rows + row_bytes + i * 32));
            }
        }
    }
}

template <typename S, typename C, typename L, typename N, typename Q, typename Room, typename Where>
__device__ __forceinline__ void attend(const End&, const Q&, const Where&, Room&, State<S>&, int) {}

// A piece's candidates of the segments that are left, `before` being those of the others, for the tokens that are active.
template <typename S, typename C, typename L, typename N, typename Q, typename Room, typename Where, typename First, typename Next>
__device__ __forceinline__ void attend(const Chain<First, Next>& chain, const Q& queries, const Where& places, Room& small,
                                       State<S>& state, int before) {
    const First& segment = chain.segment;
    int thread = threadIdx.x;
    __syncthreads();  // what is small may be in use
    {
        const View<N> view = survey<N, C>(segment, queries, small.piece, small.limits);
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

// y [T, H, Dv], or parts of it in `partial` where there are splits, of logits that are those of powers of two.
template <typename S, int TOKENS, int HEADS, int SLOTS, typename L, typename R, typename Q, typename Sinks, typename Pos,
          typename Seq, typename Partial, typename... Given>
__device__ __forceinline__ void flash_attn_tiles(const Q q, const Sinks sinks, const Pos pos, const Seq seq,
                                                 const Tensor<float, 3> y, const Partial partial, i64 n_kv, const Given... given) {
    using C = Cut<TOKENS, HEADS, S::ROWS, SLOTS>;
    TG_DYNAMIC_SHARED(smem);
    const auto segments = chain(R{}, given...);
    const Queries<Q, Pos, Seq> queries = {q, pos, seq};
    using N = typename Chosen<decltype(segments)::WIDE || decltype(queries)::WIDE, i64, int>::type;
    __shared__ Small<S, C, N> small;
    using Where = Places<S, decltype(segments)::OWN_VALUES>;
    const Where places = {(char*)smem};
    int thread = threadIdx.x;
    for (int i = thread; i < S::STAGES * Where::STAGE_BYTES / 16; i += S::THREADS)  // what is beside rows is read, but not copied
        ((uint4*)places.keys(0))[i] = make_uint4(0, 0, 0, 0);
    for (unsigned item = blockIdx.x;; item += gridDim.x) {
        const C cut(q.shape[0], q.shape[1], n_kv);
        if (item >= cut.tiles * cut.splits * cut.parts) break;
        __syncthreads();
        {
            const Piece p = shared_out<S::BLOCK, N>(cut, item, S::D_V, segments, queries, small.limits);
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
                    if (wn == 0 && lane % 4 == 0) tops[0] = state.tops[half], tops[1] = total;
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
                        if (channel < S::D_V) row[channel] = state.sums[n][half * 2 + j] * factor;
                    }
            }
        }
    }
}

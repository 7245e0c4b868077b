#include "tensorgraph.ops.attention:attention.cuh"
#include "tensorgraph.ops.attention:attention_last.cuh"
// flash_attn of anything the op allows, all of it in f32: any types, widths and strides. It is what is exact, and what the
// tiles of tensor cores (flash_attn_tiles.cu) do not take; it need not be fast, but is cut into splits as they are.
//
// A block of 128 threads takes a tile of 16 queries and goes through candidates by 32: a lane is a candidate, whose products
// with 4 queries of a warp are summed channel by channel out of shared memory, so that the soft-max of a query is within a
// warp. Values are read from global memory once: a thread has up to 4 of CHANNELS channels, of all queries (or half of them).
// Of wider values another block has the channels that follow, and the same products again.

constexpr int BLOCK = 32, ROWS = 16, THREADS = 128;

template <int CHANNELS> struct Sums {
    static constexpr int EACH = CHANNELS > THREADS ? CHANNELS / THREADS : 1;       // channels of a thread
    static constexpr int N = CHANNELS >= THREADS ? ROWS : ROWS * CHANNELS / THREADS;  // queries of a thread
    float of[N][EACH];
};

template <typename N, int SEGMENTS> struct Shared {
    static constexpr int COUNT = SEGMENTS;
    int rows[SEGMENTS];
    float q[ROWS][BLOCK], k[BLOCK][BLOCK + 1], weights[BLOCK][ROWS], factors[ROWS];
    u64 seen[BLOCK];
    const char *keys[BLOCK], *values[BLOCK];
    int numbers[BLOCK];
    N limits[ROWS][3];
};

template <typename N, typename L, typename C, int CHANNELS, typename Q, typename Room>
__device__ __forceinline__ void attend(const End&, const Q&, const Piece&, Room&, Sums<CHANNELS>&, float (&)[4], float (&)[4],
                                       int, i64, i64) {}

// A piece's candidates of the segments that are left, `before` being those of the others. `tops`, `totals`: of the queries
// 4 w + i of warp w.
template <typename N, typename L, typename C, int CHANNELS, typename Q, typename Room, typename First, typename Next>
__device__ __forceinline__ void attend(const Chain<First, Next>& chain, const Q& queries, const Piece& p, Room& shared,
                                       Sums<CHANNELS>& sums, float (&tops)[4], float (&totals)[4], int before, i64 channel,
                                       i64 d_v) {
    const First& segment = chain.segment;
    int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const View<N> view = survey<N, C>(segment, shared.rows[Room::COUNT - Chain<First, Next>::COUNT], queries, p, shared.limits);
    __syncthreads();
    int n = view.to - view.from, begin = max(p.from - before, 0), end = min(p.to - before, n);
    i64 d_k = queries.q.shape[2];
    i64 k_step = step_of(segment.k), v_step = k_step;
    if constexpr (First::OWN_VALUES) v_step = step_of(segment.v);
    int at = thread % CHANNELS, first = thread / CHANNELS * Sums<CHANNELS>::N;  // this thread's channel and queries
#pragma unroll 1
    for (int c = begin; c < end; c += BLOCK) {
        u64 mine = 0;
        if (thread < BLOCK) {
            if (c + thread < end) {
                const Candidate found = look<C>(segment, queries, p, view, shared.limits, view.from + c + thread, ~0ull);
                mine = found.seen;
                shared.numbers[thread] = found.number;
                shared.keys[thread] = found.key;
                shared.values[thread] = First::OWN_VALUES ? found.value : found.key;
            }
            shared.seen[thread] = mine;
        }
        if (!__syncthreads_or(mine != 0)) continue;
        float s[4] = {};
        for (i64 k = 0; k < d_k; k += BLOCK) {
            for (int i = thread; i < ROWS * BLOCK; i += THREADS) {
                int r = i / BLOCK, t = r / C::HEADS, h = r % C::HEADS;
                bool there = t < p.n_tokens && h < p.n_heads && k + lane < d_k;
                shared.q[r][lane] = there ? tg_float(*queries.q.at(p.token + t, p.head + h, k + lane)) : 0.0f;
            }
            for (int i = warp; i < BLOCK; i += THREADS / 32) {
                bool there = shared.seen[i] != 0 && k + lane < d_k;
                using T = typename First::Key::type;
                shared.k[i][lane] = there ? tg_float(((const T*)shared.keys[i])[(k + lane) * k_step]) : 0.0f;
            }
            __syncthreads();
#pragma unroll 1
            for (int at = 0; at < BLOCK; at += 8) {  // sums of eight: a few sums of many terms lose less than one of all
                float part[4] = {};
#pragma unroll
                for (int i = at; i < at + 8; ++i) {
                    float x = shared.k[lane][i];
#pragma unroll
                    for (int j = 0; j < 4; ++j) part[j] = fmaf(shared.q[4 * warp + j][i], x, part[j]);
                }
#pragma unroll
                for (int j = 0; j < 4; ++j) s[j] += part[j];
            }
            __syncthreads();
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            int r = 4 * warp + j, t = r / C::HEADS, h = r % C::HEADS;
            bool sees = t < p.n_tokens && h < p.n_heads && (shared.seen[lane] >> t & 1);
            float x = s[j] * L::scale();
            if constexpr (L::CAPPED) x = L::cap() * tanhf(x / L::cap());
            if constexpr (First::MASKED) {
                if (sees) x += added(segment.mask, p.head + h, p.token + t, shared.numbers[lane]);
            }
            x = sees ? x : nothing();
            float top = x;
#pragma unroll
            for (int by = 16; by > 0; by /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, by));
            top = fmaxf(top, tops[j]);
            float base = top == nothing() ? 0.0f : top, weight = sees ? expf(x - base) : 0.0f, total = weight;
#pragma unroll
            for (int by = 16; by > 0; by /= 2) total += __shfl_xor_sync(~0u, total, by);
            float factor = expf(tops[j] - base);
            totals[j] = fmaf(totals[j], factor, total);
            tops[j] = top;
            shared.weights[lane][r] = weight;
            if (lane == 0) shared.factors[r] = factor;
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < Sums<CHANNELS>::N; ++j)
#pragma unroll
            for (int e = 0; e < Sums<CHANNELS>::EACH; ++e) sums.of[j][e] *= shared.factors[first + j];
#pragma unroll 1
        for (int i = 0; i < BLOCK; ++i) {
            if (shared.seen[i] == 0) continue;
            using T = typename Chosen<First::OWN_VALUES, typename First::Value, typename First::Key>::type::type;
#pragma unroll
            for (int e = 0; e < Sums<CHANNELS>::EACH; ++e) {
                i64 own = channel + at + e * THREADS;
                float x = own < d_v ? tg_float(((const T*)shared.values[i])[own * v_step]) : 0.0f;
#pragma unroll
                for (int j = 0; j < Sums<CHANNELS>::N; ++j) {  // a row without weight may hold anything
                    float weight = shared.weights[i][first + j];
                    sums.of[j][e] = weight == 0.0f ? sums.of[j][e] : fmaf(weight, x, sums.of[j][e]);
                }
            }
        }
        __syncthreads();
    }
    attend<N, L, C, CHANNELS>(chain.next, queries, p, shared, sums, tops, totals, before + n, channel, d_v);
}

// y [T, H, Dv], or parts of it in `partial` where there are splits; where counters are given too, the last block of a tile's
// puts them together.
template <int TOKENS, int HEADS, int SLOTS, int CHANNELS, typename L, typename R, typename Q, typename Sinks, typename Pos,
          typename Seq, typename Partial, typename... Given>
__device__ __forceinline__ void flash_attn(const Q q, const Sinks sinks, const Pos pos, const Seq seq,
                                           const Tensor<float, 3> y, const Partial partial, i64 n_kv, const Given... given) {
    using C = Cut<TOKENS, HEADS, ROWS, SLOTS>;
    const auto segments = chain(R{}, given...);
    const Queries<Q, Pos, Seq> queries = {q, pos, seq};
    using N = typename Chosen<decltype(segments)::WIDE || decltype(queries)::WIDE, i64, int>::type;
    __shared__ Shared<N, decltype(segments)::COUNT> shared;
    const C cut((int)q.shape[0], q.shape[1], n_kv);
    i64 d_v = y.shape[2];
    unsigned chunks = (unsigned)((d_v + CHANNELS - 1) / CHANNELS), n_items = cut.tiles * cut.splits * cut.parts * chunks;
    int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    int at = thread % CHANNELS, first = thread / CHANNELS * Sums<CHANNELS>::N;
    if (thread == 0) note_rows(segments, shared.rows);
    __syncthreads();
    for (unsigned item = blockIdx.x; item < n_items; item += gridDim.x) {
        const Piece p = shared_out<BLOCK, N>(cut, item / chunks, d_v, segments, shared.rows, queries, shared.limits);
        i64 channel = (i64)(item % chunks) * CHANNELS;
        Sums<CHANNELS> sums = {};
        float tops[4], totals[4] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) tops[j] = nothing();
        attend<N, L, C, CHANNELS>(segments, queries, p, shared, sums, tops, totals, 0, channel, d_v);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            int r = 4 * warp + j, t = r / HEADS, h = r % HEADS;
            bool there = t < p.n_tokens && h < p.n_heads;
            if (p.divided) {
                float* to = floats(partial) + p.tops + 2 * (p.partial + r);
                if (there && lane == 0 && channel == 0) __stcg(to, tops[j]), __stcg(to + 1, totals[j]);
            } else {
                float factor = 1.0f;
                if constexpr (is_here<Sinks>) {
                    float sink = there ? tg_float(*sinks.at(p.head + h)) : nothing();
                    float top = fmaxf(tops[j], sink), base = top == nothing() ? 0.0f : top;
                    factor = expf(tops[j] - base);
                    totals[j] = fmaf(totals[j], factor, expf(sink - base));
                }
                if (lane == 0) shared.factors[r] = factor / (totals[j] == 0.0f ? 1.0f : totals[j]);
            }
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < Sums<CHANNELS>::N; ++j) {
            int r = first + j, t = r / HEADS, h = r % HEADS;
#pragma unroll
            for (int e = 0; e < Sums<CHANNELS>::EACH; ++e) {
                i64 own = channel + at + e * THREADS;
                if (t >= p.n_tokens || h >= p.n_heads || own >= d_v) continue;
                if (p.divided) __stcg(floats(partial) + (p.partial + r) * d_v + own, sums.of[j][e]);
                else *y.at(p.token + t, p.head + h, own) = sums.of[j][e] * shared.factors[r];
            }
        }
        if constexpr ((is_counters<Given> || ...)) {
            unsigned part = item / chunks % cut.parts, tile = (unsigned)p.token / TOKENS;
            if (p.divided && is_last(counters_of(given...) + tile * cut.parts + part, cut.splits * chunks))
                put_together<THREADS / 32, 1, false>(cut, p, part, (int)d_v, floats(partial), sinks, y);
        }
    }
}

#include "tensorgraph.ops.select:top_k.cu"
// index_top_k: scores of the rows that a token sees, and the best of them. Few tokens are limited by memory: every block scores
// tiles of rows, which it reads once, and writes the scores down; `top_k` is what follows. Of many tokens each has a block, which
// keeps the best as it goes, so that scores do not reach memory; keys come from the cache then.
// A tile is scored by products of matrices with the heads as rows (M) and keys as columns: ReLU, weights and the sum over heads
// stay in registers. Or in f32, element after element, as other backends do it.

constexpr int INDEX_THREADS = 256, INDEX_WARPS = INDEX_THREADS / 32;

template <typename A> struct IsAbsent { static constexpr bool value = false; };
template <> struct IsAbsent<Absent> { static constexpr bool value = true; };
template <typename A> struct IsHalf { static constexpr bool value = false; };
template <> struct IsHalf<Half> { static constexpr bool value = true; };

// A token, and the rows (of all sequences of the batch, one after another) of which it may see some.
struct Token {
    i64 pos, seq, from, to;
    const i64* pages;  // of a stream whose rows have their numbers as positions: it sees all of these, and row s lies in place
    i64 shift;         // s + shift of its sequence's pages
};

// Which rows of the keys there are, which of them tokens see, and where they lie. K is a tensor or a stream; P and S are
// positions and sequences of its rows, or absent where those are a stream's own.
template <typename K, typename P, typename S> struct IndexRows {
    static constexpr bool OWN = IsAbsent<P>::value;
    using T = typename K::type;
    const K& k;
    const P& k_pos;
    const S& k_seq;
    i64 every;

    template <typename A, typename B> __device__ __forceinline__ Token token(const A& q_pos, const B& q_seq, i64 t) const {
        Token token = {tg_whole(*q_pos.at(t)), tg_whole(*q_seq.at(t)), 0, k.shape[0], nullptr, 0};
        if constexpr (OWN) {
            const bool there = token.seq >= 0 && token.seq < k.n_sequences();
            const i64 seq = there ? token.seq : 0, start = k.field(seq, 2), at = k.field(seq, 6);
            const i64 past = token.pos < 0 ? 0 : every == 1 ? token.pos + 1 : tg_udiv(token.pos + 1, every);
            const i64 stop = past < k.field(seq, 3) ? past : k.field(seq, 3);
            token.from = at;
            token.to = there && stop > start ? at + stop - start : at;
            token.pages = (const i64*)k.field(seq, 0);
            token.shift = start - at - k.field(seq, 1);
        }
        return token;
    }
    // Of a row below the token's last.
    __device__ __forceinline__ bool sees(const Token& token, i64 s) const {
        if constexpr (OWN) return true;
        else return tg_whole(*k_seq.at(s)) == token.seq && (tg_whole(*k_pos.at(s)) + 1) * every - 1 <= token.pos;
    }
    __device__ __forceinline__ const T* row(const Token& token, i64 s) const { return row_of(k, token, s); }
    __device__ __forceinline__ i64 stride() const { return stride_of(k); }
    // Whether 16 bytes at a time can be read.
    __device__ __forceinline__ bool whole() const { return whole_of(k); }

private:
    __device__ __forceinline__ const T* row_of(const Tensor<T, 2>& rows, const Token&, i64 s) const { return rows.at(s); }
    __device__ __forceinline__ const T* row_of(const Stream<T, 2>& rows, const Token& token, i64 s) const {
        if constexpr (!OWN) return rows.seen(s);
        const i64 place = s + token.shift;
        return (const T*)rows.pages + (token.pages[place >> 4] * 16 + (place & 15)) * rows.shape[1];
    }
    __device__ __forceinline__ static i64 stride_of(const Tensor<T, 2>& rows) { return rows.strides[1]; }
    __device__ __forceinline__ static i64 stride_of(const Stream<T, 2>&) { return 1; }
    __device__ __forceinline__ static bool whole_of(const Tensor<T, 2>& rows) {
        return rows.strides[1] == 1 && (((u64)rows.data | (u64)rows.strides[0] * sizeof(T)) & 15) == 0;
    }
    __device__ __forceinline__ static bool whole_of(const Stream<T, 2>& rows) {
        return (((u64)rows.pages | (u64)rows.shape[1] * sizeof(T)) & 15) == 0;
    }
};

__device__ __forceinline__ float rectified(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays

// Rows of 32 * PARTS elements of 16 bits; a warp has 8 * COLUMNS of them, in registers. All heads of a group meet them, 16 at a
// time, as 16-bit floats in shared memory. Along a row elements go to products as they lie: a thread's 16 bytes are its share of
// two.
template <int PARTS, int COLUMNS> struct ByMatrices {
    static constexpr int TILE = 8 * COLUMNS * INDEX_WARPS, WIDTH = 32 * PARTS, ROOM = 8192;
    struct Shared {
        alignas(16) u16 queries[ROOM];
        float weights[ROOM / 32];
        float scores[TILE];
    };
    // Neighbouring heads lie 64 bytes apart (modulo 128), so that 8 threads read from different banks.
    __device__ __forceinline__ static int unit(int head, int at) {
        return head * 4 * PARTS + (at ^ (PARTS % 2 ? 0 : (head & 1) << 2));
    }

    template <typename T, typename Q, typename W>
    __device__ __forceinline__ static void stage(Shared& shared, const Q& q, const W& w, i64 t, int first, int heads) {
        using Four = Quad<typename Q::type>;
        const i64 by = q.strides[2];
        const bool whole = by == 1 && ((q.strides[0] | q.strides[1]) & 3) == 0 && ((u64)q.data & (sizeof(Four) - 1)) == 0;
#pragma unroll 2
        for (int i = threadIdx.x; i < heads * WIDTH / 8; i += INDEX_THREADS) {
            const int head = i / (WIDTH / 8), at = i % (WIDTH / 8);
            Four four[2] = {};
            if (first + head < q.shape[1]) {
                const auto* from = q.at(t, first + head, 8 * at);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    if (whole) four[j] = *(const Four*)from;
                    else four[j] = {from[0], from[by], from[2 * by], from[3 * by]};
                    from += 4 * by;
                }
            }
            T x[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) tg_set(x[j], tg_float(four[j / 4].x[j % 4]));
            *(uint4*)(shared.queries + unit(head, at) * 8) = packed(x);
        }
        for (int i = threadIdx.x; i < heads; i += INDEX_THREADS)
            shared.weights[i] = first + i < w.shape[1] ? tg_float(*w.at(t, first + i)) : 0.0f;
    }

    // Scores of the tile from row `first` on, for those before `end`; `heads` is a group's number. By all threads, which meet
    // before the scores are read.
    template <typename Rows, typename Q, typename W>
    __device__ __forceinline__ static void score(Shared& shared, const Rows& rows, const Q& q, const W& w, const Token& token,
                                                 i64 t, i64 first, i64 end, int heads, bool staged) {
        using T = typename Rows::T;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
        uint4 columns[COLUMNS][PARTS];
        const bool whole = rows.whole();
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
            const i64 s = first + (warp * COLUMNS + n) * 8 + g;
            const T* row = s < end ? rows.row(token, s) : nullptr;
            if (whole) {
#pragma unroll
                for (int p = 0; p < PARTS; ++p)
                    columns[n][p] = row == nullptr ? make_uint4(0, 0, 0, 0) : *(const uint4*)(row + 32 * p + 8 * c);
            } else {
#pragma unroll
                for (int p = 0; p < PARTS; ++p) columns[n][p] = gathered(row, 32 * p + 8 * c, rows.stride());
            }
        }
        float sums[COLUMNS][2] = {};
        const int n_heads = (int)q.shape[1];
        for (int group = 0; group < n_heads; group += heads) {
            if (!staged || n_heads > heads) {
                __syncthreads();
                stage<T>(shared, q, w, t, group, heads);
                __syncthreads();
            }
#pragma unroll 1
            for (int head = 0; head < heads; head += 16) {
                float products[COLUMNS][4] = {};
#pragma unroll
                for (int p = 0; p < PARTS; ++p) {
                    const uint4 low = *(const uint4*)(shared.queries + unit(head + g, 4 * p + c) * 8);
                    const uint4 high = *(const uint4*)(shared.queries + unit(head + g + 8, 4 * p + c) * 8);
                    const unsigned a[4] = {low.x, high.x, low.y, high.y}, b[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
                    for (int n = 0; n < COLUMNS; ++n) {
                        const unsigned x[2] = {columns[n][p].x, columns[n][p].y}, y[2] = {columns[n][p].z, columns[n][p].w};
                        multiply<T>(products[n], a, x);
                        multiply<T>(products[n], b, y);
                    }
                }
                const float weight = shared.weights[head + g], weight_8 = shared.weights[head + g + 8];
                const bool there = group + head + g < n_heads, there_8 = group + head + g + 8 < n_heads;  // 0 * inf is not 0
#pragma unroll
                for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        if (there) sums[n][i] = fmaf(rectified(products[n][i]), weight, sums[n][i]);
                        if (there_8) sums[n][i] = fmaf(rectified(products[n][i + 2]), weight_8, sums[n][i]);
                    }
                }
            }
        }
#pragma unroll
        for (int n = 0; n < COLUMNS; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
                for (int by = 4; by < 32; by *= 2) sums[n][i] += __shfl_xor_sync(~0u, sums[n][i], by);
                if (g == 0) shared.scores[(warp * COLUMNS + n) * 8 + 2 * c + i] = sums[n][i];
            }
        }
    }

private:
    template <typename T> __device__ __forceinline__ static uint4 packed(const T (&x)[8]) {
        return make_uint4(x[0].bits | (unsigned)x[1].bits << 16, x[2].bits | (unsigned)x[3].bits << 16,
                          x[4].bits | (unsigned)x[5].bits << 16, x[6].bits | (unsigned)x[7].bits << 16);
    }
    // 8 elements from one on, wherever they lie.
    template <typename T> __device__ __forceinline__ static uint4 gathered(const T* row, int first, i64 by) {
        T x[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = row == nullptr ? T{} : row[(first + i) * by];
        return packed(x);
    }
    template <typename T>
    __device__ __forceinline__ static void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
        if constexpr (IsHalf<T>::value) tg_mma_f16_16816(d, a, b);
        else tg_mma_bf16_16816(d, a, b);
    }
};

// In f32, each product summed in the order of its elements, the heads in f64: a warp has 8 heads of a group of 64, a thread two
// rows of 64.
struct InOrder {
    static constexpr int TILE = 256, ROWS = 64, HEADS = 64, OWN = HEADS / INDEX_WARPS, DEPTH = 32;
    struct Shared {
        alignas(16) float queries[HEADS * DEPTH];
        alignas(16) float keys[DEPTH * (ROWS + 1)];  // and the warps' sums
        float scores[TILE];
    };

    template <typename Rows, typename Q, typename W>
    __device__ __forceinline__ static void score(Shared& shared, const Rows& rows, const Q& q, const W& w, const Token& token,
                                                 i64 t, i64 first, i64 end, int, bool) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_heads = (int)q.shape[1], width = (int)q.shape[2];
        double* sums = (double*)shared.keys;  // [INDEX_WARPS, ROWS]
#pragma unroll 1
        for (int part = 0; part < TILE; part += ROWS) {
            if (first + part >= end) break;
            double total[2] = {};
#pragma unroll 1
            for (int group = 0; group < n_heads; group += HEADS) {
                float products[OWN][2] = {};
#pragma unroll 1
                for (int begin = 0; begin < width; begin += DEPTH) {
                    __syncthreads();
                    for (int i = threadIdx.x; i < HEADS * DEPTH; i += INDEX_THREADS) {
                        int head = group + i / DEPTH, d = begin + i % DEPTH;
                        shared.queries[i] = head < n_heads && d < width ? tg_float(*q.at(t, head, d)) : 0.0f;
                    }
                    for (int i = threadIdx.x; i < ROWS * DEPTH; i += INDEX_THREADS) {
                        i64 s = first + part + i / DEPTH;
                        int d = begin + i % DEPTH;
                        shared.keys[i % DEPTH * (ROWS + 1) + i / DEPTH] =
                            s < end && d < width ? tg_float(rows.row(token, s)[d * rows.stride()]) : 0.0f;
                    }
                    __syncthreads();
#pragma unroll 4
                    for (int d = 0; d < DEPTH; ++d) {
                        const float x = shared.keys[d * (ROWS + 1) + lane], y = shared.keys[d * (ROWS + 1) + lane + 32];
#pragma unroll
                        for (int h = 0; h < OWN; ++h) {
                            const float a = shared.queries[(warp * OWN + h) * DEPTH + d];
                            products[h][0] = fmaf(a, x, products[h][0]);
                            products[h][1] = fmaf(a, y, products[h][1]);
                        }
                    }
                }
#pragma unroll
                for (int h = 0; h < OWN; ++h) {
                    const int head = group + warp * OWN + h;
                    if (head >= n_heads) continue;
                    const float weight = tg_float(*w.at(t, head));
                    total[0] += (double)(rectified(products[h][0]) * weight);
                    total[1] += (double)(rectified(products[h][1]) * weight);
                }
            }
            __syncthreads();
            sums[warp * ROWS + lane] = total[0];
            sums[warp * ROWS + lane + 32] = total[1];
            __syncthreads();
            if (threadIdx.x < ROWS) {
                double sum = 0.0;
                for (int i = 0; i < INDEX_WARPS; ++i) sum += sums[i * ROWS + threadIdx.x];
                shared.scores[part + threadIdx.x] = (float)sum;
            }
        }
    }
};

// Scores of all rows for each token to [T, S] of f32, -inf where it does not see them. Of what follows the counts are cleared.
template <typename By, typename Q, typename K, typename W, typename A, typename B, typename P, typename S, typename M, typename L>
__device__ void index_scores(const Q q, const K k, const W w, const A q_pos, const B q_seq, const P k_pos, const S k_seq,
                             const M memory, const L lists, i64 every, int heads, int top_k) {
    __shared__ typename By::Shared shared;
    const IndexRows<K, P, S> rows = {k, k_pos, k_seq, every};
    const i64 n_rows = k.shape[0], tiles = (n_rows + By::TILE - 1) / By::TILE, items = q.shape[0] * tiles;
    if constexpr (!IsAbsent<L>::value) clear_lists(lists.data, q.shape[0], top_k);
    i64 staged = -1;
    for (i64 item = blockIdx.x; item < items; item += gridDim.x) {
        const i64 t = tg_udiv(item, tiles), first = (item - t * tiles) * By::TILE, s = first + threadIdx.x;
        const Token token = rows.token(q_pos, q_seq, t);
        const bool seen = threadIdx.x < By::TILE && s >= token.from && s < token.to && rows.sees(token, s);
        float score = __int_as_float((int)0xFF800000u);
        if (__syncthreads_or(seen)) {
            // rows before the token's own are not read
            By::score(shared, rows, q, w, token, t, first > token.from ? first : token.from, token.to, heads, staged == t);
            staged = t;
            __syncthreads();
            if (seen) score = shared.scores[s - (first > token.from ? first : token.from)];
        }
        if (threadIdx.x < By::TILE && s < n_rows) ((float*)memory.data)[t * n_rows + s] = score;
    }
}

// What top_k makes of such scores.
template <typename M, typename Y>
__device__ __forceinline__ Tensor<float, 2> written_scores(const M& memory, const Y& y, i64 n_rows) {
    return {(float*)memory.data, {y.shape[0], n_rows}, {n_rows, 1}};
}
template <int THREADS, typename M, typename Y>
__device__ void index_choice(const M memory, const Y y, i64 n_rows, int k, int room) {
    top_k_of_blocks<THREADS>(written_scores(memory, y, n_rows), y, k, room);
}
template <typename M, typename Y, typename L>
__device__ void index_count(const M memory, const Y y, i64 n_rows, const L lists, int k) {
    top_k_count(written_scores(memory, y, n_rows), y, lists, k);
}
template <typename M, typename Y, typename L>
__device__ void index_choose(const M memory, const Y y, i64 n_rows, const L lists, int k, int room) {
    top_k_choose(written_scores(memory, y, n_rows), y, lists, k, room);
}

// The best of a part of a token's rows, in no order: their number, keys and numbers of rows.
struct Kept {
    unsigned *count, *keys, *ids;
    __device__ __forceinline__ Kept(u8* memory, i64 part, int k)
        : count((unsigned*)memory + part * (4 + 2 * k)), keys(count + 4), ids(keys + k) {}
};

// The best of each token's rows, by a block; or by several, each of which keeps those of a part of them.
template <typename By, typename Q, typename K, typename W, typename A, typename B, typename P, typename S, typename Y, typename M>
__device__ void index_best(const Q q, const K k, const W w, const A q_pos, const B q_seq, const P k_pos, const S k_seq, const Y y,
                           const M memory, i64 every, int heads, int top_k, int room, int parts) {
    using Chosen = Best<unsigned, INDEX_THREADS>;
    __shared__ typename By::Shared shared;
    __shared__ typename Chosen::Shared chosen;
    TG_DYNAMIC_SHARED(pairs);
    Chosen best(pairs, chosen, room, top_k);
    const IndexRows<K, P, S> rows = {k, k_pos, k_seq, every};
    const i64 items = q.shape[0] * parts;
    for (i64 item = blockIdx.x; item < items; item += gridDim.x) {
        const i64 t = IsAbsent<M>::value ? item : tg_udiv(item, parts);
        const Token token = rows.token(q_pos, q_seq, t);
        const i64 span = (tg_udiv(token.to - token.from, (i64)parts * By::TILE) + 1) * By::TILE;
        const i64 begin = token.from + (item - t * parts) * span, end = begin + span < token.to ? begin + span : token.to;
        bool staged = false;
        best.begin();
        for (i64 first = begin; first < end; first += By::TILE) {
            const i64 s = first + threadIdx.x;
            const bool seen = threadIdx.x < By::TILE && s < end && rows.sees(token, s);
            if (!__syncthreads_or(seen)) continue;
            By::score(shared, rows, q, w, token, t, first, end, heads, staged);
            staged = true;
            __syncthreads();
            unsigned key[1] = {~0u}, id[1] = {(unsigned)s};
            if (seen) key[0] = ordered_key<true, unsigned>(float_bits(shared.scores[threadIdx.x]));
            best.offer(key, id, seen);
        }
        const int found = best.finish(IsAbsent<M>::value);
        if constexpr (IsAbsent<M>::value) write_ids<INDEX_THREADS>(best.ids, found, y.at(t), y.strides[1], top_k);
        else {
            const Kept kept(memory.data, item, top_k);
            if (threadIdx.x == 0) *kept.count = (unsigned)found;
            for (int i = threadIdx.x; i < found; i += INDEX_THREADS) {
                kept.keys[i] = best.keys[i];
                kept.ids[i] = best.ids[i];
            }
        }
    }
}

// The best of all parts of each token.
template <typename M, typename Y> __device__ void index_merge(const M memory, const Y y, int k, int room, int parts) {
    constexpr int THREADS = 512;
    using Chosen = Best<unsigned, THREADS>;
    __shared__ typename Chosen::Shared shared;
    TG_DYNAMIC_SHARED(pairs);
    Chosen best(pairs, shared, room, k);
    for (i64 t = blockIdx.x; t < y.shape[0]; t += gridDim.x) {
        best.begin();
        for (int part = 0; part < parts; ++part) {
            const Kept kept(memory.data, t * parts + part, k);
            const int n = (int)*kept.count;
            for (int first = 0; first < n; first += THREADS) {
                const int i = first + (int)threadIdx.x;
                unsigned key[1] = {i < n ? kept.keys[i] : ~0u}, id[1] = {i < n ? kept.ids[i] : ~0u};
                best.offer(key, id, i < n);
            }
        }
        const int found = best.finish();
        write_ids<THREADS>(best.ids, found, y.at(t), y.strides[1], k);
    }
}

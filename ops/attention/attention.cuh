// What kernels of attention share: which rows of a segment a tile of queries sees, where those rows lie, and how the parts of
// what one query sees are put together.
//
// A tile is TOKENS tokens and up to HEADS heads of one kv head: its row r is the query of token r / HEADS, head r % HEADS.
// Candidates are a segment's rows in order, or the places of a token's list of rows. Each is looked at once for a tile: what
// comes of it is a bit for each token that sees it. What they look at may be a few numbers (of a stream in place, whose table
// says between which rows a token sees all) or the positions and sequences of rows.

template <typename T> constexpr bool is_here = true;
template <> constexpr bool is_here<Absent> = false;
template <typename T> constexpr bool is_wide = false;
template <int N> constexpr bool is_wide<Tensor<i64, N>> = true;
template <bool YES, typename A, typename B> struct Chosen { using type = A; };
template <typename A, typename B> struct Chosen<false, A, B> { using type = B; };

constexpr int MOST_ROWS = 0x7fffffff;
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float nothing() { return __int_as_float((int)0xff800000u); }  // minus infinity

// The same number, which the compiler does not know: what is made of it in a loop is made again each time, not kept in registers.
__device__ __forceinline__ int afresh(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Positions, sequences and row numbers are compared as int, which 64-bit registers would be wasted on, unless some are i64.
template <typename N> __device__ __forceinline__ constexpr N least() { return sizeof(N) == 8 ? (N)(1ll << 63) : (N)(1u << 31); }
template <typename N> __device__ __forceinline__ constexpr N most() { return ~least<N>(); }
template <typename N> __device__ __forceinline__ N narrow(i64 x) {
    return x < least<N>() ? least<N>() : x > most<N>() ? most<N>() : (N)x;
}

// OWN: rows lie in the pages of a stream whose own positions and sequences the segment has, so that neither is read.
// BY_POS: queries and rows have positions. A WINDOW of 0 is none.
template <i64 EVERY_, i64 WINDOW_, bool CAUSAL_, bool BY_POS_, bool OWN_> struct Rule {
    static constexpr i64 EVERY = EVERY_, WINDOW = WINDOW_;
    static constexpr bool CAUSAL = CAUSAL_, BY_POS = BY_POS_ && (CAUSAL_ || WINDOW_ > 0), OWN = OWN_;
};
template <typename... R> struct Rules {};

// Floats of the logits, by their bits; a CAP of 0 is none.
template <unsigned SCALE, unsigned CAP> struct Logits {
    static constexpr bool CAPPED = CAP != 0;
    static __device__ __forceinline__ float scale() { return __int_as_float((int)SCALE); }
    static __device__ __forceinline__ float cap() { return __int_as_float((int)CAP); }
};

template <typename R_, typename K, typename V, typename Pos, typename Seq, typename Ids, typename Count, typename Mask>
struct Segment {
    using R = R_;
    using Key = K;
    using Value = V;
    static constexpr bool LISTED = is_here<Ids>, MASKED = is_here<Mask>, BY_SEQ = is_here<Seq>, OWN_VALUES = is_here<V>;
    K k;
    V v;
    Pos pos;
    Seq seq;
    Ids ids;
    Count count;
    Mask mask;
};

struct End {
    static constexpr bool OWN_VALUES = false, WIDE = false;
    static constexpr int COUNT = 0;
};
template <typename First, typename Next> struct Chain {
    static constexpr bool OWN_VALUES = First::OWN_VALUES || Next::OWN_VALUES;
    static constexpr bool WIDE = is_wide<decltype(First::pos)> || is_wide<decltype(First::seq)> || Next::WIDE;
    static constexpr int COUNT = 1 + Next::COUNT;
    First segment;
    Next next;
};
template <typename... Counters> __device__ __forceinline__ End chain(Rules<>, Counters...) { return {}; }
template <typename R, typename... Rs, typename K, typename V, typename Pos, typename Seq, typename Ids, typename Count,
          typename Mask, typename... Rest>
__device__ __forceinline__ auto chain(Rules<R, Rs...>, const K k, const V v, const Pos pos, const Seq seq, const Ids ids,
                                      const Count count, const Mask mask, const Rest... rest) {
    auto next = chain(Rules<Rs...>{}, rest...);
    return Chain<Segment<R, K, V, Pos, Seq, Ids, Count, Mask>, decltype(next)>{{k, v, pos, seq, ids, count, mask}, next};
}

// How many rows each segment has, to be kept in shared memory: extents are read from global memory at a kernel's beginning, and
// would be in registers to its end.
__device__ __forceinline__ void note_rows(const End&, int*) {}
template <typename First, typename Next> __device__ __forceinline__ void note_rows(const Chain<First, Next>& chain, int* to) {
    *to = (int)chain.segment.k.shape[0];
    note_rows(chain.next, to + 1);
}

template <typename Q_, typename Pos, typename Seq> struct Queries {
    Q_ q;
    Pos pos;
    Seq seq;
    static constexpr bool HAVE_SEQ = is_here<Seq>, WIDE = is_wide<Pos> || is_wide<Seq>;
    __device__ __forceinline__ i64 at(i64 token) const {
        if constexpr (is_here<Pos>) return tg_whole(*pos.at(token));
        return 0;
    }
    __device__ __forceinline__ i64 sequence(i64 token) const {
        if constexpr (is_here<Seq>) return tg_whole(*seq.at(token));
        return 0;
    }
};

// --- tiles -----------------------------------------------------------------------------------------------------------------

// Work is cut into tiles, the kv heads and pieces of their heads (`parts` in all), and, where there are fewer than SLOTS tiles,
// into as many `splits` of the candidates as fill them.
template <int TOKENS_, int HEADS_, int ROWS_, int SLOTS_> struct Cut {
    static constexpr int TOKENS = TOKENS_, HEADS = HEADS_, ROWS = ROWS_, SLOTS = SLOTS_;
    int n_tokens;
    unsigned n_heads, group, pieces, parts, tiles, splits;

    __device__ __forceinline__ Cut(int n_tokens_, i64 n_heads_, i64 n_kv) {
        n_tokens = n_tokens_;
        n_heads = (unsigned)n_heads_;
        group = n_heads / (unsigned)(n_kv > 0 ? n_kv : 1);
        pieces = (group + HEADS - 1) / HEADS;
        parts = (unsigned)n_kv * pieces;
        tiles = (unsigned)(n_tokens + TOKENS - 1) / TOKENS;
        splits = SLOTS / (tiles > 0 ? tiles : 1);
        if (splits < 1) splits = 1;
    }
    // Of a row of a tile, its number among those of partial results. First come the sums of all, `width` each, then for each
    // the largest logit and the total.
    __device__ __forceinline__ i64 partial(unsigned tile, unsigned split, unsigned part, unsigned row) const {
        return ((i64)(tile * splits + split) * parts + part) * ROWS + row;
    }
    __device__ __forceinline__ i64 tops(i64 width) const { return (i64)SLOTS * parts * ROWS * width; }
};

__device__ __forceinline__ float* floats(const Tensor<u8, 1>& memory) { return (float*)memory.data; }
__device__ __forceinline__ float* floats(Absent) { return nullptr; }  // where nothing is divided

// What a block works on: `from`, `to` of the candidates of all segments in a row.
struct Piece {
    i64 partial, tops;  // of its first row, as `Cut` numbers them, and where their largest logits begin
    int token, n_tokens, kv_head, head, n_heads, from, to;
    bool divided;
};

// Parts that share rows follow each other; the last tokens, which see the most, come first.
template <typename C> __device__ __forceinline__ Piece piece_of(const C& cut, unsigned item, i64 width, unsigned& split) {
    Piece p;
    unsigned part = item % cut.parts, rest = item / cut.parts, tile = cut.tiles - 1 - rest / cut.splits;
    split = rest % cut.splits;
    p.partial = cut.partial(tile, split, part, 0);
    p.tops = cut.tops(width);
    p.divided = cut.splits > 1;
    p.token = (int)tile * C::TOKENS;
    p.n_tokens = min(C::TOKENS, cut.n_tokens - p.token);
    unsigned kv = part / cut.pieces, first = part % cut.pieces * C::HEADS;
    p.kv_head = (int)kv;
    p.head = (int)(kv * cut.group + first);
    p.n_heads = min(C::HEADS, (int)(cut.group - first));
    p.from = 0, p.to = MOST_ROWS;
    return p;
}

// --- what tokens see -------------------------------------------------------------------------------------------------------

// Of the tokens of a tile: between which keys each sees rows (the least, the most); the sequence of the first; and the
// candidates from..to-1.
template <typename N> struct View {
    N lo_min, lo_max, hi_min, hi_max, seq;
    int from, to, n_rows;
    bool one_seq;
};

template <i64 EVERY> __device__ __forceinline__ i64 complete(i64 pos) {  // the last row that is complete at a position
    if constexpr (EVERY == 1) return pos;
    i64 n = pos + 1;
    return (n >= 0 ? n / EVERY : -((EVERY - 1 - n) / EVERY)) - 1;
}

// Rows with keys lo..hi are those that a token sees: keys are positions, or row numbers where the segment is OWN.
template <typename N, typename S, typename Q>
__device__ __forceinline__ void bounds_of(const S& segment, const Q& queries, int token, N& lo, N& hi) {
    using R = typename S::R;
    lo = least<N>(), hi = most<N>();
    if constexpr (R::OWN) {
        const i64* table = segment.k.table;
        i64 seq = queries.sequence(token);
        bool known = seq >= 0 && seq < table[0];
        const i64* fields = table + 8 + 8 * (known ? seq : 0);
        i64 start = fields[2], first = start, last = fields[3] - 1, shift = fields[6] - start;
        if constexpr (R::BY_POS) {
            i64 pos = queries.at(token);
            if constexpr (R::CAUSAL) {
                i64 done = complete<R::EVERY>(pos);
                last = done < last ? done : last;
            }
            if constexpr (R::WINDOW > 0) first = pos - R::WINDOW + 1 > first ? pos - R::WINDOW + 1 : first;
        }
        bool some = known && first <= last;
        lo = some ? (N)(first + shift) : most<N>();
        hi = some ? (N)(last + shift) : least<N>();
    } else if constexpr (R::BY_POS) {
        i64 pos = queries.at(token);
        if constexpr (R::CAUSAL) hi = narrow<N>(complete<R::EVERY>(pos));
        if constexpr (R::WINDOW > 0) lo = narrow<N>(pos - R::WINDOW + 1);
    }
}

// Every warp finds the same; `limits` (shared memory: lo, hi, sequence of each token) is written by the first.
template <typename N, typename C, typename S, typename Q>
__device__ __forceinline__ View<N> survey(const S& segment, int n_rows, const Q& queries, const Piece& p, N (*limits)[3]) {
    View<N> v;
    v.seq = narrow<N>(queries.sequence(p.token));
    v.one_seq = true;
    v.n_rows = n_rows;
    if constexpr (C::TOKENS == 1) {
        bounds_of<N>(segment, queries, p.token, v.lo_min, v.hi_max);
        v.lo_max = v.lo_min, v.hi_min = v.hi_max;
    } else {
        int lane = threadIdx.x % 32;
        v.lo_min = v.hi_min = most<N>();
        v.lo_max = v.hi_max = least<N>();
        bool same = true;
#pragma unroll 1
        for (int t = lane; t < p.n_tokens; t += 32) {
            N lo, hi, seq = narrow<N>(queries.sequence(p.token + t));
            bounds_of<N>(segment, queries, p.token + t, lo, hi);
            v.lo_min = min(lo, v.lo_min), v.lo_max = max(lo, v.lo_max);
            v.hi_min = min(hi, v.hi_min), v.hi_max = max(hi, v.hi_max);
            same = same && seq == v.seq;
            if (threadIdx.x < 32) limits[t][0] = lo, limits[t][1] = hi, limits[t][2] = seq;
        }
#pragma unroll
        for (int by = 16; by > 0; by /= 2) {
            v.lo_min = min(v.lo_min, __shfl_xor_sync(~0u, v.lo_min, by));
            v.lo_max = max(v.lo_max, __shfl_xor_sync(~0u, v.lo_max, by));
            v.hi_min = min(v.hi_min, __shfl_xor_sync(~0u, v.hi_min, by));
            v.hi_max = max(v.hi_max, __shfl_xor_sync(~0u, v.hi_max, by));
        }
        v.one_seq = __all_sync(~0u, same);
    }
    if constexpr (S::LISTED) {
        v.from = 0, v.to = (int)segment.count;
    } else if constexpr (S::R::OWN) {
        bool any = v.lo_min <= v.hi_max;
        v.from = any ? (int)v.lo_min : 0, v.to = any ? (int)v.hi_max + 1 : 0;
    } else {
        v.from = 0, v.to = v.n_rows;
    }
    return v;
}

// --- rows ------------------------------------------------------------------------------------------------------------------

// Where the s-th seen row of the batch lies among those of a stream's pages; `guess` is the sequence that it is likely one of.
// The sequence of a row is the last that begins at or before it: those without rows begin where the next one does.
__device__ __forceinline__ i64 place_of(const i64* table, int s, i64 guess) {
    const i64* fields = table + 8 + 8 * (guess >= 0 && guess < table[0] ? (int)guess : 0);
    int at = s - (int)fields[6];
    if (at < 0 || at >= (int)fields[3] - (int)fields[2]) {
        int low = 0, high = (int)table[0] - 1;
#pragma unroll 1
        while (low < high) {
            int middle = (low + high + 1) >> 1;
            if ((int)table[8 + 8 * middle + 6] <= s) low = middle;
            else high = middle - 1;
        }
        fields = table + 8 + 8 * low;
        at = s - (int)fields[6];
    }
    at += (int)fields[2] - (int)fields[1];
    return ((const i64*)fields[0])[at >> 4] * 16 + (at & 15);
}

template <typename T>
__device__ __forceinline__ const char* row_of(const Tensor<T, 3>& x, int s, int head, const i64*&, i64&, i64) {
    return (const char*)x.at(s, head);
}
template <typename T>
__device__ __forceinline__ const char* row_of(const Stream<T, 3>& x, int s, int head, const i64*& table, i64& place, i64 guess) {
    if (table != x.table) table = x.table, place = place_of(table, s, guess);
    return (const char*)((const T*)x.pages + (place * x.shape[1] + head) * x.shape[2]);
}

template <typename T> __device__ __forceinline__ i64 step_of(const Tensor<T, 3>& x) { return x.strides[2]; }
template <typename T> __device__ __forceinline__ i64 step_of(const Stream<T, 3>&) { return 1; }

// Whether each row of each head is so many whole 16 bytes side by side, at multiples of 16.
template <typename T> __device__ __forceinline__ bool in_sixteens(const Tensor<T, 3>& x) {
    i64 apart = x.strides[0] | x.strides[1] | x.shape[2];
    return x.strides[2] == 1 && ((apart * (i64)sizeof(T)) | (i64)x.data) % 16 == 0;
}
template <typename T> __device__ __forceinline__ bool in_sixteens(const Stream<T, 3>& x) {
    return ((x.shape[2] * (i64)sizeof(T)) | (i64)x.pages) % 16 == 0;
}

template <typename T> __device__ __forceinline__ i64 listed(const Tensor<T, 2>& ids, i64, i64 token, i64 c) {
    return tg_whole(*ids.at(token, c));
}
__device__ __forceinline__ i64 listed(const Tensor<u8, 1>& lists, i64 count, i64 token, i64 c) {  // of `listed_rows`
    return ((const int*)lists.data)[token * count + c];
}

template <typename T> __device__ __forceinline__ float added(const Tensor<T, 2>& mask, i64, i64 token, i64 s) {
    return tg_float(*mask.at(token, s));
}
template <typename T> __device__ __forceinline__ float added(const Tensor<T, 3>& mask, i64 head, i64 token, i64 s) {
    return tg_float(*mask.at(head, token, s));
}
template <typename T, int N> __device__ __forceinline__ constexpr bool one_for_all(const Tensor<T, N>&) { return N == 2; }

// A candidate: which tokens of the tile see it, which row it is, and where its key and its value lie (null if none sees it).
struct Candidate {
    u64 seen;
    int number;
    const char *key, *value;
};

__device__ __forceinline__ u64 first_bits(int n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

template <typename C, typename N, typename S, typename Q>
__device__ __forceinline__ Candidate look(const S& segment, const Q& queries, const Piece& p, const View<N>& view,
                                          const N (*limits)[3], int c, u64 active) {
    using R = typename S::R;
    Candidate found = {0, c, nullptr, nullptr};
    if constexpr (S::LISTED) {
        i64 id = listed(segment.ids, segment.count, p.token, c);
        if (id < 0 || id >= view.n_rows) return found;
        found.number = (int)id;
    }
    int s = found.number;
    N key = s, seq = 0;
    if constexpr (!R::OWN && R::BY_POS) key = narrow<N>(tg_whole(*segment.pos.at(s)));
    constexpr bool BY_SEQ = !R::OWN && S::BY_SEQ && Q::HAVE_SEQ, BY_KEY = R::OWN || R::BY_POS;
    if constexpr (BY_SEQ) seq = narrow<N>(tg_whole(*segment.seq.at(s)));
    if (BY_KEY && (key < view.lo_min || key > view.hi_max)) return found;
    if ((!BY_KEY || (key >= view.lo_max && key <= view.hi_min)) && (!BY_SEQ || (view.one_seq && seq == view.seq))) {
        found.seen = first_bits(p.n_tokens);
    } else if constexpr (C::TOKENS > 1) {
#pragma unroll 1
        for (int t = 0; t < p.n_tokens; ++t) {
            bool sees = (!BY_KEY || (key >= limits[t][0] && key <= limits[t][1])) && (!BY_SEQ || seq == limits[t][2]);
            found.seen |= (u64)sees << t;
        }
    }
    found.seen &= active;
    if constexpr (S::MASKED) {  // a row is seen by a token if any of these heads is shown it
#pragma unroll 1
        for (int t = 0; t < p.n_tokens; ++t) {
            bool shown = false;
#pragma unroll 1
            for (int h = 0; h < (one_for_all(segment.mask) ? 1 : p.n_heads); ++h)
                shown = shown || ((found.seen >> t & 1) && added(segment.mask, p.head + h, p.token + t, s) > nothing());
            if (!shown) found.seen &= ~(1ull << t);
        }
    }
    if (found.seen == 0) return found;
    const i64* table = nullptr;
    i64 place = 0;
    found.key = row_of(segment.k, s, p.kv_head, table, place, view.seq);
    if constexpr (S::OWN_VALUES) found.value = row_of(segment.v, s, p.kv_head, table, place, view.seq);
    return found;
}

// --- all segments ----------------------------------------------------------------------------------------------------------

template <typename N, typename C, typename Q>
__device__ __forceinline__ int candidates(const End&, const int*, const Q&, const Piece&, N (*)[3]) {
    return 0;
}
template <typename N, typename C, typename Q, typename First, typename Next>
__device__ __forceinline__ int candidates(const Chain<First, Next>& chain, const int* rows, const Q& queries, const Piece& p,
                                          N (*limits)[3]) {
    const View<N> view = survey<N, C>(chain.segment, rows[0], queries, p, limits);
    return view.to - view.from + candidates<N, C>(chain.next, rows + 1, queries, p, limits);
}

// The piece of an item, which takes its split's share of the candidates, in whole tiles of BLOCK.
template <int BLOCK, typename N, typename C, typename Q, typename Segments>
__device__ __forceinline__ Piece shared_out(const C& cut, unsigned item, i64 width, const Segments& segments, const int* rows,
                                            const Q& queries, N (*limits)[3]) {
    unsigned split;
    Piece p = piece_of(cut, item, width, split);
    if (p.divided) {
        unsigned n = (unsigned)candidates<N, C>(segments, rows, queries, p, limits);
        unsigned each = ((n + cut.splits - 1) / cut.splits + BLOCK - 1) / BLOCK * BLOCK;
        p.from = (int)min(split * each, n);
        p.to = (int)min(p.from + each, n);
    }
    return p;
}

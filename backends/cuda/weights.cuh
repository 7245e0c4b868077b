// Weights in layout "planes" (weights.py), as they are decoded: a matrix of a block type in its own bits, row after row in each
// plane, so that a thread reads the codes of 32 elements by one aligned load of 16 bytes (of 4 bits), and neighbours what lies
// behind. `F` is written by weights.py for each type; an element is (value - centre) * factor * scale, plus a minimum if any:
// `minimum`, or -(factor of minima) * minimum.
//
// Of the 8 groups of four elements of a block, g and g + 4 are a *pair*: they lie in the low and the high half of the bytes of
// one word where a plane has 4 bits, and so in all narrower planes. Everything here goes by pairs; a thread may take 1, 2 or all
// 4 of a block. Tables of at most 16 values are looked up in registers, eight codes by six __byte_perm.
#ifndef TG_WEIGHTS
#define TG_WEIGHTS

// All planes of a matrix [..., M, K].
template <typename F, int N> struct Weights {
    using type = F;
    const u8* data;
    i64 shape[N];

    __device__ __forceinline__ i64 rows() const {
        i64 n = 1;
#pragma unroll
        for (int i = 0; i < N - 1; ++i) n *= shape[i];
        return n;
    }
};

// Where a row begins in each plane: codes' low bits and the others, factors, scales (and minima), and its exponent.
template <typename F> struct CodedRow {
    const u8 *low, *high, *factors, *heads;
    const i8* exponent;
};

// The same as bytes from where the first row of a matrix begins: half the registers.
struct CodedOffset {
    unsigned low, high, factors, heads;
};

__device__ __forceinline__ i64 tg_whole_256(i64 n) { return (n + 255) & ~(i64)255; }

template <typename F, int N> __device__ __forceinline__ CodedRow<F> tg_coded_row(const Weights<F, N>& w, i64 row) {
    i64 n = w.rows(), width = w.shape[N - 1];
    i64 low = width / 8 * F::low_bits, high = width / 8 * F::high_bits;
    i64 factors = width / 32 * F::factor_bytes, heads = width / (32 * F::n_blocks) * F::head_bytes;
    CodedRow<F> to;
    const u8* at = w.data;
    to.low = at + row * low;
    at += tg_whole_256(n * low);
    to.high = at + row * high;
    at += tg_whole_256(n * high);
    to.factors = at + row * factors;
    at += tg_whole_256(n * factors);
    to.heads = at + row * heads;
    at += tg_whole_256(n * heads);
    to.exponent = (const i8*)at + row;
    return to;
}

// --- codes -----------------------------------------------------------------------------------------------------------------

// Words of a plane that hold so many pairs.
__host__ __device__ constexpr int tg_n_words(int bits, int pairs) {
    return bits == 8 ? 2 * pairs : bits == 4 ? pairs : bits == 2 ? (pairs > 2 ? 2 : pairs) : bits;
}

template <int N> __device__ __forceinline__ void tg_load_words(unsigned* to, const u8* from) {
    if constexpr (N == 4) {
        uint4 x = __ldg((const uint4*)from);
        to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    } else if constexpr (N == 2) {
        uint2 x = __ldg((const uint2*)from);
        to[0] = x.x, to[1] = x.y;
    } else {
        to[0] = __ldg((const unsigned*)from);
    }
}

// Pairs `first` to `first + PAIRS - 1` of a block's plane; what fields are narrower than 4 bits are moved to where those of pairs
// from 0 on would be.
template <int BITS, int PAIRS> __device__ __forceinline__ void tg_load_plane(unsigned* to, const u8* block, int first) {
    if constexpr (BITS == 8) {
        tg_load_words<PAIRS>(to, block + 4 * first);
        tg_load_words<PAIRS>(to + PAIRS, block + 4 * first + 16);
    } else if constexpr (BITS == 4) {
        tg_load_words<PAIRS>(to, block + 4 * first);
    } else if constexpr (BITS == 2 && PAIRS == 1) {
        tg_load_words<1>(to, block + 4 * (first & 1));
        to[0] >>= first & 2;
    } else if constexpr (BITS == 2) {
        tg_load_words<2>(to, block);
        if (PAIRS == 2) to[0] >>= first, to[1] >>= first;
    } else if constexpr (BITS == 1) {
        tg_load_words<1>(to, block);
        if (PAIRS < 4) to[0] >>= first;
    }
}

// The fields of pair `I`, those of group g in the low and of g + 4 in the high half of each byte.
template <int BITS, int PAIRS> __device__ __forceinline__ unsigned tg_fields(const unsigned* words, int i) {
    if constexpr (BITS == 4) return words[i];
    if constexpr (BITS == 2) return words[PAIRS == 1 ? 0 : i % 2] >> 2 * (i / 2) & 0x33333333u;
    if constexpr (BITS == 1) return words[0] >> i & 0x11111111u;
    return 0;
}

// Bytes of a table of 16 by eight codes of 4 bits: those of the low halves of bytes, and of the high ones.
template <typename F> __device__ __forceinline__ void tg_look_up(unsigned codes, unsigned& first, unsigned& second) {
    unsigned by = codes & 0x77777777u, low = __byte_perm(F::table0, F::table1, by);
    unsigned next = __byte_perm(F::table0, F::table1, by >> 16);
    if constexpr (F::n_table > 8) {
        unsigned which = 0x32103210u | (codes & 0x88888888u) >> 1;
        low = __byte_perm(low, __byte_perm(F::table2, F::table3, by), which);
        next = __byte_perm(next, __byte_perm(F::table2, F::table3, by >> 16), which >> 16);
    }
    first = __byte_perm(low, next, 0x6420);
    second = __byte_perm(low, next, 0x7531);
}

// Some pairs of a block of 32, its factors and its unit's head, as they lie in memory.
template <typename F, int PAIRS> struct Coded {
    static constexpr int n_low = tg_n_words(F::low_bits, PAIRS), n_high = tg_n_words(F::high_bits, PAIRS);
    unsigned low[n_low], high[n_high > 0 ? n_high : 1], factors, head;

    __device__ __forceinline__ void load(const CodedRow<F>& row, int block, int first = 0) {
        load(row.low + block * (4 * F::low_bits), row.high + block * (4 * F::high_bits), row.factors + block * F::factor_bytes,
             row.heads + block / F::n_blocks * F::head_bytes, first);
    }
    __device__ __forceinline__ void load(const CodedRow<F>& from, const CodedOffset& row, unsigned block, int first) {
        load(from.low + (row.low + block * (4 * F::low_bits)), from.high + (row.high + block * (4 * F::high_bits)),
             from.factors + (row.factors + block * F::factor_bytes),
             from.heads + (row.heads + block / F::n_blocks * F::head_bytes), first);
    }
    __device__ __forceinline__ void load(const u8* from_low, const u8* from_high, const u8* f, const u8* h, int first) {
        tg_load_plane<F::low_bits, PAIRS>(low, from_low, first);
        if (F::high_bits) tg_load_plane<F::high_bits, PAIRS>(high, from_high, first);
        factors = F::factor_bytes == 1 ? __ldg(f) : F::factor_bytes == 2 ? __ldg((const u16*)f) : 0u;
        head = F::head_bytes == 1 ? __ldg(h) : F::head_bytes == 2 ? __ldg((const u16*)h) : __ldg((const unsigned*)h);
    }

    // The values of pair i (a constant) of these, a byte each: of group i and of group i + 4.
    __device__ __forceinline__ void values(int i, unsigned& first, unsigned& second) const {
        if constexpr (F::low_bits == 8) {
            first = low[i];
            second = low[PAIRS + i];
        } else {
            unsigned codes = tg_fields<F::low_bits, PAIRS>(low, i), above = tg_fields<F::high_bits, PAIRS>(high, i);
            if constexpr (F::low_bits + F::high_bits <= 4) {
                if (F::high_bits) codes |= above << F::low_bits;
                if constexpr (F::n_table > 0) {
                    tg_look_up<F>(codes, first, second);
                } else {
                    first = codes & 0x0F0F0F0Fu;
                    second = codes >> 4 & 0x0F0F0F0Fu;
                }
            } else {
                first = (codes & 0x0F0F0F0Fu) | (above & 0x0F0F0F0Fu) << 4;
                second = (codes >> 4 & 0x0F0F0F0Fu) | (above & 0xF0F0F0F0u);
            }
        }
    }

    // Of the first and the last 16 elements of the block: factors of the scale, and of the minimum.
    __device__ __forceinline__ int factor(int half) const {
        if constexpr (F::factor_bytes == 0) return 1;
        unsigned byte = factors >> (F::per_factor == 16 ? 8 * half : 0);
        return F::nibbles ? (int)(byte & 15u) : F::signed_factors ? (int)(i8)byte : (int)(byte & 255u);
    }
    __device__ __forceinline__ int factor_of_minimum(int half) const {
        if constexpr (F::nibbles) return (int)(factors >> (F::per_factor == 16 ? 8 * half : 0) + 4 & 15u);
        return (int)(factors >> (F::per_factor == 16 ? 16 + 8 * half : 8) & 255u);
    }

    __device__ __forceinline__ float scale() const {
        if constexpr (F::e8m0) return __int_as_float(head < 2 ? 1 << 21 << head : (int)(head - 1) << 23);
        float d = tg_half_to_float((u16)head);
        return F::has_unit ? d * F::unit : d;
    }
    __device__ __forceinline__ float minimum() const { return tg_half_to_float((u16)(head >> 16)); }

    // What values less the centre are multiplied by, and what is then added: of a half of the block.
    __device__ __forceinline__ float scale_of(int half) const {
        return F::factor_bytes ? scale() * (float)factor(half) : scale();
    }
    __device__ __forceinline__ float minimum_of(int half) const {
        if constexpr (!F::has_min) return 0.0f;
        if constexpr (F::factor_bytes == 0) return minimum();
        return -(minimum() * (float)factor_of_minimum(half));
    }
};

// A byte (a constant) of a word less a centre, exactly.
__device__ __forceinline__ float tg_byte(unsigned word, int i, int centre) {
    return __int_as_float((int)__byte_perm(word, 0x4B000000u, 0x7440u + i)) - (8388608.0f + (float)centre);
}

// Elements of a group of four whose values are given; exactly those of the type's decoder.
template <typename F> __device__ __forceinline__ float4 tg_elements(unsigned values, float scale, float minimum) {
    float a = tg_byte(values, 0, F::centre), b = tg_byte(values, 1, F::centre);
    float c = tg_byte(values, 2, F::centre), d = tg_byte(values, 3, F::centre);
    if constexpr (F::has_min)
        return make_float4(fmaf(a, scale, minimum), fmaf(b, scale, minimum), fmaf(c, scale, minimum), fmaf(d, scale, minimum));
    return make_float4(a * scale, b * scale, c * scale, d * scale);
}

// 2^n, for n from -126 to 127.
__device__ __forceinline__ float tg_power(int n) { return __int_as_float((n + 127) << 23); }
#endif

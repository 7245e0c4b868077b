#include "tensorgraph.ops.attention:attention.cuh"
// Products of tensor cores for tiles of queries by candidates: queries by keys, and weights by values. A fragment's 32 bytes are
// 16 elements of 16 bits or 8 of 32, so that all of this is the same for both but for values, which are read across rows.

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
    int column = wn * S::LOGITS * 8 + lane % 8 + (S::LOGITS > 1 ? lane / 16 * 8 : 0);
    const char* b_at = keys + column * S::K_BYTES + lane / 8 % 2 * 16;
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
                for (int i = n; i < n + 2; ++i) {
                    const char* at = rows + i * 32;
                    S::Math::multiply(state.sums[i], a, *(const unsigned*)at, *(const unsigned*)(at + row_bytes));
                }
            }
        }
    }
}

// Rows of activations: where they lie, and how a block holds some of them in shared memory, rounded to 8 bits or as f32.
//
// What fills shared memory takes rows from a functor: `rows.row(token)` is an object whose `four(k)` gives elements k to k + 3 as
// f32, zeros behind the row's end. So a fused kernel computes its rows (a norm of them, say) on the way.
#ifndef TG_ROWS
#define TG_ROWS
#include "tensorgraph.backends.cuda:weights.cuh"

// --- rows in memory --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float tg_half_of(unsigned word, int i) { return tg_half_to_float((u16)(word >> 16 * i)); }
__device__ __forceinline__ float tg_brain_of(unsigned word, int i) {
    return __int_as_float((int)(i ? word & 0xFFFF0000u : word << 16));
}

// Four elements that lie side by side, at a multiple of their size.
__device__ __forceinline__ float4 tg_four(const float* at) { return __ldg((const float4*)at); }
__device__ __forceinline__ float4 tg_four(const double* at) {
    double2 a = __ldg((const double2*)at), b = __ldg((const double2*)at + 1);
    return make_float4((float)a.x, (float)a.y, (float)b.x, (float)b.y);
}
__device__ __forceinline__ float4 tg_four(const Half* at) {
    uint2 x = __ldg((const uint2*)at);
    return make_float4(tg_half_of(x.x, 0), tg_half_of(x.x, 1), tg_half_of(x.y, 0), tg_half_of(x.y, 1));
}
__device__ __forceinline__ float4 tg_four(const Brain* at) {
    uint2 x = __ldg((const uint2*)at);
    return make_float4(tg_brain_of(x.x, 0), tg_brain_of(x.x, 1), tg_brain_of(x.y, 0), tg_brain_of(x.y, 1));
}

// A row of any stride.
template <typename T> struct Row {
    const T* data;
    i64 stride;
    int width;
    bool fast;  // whether four elements may be read at once

    __device__ __forceinline__ Row(const T* data, i64 stride, int width)
        : data(data), stride(stride), width(width), fast(stride == 1 && (u64)data % (sizeof(T) == 8 ? 16 : 4 * sizeof(T)) == 0) {}

    __device__ __forceinline__ float one(int k) const { return k < width ? tg_float(data[k * stride]) : 0.0f; }
    __device__ __forceinline__ float4 four(int k) const {
        if (fast && k + 4 <= width) return tg_four(data + k);
        return make_float4(one(k), one(k + 1), one(k + 2), one(k + 3));
    }
};

// Row `number` of a tensor [..., K], counted over all leading axes.
template <typename T, int N> __device__ __forceinline__ Row<T> tg_row(const Tensor<T, N>& x, unsigned number) {
    const T* at = x.data;
#pragma unroll
    for (int i = N - 2; i > 0; --i) {
        unsigned n = (unsigned)x.shape[i], above = number / n;
        at += (number - above * n) * x.strides[i];
        number = above;
    }
    if (N > 1) at += number * x.strides[0];
    return {at, x.strides[N - 1], (int)x.shape[N - 1]};
}

// Rows from one on.
template <typename T, int N> struct RowsFrom {
    const Tensor<T, N>& x;
    unsigned first;

    __device__ __forceinline__ Row<T> row(int token) const { return tg_row(x, first + token); }
};

// --- rows for products -----------------------------------------------------------------------------------------------------

// They lie in shared memory, or where they do not fit, in memory, from which all blocks read them through their first caches.

// Blocks of 32 elements of each of TOKENS rows, rounded: x ~ d * code, d = max |x| / 127. A block is two times 16 bytes of codes,
// d, and the sums of the codes of both halves (s16). Halves lie apart, so that neighbouring threads read neighbouring 16 bytes.
// A block that holds what is not finite has a d that is not.
template <int TOKENS> struct Quantised {
    static constexpr int unit = 32, unit_bytes = 40, tokens = TOKENS;
    uint4* codes;  // [TOKENS][2][units]
    uint2* tails;  // [TOKENS][units]
    int units;

    __device__ __forceinline__ Quantised(unsigned char* shared, int units)
        : codes((uint4*)shared), tails((uint2*)(shared + TOKENS * 32 * units)), units(units) {}

    // From a unit of a row on.
    __device__ __forceinline__ Quantised from(int token, int unit) const {
        Quantised to = *this;
        to.codes += 2 * token * units + unit, to.tails += token * units + unit;
        return to;
    }

    // Units `first` to `first + count - 1` of some rows, by all threads of a block; waiting before and after is the caller's.
    template <typename Rows> __device__ __forceinline__ void fill(const Rows& rows, int n_rows, int first, int count) const {
        int lane = threadIdx.x & 31;
#pragma unroll 1
        for (int token = 0; token < n_rows; ++token) {
            auto row = rows.row(token);
            unsigned* to = (unsigned*)(codes + 2 * token * units);
            for (int from = threadIdx.x - lane; from < 8 * count; from += blockDim.x) {  // a lane has a group of four
                int i = from + lane, n = i >> 3, group = i & 7;
                float4 x = i < 8 * count ? row.four(32 * first + 4 * i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                int most = tg_magnitude(x);
#pragma unroll
                for (int apart = 1; apart < 8; apart *= 2) most = max(most, __shfl_xor_sync(~0u, most, apart));
                float d = __int_as_float(most) / 127.0f, by = d > 0x1p-128f ? 1.0f / d : 0.0f;
                int word = tg_codes(x, by), sum = __dp4a(word, 0x01010101, 0);
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                int other = __shfl_xor_sync(~0u, sum, 4);
                if (i < 8 * count) {
                    to[4 * ((group >> 2) * units + n) + (group & 3)] = (unsigned)word;
                    if (group == 0)
                        tails[token * units + n] = make_uint2((unsigned)__float_as_int(d), (sum & 0xFFFF) | other << 16);
                }
            }
        }
    }

    // The largest magnitude, as bits of a float: a NaN is larger than all numbers.
    static __device__ __forceinline__ int tg_magnitude(float4 x) {
        int a = max(__float_as_int(x.x) & 0x7FFFFFFF, __float_as_int(x.y) & 0x7FFFFFFF);
        return max(a, max(__float_as_int(x.z) & 0x7FFFFFFF, __float_as_int(x.w) & 0x7FFFFFFF));
    }
    // Rounded to the nearest, ties to even: what is added leaves whole numbers in the lowest byte.
    static __device__ __forceinline__ int tg_codes(float4 x, float by) {
        const float round = 12582912.0f;
        unsigned a = __float_as_int(x.x * by + round), b = __float_as_int(x.y * by + round);
        unsigned c = __float_as_int(x.z * by + round), d = __float_as_int(x.w * by + round);
        return (int)__byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
    }
};

// Units of UNIT elements of each of TOKENS rows, as f32; fours lie apart as halves do above.
template <int TOKENS, int UNIT> struct Floats {
    static constexpr int unit = UNIT, unit_bytes = 4 * UNIT, tokens = TOKENS;
    float4* fours;  // [TOKENS][UNIT / 4][units]
    int units;

    __device__ __forceinline__ Floats(unsigned char* shared, int units) : fours((float4*)shared), units(units) {}

    __device__ __forceinline__ Floats from(int token, int unit) const {
        Floats to = *this;
        to.fours += token * (UNIT / 4) * units + unit;
        return to;
    }

    template <typename Rows> __device__ __forceinline__ void fill(const Rows& rows, int n_rows, int first, int count) const {
        constexpr int each = UNIT / 4;
#pragma unroll 1
        for (int token = 0; token < n_rows; ++token) {
            auto row = rows.row(token);
            for (int i = threadIdx.x; i < each * count; i += blockDim.x)
                fours[(token * each + i % each) * units + i / each] = row.four(UNIT * first + 4 * i);
        }
    }

    __device__ __forceinline__ float4 four(int token, int i, int n) const { return fours[(token * (UNIT / 4) + i) * units + n]; }
};
#endif

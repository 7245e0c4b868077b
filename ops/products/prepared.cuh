// Rows of activations in 16 bits, as tiles of tensor cores take them (tiles.cuh).
#ifndef TG_PREPARED
#define TG_PREPARED
#include "tensorgraph.ops.products:mat_vec.cuh"

#ifdef TG_HOST
static inline unsigned tg_halves(float low, float high) { return tg_float_to_half(low) | (unsigned)tg_float_to_half(high) << 16; }
#else
__device__ __forceinline__ unsigned tg_halves(float low, float high) {  // one instruction
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
#endif
__device__ __forceinline__ unsigned tg_brains(float low, float high) {
    Brain a, b;
    tg_set(a, low);
    tg_set(b, high);
    return a.bits | (unsigned)b.bits << 16;
}

// v * 2^n, without an intermediate that is out of range where the result is not.
__device__ __forceinline__ float tg_scaled(float v, int n) { return v * tg_power(n >> 1) * tg_power(n - (n >> 1)); }

// Rows of activations one after another, `padded` elements of 2 bytes each, zeros behind their ends, and then an int for each,
// its exponent: elements in f16 are those of the row times 2^-exponent, so that the largest is below 2^14 and no less than 2^13.
struct Prepared {
    u16* rows;
    int* exponents;
    i64 padded;

    __device__ __forceinline__ Prepared(u8* at, i64 n_rows, i64 padded)
        : rows((u16*)at), exponents((int*)(at + 2 * n_rows * padded)), padded(padded) {}

    // Write a row, by all threads of a block.
    template <bool BRAIN, typename R> __device__ __forceinline__ void write(i64 number, const R& row) const {
        __shared__ int found[32];
        int most = 0, fours = (int)padded / 4, shift = 0;
        if (!BRAIN) {
            for (int i = threadIdx.x; i < fours; i += blockDim.x) most = max(most, Quantised<1>::tg_magnitude(row.four(4 * i)));
#pragma unroll
            for (int apart = 16; apart > 0; apart /= 2) most = max(most, __shfl_xor_sync(~0u, most, apart));
            __syncthreads();
            if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = most;
            __syncthreads();
            for (int i = 0; i < blockDim.x / 32; ++i) most = max(most, found[i]);
            int exponent = most >> 23;  // plus 127; 255 where something is not finite
            shift = most == 0 || exponent == 255 ? 0 : min(13 - (exponent - 127), 126);
        }
        uint2* to = (uint2*)(rows + number * padded);
        float by = tg_power(shift);
        for (int i = threadIdx.x; i < fours; i += blockDim.x) {
            float4 x = row.four(4 * i);
            to[i] = BRAIN ? make_uint2(tg_brains(x.x, x.y), tg_brains(x.z, x.w))
                          : make_uint2(tg_halves(x.x * by, x.y * by), tg_halves(x.z * by, x.w * by));
        }
        if (threadIdx.x == 0) exponents[number] = -shift;
    }
};
#endif

// What a card does at most: kernels that do one thing each. Loads are of 16 bytes, four of them on the way at once; products are
// of registers alone, in as many sums as hide the latency of a step. What is computed is written only where it cannot be.

// Reads `n` units of 16 bytes, and 1 writes where the sum is a number that it practically never is.
__device__ __forceinline__ void ceiling_read(i64 from, i64 n, i64 to) {
    const uint4* at = (const uint4*)from;
    i64 step = (i64)gridDim.x * blockDim.x;
    unsigned sum = 0;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < n; i += 4 * step) {
        uint4 a = at[i], b = at[i + step], c = at[i + 2 * step], d = at[i + 3 * step];
        sum ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
        sum ^= c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    for (; i < n; i += step) {
        uint4 a = at[i];
        sum ^= a.x ^ a.y ^ a.z ^ a.w;
    }
    if (sum == 0x12345678u) *(unsigned*)to = sum;
}

__device__ __forceinline__ void ceiling_copy(i64 from, i64 n, i64 to) {
    const uint4* at = (const uint4*)from;
    uint4* there = (uint4*)to;
    i64 step = (i64)gridDim.x * blockDim.x;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + 3 * step < n; i += 4 * step) {
        uint4 a = at[i], b = at[i + step], c = at[i + 2 * step], d = at[i + 3 * step];
        there[i] = a;
        there[i + step] = b;
        there[i + 2 * step] = c;
        there[i + 3 * step] = d;
    }
    for (; i < n; i += step) there[i] = at[i];
}

// `turns` times eight products of m16n8k16 a warp: 8 x 4096 operations.
__device__ __forceinline__ void ceiling_mma_f16(i64 turns, i64 to, i64 seed) {
    float d[8][4] = {};
    unsigned a[4], b[8][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = ((unsigned)seed * (threadIdx.x + 7u * i + 1u) & 0x03FF03FFu) | 0x2C002C00u;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) b[i][j] = ((unsigned)seed * (threadIdx.x + 13u * i + j + 3u) & 0x83FF83FFu) | 0x2C002C00u;
    for (i64 turn = 0; turn < turns; ++turn)
#pragma unroll
        for (int i = 0; i < 8; ++i) tg_mma_f16_16816(d[i], a, b[i]);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
    if (sum == 1.2345678e33f) *(float*)to = sum;
}

// `turns` times eight products of m16n8k32 a warp: 8 x 8192 operations.
__device__ __forceinline__ void ceiling_mma_s8(i64 turns, i64 to, i64 seed) {
    int d[8][4] = {};
    unsigned a[4], b[8][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = (unsigned)seed * (threadIdx.x + 7u * i + 1u);
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) b[i][j] = (unsigned)seed * (threadIdx.x + 13u * i + j + 3u);
    for (i64 turn = 0; turn < turns; ++turn)
#pragma unroll
        for (int i = 0; i < 8; ++i) tg_mma_s8_16832(d[i], a, b[i]);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum ^= d[i][0] ^ d[i][1] ^ d[i][2] ^ d[i][3];
    if (sum == 0x12345678) *(int*)to = sum;
}

// `turns` times 16 products of four bytes a thread: 16 x 8 operations.
__device__ __forceinline__ void ceiling_dp4a(i64 turns, i64 to, i64 seed) {
    int d[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) d[i] = (int)((unsigned)seed * (threadIdx.x + i));
    unsigned a = (unsigned)seed * (threadIdx.x + 5u);
    for (i64 turn = 0; turn < turns; ++turn)
#pragma unroll
        for (int i = 0; i < 16; ++i) d[i] = tg_dp4a_us(a, d[i], d[i]);
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) sum ^= d[i];
    if (sum == 0x12345678) *(int*)to = sum;
}

// `turns` times 16 multiply-adds of f32 a thread: 16 x 2 operations.
__device__ __forceinline__ void ceiling_fma(i64 turns, i64 to, i64 seed) {
    float d[16], a = 0.5f + 1e-9f * (float)(unsigned)seed;
#pragma unroll
    for (int i = 0; i < 16; ++i) d[i] = (float)(threadIdx.x + i);
    for (i64 turn = 0; turn < turns; ++turn)
#pragma unroll
        for (int i = 0; i < 16; ++i) d[i] = fmaf(d[i], a, 1.0f);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) sum += d[i];
    if (sum == 1.2345678e33f) *(float*)to = sum;
}

__device__ __forceinline__ void ceiling_nothing(i64 to) {
    if (to == 1) *(int*)to = 0;
}

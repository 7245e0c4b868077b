// Numbers drawn where they are to lie: what a model's weights and state are in measurements. Bytes are limited by what memory
// takes; a number is a hash of where it stands, so that any grid draws the same.

__device__ __forceinline__ u64 tg_hash(u64 x) {  // splitmix64
    x += 0x9E3779B97F4A7C15ull;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ x >> 27) * 0x94D049BB133111EBull;
    return x ^ x >> 31;
}

// Any bits, in words of 8 bytes.
__device__ __forceinline__ void fill_bits(i64 address, i64 n_words, i64 seed) {
    u64* to = (u64*)address;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < n_words; i += (i64)gridDim.x * blockDim.x)
        to[i] = tg_hash((u64)i ^ (u64)seed << 40);
}

// Numbers around a middle, as good as normally distributed: sums of four uniform ones. `middle` and `deviation` are f32's bits.
template <typename T> __device__ __forceinline__ void fill_floats(i64 address, i64 n, i64 seed, i64 middle, i64 deviation) {
    T* to = (T*)address;
    float about = __int_as_float((int)middle), by = __int_as_float((int)deviation) * 1.7320508f / 65536.0f;
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (i64)gridDim.x * blockDim.x) {
        u64 bits = tg_hash((u64)i ^ (u64)seed << 40);
        int sum = (int)(bits & 0xFFFF) + (int)(bits >> 16 & 0xFFFF) + (int)(bits >> 32 & 0xFFFF) + (int)(bits >> 48);
        tg_set(to[i], fmaf((float)(sum - 131070), by, about));
    }
}

// A piece again and again.
__device__ __forceinline__ void fill_repeated(i64 address, i64 n_bytes, i64 piece, i64 piece_bytes) {
    u8* to = (u8*)address;
    const u8* from = (const u8*)piece;
    i64 first = (i64)blockIdx.x * blockDim.x + threadIdx.x, step = (i64)gridDim.x * blockDim.x;
    i64 at = tg_urem(first, piece_bytes), by = tg_urem(step, piece_bytes);
    for (i64 i = first; i < n_bytes; i += step) {
        to[i] = from[at];
        at += by;
        if (at >= piece_bytes) at -= piece_bytes;
    }
}

// What every kernel begins with: types, small functions, and the operands that hand-written kernels are given.
#ifndef TG_PRELUDE
#define TG_PRELUDE

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef unsigned char u8;
typedef signed char i8;

#ifndef TG_HOST
#define TG_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

// Quotients of numbers that are not negative: of 32 bits where both fit, which takes a fifth of the time; else bit by bit, as
// the compiler's own function is called with registers saved to memory.
__device__ __forceinline__ i64 tg_divided(i64 a, i64 b, bool rest) {
    if ((((u64)a | (u64)b) >> 32) == 0) return rest ? (i64)((unsigned)a % (unsigned)b) : (i64)((unsigned)a / (unsigned)b);
    u64 quotient = 0, left = 0;
#pragma unroll 1
    for (int bit = 63; bit >= 0; --bit) {
        left = left << 1 | ((u64)a >> bit & 1);
        if (left >= (u64)b) {
            left -= (u64)b;
            quotient |= 1ull << bit;
        }
    }
    return (i64)(rest ? left : quotient);
}
__device__ __forceinline__ i64 tg_udiv(i64 a, i64 b) { return tg_divided(a, b, false); }
__device__ __forceinline__ i64 tg_urem(i64 a, i64 b) { return tg_divided(a, b, true); }

__device__ __forceinline__ int tg_abs(int x) { return x < 0 ? -x : x; }
__device__ __forceinline__ i64 tg_abs(i64 x) { return x < 0 ? -x : x; }

// The first kernel that refuses its input has its say: a code, and three numbers of its message.
__device__ __forceinline__ void tg_refuse(u64* status, i64 code, i64 a, i64 b, i64 c) {
    if (atomicCAS((unsigned long long*)status, 0ull, (unsigned long long)code) == 0ull) {
        status[1] = (u64)a;
        status[2] = (u64)b;
        status[3] = (u64)c;
    }
}

// Elements as they lie in memory.
struct Half { u16 bits; };
struct Brain { u16 bits; };

__device__ __forceinline__ float tg_float(float x) { return x; }
__device__ __forceinline__ float tg_float(double x) { return (float)x; }
__device__ __forceinline__ float tg_float(Half x) { return tg_half_to_float(x.bits); }
__device__ __forceinline__ float tg_float(Brain x) { return __int_as_float((int)((unsigned)x.bits << 16)); }
__device__ __forceinline__ i64 tg_whole(i64 x) { return x; }
__device__ __forceinline__ i64 tg_whole(int x) { return x; }
__device__ __forceinline__ i64 tg_whole(short x) { return x; }
__device__ __forceinline__ i64 tg_whole(i8 x) { return x; }
__device__ __forceinline__ i64 tg_whole(u8 x) { return x; }
__device__ __forceinline__ i64 tg_whole(bool x) { return x; }

__device__ __forceinline__ void tg_set(float& to, float x) { to = x; }
__device__ __forceinline__ void tg_set(double& to, float x) { to = (double)x; }
__device__ __forceinline__ void tg_set(Half& to, float x) { to.bits = tg_float_to_half(x); }
__device__ __forceinline__ void tg_set(Brain& to, float x) {  // to nearest, ties to even
    unsigned bits = (unsigned)__float_as_int(x);
    to.bits = (u16)((x != x ? bits | 0x400000u : bits + (bits >> 16 & 1u) + 0x7FFFu) >> 16);
}

// What hand-written kernels are given in place of an operand that is not there, and for one that is: where its first element
// lies, its extents, and how many elements apart neighbours along each axis are.
struct Absent {};
constexpr __host__ __device__ bool tg_is_absent(const Absent*) { return true; }
constexpr __host__ __device__ bool tg_is_absent(const void*) { return false; }

template <typename T, int N> struct Tensor {
    using type = T;
    T* data;
    i64 shape[N > 0 ? N : 1], strides[N > 0 ? N : 1];

    __device__ __forceinline__ T* at(i64 a) const { return data + a * strides[0]; }
    __device__ __forceinline__ T* at(i64 a, i64 b) const { return at(a) + b * strides[1]; }
    __device__ __forceinline__ T* at(i64 a, i64 b, i64 c) const { return at(a, b) + c * strides[2]; }
    __device__ __forceinline__ T* at(i64 a, i64 b, i64 c, i64 d) const { return at(a, b, c) + d * strides[3]; }
};

// A stream in layout "rows": pages of 16 rows, found by the table of its class (`backends.cpu.streams.FIELDS`).
template <typename T, int N> struct Stream {
    using type = T;
    char* pages;
    const i64* table;
    i64 shape[N];

    __device__ __forceinline__ i64 width() const {
        i64 n = 1;
#pragma unroll
        for (int i = 1; i < N; ++i) n *= shape[i];
        return n;
    }
    __device__ __forceinline__ i64 n_sequences() const { return table[0]; }
    // 1: the row that the sequence's first page begins with; 2, 3: the rows that are seen, from and to; 6: where the first of
    // them stands among the seen rows of all sequences; 4, 5, 7: the same of those that this step adds
    __device__ __forceinline__ i64 field(i64 seq, int which) const { return table[8 + 8 * seq + which]; }
    // Row `row` of a sequence of the batch.
    __device__ __forceinline__ T* row(i64 seq, i64 row) const {
        i64 place = row - field(seq, 1);
        i64 page = ((const i64*)field(seq, 0))[place / 16];
        return (T*)pages + (page * 16 + place % 16) * width();
    }
    // The sequence that has the s-th seen row of the batch: the last that begins at or before it and is not empty.
    __device__ __forceinline__ i64 sequence_of(i64 s) const {
        i64 found = 0;
        for (i64 i = 0; i < n_sequences(); ++i)
            if (field(i, 6) <= s && field(i, 3) > field(i, 2)) found = i;
        return found;
    }
    // The n-th row that this step adds.
    __device__ __forceinline__ T* added(i64 n) const {
        i64 seq = 0;
        for (i64 i = 0; i < n_sequences(); ++i)
            if (field(i, 7) <= n && field(i, 5) > field(i, 4)) seq = i;
        return row(seq, n - field(seq, 7) + field(seq, 4));
    }
    // The s-th seen row of the batch.
    __device__ __forceinline__ T* seen(i64 s) const {
        i64 seq = sequence_of(s);
        return row(seq, s - field(seq, 6) + field(seq, 2));
    }
};
#endif

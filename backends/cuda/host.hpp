// What NVRTC gives a kernel, given by g++ (C++17): the same source runs on the CPU, each CUDA thread as a fiber of
// host_runtime.cpp. Read before the kernel with -include. Nothing is included here, since <cmath> alone takes 0.3 s.
//
// A kernel must not rely on what differs: `__shared__ alignas(16)` (g++ wants `__shared__ __align__(16)`), `__device__` variables
// that change (they lie where shared memory lies, and are filled with poison), a * b + c that is fused though it is not in fmaf,
// and casts of floats to integers out of range, which saturate on a device only.
#pragma once

#define TG_HOST 1
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __constant__ static
#define __shared__ static  // in .bss, which the runtime fills with poison before each block
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline __attribute__((always_inline))
#define TG_DYNAMIC_SHARED(name) unsigned char* const name = tg_dynamic_shared

using size_t = decltype(sizeof 0);

#define TG_VECTOR(type, name)                                                                                            \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                                             \
    struct name##3 { type x, y, z; };                                                                                    \
    struct alignas(sizeof(type) > 4 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; };                               \
    static inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                              \
    static inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                                   \
    static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
TG_VECTOR(signed char, char)
TG_VECTOR(unsigned char, uchar)
TG_VECTOR(short, short)
TG_VECTOR(unsigned short, ushort)
TG_VECTOR(int, int)
TG_VECTOR(unsigned, uint)
TG_VECTOR(long long, longlong)
TG_VECTOR(unsigned long long, ulonglong)
TG_VECTOR(float, float)
TG_VECTOR(double, double)
#undef TG_VECTOR

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

// What host_runtime.cpp defines. `line` is the kernel's line: threads that meet must meet at the same one.
enum tg_shuffle_mode { TG_SHUFFLE_INDEX, TG_SHUFFLE_UP, TG_SHUFFLE_DOWN, TG_SHUFFLE_XOR };
enum tg_vote_mode { TG_BALLOT, TG_ANY, TG_ALL };
enum tg_barrier_mode { TG_BARRIER, TG_BARRIER_COUNT, TG_BARRIER_AND, TG_BARRIER_OR };
enum tg_mma_mode { TG_MMA_S8, TG_MMA_F16, TG_MMA_BF16, TG_MMA_TF32 };
enum tg_matrix_mode { TG_MATRIX_X2, TG_MATRIX_X4, TG_MATRIX_X4_TRANS };
extern "C" {
extern uint3 threadIdx, blockIdx;  // of the fiber that runs; not const, or g++ would keep them over a switch
extern dim3 blockDim, gridDim;
extern unsigned char* tg_dynamic_shared;
void tg_host_register(const char* module, char* shared, char* end);
[[noreturn]] void tg_host_trap(int line);
int tg_host_barrier(tg_barrier_mode mode, int predicate, int line);
void tg_host_syncwarp(unsigned mask, int line);
unsigned tg_host_vote(tg_vote_mode mode, unsigned mask, int predicate, int line);
unsigned long long tg_host_shuffle(tg_shuffle_mode mode, unsigned mask, unsigned long long bits, int by, int width, int line);
void tg_host_mma(tg_mma_mode mode, void* d, const unsigned* a, const unsigned* b, int line);
void tg_host_ldmatrix(tg_matrix_mode mode, unsigned* r, const void* row, int line);
void tg_host_copy16(void* shared, const void* global, int line);
void tg_host_copy_commit();
void tg_host_copy_wait(int groups);
void tg_host_stored(void* to, unsigned size_bytes);
void tg_host_fence();
void tg_host_atomic();
}

#ifndef TG_RUNTIME
// The linker's bounds of this library and of its .bss, which holds the kernels' static shared memory and nothing else.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[], __bss_start[], _end[];
__attribute__((constructor)) static void tg_host_load() { tg_host_register(__ehdr_start, __bss_start, _end); }
#endif

// --- bits ------------------------------------------------------------------------------------------------------------------

template <class To, class From> static inline To tg_host_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
static inline int __float_as_int(float x) { return tg_host_bits<int>(x); }
static inline unsigned __float_as_uint(float x) { return tg_host_bits<unsigned>(x); }
static inline float __int_as_float(int x) { return tg_host_bits<float>(x); }
static inline float __uint_as_float(unsigned x) { return tg_host_bits<float>(x); }
static inline long long __double_as_longlong(double x) { return tg_host_bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return tg_host_bits<double>(x); }

static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(x);
}
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {  // bit 3 of a selector spreads the sign, as prmt
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        unsigned pick = selector >> 4 * i & 15, byte = ((unsigned long long)y << 32 | x) >> 8 * (pick & 7) & 255;
        result |= (pick & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return result;
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return (((unsigned long long)high << 32 | low) << (by & 31)) >> 32;
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return ((unsigned long long)high << 32 | low) >> (by & 31);
}
static inline int __mulhi(int x, int y) { return (long long)x * y >> 32; }
static inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned long long)x * y >> 32; }
static inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) { return (unsigned __int128)x * y >> 64; }

template <class A, class B, class C> static inline C tg_host_dot4(unsigned a, unsigned b, C c) {
    for (int i = 0; i < 32; i += 8) c += (C)((int)(A)(a >> i) * (int)(B)(b >> i));
    return c;
}
static inline int __dp4a(int a, int b, int c) { return tg_host_dot4<signed char, signed char>(a, b, c); }
static inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) { return tg_host_dot4<unsigned char, unsigned char>(a, b, c); }

// --- mathematics -----------------------------------------------------------------------------------------------------------

#define TG_MATH1(name)              \
    extern "C" double name(double); \
    extern "C" float name##f(float); \
    static inline float name(float x) { return name##f(x); }
#define TG_MATH2(name)                      \
    extern "C" double name(double, double); \
    extern "C" float name##f(float, float); \
    static inline float name(float x, float y) { return name##f(x, y); }
TG_MATH1(sqrt) TG_MATH1(cbrt) TG_MATH1(exp) TG_MATH1(exp2) TG_MATH1(exp10) TG_MATH1(expm1) TG_MATH1(log) TG_MATH1(log2)
TG_MATH1(log10) TG_MATH1(log1p) TG_MATH1(sin) TG_MATH1(cos) TG_MATH1(tan) TG_MATH1(asin) TG_MATH1(acos) TG_MATH1(atan)
TG_MATH1(sinh) TG_MATH1(cosh) TG_MATH1(tanh) TG_MATH1(asinh) TG_MATH1(acosh) TG_MATH1(atanh) TG_MATH1(erf) TG_MATH1(erfc)
TG_MATH1(floor) TG_MATH1(ceil) TG_MATH1(trunc) TG_MATH1(rint) TG_MATH1(nearbyint) TG_MATH1(round) TG_MATH1(fabs)
TG_MATH1(lgamma) TG_MATH1(tgamma)
TG_MATH2(pow) TG_MATH2(fmod) TG_MATH2(fmin) TG_MATH2(fmax) TG_MATH2(copysign) TG_MATH2(atan2) TG_MATH2(hypot)
#undef TG_MATH1
#undef TG_MATH2
extern "C" double fma(double, double, double);
extern "C" float fmaf(float, float, float);
extern "C" double ldexp(double, int);
extern "C" float ldexpf(float, int);
extern "C" void sincosf(float, float*, float*);
extern "C" int abs(int);
static inline float fma(float x, float y, float z) { return fmaf(x, y, z); }
static inline float ldexp(float x, int n) { return ldexpf(x, n); }
static inline long abs(long x) { return x < 0 ? -x : x; }
static inline long long abs(long long x) { return x < 0 ? -x : x; }
static inline float abs(float x) { return fabsf(x); }
static inline double abs(double x) { return fabs(x); }
static inline float rsqrtf(float x) { return 1 / sqrtf(x); }
static inline double rsqrt(double x) { return 1 / sqrt(x); }
static inline float rsqrt(float x) { return 1 / sqrtf(x); }
static inline bool isnan(float x) { return x != x; }
static inline bool isnan(double x) { return x != x; }
static inline bool isinf(float x) { return __builtin_isinf(x); }
static inline bool isinf(double x) { return __builtin_isinf(x); }
static inline bool isfinite(float x) { return __builtin_isfinite(x); }
static inline bool isfinite(double x) { return __builtin_isfinite(x); }
static inline bool signbit(float x) { return __builtin_signbit(x); }
static inline bool signbit(double x) { return __builtin_signbit(x); }

// The quick forms of a device are less exact than these.
static inline float __expf(float x) { return expf(x); }
static inline float __exp10f(float x) { return exp10f(x); }
static inline float __logf(float x) { return logf(x); }
static inline float __log2f(float x) { return log2f(x); }
static inline float __sinf(float x) { return sinf(x); }
static inline float __cosf(float x) { return cosf(x); }
static inline float __powf(float x, float y) { return powf(x, y); }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fsub_rn(float x, float y) { return x - y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __frcp_rn(float x) { return 1 / x; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __frsqrt_rn(float x) { return (float)(1 / sqrt((double)x)); }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __uint2float_rn(unsigned x) { return (float)x; }
static inline int tg_host_saturated_int(float x) {
    return x != x ? 0 : x >= 0x1p31f ? 0x7fffffff : x < -0x1p31f ? -0x7fffffff - 1 : (int)x;
}
static inline unsigned tg_host_saturated_uint(float x) { return !(x > 0) ? 0 : x >= 0x1p32f ? 0xffffffffu : (unsigned)x; }
static inline int __float2int_rn(float x) { return tg_host_saturated_int(rintf(x)); }
static inline int __float2int_rz(float x) { return tg_host_saturated_int(x); }
static inline int __float2int_rd(float x) { return tg_host_saturated_int(floorf(x)); }
static inline int __float2int_ru(float x) { return tg_host_saturated_int(ceilf(x)); }
static inline unsigned __float2uint_rn(float x) { return tg_host_saturated_uint(rintf(x)); }
static inline unsigned __float2uint_rz(float x) { return tg_host_saturated_uint(x); }

#define TG_MINMAX(type, left, right)                                                                 \
    static inline type min(left x, right y) { return (type)x < (type)y ? (type)x : (type)y; }        \
    static inline type max(left x, right y) { return (type)x < (type)y ? (type)y : (type)x; }
TG_MINMAX(int, int, int)
TG_MINMAX(unsigned, unsigned, unsigned)
TG_MINMAX(unsigned, int, unsigned)
TG_MINMAX(unsigned, unsigned, int)
TG_MINMAX(long, long, long)
TG_MINMAX(unsigned long, unsigned long, unsigned long)
TG_MINMAX(long long, long long, long long)
TG_MINMAX(unsigned long long, unsigned long long, unsigned long long)
TG_MINMAX(unsigned long long, long long, unsigned long long)
TG_MINMAX(unsigned long long, unsigned long long, long long)
#undef TG_MINMAX
static inline float min(float x, float y) { return fminf(x, y); }
static inline float max(float x, float y) { return fmaxf(x, y); }
static inline double min(double x, double y) { return fmin(x, y); }
static inline double max(double x, double y) { return fmax(x, y); }
static inline double min(float x, double y) { return fmin(x, y); }
static inline double max(float x, double y) { return fmax(x, y); }
static inline double min(double x, float y) { return fmin(x, y); }
static inline double max(double x, float y) { return fmax(x, y); }

// --- memory ----------------------------------------------------------------------------------------------------------------

template <class T> struct tg_host_same { using type = T; };  // lets a value convert to the type of what an address points to
#define TG_ATOMIC(name, result)                                                               \
    template <class T> static inline T name(T* address, typename tg_host_same<T>::type value) {   \
        T old = *address;                                                                     \
        *address = result;                                                                    \
        tg_host_atomic();                                                                     \
        return old;                                                                           \
    }
TG_ATOMIC(atomicAdd, old + value)
TG_ATOMIC(atomicSub, old - value)
TG_ATOMIC(atomicMax, old < value ? value : old)
TG_ATOMIC(atomicMin, value < old ? value : old)
TG_ATOMIC(atomicExch, value)
TG_ATOMIC(atomicAnd, old & value)
TG_ATOMIC(atomicOr, old | value)
TG_ATOMIC(atomicXor, old ^ value)
TG_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
TG_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef TG_ATOMIC
template <class T>
static inline T atomicCAS(T* address, typename tg_host_same<T>::type expected, typename tg_host_same<T>::type value) {
    T old = *address;
    *address = old == expected ? value : old;
    tg_host_atomic();
    return old;
}
static inline void __threadfence() {
    asm volatile("" ::: "memory");
    tg_host_fence();
}
static inline void __threadfence_block() { asm volatile("" ::: "memory"); }
template <class T> static inline T __ldg(const T* address) { return *address; }
template <class T> static inline T __ldcg(const T* address) { return *address; }
template <class T> static inline T __ldcs(const T* address) { return *address; }
template <class T> static inline void __stcg(T* address, typename tg_host_same<T>::type value) {
    *address = value;
    tg_host_stored(address, sizeof value);
}
template <class T> static inline void __stcs(T* address, typename tg_host_same<T>::type value) { *address = value; }

// --- threads that meet -----------------------------------------------------------------------------------------------------

static constexpr int warpSize = 32;
static inline void __trap(int line = __builtin_LINE()) { tg_host_trap(line); }
static inline void __syncthreads(int line = __builtin_LINE()) { tg_host_barrier(TG_BARRIER, 0, line); }
static inline int __syncthreads_count(int x, int line = __builtin_LINE()) { return tg_host_barrier(TG_BARRIER_COUNT, x, line); }
static inline int __syncthreads_and(int x, int line = __builtin_LINE()) { return tg_host_barrier(TG_BARRIER_AND, x, line); }
static inline int __syncthreads_or(int x, int line = __builtin_LINE()) { return tg_host_barrier(TG_BARRIER_OR, x, line); }
static inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { tg_host_syncwarp(mask, line); }
static inline unsigned __ballot_sync(unsigned mask, int x, int line = __builtin_LINE()) {
    return tg_host_vote(TG_BALLOT, mask, x, line);
}
static inline int __any_sync(unsigned mask, int x, int line = __builtin_LINE()) { return tg_host_vote(TG_ANY, mask, x, line); }
static inline int __all_sync(unsigned mask, int x, int line = __builtin_LINE()) { return tg_host_vote(TG_ALL, mask, x, line); }

template <class T> static inline T tg_host_shuffled(tg_shuffle_mode mode, unsigned mask, T value, int by, int width, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle takes 4 or 8 bytes");
    unsigned long long bits = 0;
    __builtin_memcpy(&bits, &value, sizeof value);
    bits = tg_host_shuffle(mode, mask, bits, by, width, line);
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
#define TG_SHUFFLE(name, mode)                                                                                           \
    template <class T> static inline T name(unsigned mask, T value, int by, int width = 32, int line = __builtin_LINE()) { \
        return tg_host_shuffled(mode, mask, value, by, width, line);                                                          \
    }
TG_SHUFFLE(__shfl_sync, TG_SHUFFLE_INDEX)
TG_SHUFFLE(__shfl_up_sync, TG_SHUFFLE_UP)
TG_SHUFFLE(__shfl_down_sync, TG_SHUFFLE_DOWN)
TG_SHUFFLE(__shfl_xor_sync, TG_SHUFFLE_XOR)
#undef TG_SHUFFLE

// --- the wrappers of wrappers.cuh, which hold PTX there ---------------------------------------------------------------------

static inline float tg_half_to_float(unsigned short half) {
    unsigned magnitude = half & 0x7fff, sign = (half & 0x8000u) << 16;
    unsigned bits = (magnitude << 13) + (112 << 23);
    if (magnitude >= 0x7c00) bits += 112 << 23;  // infinite, or a NaN, which is made quiet
    if (magnitude > 0x7c00) bits |= 1 << 22;
    if (magnitude < 0x400) bits = tg_host_bits<unsigned>(tg_host_bits<float>(bits + (1 << 23)) - 0x1p-14f);
    return tg_host_bits<float>(sign | bits);
}
static inline unsigned short tg_float_to_half(float x) {  // to nearest, ties to even; any NaN becomes 0x7fff, as cvt makes it
    unsigned bits = tg_host_bits<unsigned>(x), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x47800000) return sign | 0x7c00;  // 65536 and up
    if (magnitude < 0x38800000) {                       // subnormal: adding 0.5 leaves units of 2^-24 in the low bits, rounded
        return sign | (tg_host_bits<unsigned>(tg_host_bits<float>(magnitude) + 0.5f) - 0x3f000000);
    }
    return sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
}
static inline unsigned tg_float_to_tf32(float x) {  // to nearest, ties away from zero: cvt.rna
    unsigned bits = tg_host_bits<unsigned>(x);
    return (bits & 0x7fffffff) >= 0x7f800000 ? bits : (bits + 0x1000) & ~0x1fffu;
}
static inline int tg_dp4a_us(unsigned a, int b, int c) { return tg_host_dot4<unsigned char, signed char>(a, b, c); }

// d += a * b of a whole warp; e = 4 (s8), 2 (f16, bf16) or 1 (tf32) elements to a register, K = 8 e. With g = lane / 4 and
// t = lane % 4: register r of a, its element j, is A[g + 8 (r % 2)][e t + j + 4 e (r / 2)]; of b, B[e t + j + 4 e r][g];
// d[i] is D[g + 8 (i / 2)][2 t + i % 2]. A is 16 x K, B is K x 8, D is 16 x 8.
#define TG_MMA(name, type, mode)                                                                                         \
    static inline void name(type (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], int line = __builtin_LINE()) { \
        tg_host_mma(mode, d, a, b, line);                                                                                \
    }
TG_MMA(tg_mma_s8_16832, int, TG_MMA_S8)
TG_MMA(tg_mma_f16_16816, float, TG_MMA_F16)
TG_MMA(tg_mma_bf16_16816, float, TG_MMA_BF16)
TG_MMA(tg_mma_tf32_1688, float, TG_MMA_TF32)
#undef TG_MMA

// 8 x 8 matrices of 16 bits: lane 8 i + k brings the address of row k of matrix i; r[i] is elements (lane / 4, 2 (lane % 4)) and
// the one to its right of matrix i, or of its transpose. The lanes above 15 bring no address to x2.
static inline void tg_ldmatrix_x2(unsigned (&r)[2], const void* row, int line = __builtin_LINE()) {
    tg_host_ldmatrix(TG_MATRIX_X2, r, row, line);
}
static inline void tg_ldmatrix_x4(unsigned (&r)[4], const void* row, int line = __builtin_LINE()) {
    tg_host_ldmatrix(TG_MATRIX_X4, r, row, line);
}
static inline void tg_ldmatrix_x4_trans(unsigned (&r)[4], const void* row, int line = __builtin_LINE()) {
    tg_host_ldmatrix(TG_MATRIX_X4_TRANS, r, row, line);
}

// Fills 16 bytes with poison now, and copies at the wait that covers them.
static inline void tg_cp_async16(void* shared, const void* global, int line = __builtin_LINE()) {
    tg_host_copy16(shared, global, line);
}
static inline void tg_cp_async_commit() { tg_host_copy_commit(); }
template <int N> static inline void tg_cp_async_wait() { tg_host_copy_wait(N); }

// A few rows of activations times a matrix, each of whose elements is read once for all of them.
//
// What limits it is memory: an H100 hides its latency with some 18 KB of loads in flight on each multiprocessor. A *team* of
// LANES threads (a part of a warp, a warp, or several) has ROWS rows of the matrix; lane i takes units i, i + LANES, ... of them,
// a unit being what 16 bytes hold (32 elements of a block type), and has DEPTH of each row in flight. The first of them are asked
// for before the activations are rounded, which hides one behind the other. Integer products (dp4a) of unsigned codes by signed
// activations; sums over 16 make up for centres and minima.
#ifndef TG_MAT_VEC
#define TG_MAT_VEC
#include "tensorgraph.ops.products:rows.cuh"

// --- matrices --------------------------------------------------------------------------------------------------------------

// A matrix of a block type. `unit`: elements that a lane takes at once.
template <typename F> struct PlanesOf {
    static constexpr int unit = 32;
    using Unit = Coded<F, 4>;
    using RowOf = CodedRow<F>;
    CodedRow<F> first;
    i64 low, high, factors, heads;  // bytes of a row

    __device__ __forceinline__ RowOf row(i64 m) const {
        return {first.low + m * low, first.high + m * high, first.factors + m * factors, first.heads + m * heads,
                first.exponent + m};
    }
    static __device__ __forceinline__ void load(Unit& to, const RowOf& row, int n) { to.load(row, n); }
};

// Eight elements of 2 bytes, or four of more, which are then f32.
template <typename T> struct DenseUnit {
    unsigned words[4];

    __device__ __forceinline__ float4 four(int i) const {
        if constexpr (sizeof(T) > 2)
            return make_float4(__int_as_float(words[0]), __int_as_float(words[1]), __int_as_float(words[2]),
                               __int_as_float(words[3]));
        unsigned a = words[2 * i], b = words[2 * i + 1];
        if constexpr (tg_is_half((const T*)nullptr))
            return make_float4(tg_half_of(a, 0), tg_half_of(a, 1), tg_half_of(b, 0), tg_half_of(b, 1));
        return make_float4(tg_brain_of(a, 0), tg_brain_of(a, 1), tg_brain_of(b, 0), tg_brain_of(b, 1));
    }
    static constexpr __device__ bool tg_is_half(const Half*) { return true; }
    static constexpr __device__ bool tg_is_half(const void*) { return false; }
};

// A matrix of floats with any strides.
template <typename T> struct DenseOf {
    static constexpr int unit = sizeof(T) > 2 ? 4 : 8;
    using Unit = DenseUnit<T>;
    struct RowOf {
        const T* data;
        i64 stride;
        int width;
        bool fast;
    };
    const T* data;
    i64 row_stride, stride;
    int width;

    __device__ __forceinline__ RowOf row(i64 m) const {
        const T* at = data + m * row_stride;
        return {at, stride, width, stride == 1 && (u64)at % 16 == 0};
    }
    static __device__ __forceinline__ unsigned bits(const RowOf& row, int k) {
        if (k >= row.width) return 0;
        T x = row.data[k * row.stride];
        if constexpr (sizeof(T) > 2) return (unsigned)__float_as_int((float)x);
        else return x.bits;
    }
    static __device__ __forceinline__ void load(Unit& to, const RowOf& row, int n) {
        int k = unit * n;
        if (row.fast && k + unit <= row.width) {
            if constexpr (sizeof(T) == 8) {
                float4 x = tg_four(row.data + k);
                to.words[0] = __float_as_int(x.x), to.words[1] = __float_as_int(x.y);
                to.words[2] = __float_as_int(x.z), to.words[3] = __float_as_int(x.w);
            } else {
                tg_load_words<4>(to.words, (const u8*)(row.data + k));
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            to.words[i] = unit == 4 ? bits(row, k + i) : bits(row, k + 2 * i) | bits(row, k + 2 * i + 1) << 16;
    }
};

// Matrix `number` of [..., M, K]: where it begins, `number` counted over `leading` as these axes of b's batch are.
template <typename F, int N> __device__ __forceinline__ PlanesOf<F> tg_matrix(const Weights<F, N>& a, i64 number) {
    i64 width = a.shape[N - 1];
    return {tg_coded_row(a, number * a.shape[N - 2]), width / 8 * F::low_bits, width / 8 * F::high_bits,
            width / 32 * F::factor_bytes, width / (32 * F::n_blocks) * F::head_bytes};
}
template <typename T, int N> __device__ __forceinline__ DenseOf<T> tg_matrix(const Tensor<T, N>& a, i64 offset) {
    return {a.data + offset, a.strides[N - 2], a.strides[N - 1], (int)a.shape[N - 1]};
}
// What `tg_matrix` is told of index i of a's axis `axis`.
template <typename F, int N> __device__ __forceinline__ i64 tg_step(const Weights<F, N>& a, int axis) {
    i64 n = 1;
#pragma unroll
    for (int i = 0; i < N - 2; ++i)
        if (i > axis) n *= a.shape[i];
    return n;
}
template <typename T, int N> __device__ __forceinline__ i64 tg_step(const Tensor<T, N>& a, int axis) { return a.strides[axis]; }

// The matrix of a number of b's batch: neighbours share one, as many as the axis of b is longer than a's.
template <template <typename, int> class A, typename T, int N, typename S, int M>
__device__ __forceinline__ auto tg_matrix_of(const A<T, N>& a, const Tensor<S, M>& b, unsigned number) {
    i64 at = 0;
#pragma unroll
    for (int i = M - 3; i >= 0; --i) {
        unsigned n = (unsigned)b.shape[i], above = number / n, index = number - above * n;
        number = above;
        const int axis = i - (M - N);
        if (axis >= 0) at += index / (n / (unsigned)a.shape[axis >= 0 ? axis : 0]) * tg_step(a, axis >= 0 ? axis : 0);
    }
    return tg_matrix(a, at);
}

// --- products of units -----------------------------------------------------------------------------------------------------

// Units n of ROWS rows of a matrix times those of TOKENS rows of activations.
template <typename F, int ROWS, int TOKENS>
__device__ __forceinline__ void tg_add(float (&sums)[ROWS][TOKENS], const Coded<F, 4> (&units)[ROWS], const Quantised<TOKENS>& x,
                                       int n) {
    unsigned low[ROWS][4], high[ROWS][4];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) units[r].values(i, low[r][i], high[r][i]);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        uint4 a = x.codes[2 * t * x.units + n], b = x.codes[(2 * t + 1) * x.units + n];
        uint2 tail = x.tails[t * x.units + n];
        float d = __int_as_float((int)tail.x);
        int first = (int)(short)tail.y, second = (int)tail.y >> 16;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const Coded<F, 4>& unit = units[r];
            int p = tg_dp4a_us(low[r][0], a.x, 0), q = tg_dp4a_us(high[r][0], b.x, 0);
            p = tg_dp4a_us(low[r][1], a.y, p), q = tg_dp4a_us(high[r][1], b.y, q);
            p = tg_dp4a_us(low[r][2], a.z, p), q = tg_dp4a_us(high[r][2], b.z, q);
            p = tg_dp4a_us(low[r][3], a.w, p), q = tg_dp4a_us(high[r][3], b.w, q);
            int whole;
            if (F::per_factor == 16) {
                if (F::centre) p -= F::centre * first, q -= F::centre * second;
                whole = unit.factor(0) * p + unit.factor(1) * q;
            } else {
                whole = p + q;
                if (F::centre) whole -= F::centre * (first + second);
                if (F::factor_bytes) whole *= unit.factor(0);
            }
            float sum = unit.scale() * (float)whole;
            if constexpr (F::has_min) {
                if constexpr (F::factor_bytes == 0) {
                    sum = fmaf(unit.minimum(), (float)(first + second), sum);
                } else {
                    int least = F::per_factor == 16 ? unit.factor_of_minimum(0) * first + unit.factor_of_minimum(1) * second
                                                    : unit.factor_of_minimum(0) * (first + second);
                    sum = fmaf(-unit.minimum(), (float)least, sum);
                }
            }
            sums[r][t] = fmaf(d, sum, sums[r][t]);
        }
    }
}

__device__ __forceinline__ float tg_dot(float4 a, float4 b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

template <typename F, int ROWS, int TOKENS>
__device__ __forceinline__ void tg_add(float (&sums)[ROWS][TOKENS], const Coded<F, 4> (&units)[ROWS], const Floats<TOKENS, 32>& x,
                                       int n) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        float scale[2] = {units[r].scale_of(0), units[r].scale_of(1)};
        float least[2] = {units[r].minimum_of(0), units[r].minimum_of(1)};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            unsigned first, second;
            units[r].values(i, first, second);
            float4 low = tg_elements<F>(first, scale[0], least[0]), high = tg_elements<F>(second, scale[1], least[1]);
#pragma unroll
            for (int t = 0; t < TOKENS; ++t)
                sums[r][t] = tg_dot(high, x.four(t, 4 + i, n), tg_dot(low, x.four(t, i, n), sums[r][t]));
        }
    }
}

template <typename T, int ROWS, int TOKENS, int UNIT>
__device__ __forceinline__ void tg_add(float (&sums)[ROWS][TOKENS], const DenseUnit<T> (&units)[ROWS],
                                       const Floats<TOKENS, UNIT>& x, int n) {
#pragma unroll
    for (int i = 0; i < UNIT / 4; ++i)
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            float4 y = x.four(t, i, n);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) sums[r][t] = tg_dot(units[r].four(i), y, sums[r][t]);
        }
}

// --- sums of a team --------------------------------------------------------------------------------------------------------

// How the threads of a block are divided: `team` of `teams`, and this thread's `lane`.
template <int LANES> struct Team {
    static __device__ __forceinline__ int lane() { return threadIdx.x % LANES; }
    static __device__ __forceinline__ int team() { return threadIdx.x / LANES; }
    static __device__ __forceinline__ int teams() { return blockDim.x / LANES; }
};

// What a lane has of the products of rows `first_row` on of a matrix (those below `height`) with `x`, added to `sums`.
// `fill(first, count)` has the block put units `first` to `first + count - 1` into `x`, and waits as needed; all threads of the
// block call it alike. `chunk`: units that x has room for.
template <int LANES, int DEPTH, typename Matrix, typename X, typename Fill, int ROWS, int TOKENS>
__device__ __forceinline__ void tg_mat_vec(float (&sums)[ROWS][TOKENS], const Matrix& matrix, i64 first_row, i64 height,
                                           const X& x, int n_units, int chunk, const Fill& fill) {
    typename Matrix::RowOf rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) rows[r] = matrix.row(first_row + r < height ? first_row + r : height - 1);
    const int lane = Team<LANES>::lane();
#pragma unroll 1
    for (int first = 0; first < n_units; first += chunk) {
        int count = n_units - first < chunk ? n_units - first : chunk;
        typename Matrix::Unit units[DEPTH][ROWS];
#pragma unroll
        for (int d = 0; d < DEPTH; ++d)
            if (lane + d * LANES < count)
#pragma unroll
                for (int r = 0; r < ROWS; ++r) Matrix::load(units[d][r], rows[r], first + lane + d * LANES);
        fill(first, count);
#pragma unroll 1
        for (int begin = lane; begin < count; begin += LANES * DEPTH)
#pragma unroll
            for (int d = 0; d < DEPTH; ++d) {
                int n = begin + d * LANES, next = n + LANES * DEPTH;
                if (n < count) tg_add(sums, units[d], x, n);
                if (next < count)
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) Matrix::load(units[d][r], rows[r], first + next);
            }
    }
}

// The sums of all lanes of a team, then `epilogue(token, row, sum)` for each token below `n_tokens` and each row below `height`,
// each by one thread. All threads of the block call it alike; `shared`: `tg_exchange_floats` of a block.
template <int LANES, int ROWS, int TOKENS> __host__ __device__ constexpr int tg_exchange_floats() {
    return LANES > 32 ? 8 * ROWS * TOKENS : 1;  // 8 warps at most
}
template <int LANES, typename Epilogue, int ROWS, int TOKENS>
__device__ __forceinline__ void tg_finish(float (&sums)[ROWS][TOKENS], i64 first_row, i64 height, int n_tokens, float* shared,
                                          const Epilogue& epilogue) {
    constexpr int within = LANES < 32 ? LANES : 32, count = ROWS * TOKENS;
    int lane = Team<LANES>::lane();
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int t = 0; t < TOKENS; ++t)
#pragma unroll
            for (int apart = within / 2; apart > 0; apart /= 2) sums[r][t] += __shfl_xor_sync(~0u, sums[r][t], apart);
    if constexpr (LANES > 32) {
        constexpr int warps = LANES / 32;
        float* mine = shared + Team<LANES>::team() * (warps * count);
        if (lane % 32 == 0)
#pragma unroll
            for (int i = 0; i < count; ++i) mine[lane / 32 * count + i] = sums[i % ROWS][i / ROWS];
        __syncthreads();
        if (lane < count) {
            float sum = mine[lane];
#pragma unroll
            for (int w = 1; w < warps; ++w) sum += mine[w * count + lane];
            int token = lane / ROWS, row = lane % ROWS;
            if (token < n_tokens && first_row + row < height) epilogue(token, first_row + row, sum);
        }
        __syncthreads();
    } else {
#pragma unroll
        for (int from = 0; from < count; from += within) {
            float sum = 0.0f;
#pragma unroll
            for (int i = from; i < count && i < from + within; ++i) sum = lane == i - from ? sums[i % ROWS][i / ROWS] : sum;
            int i = from + lane, token = i / ROWS, row = i % ROWS;
            if (i < count && token < n_tokens && first_row + row < height) epilogue(token, first_row + row, sum);
        }
    }
}
#endif

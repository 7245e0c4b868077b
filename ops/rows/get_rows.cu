// y[..., r, :] = a[..., ids[..., r], :], as f32 or whole numbers; zeros for the row -1. A block has a thousand elements of a row,
// so that one row of an embedding is brought by several; a table in planes is decoded, exactly as its type says.
#include "tensorgraph.ops.products:rows.cuh"

constexpr int GET_ROWS_PIECE = 1024;

// Elements `first` on, below `n`, of a row, by all threads of a block.
template <typename F> __device__ __forceinline__ void move_row(float* to, const CodedRow<F>& row, i64 first, i64 n) {
    for (i64 i = first / 8 + threadIdx.x; i < n / 8; i += blockDim.x) {
        Coded<F, 1> held;
        int block = (int)(i / 4), pair = (int)(i % 4);
        held.load(row, block, pair);
        unsigned low, high;
        held.values(0, low, high);
        float4* at = (float4*)(to + 32 * block) + pair;
        at[0] = tg_elements<F>(low, held.scale_of(0), held.minimum_of(0));
        at[4] = tg_elements<F>(high, held.scale_of(1), held.minimum_of(1));
    }
}
template <typename T> __device__ __forceinline__ void move_row(float* to, const Row<T>& row, i64 first, i64 n) {
    for (i64 k = first + 4 * threadIdx.x; k < n; k += 4 * blockDim.x) {
        float4 x = row.four((int)k);
        if ((u64)(to + k) % 16 == 0 && k + 4 <= n) {
            *(float4*)(to + k) = x;
        } else {
            to[k] = x.x;
            if (k + 1 < n) to[k + 1] = x.y;
            if (k + 2 < n) to[k + 2] = x.z;
            if (k + 3 < n) to[k + 3] = x.w;
        }
    }
}
template <typename Y, typename T> struct WholeRow {
    const T* data;
    i64 stride;
};
template <typename Y, typename T> __device__ __forceinline__ void move_row(Y* to, const WholeRow<Y, T>& row, i64 first, i64 n) {
    for (i64 k = first + threadIdx.x; k < n; k += blockDim.x) to[k] = (Y)row.data[k * row.stride];
}

template <typename Y, typename F, int N>
__device__ __forceinline__ CodedRow<F> row_of(const Weights<F, N>& a, i64 batch, i64 id) {
    return tg_coded_row(a, batch * a.shape[N - 2] + id);
}
template <typename Y, typename T, int N> __device__ __forceinline__ auto row_of(const Tensor<T, N>& a, i64 offset, i64 id) {
    const T* at = a.data + offset + id * a.strides[N - 2];
    if constexpr (Y(0.5f) != Y(0)) return Row<T>(at, a.strides[N - 1], (int)a.shape[N - 1]);
    else return WholeRow<Y, T>{at, a.strides[N - 1]};
}
template <typename F, int N> __device__ __forceinline__ i64 step_of(const Weights<F, N>& a, int axis) {
    i64 n = 1;
#pragma unroll
    for (int i = 0; i < N - 2; ++i)
        if (i > axis) n *= a.shape[i];
    return n;
}
template <typename T, int N> __device__ __forceinline__ i64 step_of(const Tensor<T, N>& a, int axis) { return a.strides[axis]; }

template <typename A, typename I, int N, typename Y>
__device__ __forceinline__ void get_rows(const A a, const Tensor<I, N> ids, const Tensor<Y, N + 1> y, u64* status, i64 code) {
    const i64 n = y.shape[N], height = a.shape[N - 1];
    const unsigned pieces = (unsigned)((n + GET_ROWS_PIECE - 1) / GET_ROWS_PIECE);
    i64 rows = 1;
#pragma unroll
    for (int i = 0; i < N; ++i) rows *= ids.shape[i];
    for (i64 item = blockIdx.x; item < rows * pieces; item += gridDim.x) {
        const unsigned number = (unsigned)item / pieces, piece = (unsigned)item - number * pieces;
        unsigned left = number;
        i64 at = 0, batch = 0;
#pragma unroll
        for (int i = N - 1; i >= 0; --i) {
            unsigned extent = (unsigned)ids.shape[i], above = left / extent, index = left - above * extent;
            left = above;
            at += index * ids.strides[i];
            if (i < N - 1) batch += index * step_of(a, i);
        }
        const i64 id = tg_whole(ids.data[at]), first = (i64)piece * GET_ROWS_PIECE;
        const i64 stop = first + GET_ROWS_PIECE < n ? first + GET_ROWS_PIECE : n;
        Y* to = y.data + number * n;
        if (id >= 0 && id < height) {
            move_row(to, row_of<Y>(a, batch, id), first, stop);
        } else {
            if (id != -1 && threadIdx.x == 0) tg_refuse(status, code, id, height, 0);
            for (i64 k = first + threadIdx.x; k < stop; k += blockDim.x) to[k] = Y(0);
        }
    }
}

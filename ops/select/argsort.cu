#include "tensorgraph.ops.select:selection.cuh"
// argsort, and top_k of so many that they do not fit beside each other: rows are sorted in shared memory, as pairs of a key and a
// number. Longer ones are sorted in pieces, which are then merged two by two, a launch for each doubling: every pair finds its
// place by counting, with a binary search, the pairs of the other piece that come before it.

// SELECT: places of what is never selected are -1.
template <bool SELECT, typename K>
__device__ __forceinline__ void write_order(const K* keys, const unsigned* ids, int first, int n, int end, int* to, i64 stride,
                                            int threads) {
    for (int i = first + (int)threadIdx.x; i < end; i += threads)
        to[i * stride] = i < n && (!SELECT || keys[i] < Bits<K>::UNABLE) ? (int)ids[i] : -1;
}

// `n` elements of a row, from `first` on, into shared memory, in order.
template <int THREADS, bool DESCENDING, typename T, typename K>
__device__ __forceinline__ void sort_piece(const T* row, i64 stride, int first, int n, K* keys, unsigned* ids) {
    constexpr int EACH = 4;
    RowKeys<T, THREADS, EACH, DESCENDING> piece(row + first * stride, stride, n);
    __syncthreads();
    for (int tile = 0; tile < n; tile += THREADS * EACH) {
        K key[EACH];
        unsigned id[EACH], there = piece.load(tile, key, id);
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            if (there >> j & 1) {
                keys[id[j]] = key[j];
                ids[id[j]] = id[j] + first;
            }
        }
    }
    sort_pairs<THREADS>(keys, ids, n);
}

// A block for each row of up to `room` elements, a power of two.
template <int THREADS, bool DESCENDING, bool SELECT, typename X, typename Y>
__device__ void sort_rows(const X x, const Y y, int room) {
    using K = typename KeyOf<typename X::type>::type;
    TG_DYNAMIC_SHARED(memory);
    K* keys = (K*)memory;
    unsigned* ids = (unsigned*)(keys + room);
    const int n = row_length(x);
    const i64 n_rows = row_count(y);
    for (i64 at = blockIdx.x; at < n_rows; at += gridDim.x) {
        sort_piece<THREADS, DESCENDING>(row_at(x, at), row_stride(x), 0, n, keys, ids);
        write_order<SELECT>(keys, ids, 0, n, row_length(y), row_at(y, at), row_stride(y), THREADS);
    }
}

// Pairs of all rows: two memories, of which the pieces of one are merged into the other.
template <typename K> struct Pairs {
    K* keys;
    unsigned* ids;
    __device__ __forceinline__ Pairs(u8* memory, i64 room, int which)
        : keys((K*)memory + which * room), ids((unsigned*)((K*)memory + 2 * room) + which * room) {}
};

// The pieces of each row, in order, to the first memory.
template <int THREADS, bool DESCENDING, typename X, typename Y, typename M>
__device__ void sort_pieces(const X x, const Y y, const M memory, i64 room, int piece) {
    using K = typename KeyOf<typename X::type>::type;
    TG_DYNAMIC_SHARED(shared);
    K* keys = (K*)shared;
    unsigned* ids = (unsigned*)(keys + piece);
    const int n = row_length(x), pieces = (n + piece - 1) / piece;
    const i64 items = row_count(y) * pieces;
    const Pairs<K> to(memory.data, room, 0);
    for (i64 item = blockIdx.x; item < items; item += gridDim.x) {
        const i64 at = tg_udiv(item, pieces);
        const int first = (int)(item - at * pieces) * piece, count = min(piece, n - first);
        sort_piece<THREADS, DESCENDING>(row_at(x, at), row_stride(x), first, count, keys, ids);
        for (int i = threadIdx.x; i < count; i += THREADS) {
            to.keys[at * n + first + i] = keys[i];
            to.ids[at * n + first + i] = ids[i];
        }
    }
}

// How many of n pairs in order are before another.
template <typename K> __device__ __forceinline__ int count_before(const K* keys, const unsigned* ids, int n, K key, unsigned id) {
    int low = 0, high = n;
    while (low < high) {
        int middle = (low + high) / 2;
        if (is_before(keys[middle], ids[middle], key, id)) low = middle + 1;
        else high = middle;
    }
    return low;
}

// Pieces of `piece` pairs of memory `from` into pieces of twice as many of the other; rows of one piece are in order and stay.
template <typename X, typename Y, typename M>
__device__ void merge_pieces(const X x, const Y y, const M memory, i64 room, int piece, int from) {
    using K = typename KeyOf<typename X::type>::type;
    const int n = row_length(x), tile = blockDim.x, tiles = (n + tile - 1) / tile;
    if (n <= piece) return;
    const i64 items = row_count(y) * tiles;
    const Pairs<K> source(memory.data, room, from), to(memory.data, room, 1 - from);
    for (i64 item = blockIdx.x; item < items; item += gridDim.x) {
        const i64 at = tg_udiv(item, tiles), row = at * n;
        const int i = (int)(item - at * tiles) * tile + (int)threadIdx.x;
        if (i >= n) continue;
        const int own = i / piece, other = min((own ^ 1) * piece, n), count = min(piece, n - other);
        const K key = source.keys[row + i];
        const unsigned id = source.ids[row + i];
        const int before = count_before(source.keys + row + other, source.ids + row + other, count, key, id);
        const i64 place = row + (own & ~1) * (i64)piece + (i - own * piece) + before;
        to.keys[place] = key;
        to.ids[place] = id;
    }
}

// What is in order after as many merges as a row needs.
template <bool SELECT, typename X, typename Y, typename M>
__device__ void write_merged(const X x, const Y y, const M memory, i64 room, int piece) {
    using K = typename KeyOf<typename X::type>::type;
    const int n = row_length(x), width = row_length(y), tile = 4 * blockDim.x, tiles = (width + tile - 1) / tile;
    int which = 0;
    for (i64 sorted = piece; sorted < n; sorted *= 2) which ^= 1;
    const Pairs<K> source(memory.data, room, which);
    const i64 items = row_count(y) * tiles;
    for (i64 item = blockIdx.x; item < items; item += gridDim.x) {
        const i64 at = tg_udiv(item, tiles), row = at * n;
        const int first = (int)(item - at * tiles) * tile, end = min(width, first + tile);
        write_order<SELECT>(source.keys + row, source.ids + row, first, n, end, row_at(y, at), row_stride(y), blockDim.x);
    }
}

// Order and selection in a block: keys that compare as floats do, the k least of many pairs of a key and a number, and the order
// of pairs. No two pairs of one selection have the same number, so that what is selected, and its order, do not depend on the
// order in which threads come: of equal keys the lower number is the lesser.
#ifndef TG_SELECTION
#define TG_SELECTION

template <typename T> struct KeyOf { using type = unsigned; };
template <> struct KeyOf<double> { using type = u64; };

__device__ __forceinline__ unsigned float_bits(float x) { return (unsigned)__float_as_int(x); }
__device__ __forceinline__ unsigned float_bits(Half x) { return float_bits(tg_half_to_float(x.bits)); }
__device__ __forceinline__ unsigned float_bits(Brain x) { return (unsigned)x.bits << 16; }
__device__ __forceinline__ u64 float_bits(double x) { return (u64)__double_as_longlong(x); }

template <typename K> struct Bits {
    static constexpr int N = 8 * (int)sizeof(K);
    static constexpr K SIGN = (K)1 << (N - 1);
    static constexpr K INFINITE = N == 32 ? (K)0x7F800000u : (K)0x7FF0000000000000ull;
    static constexpr K UNABLE = SIGN | INFINITE;  // the descending key of -inf: those that are selected are below it, NaN's above
};
__device__ __forceinline__ int leading_zeros(unsigned x) { return __clz((int)x); }
__device__ __forceinline__ int leading_zeros(u64 x) { return __clzll((i64)x); }

// Unsigned integers that stand in the order of floats, or in the reverse; zeros of both signs are equal, NaN the highest in
// either. No arithmetic of floats, which could flush subnormal numbers.
template <bool DESCENDING, typename K> __device__ __forceinline__ K ordered_key(K bits) {
    K size = bits & ~Bits<K>::SIGN;
    K key = size == 0 ? Bits<K>::SIGN : bits & Bits<K>::SIGN ? ~bits : bits | Bits<K>::SIGN;
    return size > Bits<K>::INFINITE ? ~(K)0 : DESCENDING ? ~key : key;
}

// Rows of tensors: all but the last axis, flattened.
template <typename T, int N> __device__ __forceinline__ int row_length(const Tensor<T, N>& x) { return (int)x.shape[N - 1]; }
template <typename T, int N> __device__ __forceinline__ i64 row_stride(const Tensor<T, N>& x) { return x.strides[N - 1]; }
template <typename T, int N> __device__ __forceinline__ i64 row_count(const Tensor<T, N>& x) {
    i64 n = 1;
#pragma unroll
    for (int i = 0; i < N - 1; ++i) n *= x.shape[i];
    return n;
}
template <typename T, int N> __device__ __forceinline__ T* row_at(const Tensor<T, N>& x, i64 row) {
    T* at = x.data;
#pragma unroll
    for (int i = N - 2; i > 0; --i) {
        i64 rest = tg_udiv(row, x.shape[i]);
        at += (row - rest * x.shape[i]) * x.strides[i];
        row = rest;
    }
    if constexpr (N > 1) at += row * x.strides[0];
    return at;
}

// Four neighbours of a row, read at once.
template <typename T> struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Quad { T x[4]; };

// A row's keys, in tiles of EACH elements for each of THREADS threads. A thread's elements lie side by side, four at a time,
// where these can be read at once.
template <typename T, int THREADS, int EACH, bool DESCENDING> struct RowKeys {
    using K = typename KeyOf<T>::type;
    static constexpr int TILE = THREADS * EACH;
    const T* row;
    i64 stride;
    int n;
    bool whole;  // four elements at a time

    __device__ __forceinline__ RowKeys(const T* row, i64 stride, int n)
        : row(row), stride(stride), n(n), whole(stride == 1 && ((u64)row & (sizeof(Quad<T>) - 1)) == 0) {}

    __device__ __forceinline__ int place(int first, int j) const {
        return whole ? first + (j / 4 * THREADS + (int)threadIdx.x) * 4 + j % 4 : first + j * THREADS + (int)threadIdx.x;
    }
    // The keys of a tile; those that are there, as bits.
    __device__ __forceinline__ unsigned load(int first, K (&keys)[EACH], unsigned (&ids)[EACH]) const {
        unsigned there = 0;
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            ids[j] = (unsigned)place(first, j);
            if ((int)ids[j] < n) there |= 1u << j;
        }
        T x[EACH];
        if (whole && first + TILE <= n) {
#pragma unroll
            for (int j = 0; j < EACH; j += 4) {
                Quad<T> four = *(const Quad<T>*)(row + ids[j]);
#pragma unroll
                for (int i = 0; i < 4; ++i) x[j + i] = four.x[i];
            }
        } else {
#pragma unroll
            for (int j = 0; j < EACH; ++j) x[j] = row[there >> j & 1 ? (i64)ids[j] * stride : 0];
        }
#pragma unroll
        for (int j = 0; j < EACH; ++j) keys[j] = ordered_key<DESCENDING, K>(float_bits(x[j]));
        return there;
    }
};

// The sum of what the threads before this one have. `sums` is shared, and free again after the next barrier.
template <int THREADS> __device__ __forceinline__ unsigned sum_before(unsigned own, unsigned (&sums)[THREADS / 32]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned up_to = own;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        unsigned other = __shfl_up_sync(~0u, up_to, by);
        if (lane >= by) up_to += other;
    }
    if (lane == 31) sums[warp] = up_to;
    __syncthreads();
    unsigned before = up_to - own;
#pragma unroll
    for (int i = 0; i < THREADS / 32 - 1; ++i) before += i < warp ? sums[i] : 0u;
    return before;
}

// Where each thread of a warp may write those of its elements that are in `taken` (bits), counted by a counter in memory.
template <int EACH> struct Places {
    unsigned masks[EACH];
    unsigned first;

    __device__ __forceinline__ Places(unsigned taken, unsigned* counter) {
        unsigned total = 0;
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            masks[j] = __ballot_sync(~0u, taken >> j & 1);
            total += __popc(masks[j]);
        }
        unsigned at = 0;
        if (total != 0 && threadIdx.x % 32 == 0) at = atomicAdd(counter, total);
        first = __shfl_sync(~0u, at, 0);
    }
    // Of element j; asked for in order.
    __device__ __forceinline__ unsigned next(int j) {
        unsigned at = first + __popc(masks[j] & ((1u << threadIdx.x % 32) - 1));
        first += __popc(masks[j]);
        return at;
    }
};

template <typename K> __device__ __forceinline__ bool is_before(K key, unsigned id, K other, unsigned other_id) {
    return key < other || (key == other && id < other_id);
}

// Pairs in shared memory into ascending order; there is room for as many as the next power of two. Neighbours up to 32 pairs
// apart are a warp's own, so that only the steps between those that lie farther apart wait for the block.
template <int THREADS, typename K> __device__ __forceinline__ void sort_pairs(K* keys, unsigned* ids, int n) {
    int padded = 1;
    while (padded < n) padded *= 2;
    for (int i = n + (int)threadIdx.x; i < padded; i += THREADS) {
        keys[i] = ~(K)0;
        ids[i] = ~0u;
    }
    __syncthreads();
#pragma unroll 1
    for (int size = 2; size <= padded; size *= 2) {
#pragma unroll 1
        for (int half = size / 2; half > 0; half /= 2) {
            if (half >= 32) __syncthreads();
            else __syncwarp();
#pragma unroll 2
            for (int p = threadIdx.x; p < padded / 2; p += THREADS) {
                int a = 2 * p - (p & (half - 1)), b = a + half;
                K key = keys[a], other = keys[b];
                unsigned id = ids[a], other_id = ids[b];
                if (is_before(other, other_id, key, id) == ((a & size) == 0)) {
                    keys[a] = other;
                    keys[b] = key;
                    ids[a] = other_id;
                    ids[b] = id;
                }
            }
        }
    }
    __syncthreads();
}

// The k least of the pairs that a block's threads offer. All that is not above the limit is written down in shared memory; when
// there is no more room, the limit is lowered to about the k-th least, and what is above it goes. A row in no order is looked at
// once this way, and few of its elements are written down.
template <typename K, int THREADS> struct Best {
    static constexpr int BINS = 1024, DIGIT = 10, OWN = BINS / THREADS;
    struct Shared {
        unsigned counts[BINS];  // 0 between two uses
        unsigned sums[THREADS / 32];
        K low, high;
        unsigned count, bin, before, inside;
    };
    K* keys;
    unsigned* ids;
    Shared& shared;
    int room, k;
    K limit;
    unsigned limit_id;

    // Of `room` pairs in memory; there is to be room for more than k, and for the power of two that is not less.
    __device__ __forceinline__ Best(unsigned char* memory, Shared& shared, int room, int k)
        : keys((K*)memory), ids((unsigned*)(memory + room * sizeof(K))), shared(shared), room(room), k(k) {}

    // Forget what was there; pairs whose keys are not able are never taken.
    __device__ __forceinline__ void begin() {
        __syncthreads();
        for (int i = threadIdx.x; i < BINS; i += THREADS) shared.counts[i] = 0;
        if (threadIdx.x == 0) {
            shared.count = 0;
            shared.low = ~(K)0;
            shared.high = 0;
        }
        limit = Bits<K>::UNABLE - 1;
        limit_id = ~0u;
        __syncthreads();
    }

    __device__ __forceinline__ bool within(K key, unsigned id) const { return key < limit || (key == limit && id <= limit_id); }

    // By all threads: those of a thread's pairs that are named by bits. What was read of shared memory before may be written
    // after.
    template <int EACH> __device__ __forceinline__ void offer(const K (&key)[EACH], const unsigned (&id)[EACH], unsigned wanted) {
        for (;;) {
            unsigned taken = 0;
#pragma unroll
            for (int j = 0; j < EACH; ++j)
                if ((wanted >> j & 1) && within(key[j], id[j])) taken |= 1u << j;
            wanted = write(key, id, taken);
            if (!__syncthreads_or(wanted != 0)) return;
            cut(room, k + (room - k) / 4);  // what found no room is offered again
        }
    }

    // The k least in order, in `keys` and `ids`; returns how many they are.
    __device__ __forceinline__ int finish(bool sorted = true) {
        __syncthreads();
        int n = (int)shared.count;
        if (n > k) {
            cut(n, k);
            n = k;
        }
        if (sorted) sort_pairs<THREADS>(keys, ids, n);
        return n;
    }

private:
    // Returns those that found no room.
    template <int EACH>
    __device__ __forceinline__ unsigned write(const K (&key)[EACH], const unsigned (&id)[EACH], unsigned taken) {
        Places<EACH> places(taken, &shared.count);
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            unsigned at = places.next(j);
            if ((taken >> j & 1) && at < (unsigned)room) {
                keys[at] = key[j];
                ids[at] = id[j];
                taken &= ~(1u << j);
            }
        }
        return taken;
    }

    // Of n > k pairs at least the k least are kept, at most `most`, and the limit is the last of them.
    __device__ __forceinline__ void cut(int n, int most);
};

// The keys' range is cut into bins, then that of the bin which the k-th least is in, until few enough are in it; where all keys
// of a bin are alike, the range of numbers is.
template <typename K, int THREADS> __device__ __forceinline__ void Best<K, THREADS>::cut(int n, int most) {
    K low = ~(K)0, high = 0;
#pragma unroll 2
    for (int i = threadIdx.x; i < n; i += THREADS) {
        K key = keys[i];
        low = key < low ? key : low;
        high = key > high ? key : high;
    }
#pragma unroll
    for (int by = 16; by > 0; by /= 2) {
        K other_low = __shfl_xor_sync(~0u, low, by), other_high = __shfl_xor_sync(~0u, high, by);
        low = other_low < low ? other_low : low;
        high = other_high > high ? other_high : high;
    }
    if (threadIdx.x % 32 == 0) {
        atomicMin(&shared.low, low);
        atomicMax(&shared.high, high);
    }
    __syncthreads();
    low = shared.low;
    high = shared.high;
    K value = 0;
    bool by_id = false;
    unsigned wanted = (unsigned)k, passed = 0;  // the rank within the range, and how many are below it
    for (;;) {
        K span = high - low;
        const int bits = Bits<K>::N - leading_zeros(span), shift = bits > DIGIT ? bits - DIGIT : 0;
#pragma unroll 2
        for (int i = threadIdx.x; i < n; i += THREADS) {
            K key = keys[i];
            bool inside = !by_id || key == value;
            if (by_id) key = ids[i];
            if (inside && key >= low && key <= high) atomicAdd(&shared.counts[(unsigned)((key - low) >> shift)], 1u);
        }
        __syncthreads();
        unsigned own[OWN], total = 0;
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
            own[j] = shared.counts[threadIdx.x * OWN + j];
            shared.counts[threadIdx.x * OWN + j] = 0;
            total += own[j];
        }
        unsigned before = sum_before<THREADS>(total, shared.sums);
#pragma unroll
        for (int j = 0; j < OWN; ++j) {
            if (before < wanted && wanted <= before + own[j]) {
                shared.bin = threadIdx.x * OWN + j;
                shared.before = before;
                shared.inside = own[j];
            }
            before += own[j];
        }
        __syncthreads();
        const K rest = ((K)1 << shift) - 1;
        low += (K)shared.bin << shift;
        high = high - low < rest ? high : low + rest;
        passed += shared.before;
        if (passed + shared.inside <= (unsigned)most) break;
        wanted -= shared.before;
        if (shift == 0) {
            by_id = true;
            value = low;
            low = 0;
            high = (K)0x7FFFFFFF;
        }
    }
    limit = by_id ? value : high;
    limit_id = by_id ? (unsigned)high : ~0u;
    if (threadIdx.x == 0) {
        shared.count = 0;
        shared.low = ~(K)0;
        shared.high = 0;
    }
    constexpr int EACH = 4;
#pragma unroll 1
    for (int first = 0; first < n; first += EACH * THREADS) {
        K key[EACH];
        unsigned id[EACH], kept = 0;
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            int i = first + j * THREADS + (int)threadIdx.x;
            key[j] = i < n ? keys[i] : ~(K)0;
            id[j] = i < n ? ids[i] : ~0u;
            if (i < n && within(key[j], id[j])) kept |= 1u << j;
        }
        __syncthreads();  // what is written now was read before
        write(key, id, kept);
    }
    __syncthreads();
}
#endif

// Many rows of activations times a matrix, a tile of the result to a block: `tg_mma_tile` by tensor cores, on weights that are
// decoded to f16 (or bf16) in shared memory, and `tg_fma_tile` in f32.
//
// Both go along K by 32. What later steps need is asked for before the products of this one, one step ahead in large tiles, of
// which several run at once, and more where few tokens make few tiles; weights are decoded behind the products, into the other of
// two buffers. A decoded element costs some 3 instructions, little beside its 64 or 128 products; of 8 warps each has 64 x 32
// results, and a load (ldmatrix) for every 2.7 mma.
#ifndef TG_TILES
#define TG_TILES
#include "tensorgraph.ops.products:prepared.cuh"

constexpr int TG_STEP = 32;
constexpr int TG_PITCH = 40;  // halves of a row in shared memory: 8 rows of ldmatrix lie in different banks

// --- tensor cores ----------------------------------------------------------------------------------------------------------

// What a thread brings to a tile of weights: half of the 32 elements that a step takes of a row. Elements are those of the row
// times 2^(14 - its exponent), so that f16 holds them whatever their scales are.
template <typename F> struct PlanesTile {
    static constexpr bool brain = false;
    using Held = Coded<F, 2>;
    const PlanesOf<F>& matrix;
    CodedOffset row;
    float by;
    int exponent;  // of the row's results

    __device__ __forceinline__ PlanesTile(const PlanesOf<F>& matrix, i64 first_row, i64 height) : matrix(matrix) {
        i64 m = first_row + threadIdx.x / 2;
        if (m >= height) m = height - 1;
        row = {(unsigned)(m * matrix.low), (unsigned)(m * matrix.high), (unsigned)(m * matrix.factors),
               (unsigned)(m * matrix.heads)};
        exponent = __ldg(matrix.first.exponent + m) - 14;
        by = tg_power(-exponent);
    }
    __device__ __forceinline__ void fetch(Held& held, int step) const {
        held.load(matrix.first, row, step, 2 * (threadIdx.x & 1));
    }
    __device__ __forceinline__ void put(const Held& held, u16* tile) const {
        unsigned first[2], second[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) held.values(i, first[i], second[i]);
        uint4* to = (uint4*)(tile + threadIdx.x / 2 * TG_PITCH + 8 * (threadIdx.x & 1));
        to[0] = eight(first, held.scale_of(0) * by, held.minimum_of(0) * by);
        to[2] = eight(second, held.scale_of(1) * by, held.minimum_of(1) * by);
    }
    static __device__ __forceinline__ uint4 eight(const unsigned (&values)[2], float scale, float least) {
        float4 a = tg_elements<F>(values[0], scale, least), b = tg_elements<F>(values[1], scale, least);
        return make_uint4(tg_halves(a.x, a.y), tg_halves(a.z, a.w), tg_halves(b.x, b.y), tg_halves(b.z, b.w));
    }
};

// The same of Half or Brain elements, as they are.
template <typename T> struct DenseTile {
    static constexpr bool brain = !DenseUnit<T>::tg_is_half((const T*)nullptr);
    struct Held {
        DenseUnit<T> units[2];
    };
    typename DenseOf<T>::RowOf row;
    static constexpr int exponent = 0;

    __device__ __forceinline__ DenseTile(const DenseOf<T>& matrix, i64 first_row, i64 height) {
        i64 m = first_row + threadIdx.x / 2;
        row = matrix.row(m < height ? m : height - 1);
    }
    __device__ __forceinline__ void fetch(Held& held, int step) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) DenseOf<T>::load(held.units[i], row, 4 * step + 2 * (threadIdx.x & 1) + i);
    }
    __device__ __forceinline__ void put(const Held& held, u16* tile) const {
        uint4* to = (uint4*)(tile + threadIdx.x / 2 * TG_PITCH + 16 * (threadIdx.x & 1));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const unsigned(&words)[4] = held.units[i].words;
            to[i] = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
};

template <typename F> __device__ __forceinline__ PlanesTile<F> tg_tile_of(const PlanesOf<F>& matrix, i64 first_row, i64 height) {
    return {matrix, first_row, height};
}
template <typename T> __device__ __forceinline__ DenseTile<T> tg_tile_of(const DenseOf<T>& matrix, i64 first_row, i64 height) {
    return {matrix, first_row, height};
}

// A tile of BN rows of activations by BM rows of weights, 2 * BM threads in WARPS_N times as many warps as are side by side. Of
// activations STAGES steps are in shared memory or on the way there, of weights DEPTH are on the way to registers; none while
// weights are decoded where that is 0, for which fewer registers do.
// `place(token)`: the number of its row in `x`; tokens from `count` on are not there. Then `epilogue(token, row, u, v)`: results
// of a token, of a row and the next; rows count from the tile's first.
template <int BN, int BM, int WARPS_N, int STAGES, int DEPTH, typename Tile, typename Place, typename Epilogue>
__device__ __forceinline__ void tg_mma_tile(const Tile& weights, const Prepared& x, int n_steps, int count, const Place& place,
                                            const Epilogue& epilogue) {
    constexpr int kept = DEPTH > 0 ? DEPTH : 1, turns = DEPTH > 0 ? STAGES : 1, at_once = DEPTH > 0 ? 2 : 1;
    static_assert(STAGES % 2 == 0 && STAGES % kept == 0, "steps take turns with what they hold");
    constexpr int threads = 2 * BM, warps_m = threads / 32 / WARPS_N, wn = BN / WARPS_N, wm = BM / warps_m;
    constexpr int copies = BN * 4 / threads;
    __shared__ __align__(16) u16 rows_of[STAGES][BN * TG_PITCH], columns_of[2][BM * TG_PITCH];
    const int thread = threadIdx.x, lane = thread % 32;
    const int first_n = thread / 32 % WARPS_N * wn, first_m = thread / 32 / WARPS_N * wm;

    unsigned from[copies];  // in 16 bytes: registers are short here
#pragma unroll
    for (int i = 0; i < copies; ++i) {
        int token = thread / 4 + i * (threads / 4);
        from[i] = (unsigned)(place(token < count ? token : count - 1) * x.padded / 8) + thread % 4;
    }
    auto copy = [&](int step, int stage) {
        u16* to = &rows_of[stage][thread / 4 * TG_PITCH + thread % 4 * 8];
        if (step < n_steps)
#pragma unroll
            for (int i = 0; i < copies; ++i)
                tg_cp_async16(to + i * (threads / 4 * TG_PITCH), (const uint4*)x.rows + (from[i] + TG_STEP / 8 * step));
        tg_cp_async_commit();  // of nothing, too, so that the n-th is always the n-th
    };

    float sums[wn / 16][wm / 8][4];
#pragma unroll
    for (int i = 0; i < wn / 16; ++i)
#pragma unroll
        for (int j = 0; j < wm / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.0f;

    __syncthreads();  // a tile before may still be read
    __shared__ int exponents[BM], exponents_of[BN];  // of rows and tokens; where these lie is then forgotten
    if (thread % 2 == 0) exponents[thread / 2] = weights.exponent;
    if (thread < BN) exponents_of[thread] = x.exponents[place(thread < count ? thread : count - 1)];
    if (n_steps == 0) __syncthreads();
    typename Tile::Held held[kept];
#pragma unroll
    for (int i = 0; i < kept; ++i)
        if (i < n_steps) weights.fetch(held[i], i);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) copy(i, i);
    auto put = [&](int step, typename Tile::Held& one) {  // a step's weights to where it will find them; and asks for later ones
        if (step >= n_steps) return;
        weights.put(one, columns_of[step & 1]);
        if (DEPTH > 0 && step + DEPTH < n_steps) weights.fetch(one, step + DEPTH);
    };
    put(0, held[0]);
#pragma unroll 1
    for (int first = 0; first < n_steps; first += turns)
#pragma unroll
    for (int turn = 0; turn < turns; ++turn) {
        const int step = first + turn, stage = turns > 1 ? turn : step % STAGES;
        if (step >= n_steps) break;
        tg_cp_async_wait<STAGES - 2>();
        __syncthreads();
        copy(step + STAGES - 1, (stage + STAGES - 1) % STAGES);
        if (DEPTH == 0 && step + 1 < n_steps) weights.fetch(held[0], step + 1);
        const u16 *a = &rows_of[stage][first_n * TG_PITCH], *b = &columns_of[stage & 1][first_m * TG_PITCH];
#pragma unroll(at_once)
        for (int k = 0; k < TG_STEP; k += 16) {
            constexpr int by_turns = DEPTH > 0 ? 2 : 1;  // tiles of 16 rows: these are volatile, and stay in order
            unsigned rows[by_turns][4], columns[wm / 16][4];
            const u16* row = a + lane % 16 * TG_PITCH + k + lane / 16 * 8;
            tg_ldmatrix_x4(rows[0], row);
#pragma unroll
            for (int j = 0; j < wm / 16; ++j)
                tg_ldmatrix_x4(columns[j], b + (16 * j + lane / 16 * 8 + lane % 8) * TG_PITCH + k + lane / 8 % 2 * 8);
#pragma unroll
            for (int i = 0; i < wn / 16; ++i) {
                int next = by_turns > 1 ? i + 1 : i;
                if (next > 0 && next < wn / 16) tg_ldmatrix_x4(rows[next % by_turns], row + 16 * next * TG_PITCH);
#pragma unroll
                for (int j = 0; j < wm / 8; ++j) {
                    const unsigned column[2] = {columns[j / 2][j % 2 * 2], columns[j / 2][j % 2 * 2 + 1]};
                    if constexpr (Tile::brain) tg_mma_bf16_16816(sums[i][j], rows[i % by_turns], column);
                    else tg_mma_f16_16816(sums[i][j], rows[i % by_turns], column);
                }
            }
        }
        put(step + 1, held[(turn + 1) % kept]);
    }
    tg_cp_async_wait<0>();

#pragma unroll
    for (int i = 0; i < wn / 16; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int token = first_n + 16 * i + 8 * half + lane / 4;
            if (token >= count) continue;
            const int own = exponents_of[token];
#pragma unroll
            for (int j = 0; j < wm / 8; ++j) {
                int m = first_m + 8 * j + lane % 4 * 2;
                float u = tg_scaled(sums[i][j][2 * half], exponents[m] + own);
                float v = tg_scaled(sums[i][j][2 * half + 1], exponents[m + 1] + own);
                epilogue(token, m, u, v);
            }
        }
}

// Two results of a token, of rows m and m + 1, which lie side by side.
__device__ __forceinline__ void tg_store_two(float* to, i64 m, i64 height, float u, float v) {
    if (height % 2 == 0) {
        if (m < height) *(float2*)(to + m) = make_float2(u, v);
        return;
    }
    if (m < height) to[m] = u;
    if (m + 1 < height) to[m + 1] = v;
}

// --- f32 -------------------------------------------------------------------------------------------------------------------

constexpr int TG_SIDE = 64;  // rows of either in a tile of `tg_fma_tile`, of 128 threads

// In shared memory element k of row m: 64 rows side by side, fours of them in an order in which neither those who write along k
// nor those who read along m meet in a bank.
__device__ __forceinline__ int tg_at(int k, int m) { return k * TG_SIDE + (m ^ 4 * (k >> 2 & 7)); }
__device__ __forceinline__ void tg_put(float* to, int k, int m, float4 x) {
    to[tg_at(k, m)] = x.x, to[tg_at(k + 1, m)] = x.y, to[tg_at(k + 2, m)] = x.z, to[tg_at(k + 3, m)] = x.w;
}

// What a thread brings to such a tile of weights: two pairs of groups of a step.
template <typename F> struct PlanesFma {
    CodedRow<F> rows[2];
    Coded<F, 1> held[2];

    __device__ __forceinline__ PlanesFma(const PlanesOf<F>& matrix, i64 first_row, i64 height) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            i64 m = first_row + 32 * i + threadIdx.x / 4;
            rows[i] = matrix.row(m < height ? m : height - 1);
        }
    }
    __device__ __forceinline__ void fetch(int step) {
#pragma unroll
        for (int i = 0; i < 2; ++i) held[i].load(rows[i], step, threadIdx.x % 4);
    }
    __device__ __forceinline__ void put(float* to) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            unsigned first, second;
            held[i].values(0, first, second);
            int k = threadIdx.x % 4 * 4, m = 32 * i + threadIdx.x / 4;
            tg_put(to, k, m, tg_elements<F>(first, held[i].scale_of(0), held[i].minimum_of(0)));
            tg_put(to, 16 + k, m, tg_elements<F>(second, held[i].scale_of(1), held[i].minimum_of(1)));
        }
    }
};

// Four fours of a matrix with any strides: along its rows, or of neighbouring rows where these lie side by side.
template <typename T> struct DenseFma {
    const DenseOf<T>& matrix;
    i64 first_row, height;
    bool across;
    float4 held[4];

    __device__ __forceinline__ DenseFma(const DenseOf<T>& matrix, i64 first_row, i64 height)
        : matrix(matrix), first_row(first_row), height(height), across(matrix.row_stride == 1 && matrix.stride != 1) {}

    __device__ __forceinline__ void fetch(int step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int thread = threadIdx.x;
            if (across) {
                i64 left = height - first_row;
                int k = TG_STEP * step + 8 * i + thread / 16;
                Row<T> column(matrix.data + k * matrix.stride + first_row, 1, left < TG_SIDE ? (int)left : TG_SIDE);
                held[i] = k < matrix.width ? column.four(thread % 16 * 4) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            } else {
                i64 m = first_row + 16 * i + thread / 8;
                Row<T> row(matrix.data + (m < height ? m : height - 1) * matrix.row_stride, matrix.stride, matrix.width);
                held[i] = row.four(TG_STEP * step + thread % 8 * 4);
            }
        }
    }
    __device__ __forceinline__ void put(float* to) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int thread = threadIdx.x;
            if (across) *(float4*)(to + tg_at(8 * i + thread / 16, thread % 16 * 4)) = held[i];
            else tg_put(to, thread % 8 * 4, 16 * i + thread / 8, held[i]);
        }
    }
};

template <typename F> __device__ __forceinline__ PlanesFma<F> tg_fma_of(const PlanesOf<F>& matrix, i64 first_row, i64 height) {
    return {matrix, first_row, height};
}
template <typename T> __device__ __forceinline__ DenseFma<T> tg_fma_of(const DenseOf<T>& matrix, i64 first_row, i64 height) {
    return {matrix, first_row, height};
}

// A tile of 64 rows of activations by 64 of weights. `row(token)`: its elements, an object with `four(k)`; tokens from `count` on
// are not there. Then `epilogue(token, row, values)`: results of a token and of four rows, which count from the tile's first.
template <typename Tile, typename Rows, typename Epilogue>
__device__ __forceinline__ void tg_fma_tile(Tile& weights, const Rows& row, int n_steps, int count, const Epilogue& epilogue) {
    __shared__ __align__(16) float shared[2][2][TG_STEP * TG_SIDE];
    const int thread = threadIdx.x, first_m = thread % 16 * 4, first_n = thread / 16 * 8;
    auto mine = [&](int i) { return row(16 * i + thread / 8 < count ? 16 * i + thread / 8 : count - 1); };
    const decltype(row(0)) rows[4] = {mine(0), mine(1), mine(2), mine(3)};
    float4 held[4];
    auto ask = [&](int step) {
        weights.fetch(step);
#pragma unroll
        for (int i = 0; i < 4; ++i) held[i] = rows[i].four(TG_STEP * step + thread % 8 * 4);
    };
    auto put = [&](int to) {
        weights.put(shared[to][0]);
#pragma unroll
        for (int i = 0; i < 4; ++i) tg_put(shared[to][1], thread % 8 * 4, 16 * i + thread / 8, held[i]);
    };
    float sums[8][4];
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] = 0.0f;

    __syncthreads();  // a tile before may still be read
    if (n_steps > 0) {
        ask(0);
        put(0);
    }
#pragma unroll 1
    for (int step = 0; step < n_steps; ++step) {
        __syncthreads();
        if (step + 1 < n_steps) ask(step + 1);
        const float *a = shared[step & 1][0], *b = shared[step & 1][1];
#pragma unroll 8
        for (int k = 0; k < TG_STEP; ++k) {
            float4 w = *(const float4*)(a + tg_at(k, first_m));
            float4 x[2] = {*(const float4*)(b + tg_at(k, first_n)), *(const float4*)(b + tg_at(k, first_n + 4))};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float y = i % 4 == 0 ? x[i / 4].x : i % 4 == 1 ? x[i / 4].y : i % 4 == 2 ? x[i / 4].z : x[i / 4].w;
                sums[i][0] = fmaf(w.x, y, sums[i][0]), sums[i][1] = fmaf(w.y, y, sums[i][1]);
                sums[i][2] = fmaf(w.z, y, sums[i][2]), sums[i][3] = fmaf(w.w, y, sums[i][3]);
            }
        }
        if (step + 1 < n_steps) put((step + 1) & 1);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (first_n + i < count) epilogue(first_n + i, first_m, make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]));
}

__device__ __forceinline__ void tg_store_four(float* to, i64 m, i64 height, float4 x) {
    if (height % 4 == 0) {
        if (m < height) *(float4*)(to + m) = x;
        return;
    }
    if (m < height) to[m] = x.x;
    if (m + 1 < height) to[m + 1] = x.y;
    if (m + 2 < height) to[m + 2] = x.z;
    if (m + 3 < height) to[m + 3] = x.w;
}
#endif

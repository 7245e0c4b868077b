// Lists of rows as attention reads them: each row once, the later places of the same one empty (-1). Also where ids are looked
// at: one that names no row is refused, and left out.
//
// A block takes a token. Its ids go into a table of open addresses, SIZE pairs of an id and the first place where it is listed,
// in shared memory if it has room, else in `tables`. An id stays where its place is the first.

template <int SIZE, typename Ids, typename Tables>
__device__ __forceinline__ void listed_rows(const Ids ids, i64 n_rows, const Tensor<u8, 1> listed, const Tables tables,
                                            u64* status, i64 code) {
    TG_DYNAMIC_SHARED(smem);
    i64 n = ids.shape[1];
    int thread = threadIdx.x, threads = blockDim.x;
    for (i64 token = blockIdx.x; token < ids.shape[0]; token += gridDim.x) {
        int* table = (int*)smem;
        if constexpr (sizeof(Tables) > sizeof(Absent)) table = (int*)tables.data + token * (2 * SIZE);
        int* to = (int*)listed.data + token * n;
        for (int i = thread; i < SIZE; i += threads) table[2 * i] = -1, table[2 * i + 1] = 0x7fffffff;
        __syncthreads();
        for (i64 i = thread; i < n; i += threads) {
            i64 id = tg_whole(*ids.at(token, i));
            if ((id < -1 || id >= n_rows) && *(volatile u64*)status == 0) {
                i64 low = id, high = id;
                for (i64 t = 0; t < ids.shape[0]; ++t)
                    for (i64 j = 0; j < n; ++j) {
                        i64 other = tg_whole(*ids.at(t, j));
                        low = other < low ? other : low;
                        high = other > high ? other : high;
                    }
                tg_refuse(status, code, low, high, n_rows);
            }
            bool good = id >= 0 && id < n_rows;
            to[i] = good ? (int)id : -1;
            if (!good) continue;
            unsigned at = ((unsigned)id * 2654435769u >> 8) % SIZE;
            for (;;) {
                int held = atomicCAS(table + 2 * at, -1, (int)id);
                if (held == -1 || held == (int)id) break;
                at = (at + 1) % SIZE;
            }
            atomicMin(table + 2 * at + 1, (int)i);
        }
        __syncthreads();
        for (i64 i = thread; i < n; i += threads) {
            int id = to[i];
            if (id < 0) continue;
            unsigned at = ((unsigned)id * 2654435769u >> 8) % SIZE;
            volatile const int* found = table;  // not as some cache of this multiprocessor may have it
            while (found[2 * at] != id) at = (at + 1) % SIZE;
            if (found[2 * at + 1] != (int)i) to[i] = -1;
        }
        __syncthreads();
    }
}

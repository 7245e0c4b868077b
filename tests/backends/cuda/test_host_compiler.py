"""Kernels run on the processor: the functions of host.hpp against NumPy, and what the order of threads shows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tensorgraph.backends.cuda.host_compiler import HostCompiler
from tensorgraph.errors import KernelError
from tests.backends.cuda.hosted import run

SCHEDULES = (0, 1, 2, 3)
INT = np.dtype(np.int32)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


REDUCTION = """__shared__ float s[256];
int t = threadIdx.x;
s[t] = x[blockIdx.x * 256 + t];
__syncthreads();
for (int k = 128; k; k /= 2) {
    if (t < k) s[t] += s[t + k];
    __syncthreads();  // each time
}
if (t == 0) y[blockIdx.x] = s[0];"""


def reduce(compiler: HostCompiler, body: str, schedule: int) -> bool:
    """Whether the sums of four blocks are what NumPy's are."""
    x, y = np.arange(1024, dtype=np.float32), np.zeros(4, np.float32)
    run(compiler, "const float* x, float* y", body, x, y, grid=(4, 1, 1), block=(256, 1, 1), schedule=schedule)
    return np.array_equal(y, x.reshape(4, 256).sum(1))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_block_reduces_through_shared_memory(compiler: HostCompiler, schedule: int) -> None:
    assert reduce(compiler, REDUCTION, schedule)


@pytest.mark.parametrize("barrier", ["__syncthreads();\nfor", "__syncthreads();  // each time"])
def test_some_schedule_finds_a_barrier_that_is_missing(compiler: HostCompiler, barrier: str) -> None:
    body = REDUCTION.replace(barrier, barrier.replace("__syncthreads();", ""))
    assert not all(reduce(compiler, body, schedule) for schedule in SCHEDULES)


def test_each_thread_of_each_block_runs_once(compiler: HostCompiler) -> None:
    for schedule in SCHEDULES:
        x = np.zeros(2 * 3 * 4 * 12, INT)
        body = """int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
        x[block * 12 + thread] += thread + 1;"""
        run(compiler, "int* x", body, x, grid=(2, 3, 4), block=(3, 2, 2), schedule=schedule)
        assert np.array_equal(x.reshape(24, 12), np.tile(np.arange(1, 13), (24, 1)))


def test_schedules_are_orders_of_threads_and_blocks(compiler: HostCompiler) -> None:
    def order(schedule: int) -> list[int]:
        x = np.zeros(1 + 3 * 64, INT)
        body = "__syncthreads(); x[1 + atomicAdd(x, 1)] = blockIdx.x * 64 + threadIdx.x;"
        run(compiler, "int* x", body, x, grid=(3, 1, 1), block=(64, 1, 1), schedule=schedule)
        return x[1:].tolist()

    assert order(0) == list(range(192)) and order(1) == list(range(191, -1, -1))
    assert order(2) == order(2) != order(3) and sorted(order(2)) == list(range(192))


@pytest.mark.parametrize("dtype, name", [(np.int32, "int"), (np.float64, "double"), (np.uint64, "unsigned long long")])
def test_shuffles(compiler: HostCompiler, rng: np.random.Generator, dtype: type[np.generic], name: str) -> None:
    x, by = rng.integers(0, 1 << 30, 32).astype(dtype), rng.integers(0, 32, 32).astype(INT)
    y = np.zeros((6, 4, 32), dtype)
    body = """int t = threadIdx.x;
    for (int w = 0; w < 6; w++, y += 128) {
        y[t] = __shfl_sync(~0u, x[t], by[t], 1 << w);
        y[32 + t] = __shfl_up_sync(~0u, x[t], 3, 1 << w);
        y[64 + t] = __shfl_down_sync(~0u, x[t], 3, 1 << w);
        y[96 + t] = __shfl_xor_sync(~0u, x[t], 5, 1 << w);
    }"""
    run(compiler, f"const {name}* x, const int* by, {name}* y", body, x, by, y, schedule=2)
    lane = np.arange(32)
    for w in range(6):
        first, last = lane & -(1 << w), lane | (1 << w) - 1
        up, down, across = lane - 3, lane + 3, lane ^ 5
        assert np.array_equal(y[w, 0], x[first + by % (1 << w)])
        assert np.array_equal(y[w, 1], x[np.where(up < first, lane, up)])
        assert np.array_equal(y[w, 2], x[np.where(down > last, lane, down)])
        assert np.array_equal(y[w, 3], x[np.where(across > last, lane, across)])


def test_votes_of_a_part_of_a_warp(compiler: HostCompiler, rng: np.random.Generator) -> None:
    x, y = rng.integers(0, 2, 64).astype(INT), np.zeros((64, 4), np.uint32)
    body = """int t = threadIdx.x;
    if (t % 32 >= 20) return;
    y[4 * t] = __ballot_sync(0xfffff, x[t]);
    y[4 * t + 1] = __any_sync(0xfffff, t == 32);
    y[4 * t + 2] = __all_sync(0xfffff, t < 51);
    __syncwarp(0xfffff);
    y[4 * t + 3] = __all_sync(1 << t % 32, t == 3);"""
    run(compiler, "const int* x, unsigned* y", body, x, y, block=(64, 1, 1))
    for warp in range(2):
        ballot = sum(int(bit) << lane for lane, bit in enumerate(x[32 * warp : 32 * warp + 20]))
        expected = [[ballot, warp, 1 - warp, 32 * warp + lane == 3] for lane in range(20)]
        assert np.array_equal(y[32 * warp : 32 * warp + 20], expected)


def test_barriers_count_and_do_not_wait_for_threads_that_returned(compiler: HostCompiler) -> None:
    for schedule in SCHEDULES:
        y = np.zeros((64, 4), INT)
        body = """int t = threadIdx.x;
        y[4 * t] = __syncthreads_count(t % 3 == 0);
        y[4 * t + 1] = __syncthreads_or(t == 40);
        y[4 * t + 2] = __syncthreads_and(t != 40);
        if (t < 40) return;
        y[4 * t + 3] = __syncthreads_count(1);"""
        run(compiler, "int* y", body, y, block=(64, 1, 1), schedule=schedule)
        assert np.array_equal(y, [[22, 1, 0, 24 if thread >= 40 else 0] for thread in range(64)])


MMA = {  # elements of a register, as what they lie in memory, and what is summed
    "s8_16832": (4, np.int8, INT),
    "f16_16816": (2, np.float16, np.float32),
    "bf16_16816": (2, ml_dtypes.bfloat16, np.float32),
    "tf32_1688": (1, np.float32, np.float32),
}


@pytest.mark.parametrize("shape", MMA)
def test_products_of_fragments_laid_out_as_ptx_says(compiler: HostCompiler, rng: np.random.Generator, shape: str) -> None:
    elements, dtype, total = MMA[shape]
    depth = 8 * elements
    a, b = (rng.normal(0, 50, size).astype(dtype) for size in ((16, depth), (depth, 8)))
    c = rng.integers(-99, 99, (16, 8)).astype(total)
    if shape == "tf32_1688":  # the low bits are not looked at
        exact = [(each.view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32) for each in (a, b)]
    else:
        exact = [a, b]
    expected = c + exact[0].astype(np.float64) @ exact[1].astype(np.float64)
    kind = "float" if total == np.float32 else "int"
    body = f"""int g = threadIdx.x / 4, t = threadIdx.x % 4, row, column;
    constexpr int K = {depth}, E = {elements}, BITS = 32 / E;
    unsigned a[4] = {{}}, b[2] = {{}};
    {kind} d[4];
    for (int i = 0; i < 4 * E; i++) {{  // PTX's a_i and b_i, E of them in a register
        row = i / E % 2 ? g + 8 : g, column = t * E + i % E + (i < 2 * E ? 0 : 4 * E);
        a[i / E] |= (unsigned)A[row * K + column] << i % E * BITS % 32;
    }}
    for (int i = 0; i < 2 * E; i++) {{
        row = t * E + i % E + (i < E ? 0 : 4 * E), column = g;
        b[i / E] |= (unsigned)B[row * 8 + column] << i % E * BITS % 32;
    }}
    for (int i = 0; i < 4; i++) d[i] = C[(i < 2 ? g : g + 8) * 8 + t * 2 + (i & 1)];
    tg_mma_{shape}(d, a, b);
    for (int i = 0; i < 4; i++) C[(i < 2 ? g : g + 8) * 8 + t * 2 + (i & 1)] = d[i];"""
    bits = f"unsigned {({1: 'char', 2: 'short', 4: 'int'})[a.itemsize]}"
    run(compiler, f"const {bits}* A, const {bits}* B, {kind}* C", body, a, b, c, schedule=3)
    assert np.allclose(c, expected, rtol=1e-6, atol=1e-3) if kind == "float" else np.array_equal(c, expected)


def test_ldmatrix(compiler: HostCompiler) -> None:
    x, y = np.arange(256, dtype=np.uint16).reshape(4, 8, 8), np.zeros((32, 10, 2), np.uint16)
    body = """__shared__ __align__(16) unsigned short m[256];
    int t = threadIdx.x;
    for (int i = t; i < 256; i += 32) m[i] = x[i];
    __syncthreads();
    unsigned plain[4], turned[4], two[2];
    tg_ldmatrix_x4(plain, m + 8 * t);
    tg_ldmatrix_x4_trans(turned, m + 8 * t);
    tg_ldmatrix_x2(two, t < 16 ? m + 8 * t : nullptr);
    for (int i = 0; i < 4; i++) y[t * 10 + i] = plain[i], y[t * 10 + 4 + i] = turned[i];
    for (int i = 0; i < 2; i++) y[t * 10 + 8 + i] = two[i];"""
    run(compiler, "const unsigned short* x, unsigned* y", body, x, y)
    pairs = [each.reshape(-1, 32, 2).swapaxes(0, 1) for each in (x, x.swapaxes(1, 2).copy(), x[:2])]
    assert np.array_equal(y, np.concatenate(pairs, axis=1))


def test_a_product_of_rows_in_shared_memory(compiler: HostCompiler, rng: np.random.Generator) -> None:
    a, b, c = rng.normal(size=(16, 16)).astype(np.float16), rng.normal(size=(8, 16)).astype(np.float16), np.zeros((16, 8), "f")
    body = """__shared__ __align__(16) unsigned short a[16][16], b[8][16];
    int t = threadIdx.x;
    for (int i = t; i < 256; i += 32) a[i / 16][i % 16] = A[i], b[i / 16 % 8][i % 16] = B[i % 128];
    __syncwarp();
    unsigned left[4], right[2];
    float d[4] = {};
    tg_ldmatrix_x4(left, &a[t % 16][t / 16 * 8]);
    tg_ldmatrix_x2(right, &b[t % 8][t / 8 % 2 * 8]);
    tg_mma_f16_16816(d, left, right);
    for (int i = 0; i < 4; i++) C[(t / 4 + i / 2 * 8) * 8 + t % 4 * 2 + i % 2] = d[i];"""
    run(compiler, "const unsigned short* A, const unsigned short* B, float* C", body, a, b, c)
    assert np.allclose(c, a.astype("f") @ b.astype("f").T, atol=1e-5)


PIPELINE = """TG_DYNAMIC_SHARED(raw);
float4* s = (float4*)raw;
const float4* from = (const float4*)x;
int t = threadIdx.x;
float sum = 0;
tg_cp_async16(s + t, from + t);
tg_cp_async_commit();  // the first
for (int i = 0; i < n; i++) {
    if (i + 1 < n) tg_cp_async16(s + (i + 1) % 2 * 64 + t, from + (i + 1) * 64 + t);
    tg_cp_async_commit();
    tg_cp_async_wait<1>();
    __syncthreads();
    float4 v = s[i % 2 * 64 + 63 - t];
    sum += v.x + v.y + v.z + v.w;
    __syncthreads();  // before the next copy
}
y[t] = sum;"""


def pipe(compiler: HostCompiler, body: str, schedule: int) -> bool:
    x, y = np.arange(6 * 64 * 4, dtype=np.float32).reshape(6, 64, 4), np.zeros(64, np.float32)
    params = "const float* x, float* y, long long n"
    run(compiler, params, body, x, y, 6, block=(64, 1, 1), shared_bytes=2 * 64 * 16, schedule=schedule)
    return np.array_equal(y, x.sum((0, 2))[::-1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_copies_run_ahead_of_their_use(compiler: HostCompiler, schedule: int) -> None:
    assert pipe(compiler, PIPELINE, schedule)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("tg_cp_async_wait<1>();", ""),
        ("tg_cp_async_wait<1>();", "tg_cp_async_wait<2>();"),
        ("tg_cp_async_commit();\n    tg", "\n    tg"),
        ("__syncthreads();  // before the next copy", ""),
        ("__syncthreads();\n    float4", "float4"),
    ],
)
def test_a_copy_used_too_early_or_overwritten_is_found(compiler: HostCompiler, right: str, wrong: str) -> None:
    assert right in PIPELINE
    assert not all(pipe(compiler, PIPELINE.replace(right, wrong), schedule) for schedule in SCHEDULES)


def test_dp4a(compiler: HostCompiler, rng: np.random.Generator) -> None:
    x, y = rng.integers(-(1 << 31), 1 << 31, (256, 3)).astype(INT), np.zeros((256, 3), INT)
    body = """int i = threadIdx.x, a = x[3 * i], b = x[3 * i + 1], c = x[3 * i + 2];
    y[3 * i] = __dp4a(a, b, c);
    y[3 * i + 1] = __dp4a((unsigned)a, (unsigned)b, (unsigned)c);
    y[3 * i + 2] = tg_dp4a_us(a, b, c);"""
    run(compiler, "const int* x, int* y", body, x, y, block=(256, 1, 1))
    for column, (left, right) in enumerate([(np.int8, np.int8), (np.uint8, np.uint8), (np.uint8, np.int8)]):
        a, b = (np.ascontiguousarray(x[:, i]).view(t).reshape(-1, 4).astype(np.int64) for i, t in enumerate((left, right)))
        assert np.array_equal(y[:, column], ((a * b).sum(1) + x[:, 2]).astype(INT))


def test_halves_and_tf32(compiler: HostCompiler, rng: np.random.Generator) -> None:
    halves, floats = np.arange(65536, dtype=np.uint16), np.zeros(65536, np.float32)
    body = "int i = blockIdx.x * 256 + threadIdx.x; y[i] = tg_half_to_float(x[i]);"
    run(compiler, "const unsigned short* x, float* y", body, halves, floats, grid=(256, 1, 1), block=(256, 1, 1))
    assert np.array_equal(floats, halves.view(np.float16).astype(np.float32), equal_nan=True)
    assert np.array_equal(np.signbit(floats), halves >= 0x8000)

    ties = floats[:-1] / 2 + floats[1:] / 2  # between neighbours, to even; then any bits, and many of the range of halves
    any_bits = rng.integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    some = np.array([65519.99, 65520, -65520, 1e-8, 2.0**-25, *2 ** rng.uniform(-26, 17, 1 << 17)], np.float32)
    x = np.concatenate([floats, ties, any_bits, some])
    x = np.resize(x, -(-x.size // 256) * 256)
    y, bits = np.zeros(x.size, np.uint16), np.zeros(x.size, np.uint32)
    body = "int i = blockIdx.x * 256 + threadIdx.x; y[i] = tg_float_to_half(x[i]); z[i] = tg_float_to_tf32(x[i]);"
    params = "const float* x, unsigned short* y, unsigned* z"
    run(compiler, params, body, x, y, bits, grid=(x.size // 256, 1, 1), block=(256, 1, 1))
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.array_equal(y[~np.isnan(x)], x[~np.isnan(x)].astype(np.float16).view(np.uint16))
    assert (y[np.isnan(x)] == 0x7FFF).all()
    finite = np.isfinite(x)
    magnitude = x[finite].view(np.uint32) & 0x7FFFFFFF
    assert np.array_equal(bits[finite] & 0x7FFFFFFF, (magnitude + 0x1000) >> 13 << 13)  # to nearest, ties away from zero
    assert np.array_equal(bits[finite] >> 31, x[finite].view(np.uint32) >> 31)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_atomics(compiler: HostCompiler, rng: np.random.Generator, schedule: int) -> None:
    x = rng.integers(1, 1 << 30, 512).astype(INT)
    bins, ints = np.zeros(8, np.uint32), np.array([0, 1 << 30, 0, -1, 9, 0, 0, 0], INT)
    floats, longs, doubles = np.zeros(1, np.float32), np.zeros(1, np.uint64), np.zeros(1)
    body = """__shared__ unsigned bins[8], ticket;
    int t = threadIdx.x, v = x[blockIdx.x * 256 + t];
    if (t < 8) bins[t] = ticket = 0;
    __syncthreads();
    atomicAdd(&bins[v & 7], 1u);
    unsigned mine = atomicInc(&ticket, 99);
    __syncthreads();
    if (t < 8) atomicAdd(u + t, bins[t]);
    atomicMax(i, v), atomicMin(i + 1, v), atomicOr(i + 2, v), atomicAnd(i + 3, v);
    if (mine > 99 || (mine == 99 && atomicExch(i + 4, 7) == 9)) atomicAdd(i + 5, 1);
    if (atomicCAS(i + 6, 0, t + 1) == 0) atomicAdd(i + 7, 1);
    atomicAdd(f, 0.5f), atomicAdd(l, (unsigned long long)v), atomicAdd(d, 0.25);"""
    params = "const int* x, unsigned* u, int* i, float* f, unsigned long long* l, double* d"
    args = (x, bins, ints, floats, longs, doubles)
    run(compiler, params, body, *args, grid=(2, 1, 1), block=(256, 1, 1), schedule=schedule)
    assert np.array_equal(bins, np.bincount(x & 7, minlength=8))
    assert ints[:4].tolist() == [x.max(), x.min(), np.bitwise_or.reduce(x), np.bitwise_and.reduce(x)]
    assert ints[4:6].tolist() == [7, 1] and ints[6] > 0 and ints[7] == 1
    assert (floats[0], longs[0], doubles[0]) == (256, x.sum(dtype=np.int64), 128)


def test_bits_and_functions(compiler: HostCompiler, rng: np.random.Generator) -> None:
    x = np.concatenate([[0, 1, 0xFFFFFFFF, 0x80000000], rng.integers(0, 1 << 32, 28)]).astype(np.uint32)
    y, z = np.zeros((32, 10), np.int64), np.zeros((32, 7), np.float32)
    body = """unsigned u = x[threadIdx.x];
    float v = (u >> 8) * 0x1p-22f + 0.5f, *f = z + threadIdx.x * 7;
    long long* r = y + threadIdx.x * 10;
    r[0] = __popc(u), r[1] = __clz(u), r[2] = __ffs(u), r[3] = __brev(u), r[4] = __byte_perm(u, ~u, 0xb305);
    r[5] = __popcll((long long)u << 9 | 1), r[6] = __clzll(u), r[7] = __float_as_uint(__uint_as_float(u & 0xbfffffff));
    r[8] = min((int)u, 5), r[9] = max(u, 5u);
    f[0] = fmaf(v, v, -v), f[1] = rsqrtf(v), f[2] = exp(-v), f[3] = log(v), f[4] = tanh(v), f[5] = floorf(-v);
    f[6] = fmaxf(v, 2);"""
    run(compiler, "const unsigned* x, long long* y, float* z", body, x, y, z)
    for u, row in zip(x.tolist(), y.tolist(), strict=True):
        picked = [*u.to_bytes(4, "little"), *(~u & 0xFFFFFFFF).to_bytes(4, "little")]
        expected = [u.bit_count(), 32 - u.bit_length(), (u & -u).bit_length(), int(f"{u:032b}"[::-1], 2)]
        expected += [int.from_bytes([picked[5], picked[0], picked[3], 255 * (u >> 31)], "little"), u.bit_count() + 1]
        assert row == [*expected, 64 - u.bit_length(), u & 0xBFFFFFFF, min(u - (u >> 31 << 32), 5), max(u, 5)]
    v = ((x >> 8) * 2.0**-22 + 0.5).astype(np.float32).astype(np.float64)
    expected = np.stack([v * v - v, v**-0.5, np.exp(-v), np.log(v), np.tanh(v), np.floor(-v), np.maximum(v, 2)], 1)
    assert np.allclose(z, expected, rtol=3e-7, atol=1e-7)


def test_shared_memory_holds_poison_at_first_and_is_as_large_as_asked(compiler: HostCompiler) -> None:
    body = """__shared__ unsigned held[32];
    TG_DYNAMIC_SHARED(raw);
    x[0] |= held[threadIdx.x] != poison || ((unsigned*)raw)[threadIdx.x] != poison || (size_t)raw % 128 != 0;
    held[threadIdx.x] = ((unsigned*)raw)[threadIdx.x] = 0;
    if (blockIdx.x == 2) raw[at] = 1;"""
    params = "unsigned* x, long long poison, long long at"
    for schedule, poison in ((0, 0xCCCCCCCC), (1, 0x7F7F7F7F)):
        x = np.zeros(1, np.uint32)
        run(compiler, params, body, x, poison, 159, grid=(3, 1, 1), shared_bytes=160, schedule=schedule)
        assert x[0] == 0
    for at in (-1, 160):
        with pytest.raises(KernelError, match=r"160 bytes of dynamic shared memory; got some beyond; in block \(2, 0, 0\)"):
            run(compiler, params, body, x, poison, at, grid=(3, 1, 1), shared_bytes=160)

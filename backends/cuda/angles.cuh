// sin and cos in double precision for all numbers, without the table on the stack that the compiler's own have.
#ifndef TG_ANGLES
#define TG_ANGLES

// 2 / pi, 64 bits a word, the first below the point.
static __device__ const u64 tg_two_over_pi[] = {
    0xa2f9836e4e441529ull, 0xfc2757d1f534ddc0ull, 0xdb6295993c439041ull,
    0xfe5163abdebbc561ull, 0xb7246e3a424dd2e0ull, 0x06492eea09d1921cull,
    0xfe1deb1cb129a73eull, 0xe88235f52ebb4484ull, 0xe99c7026b45f7e41ull,
    0x3991d639835339f4ull, 0x9c845f8bbdf9283bull, 0x1ff897ffde05980full,
    0xef2f118b5a0a6d1full, 0x6d367ecf27cb09b7ull, 0x4f463f669e5fea2dull,
    0x7527bac7ebe5f17bull, 0x3d0739f78a5292eaull, 0x6bfb5fb11f8d5d08ull,
    0x56033046fc7b6babull, 0xf0cfbc209af4361dull, 0xa9e391615ee61b08ull,
};

__device__ __forceinline__ u64 tg_high(u64 a, u64 b) {
    u64 al = (unsigned)a, ah = a >> 32, bl = (unsigned)b, bh = b >> 32;
    u64 low = al * bl, one = ah * bl + (low >> 32), other = al * bh + (unsigned)one;
    return ah * bh + (one >> 32) + (other >> 32);
}

// x = quadrant * pi / 2 + rest, |rest| <= pi / 4 and a little: the bits of x * 2 / pi from two above the point on, of a window of
// four words whose neighbours give whole turns or too little to matter (Payne and Hanek, 1983).
__device__ __forceinline__ double tg_reduced(double x, int& quadrant) {
    i64 bits = __double_as_longlong(x);
    int e = (int)(bits >> 52 & 0x7FF);
    u64 m = (u64)(bits & 0xFFFFFFFFFFFFFll) | 1ull << 52;
    quadrant = 0;
    if (e < 1022) return x;  // |x| < 1 / 2
    if (e == 0x7FF) return x - x;
    e -= 1075;  // x = m 2^e
    int first = e >= 2 ? (e - 2) / 64 : 0;
    const u64* w = tg_two_over_pi + first;
    u64 p0 = m * w[3], p1 = tg_high(m, w[3]), p2, p3, p4, t;
    t = m * w[2];
    p1 += t;
    p2 = tg_high(m, w[2]) + (p1 < t);
    t = m * w[1];
    p2 += t;
    p3 = tg_high(m, w[1]) + (p2 < t);
    t = m * w[0];
    p3 += t;
    p4 = tg_high(m, w[0]) + (p3 < t);
    int left = 320 - (64 * (first + 4) - e + 2);  // 8 to 127
    if (left >= 64) {
        p4 = p3, p3 = p2, p2 = p1, p1 = p0;
        left -= 64;
    }
    if (left > 0) {
        p4 = p4 << left | p3 >> (64 - left);
        p3 = p3 << left | p2 >> (64 - left);
        p2 = p2 << left | p1 >> (64 - left);
    }
    quadrant = (int)(p4 >> 62);
    u64 high = p4 << 2 | p3 >> 62, low = p3 << 2 | p2 >> 62;
    bool over = high >> 63;
    if (over) {  // the next quadrant, from above
        quadrant += 1;
        low = ~low + 1;
        high = ~high + (low == 0);
    }
    int zeros = high ? __clzll((i64)high) : 63;
    if (zeros) high = high << zeros | low >> (64 - zeros);
    double rest = (double)(i64)(high >> 11) * __longlong_as_double((i64)(1023 - 53 - zeros) << 52) * 1.5707963267948966;
    if (bits < 0) quadrant = -quadrant;
    return (bits < 0) != over ? -rest : rest;
}

__device__ __forceinline__ double tg_of_quadrant(double r, int quadrant) {
    double z = r * r;
    double sine = -7.647163731819816e-13;
    sine = fma(sine, z, 1.6059043836821613e-10);
    sine = fma(sine, z, -2.505210838544172e-08);
    sine = fma(sine, z, 2.7557319223985893e-06);
    sine = fma(sine, z, -0.0001984126984126984);
    sine = fma(sine, z, 0.008333333333333333);
    sine = fma(sine, z, -0.16666666666666666);
    sine = fma(r * z, sine, r);
    double cosine = 4.779477332387385e-14;
    cosine = fma(cosine, z, -1.1470745597729725e-11);
    cosine = fma(cosine, z, 2.08767569878681e-09);
    cosine = fma(cosine, z, -2.755731922398589e-07);
    cosine = fma(cosine, z, 2.48015873015873e-05);
    cosine = fma(cosine, z, -0.001388888888888889);
    cosine = fma(cosine, z, 0.041666666666666664);
    cosine = fma(cosine, z, -0.5);
    cosine = fma(z, cosine, 1.0);
    double found = quadrant & 1 ? cosine : sine;
    return quadrant & 2 ? -found : found;
}

__device__ __forceinline__ double tg_sin(double x) {
    int quadrant;
    double r = tg_reduced(x, quadrant);
    return tg_of_quadrant(r, quadrant);
}

__device__ __forceinline__ double tg_cos(double x) {
    int quadrant;
    double r = tg_reduced(x, quadrant);
    return tg_of_quadrant(r, quadrant + 1);
}
#endif

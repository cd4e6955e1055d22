/* Block-scaled quantization of rows on a CPU: the numerics of reference.py, bit for bit, at the speed of memory.

   Compiled on first use by the machine's own compiler and called through ctypes (native.py). Loops over one block have
   no branches and no calls, so that the compiler turns them into vector instructions of whatever width the machine has.

   Rules that keep the bits:
   - no contraction of a * b + c (-ffp-contract=off), no reassociation, correctly rounded divisions;
   - multiplying by the reciprocal of a power of two is a division by it, and only powers of two are treated so;
   - subnormal numbers are computed with, even in a thread that has told its processor to flush them;
   - sums of squared errors run over a halving tree.

   Rounding to the grid of an element needs no case distinction: in the binade of u >= 0 the grid is a ladder of step
   2**k, and adding 1.5 * 2**(k + 23), whose last bit is worth 2**k, rounds u to that ladder with ties to even.

   The search for NVFP4's scale of least error estimates all 17 candidates and computes exactly what is too close to
   call. Everything else follows reference.py, scales.py, rounding.py, packing.py, philox.py, rotation.py and
   macro_block.py line by line. */

#include <float.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#if defined(__FAST_MATH__) || FLT_EVAL_METHOD != 0
#error "this file needs fp32 arithmetic that rounds every operation to fp32"
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

#define TILE_BLOCKS 64  /* blocks whose scales are computed together */
#define LANES 16        /* blocks whose errors are summed side by side */
#define MAX_BLOCK 256   /* largest block size; native.py refuses larger ones */
#define MAX_THREADS 64

#define ABS_MASK 0x7fffffffu
#define SIGN_MASK 0x80000000u
#define EXPONENT_MASK 0x7f800000u
#define NAN_BITS 0x7fc00000u

enum { F32, BF16 };
enum { NEAREST, HALF_AWAY, STOCHASTIC };
enum { E8M0, E8M0_MSE, E4M3, E4M3_FOUR_OVER_SIX, E4M3_MSE, E4M3_FOUR_OVER_SIX_MAE, E4M3_FOUR_OVER_SIX_ABSMAX };
enum { SQUARES, MAGNITUDES, LARGEST };

/* Mirrored field by field by `_Plan` in native.py. */
typedef struct {
    int32_t block_size, bits, mantissa_bits, emin, emax, is_integer;
    int32_t dtype, rounding, rule;
    int32_t round_up_from; /* E8M0: mantissa bits of amax from which the scale is one binade higher */
    int32_t macro_block;   /* elements under one factor, or 0 */
    int32_t rotated;
    float max;
    float residual;        /* alpha of the second pass, or -1 */
    float root;            /* fp32(1 / sqrt(block_size)) */
} Plan;

typedef struct {
    const Plan *plan;
    const void *x;
    void *out;                  /* values of x's dtype, or NULL: */
    uint8_t *codes, *scales;    /* packed codes and scale bytes */
    const float *divisor;       /* gs, or NULL for E8M0 */
    int64_t rows, columns, divisor_stride;
    uint64_t seed, offset;
    int64_t first, last;        /* the tiles of this thread */
} Job;

/* ---- numbers and their bits ---- */

/* Four bytes of a tensor, which may lie anywhere two may. */
typedef uint32_t __attribute__((aligned(2), may_alias)) Word;

INLINE float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
INLINE uint32_t as_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }
#if defined(__FMA__) || defined(__aarch64__)
#define MULTIPLY_ADD(a, b, c) __builtin_fmaf(a, b, c) /* where a * b is exact, or bits do not matter */
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif
INLINE int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }
INLINE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
INLINE int64_t smaller_count(int64_t a, int64_t b) { return a < b ? a : b; }

/* `condition ? a : b` for a condition of 0 or 1, in a form that no compiler turns into a branch. */
INLINE uint32_t pick(int condition, uint32_t a, uint32_t b) { return b ^ ((a ^ b) & (0u - (uint32_t)condition)); }
INLINE float pick_float(int condition, float a, float b)
{
    return as_float(pick(condition, as_bits(a), as_bits(b)));
}

/* 2**(byte - 127) for a byte in 0..254. */
INLINE float e8m0_value(int32_t byte) { return as_float(pick(byte > 0, (uint32_t)byte << 23, 0x00400000u)); }

INLINE uint32_t load_bits(const void *x, int64_t i, const int dtype)
{
    return dtype == BF16 ? (uint32_t)((const uint16_t *)x)[i] << 16 : ((const uint32_t *)x)[i];
}

/* The upper half of the result is bf16, to nearest even. The only NaN that arises here is quiet with no other bit set,
   so the carry cannot wrap. */
INLINE uint32_t to_bf16(uint32_t bits) { return bits + 0x7fffu + ((bits >> 16) & 1u); }

INLINE void store_bits(void *out, int64_t i, uint32_t bits, const int dtype)
{
    if (dtype == BF16)
        ((uint16_t *)out)[i] = (uint16_t)(to_bf16(bits) >> 16);
    else
        ((uint32_t *)out)[i] = bits;
}

INLINE int64_t dtype_bytes(const int dtype) { return dtype == BF16 ? 2 : 4; }

INLINE void load_block(const void *x, float *row, int size, const int dtype)
{
    for (int i = 0; i < size; i++)
        row[i] = as_float(load_bits(x, i, dtype));
}

/* ---- the grid of an element ---- */

typedef struct {
    float max, ladder;
    int32_t floor_bits, emin, mantissa_bits;
} Grid;

INLINE Grid grid_of(float max, int32_t emin, int32_t mantissa_bits)
{
    const float ladder = 1.5f * as_float((uint32_t)(127 + 23 - mantissa_bits) << 23);
    Grid g = {max, ladder, (emin + 127) << 23, emin, mantissa_bits};
    return g;
}

/* Nearest grid point, ties to even; u >= 0 or NaN, and NaN gives the maximum. */
INLINE float nearest(float u, Grid g)
{
    u = u < g.max ? u : g.max;
    float binade = as_float((uint32_t)larger((int32_t)(as_bits(u) & EXPONENT_MASK), g.floor_bits));
    float raised = MULTIPLY_ADD(binade, g.ladder, u);
    return MULTIPLY_ADD(-binade, g.ladder, raised);
}

/* The same with ties away from zero, or up where `draw` * 2**-24 is below the remainder. */
INLINE float by_remainder(float u, Grid g, const int rounding, uint32_t draw)
{
    u = u < g.max ? u : g.max;
    int32_t binade = larger((int32_t)(as_bits(u) & EXPONENT_MASK), g.floor_bits);
    float step = as_float((uint32_t)(binade - (g.mantissa_bits << 23)));
    float per_step = as_float((uint32_t)((254 << 23) - (binade - (g.mantissa_bits << 23))));
    float ladder = u * per_step;
    float below = (float)(int32_t)ladder; /* below 2**(mantissa_bits + 1) */
    float remainder = ladder - below;
    if (rounding == HALF_AWAY)
        return (below + (remainder >= 0.5f ? 1.0f : 0.0f)) * step;
    return (below + ((float)(int32_t)draw * 0x1p-24f < remainder ? 1.0f : 0.0f)) * step;
}

INLINE float to_grid(float u, Grid g, const int rounding, uint32_t draw)
{
    return rounding == NEAREST ? nearest(u, g) : by_remainder(u, g, rounding, draw);
}

/* The code of a magnitude on the grid; `sign` is 0 or SIGN_MASK. */
INLINE int32_t code_of(float r, uint32_t sign, Grid g, const int is_integer, const int bits)
{
    if (is_integer) {
        int32_t count = (int32_t)(r * as_float((uint32_t)(127 + g.mantissa_bits) << 23));
        int32_t negative = -(int32_t)(sign >> 31);
        return ((count ^ negative) - negative) & ((1 << bits) - 1);
    }
    int32_t field = (larger((int32_t)as_bits(r), g.floor_bits) - g.floor_bits) >> 23;
    float per_step = as_float((uint32_t)(127 + g.mantissa_bits - g.emin - field) << 23);
    int32_t ladder = (int32_t)(r * per_step);
    return ((field << g.mantissa_bits) + ladder) | (int32_t)(sign >> (32 - bits));
}

INLINE float value_of(int32_t code, Grid g, const int is_integer, const int bits)
{
    if (is_integer) {
        int32_t count = (int32_t)((uint32_t)code << (32 - bits)) >> (32 - bits);
        return (float)count * as_float((uint32_t)(127 - g.mantissa_bits) << 23);
    }
    uint32_t sign = (uint32_t)code >> (bits - 1) << 31;
    int32_t magnitude = code & ((1 << (bits - 1)) - 1);
    int32_t above = larger((magnitude >> g.mantissa_bits) - 1, 0);
    float step = as_float((uint32_t)(127 + above + g.emin - g.mantissa_bits) << 23);
    float value = (float)(magnitude - (above << g.mantissa_bits)) * step;
    return as_float(pick(value > g.max, NAN_BITS, as_bits(value) | sign));
}

/* ---- E4M3 scales ---- */

INLINE Grid e4m3_grid(void) { return grid_of(448.0f, -6, 3); }

/* The E4M3 number of a code in 0..126; fp32 holds a normal one's fields at the same distance from each other. */
INLINE float e4m3_positive(int32_t code)
{
    return pick_float(code < 8, (float)code * 0x1p-9f, as_float((uint32_t)((code << 20) + (120 << 23))));
}

/* Nearest E4M3 number of a non-negative target, at most 448; NaN stays NaN. */
INLINE float e4m3_round(float target)
{
    return pick_float(target == target, nearest(target, e4m3_grid()), as_float(NAN_BITS));
}

INLINE int32_t e4m3_code(float s)
{
    const int number = s == s;
    return (int32_t)pick(number, (uint32_t)code_of(pick_float(number, s, 0.0f), 0, e4m3_grid(), 0, 8), 0x7f);
}

/* ---- Philox4x32-10, first word (Salmon et al., SC11); counter (low, high, 0, 0) ---- */

INLINE uint32_t philox(uint64_t counter, uint64_t seed)
{
    uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int i = 0; i < 10; i++) {
        uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0 >> 8;
}

/* ---- the maximum of each block ---- */

INLINE void peaks_of(const void *x, int blocks, uint32_t *peak, const int64_t size, const int dtype)
{
    for (int b = 0; b < blocks; b++) {
        if (dtype == BF16) {
            const uint16_t *p = (const uint16_t *)x + b * size;
            uint16_t top = 0;
            for (int64_t i = 0; i < size; i++) {
                uint16_t m = p[i] & 0x7fff;
                top = m > top ? m : top;
            }
            peak[b] = (uint32_t)top << 16;
        } else {
            const uint32_t *p = (const uint32_t *)x + b * size;
            int32_t top = 0;
            for (int64_t i = 0; i < size; i++)
                top = larger((int32_t)(p[i] & ABS_MASK), top);
            peak[b] = (uint32_t)top;
        }
    }
}

/* A constant block size lets the compiler unroll: worth it for the two that every format of the library has. */
static void block_peaks(const void *x, int blocks, uint32_t *peak, int size, int dtype)
{
    if (size == 32 && dtype == BF16)
        peaks_of(x, blocks, peak, 32, BF16);
    else if (size == 32)
        peaks_of(x, blocks, peak, 32, F32);
    else if (size == 16 && dtype == BF16)
        peaks_of(x, blocks, peak, 16, BF16);
    else if (size == 16)
        peaks_of(x, blocks, peak, 16, F32);
    else if (dtype == BF16)
        peaks_of(x, blocks, peak, size, BF16);
    else
        peaks_of(x, blocks, peak, size, F32);
}

/* ---- the scale of each block ----
   `scale` multiplies the rounded elements, `per_unit` multiplies (E8M0) or divides (E4M3) the input. Blocks with NaN or
   Inf get a NaN scale; what is divided by a scale of 0 has to be 0. */

typedef struct {
    uint32_t peak[TILE_BLOCKS];
    float scale[TILE_BLOCKS], per_unit[TILE_BLOCKS], plain[TILE_BLOCKS];
    int32_t byte[TILE_BLOCKS];
} Tile;

static void e8m0_plain(Tile *t, int blocks, const Plan *plan)
{
    const int32_t emax = plan->emax, round_up_from = plan->round_up_from;
    for (int b = 0; b < blocks; b++) {
        uint32_t bits = t->peak[b];
        int subnormal = bits < 1u << 23;
        /* A subnormal's bits count units of 2**-149; the count as fp32 is normal. */
        int32_t m = (int32_t)pick(subnormal, as_bits((float)(int32_t)bits), bits);
        int32_t exponent = (m >> 23) - 127 - 149 * subnormal - emax + ((m & 0x7fffff) >= round_up_from);
        t->byte[b] = smaller(larger(exponent, -127), 127) + 127;
    }
}

static void e8m0_finish(Tile *t, int blocks)
{
    for (int b = 0; b < blocks; b++) {
        const int finite = t->peak[b] < EXPONENT_MASK;
        const int32_t byte = t->byte[b];
        t->scale[b] = pick_float(finite, e8m0_value(byte), as_float(NAN_BITS));
        t->per_unit[b] = pick_float(finite, e8m0_value(254 - byte), 0.0f);
        t->byte[b] = (int32_t)pick(finite, (uint32_t)byte, 0xff);
    }
}

static void e4m3_plain(Tile *t, int blocks, const Plan *plan, float gs)
{
    const float max = plan->max;
    for (int b = 0; b < blocks; b++)
        t->plain[b] = as_float(t->peak[b]) / max * gs;
}

/* `t->plain` holds S. */
static void e4m3_finish(Tile *t, int blocks, float gs)
{
    for (int b = 0; b < blocks; b++) {
        float s = pick_float(t->peak[b] < EXPONENT_MASK, t->plain[b], as_float(NAN_BITS));
        float scale = s / gs;
        t->scale[b] = scale;
        t->per_unit[b] = pick_float(scale == 0.0f, as_float(EXPONENT_MASK), scale);
        t->byte[b] = e4m3_code(s);
    }
}

/* ---- scales of least squared error: LANES blocks side by side, element i of block b at m[i][b] ---- */

typedef float Lanes[LANES];

/* Interleave the lower half of the rows with the upper; four times over this transposes 16 x 16. */
INLINE void interleave(const uint32_t (*from)[16], uint32_t (*to)[16])
{
    for (int r = 0; r < 8; r++)
        for (int i = 0; i < 8; i++) {
            to[2 * r][2 * i] = from[r][i];
            to[2 * r][2 * i + 1] = from[r + 8][i];
            to[2 * r + 1][2 * i] = from[r][i + 8];
            to[2 * r + 1][2 * i + 1] = from[r + 8][i + 8];
        }
}

/* Magnitudes of `count` blocks; the lanes past them are zero. `m` has room for whole sixteens. */
static void side_by_side(const void *x, int count, Lanes *m, int size, int dtype)
{
    uint32_t a[LANES][16] = {{0}}, b[LANES][16];
    for (int i0 = 0; i0 < size; i0 += 16) {
        const int width = size - i0 < 16 ? size - i0 : 16;
        for (int r = 0; r < count; r++) {
            const int64_t at = (int64_t)r * size + i0;
            if (dtype == BF16 && width == 16)
                for (int i = 0; i < 16; i++)
                    a[r][i] = (uint32_t)(((const uint16_t *)x)[at + i] & 0x7fff) << 16;
            else if (width == 16)
                for (int i = 0; i < 16; i++)
                    a[r][i] = ((const uint32_t *)x)[at + i] & ABS_MASK;
            else
                for (int i = 0; i < width; i++)
                    a[r][i] = load_bits(x, at + i, dtype) & ABS_MASK;
        }
        for (int r = count; r < LANES; r++)
            memset(a[r], 0, sizeof a[r]);
        interleave(a, b);
        interleave(b, a);
        interleave(a, b);
        interleave(b, (uint32_t(*)[16])(m + i0));
    }
}

INLINE float one_error(float m, float scale, float divisor, float inverse, float gs, Grid g, const int by_inverse,
                       const int norm)
{
    float u = by_inverse ? m * inverse : m / divisor;
    float e = (nearest(u, g) * scale - m) * gs;
    return norm == SQUARES ? e * e : as_float(as_bits(e) & ABS_MASK);
}

INLINE float joined(float a, float b, const int norm) { return norm == LARGEST ? (a > b ? a : b) : a + b; }

/* ((nearest(m / scale) * scale - m) * gs)**2, or the magnitude of that error, summed over a halving tree; or the
   largest magnitude. A `scale` of 0 divides as infinity does. */
INLINE void sum_errors(const Lanes *m, const float *scale, float gs, float *sum, Grid g, int size,
                       const int by_inverse, const int norm)
{
    Lanes e[MAX_BLOCK / 4], divisor, inverse;
    for (int b = 0; b < LANES; b++) {
        divisor[b] = scale[b] == 0.0f ? as_float(EXPONENT_MASK) : scale[b];
        inverse[b] = 1.0f / divisor[b]; /* used where it is exact */
    }
    const int quarter = size / 4;
    for (int i = 0; i < quarter; i++) {
        const float *p = m[i], *q = m[i + quarter], *r = m[i + 2 * quarter], *s = m[i + 3 * quarter];
        for (int b = 0; b < LANES; b++) {
            float first = one_error(p[b], scale[b], divisor[b], inverse[b], gs, g, by_inverse, norm);
            float second = one_error(q[b], scale[b], divisor[b], inverse[b], gs, g, by_inverse, norm);
            float third = one_error(r[b], scale[b], divisor[b], inverse[b], gs, g, by_inverse, norm);
            float fourth = one_error(s[b], scale[b], divisor[b], inverse[b], gs, g, by_inverse, norm);
            e[i][b] = joined(joined(first, third, norm), joined(second, fourth, norm), norm);
        }
    }
    for (int half = quarter / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            for (int b = 0; b < LANES; b++)
                e[i][b] = joined(e[i][b], e[i + half][b], norm);
    for (int b = 0; b < LANES; b++)
        sum[b] = e[0][b];
}

static void errors_of_powers(const Lanes *m, const float *scale, float *sum, Grid g, int size)
{
    sum_errors(m, scale, 1.0f, sum, g, size, 1, SQUARES);
}

static void errors(const Lanes *m, const float *scale, float gs, float *sum, Grid g, int size, int rule)
{
    if (rule == E4M3_FOUR_OVER_SIX_MAE)
        sum_errors(m, scale, gs, sum, g, size, 0, MAGNITUDES);
    else if (rule == E4M3_FOUR_OVER_SIX_ABSMAX)
        sum_errors(m, scale, gs, sum, g, size, 0, LARGEST);
    else
        sum_errors(m, scale, gs, sum, g, size, 0, SQUARES);
}

static void e8m0_mse(Tile *t, const void *x, int blocks, Grid g, int size, int dtype)
{
    for (int b0 = 0; b0 < blocks; b0 += LANES) {
        Lanes m[MAX_BLOCK], per_unit, best, ratio, sum;
        int32_t byte[LANES], chosen[LANES];
        const int count = blocks - b0 < LANES ? blocks - b0 : LANES;
        side_by_side((const char *)x + (int64_t)b0 * size * dtype_bytes(dtype), count, m, size, dtype);
        for (int b = 0; b < LANES; b++) {
            byte[b] = chosen[b] = b < count ? t->byte[b0 + b] : 127;
            per_unit[b] = e8m0_value(254 - byte[b]);
            best[b] = as_float(EXPONENT_MASK);
        }
        for (int i = 0; i < size; i++)
            for (int b = 0; b < LANES; b++)
                m[i][b] *= per_unit[b];
        for (int step = 1; step >= -1; step--) { /* largest scale first: it keeps a tie */
            int32_t candidate[LANES];
            for (int b = 0; b < LANES; b++) {
                candidate[b] = smaller(larger(byte[b] + step, 0), 254);
                ratio[b] = e8m0_value(127 + candidate[b] - byte[b]);
            }
            errors_of_powers(m, ratio, sum, g, size);
            for (int b = 0; b < LANES; b++) {
                int better = sum[b] < best[b];
                best[b] = pick_float(better, sum[b], best[b]);
                chosen[b] = (int32_t)pick(better, (uint32_t)candidate[b], (uint32_t)chosen[b]);
            }
        }
        for (int b = 0; b < count; b++)
            if (t->peak[b0 + b] != 0)
                t->byte[b0 + b] = chosen[b];
    }
}

/* Estimates of the errors of all candidates decide most blocks of a search: see `e4m3_search`.
   low[c][b] and *least bound the error of candidate c, in the arithmetic of `errors`, from below, and the least error
   from above. `m` holds magnitudes times gs, in which the scale of a candidate is s itself.

   Bounds. Let E be the error in real numbers, n the block size, M the maximum of the grid. Three roundings move an
   estimate of u = m / s by less than M * 2**-21 for u <= 2 * M, and by less than 2**-21 of its distance from M beyond;
   the roundings of `errors` do no more, and to move a number next to a tie to its other neighbour changes the distance
   by as little. With eta = s * M * 2**-21 an estimate and the exact result each lie within 2 * eta * sqrt(n * E) + n *
   eta**2 of E, which is at most E * 2**-15 + n * (s * M)**2 * 2**-27 * (1 + 2**-15), and within n * 2**-24 of E by
   summing; n <= 256. RELATIVE and ABSOLUTE are more than twice that, for the distance of the two. */
#define RELATIVE 0x1p-13f
#define ABSOLUTE 0x1p-25f

static void estimate(const Lanes *m, const float *peak, const Lanes *s, int candidates, Lanes *low, float *least,
                     Grid g, int size)
{
    for (int b = 0; b < LANES; b++)
        least[b] = as_float(EXPONENT_MASK);
    for (int c = 0; c < candidates; c++) {
        Lanes inverse, even = {0}, odd = {0};
        if (c > candidates / 2) {
            /* The maximum alone may be clipped by more than the least error, and smaller scales clip more. */
            int hopeless = 1;
            for (int b = 0; b < LANES; b++) {
                float clipped = peak[b] * (1.0f - 0x1p-20f) - g.max * s[c][b] * (1.0f + 0x1p-20f);
                low[c][b] = clipped > 0.0f ? clipped * clipped * (1.0f - RELATIVE) : 0.0f;
                hopeless &= low[c][b] > least[b];
            }
            if (hopeless) {
                for (int rest = c + 1; rest < candidates; rest++)
                    memcpy(low[rest], low[c], sizeof *low);
                return;
            }
        }
        for (int b = 0; b < LANES; b++)
            inverse[b] = 1.0f / s[c][b];
        for (int i = 0; i < size; i += 4)
            for (int b = 0; b < LANES; b++) {
                float p = m[i][b] * inverse[b], q = m[i + 1][b] * inverse[b];
                float r = m[i + 2][b] * inverse[b], t = m[i + 3][b] * inverse[b];
                float dp = nearest(p, g) - p, dq = nearest(q, g) - q, dr = nearest(r, g) - r, dt = nearest(t, g) - t;
                even[b] = MULTIPLY_ADD(dp, dp, MULTIPLY_ADD(dr, dr, even[b]));
                odd[b] = MULTIPLY_ADD(dq, dq, MULTIPLY_ADD(dt, dt, odd[b]));
            }
        for (int b = 0; b < LANES; b++) {
            float square = s[c][b] * s[c][b], sum = (even[b] + odd[b]) * square;
            float slack = sum * RELATIVE + (float)size * g.max * g.max * square * ABSOLUTE, high = sum + slack;
            low[c][b] = sum - slack;
            least[b] = high < least[b] ? high : least[b];
        }
    }
}

/* `t->plain` holds the target of the plain rule and is replaced by S. */
static void e4m3_search(Tile *t, const void *x, int blocks, float gs, Grid g, int size, int dtype, int rule)
{
    const int candidates = rule == E4M3_MSE ? 17 : 2;
    for (int b = blocks; b < TILE_BLOCKS; b++) {
        t->plain[b] = 0.0f;
        t->peak[b] = 0;
    }
    for (int b = 0; b < TILE_BLOCKS; b++)
        t->byte[b] = e4m3_code(e4m3_round(t->plain[b]));
    for (int b0 = 0; b0 < blocks; b0 += LANES) {
        Lanes m[MAX_BLOCK], s[17], low[17], best, least, chosen, scale, sum, target, peak;
        int32_t code[LANES], open[LANES];
        const int count = blocks - b0 < LANES ? blocks - b0 : LANES;
        int any_open = 1, estimated = rule == E4M3_MSE && gs > 0x1p-100f && gs < 0x1p100f;
        side_by_side((const char *)x + (int64_t)b0 * size * dtype_bytes(dtype), count, m, size, dtype);
        for (int b = 0; b < LANES; b++) {
            target[b] = t->plain[b0 + b];
            peak[b] = as_float(t->peak[b0 + b]) * gs;
            code[b] = t->byte[b0 + b];
            best[b] = as_float(EXPONENT_MASK);
            open[b] = 1;
            estimated &= peak[b] < 0x1p20f;
        }
        /* Largest scale first: it keeps a tie. */
        if (rule == E4M3_MSE)
            for (int c = 0; c < candidates; c++)
                for (int b = 0; b < LANES; b++)
                    s[c][b] = e4m3_positive(smaller(larger(code[b] + 8 - c, 1), 126));
        else
            for (int b = 0; b < LANES; b++) {
                s[0][b] = e4m3_round(target[b] * 1.5f);
                s[1][b] = e4m3_round(target[b]);
            }
        for (int b = 0; b < LANES; b++)
            chosen[b] = s[0][b];
        if (estimated) {
            Lanes scaled[MAX_BLOCK];
            for (int i = 0; i < size; i++)
                for (int b = 0; b < LANES; b++)
                    scaled[i][b] = m[i][b] * gs;
            estimate(scaled, peak, s, candidates, low, least, g, size);
            /* A block is decided where one candidate alone can have the least error. */
            int32_t rivals[LANES] = {0};
            Lanes previous = {0};
            for (int c = 0; c < candidates; c++)
                for (int b = 0; b < LANES; b++) {
                    int rival = (low[c][b] <= least[b]) & (s[c][b] != previous[b]);
                    rivals[b] += rival;
                    chosen[b] = pick_float(rival, s[c][b], chosen[b]);
                    previous[b] = s[c][b];
                }
            any_open = 0;
            for (int b = 0; b < LANES; b++) {
                open[b] = (rivals[b] != 1) & (b < count);
                any_open |= open[b];
            }
        }
        for (int c = 0; any_open && c < candidates; c++) {
            int needed = 0;
            for (int b = 0; b < LANES; b++)
                needed |= open[b] & !(estimated & (low[c][b] > least[b]));
            if (!needed)
                continue;
            for (int b = 0; b < LANES; b++)
                scale[b] = s[c][b] / gs;
            errors(m, scale, gs, sum, g, size, rule);
            for (int b = 0; b < LANES; b++) {
                int better = open[b] & (sum[b] < best[b]);
                best[b] = pick_float(better, sum[b], best[b]);
                chosen[b] = pick_float(better, s[c][b], chosen[b]);
            }
        }
        for (int b = 0; b < LANES; b++) {
            int zero = (rule == E4M3_MSE) & (t->peak[b0 + b] == 0);
            t->plain[b0 + b] = pick_float(zero, e4m3_round(target[b]), chosen[b]);
        }
    }
}

/* ---- elements ---- */

/* u = |x| / scale. */
INLINE float units(uint32_t bits, float per_unit, const int by_product)
{
    float m = as_float(bits & ABS_MASK);
    return by_product ? m * per_unit : m / per_unit;
}

INLINE uint32_t signed_value(float r, float scale, uint32_t bits, const int is_integer)
{
    uint32_t value = as_bits(r * scale);
    uint32_t sign = bits & SIGN_MASK;
    /* Two's complement has no -0. */
    return value | (is_integer && !(r > 0.0f) ? 0u : sign);
}

/* Rounded to nearest, for block sizes known to the compiler. bf16 is worked on in words of two elements, which need no
   widening and narrowing of vectors. `exact`: every value is a bf16 number already. With E8M0 scales it is, because the
   grid has at most 7 mantissa bits, and a bf16 number on the grid stays as it is, subnormal or not. */
INLINE void nearest_blocks(const Tile *t, const void *x, void *out, int blocks, Grid g, const int size,
                           const int dtype, const int is_integer, const int by_product, const int exact)
{
    const int words = dtype == BF16 ? size / 2 : size;
    for (int b = 0; b < blocks; b++) {
        const float scale = t->scale[b], per_unit = t->per_unit[b];
        const Word *from = (const Word *)x + (int64_t)b * words;
        Word *to = (Word *)out + (int64_t)b * words;
#pragma GCC ivdep
        for (int i = 0; i < words; i++) {
            uint32_t word = from[i];
            uint32_t high = dtype == BF16 ? word & 0xffff0000u : word;
            uint32_t value = signed_value(nearest(units(high, per_unit, by_product), g), scale, high, is_integer);
            if (dtype == BF16) {
                uint32_t low = word << 16;
                uint32_t other = signed_value(nearest(units(low, per_unit, by_product), g), scale, low, is_integer);
                if (!exact) {
                    value = to_bf16(value);
                    other = to_bf16(other);
                }
                value = (value & 0xffff0000u) | other >> 16;
            }
            to[i] = value;
        }
    }
}

/* Magnitudes on the grid, for one block of any size; `row` holds the block in fp32. */
static void round_block(const float *row, float *rounded, float per_unit, const Plan *plan, Grid g, int by_product,
                        uint64_t seed, uint64_t index)
{
    const int size = plan->block_size;
    float u[MAX_BLOCK];
    uint32_t draw[MAX_BLOCK];
    if (by_product)
        for (int i = 0; i < size; i++)
            u[i] = units(as_bits(row[i]), per_unit, 1);
    else
        for (int i = 0; i < size; i++)
            u[i] = units(as_bits(row[i]), per_unit, 0);
    if (plan->rounding == NEAREST) {
        for (int i = 0; i < size; i++)
            rounded[i] = nearest(u[i], g);
    } else if (plan->rounding == HALF_AWAY) {
        for (int i = 0; i < size; i++)
            rounded[i] = by_remainder(u[i], g, HALF_AWAY, 0);
    } else {
        for (int i = 0; i < size; i++)
            draw[i] = philox(index + (uint64_t)i, seed);
        for (int i = 0; i < size; i++)
            rounded[i] = by_remainder(u[i], g, STOCHASTIC, draw[i]);
    }
}

static void pack_block(const int32_t *code, uint8_t *out, int size, int bits)
{
    if (bits == 8)
        for (int i = 0; i < size; i++)
            out[i] = (uint8_t)code[i];
    else if (bits == 4)
        for (int i = 0; i < size / 2; i++)
            out[i] = (uint8_t)(code[2 * i] | code[2 * i + 1] << 4);
    else
        for (int i = 0; i < size / 4; i++) {
            const int32_t *c = code + 4 * i;
            out[3 * i] = (uint8_t)(c[0] | c[1] << 6);
            out[3 * i + 1] = (uint8_t)(c[1] >> 2 | c[2] << 4);
            out[3 * i + 2] = (uint8_t)(c[2] >> 4 | c[3] << 2);
        }
}

static void unpack_block(const uint8_t *in, int32_t *code, int size, int bits)
{
    if (bits == 8)
        for (int i = 0; i < size; i++)
            code[i] = in[i];
    else if (bits == 4)
        for (int i = 0; i < size / 2; i++) {
            code[2 * i] = in[i] & 15;
            code[2 * i + 1] = in[i] >> 4;
        }
    else
        for (int i = 0; i < size / 4; i++) {
            const uint8_t *p = in + 3 * i;
            code[4 * i] = p[0] & 63;
            code[4 * i + 1] = p[0] >> 6 | (p[1] & 15) << 2;
            code[4 * i + 2] = p[1] >> 4 | (p[2] & 3) << 4;
            code[4 * i + 3] = p[2] >> 2;
        }
}

/* Values or codes of blocks of any size under any rounding. */
static void any_blocks(const Tile *t, const void *x, void *out, uint8_t *codes, int blocks, const Plan *plan, Grid g,
                       int by_product, uint64_t seed, uint64_t index)
{
    const int size = plan->block_size, bits = plan->bits, dtype = plan->dtype, is_integer = plan->is_integer;
    for (int b = 0; b < blocks; b++) {
        const float scale = t->scale[b];
        const int64_t at = (int64_t)b * size;
        float row[MAX_BLOCK], rounded[MAX_BLOCK];
        int32_t code[MAX_BLOCK];
        if (dtype == BF16)
            load_block((const uint16_t *)x + at, row, size, BF16);
        else
            load_block((const uint32_t *)x + at, row, size, F32);
        round_block(row, rounded, t->per_unit[b], plan, g, by_product, seed, index + (uint64_t)at);
        if (codes) {
            /* A NaN block holds zeros with the signs of its elements. */
            const uint32_t keep = scale == scale ? ~0u : 0u;
            for (int i = 0; i < size; i++)
                rounded[i] = as_float(as_bits(rounded[i]) & keep);
            if (is_integer)
                for (int i = 0; i < size; i++)
                    code[i] = code_of(rounded[i], as_bits(row[i]) & SIGN_MASK, g, 1, bits);
            else
                for (int i = 0; i < size; i++)
                    code[i] = code_of(rounded[i], as_bits(row[i]) & SIGN_MASK, g, 0, bits);
            pack_block(code, codes + at * bits / 8, size, bits);
        } else if (dtype == BF16) {
            for (int i = 0; i < size; i++)
                store_bits(out, at + i, signed_value(rounded[i], scale, as_bits(row[i]), is_integer), BF16);
        } else {
            for (int i = 0; i < size; i++)
                store_bits(out, at + i, signed_value(rounded[i], scale, as_bits(row[i]), is_integer), F32);
        }
    }
}

/* ---- one tile ---- */

static void choose_scales(Tile *t, const void *x, int blocks, const Plan *plan, float gs, Grid g)
{
    const int size = plan->block_size, dtype = plan->dtype;
    block_peaks(x, blocks, t->peak, size, dtype);
    if (plan->rule == E8M0 || plan->rule == E8M0_MSE) {
        e8m0_plain(t, blocks, plan);
        if (plan->rule == E8M0_MSE)
            e8m0_mse(t, x, blocks, g, size, dtype);
        e8m0_finish(t, blocks);
        return;
    }
    e4m3_plain(t, blocks, plan, gs);
    if (plan->rule == E4M3)
        for (int b = 0; b < blocks; b++)
            t->plain[b] = e4m3_round(t->plain[b]);
    else
        e4m3_search(t, x, blocks, gs, g, size, dtype, plan->rule);
    e4m3_finish(t, blocks, gs);
}

static void quantize_tile(const Job *job, const void *x, void *out, uint8_t *codes, uint8_t *scales, int blocks,
                          float gs, uint64_t index)
{
    const Plan *plan = job->plan;
    const Grid g = grid_of(plan->max, plan->emin, plan->mantissa_bits);
    const int by_product = plan->rule == E8M0 || plan->rule == E8M0_MSE;
    const int wide = plan->dtype == F32, whole = plan->is_integer;
    Tile t;
    choose_scales(&t, x, blocks, plan, gs, g);
    if (scales)
        for (int b = 0; b < blocks; b++)
            scales[b] = (uint8_t)t.byte[b];
    if (!codes && plan->rounding == NEAREST && by_product && plan->block_size == 32) {
        if (wide && whole)
            nearest_blocks(&t, x, out, blocks, g, 32, F32, 1, 1, 0);
        else if (wide)
            nearest_blocks(&t, x, out, blocks, g, 32, F32, 0, 1, 0);
        else if (whole)
            nearest_blocks(&t, x, out, blocks, g, 32, BF16, 1, 1, 1);
        else
            nearest_blocks(&t, x, out, blocks, g, 32, BF16, 0, 1, 1);
    } else if (!codes && plan->rounding == NEAREST && !by_product && plan->block_size == 16 && !whole) {
        if (wide)
            nearest_blocks(&t, x, out, blocks, g, 16, F32, 0, 0, 0);
        else
            nearest_blocks(&t, x, out, blocks, g, 16, BF16, 0, 0, 0);
    } else {
        any_blocks(&t, x, out, codes, blocks, plan, g, by_product, job->seed, index);
    }
}

/* ---- rows, tiles, threads ---- */

/* A row is cut into tiles of whole blocks; a ragged tail is a tile of its own, computed in a padded copy. */
static int64_t tiles_per_row(int64_t columns, int64_t size)
{
    return (columns / size + TILE_BLOCKS - 1) / TILE_BLOCKS + (columns % size != 0);
}

static void quantize_range(const Job *job)
{
    const Plan *plan = job->plan;
    const int64_t size = plan->block_size, bytes = dtype_bytes(plan->dtype), columns = job->columns;
    const int64_t whole = columns / size, per_row = tiles_per_row(columns, size);
    const int64_t blocks_per_row = whole + (columns % size != 0);
    for (int64_t unit = job->first; unit < job->last; unit++) {
        const int64_t row = unit / per_row, block = unit % per_row * TILE_BLOCKS;
        const int64_t start = block < whole ? block * size : whole * size;
        const int64_t at = row * columns + start;
        const char *x = (const char *)job->x + at * bytes;
        char *out = job->out ? (char *)job->out + at * bytes : 0;
        const int64_t number = row * blocks_per_row + start / size;
        uint8_t *codes = job->codes ? job->codes + number * size * plan->bits / 8 : 0;
        uint8_t *scales = job->scales ? job->scales + number : 0;
        const float gs = job->divisor ? job->divisor[row * job->divisor_stride] : 1.0f;
        if (block < whole) {
            const int64_t left = whole - block;
            quantize_tile(job, x, out, codes, scales, left < TILE_BLOCKS ? (int)left : TILE_BLOCKS, gs,
                          job->offset + (uint64_t)at);
        } else {
            const size_t tail = (size_t)((columns - start) * bytes);
            uint32_t padded[MAX_BLOCK] = {0}, result[MAX_BLOCK];
            memcpy(padded, x, tail);
            quantize_tile(job, padded, result, codes, scales, 1, gs, job->offset + (uint64_t)at);
            if (out)
                memcpy(out, result, tail);
        }
    }
}

/* ---- what a spec does around the quantizer: tiles of whole blocks in fp32, a ragged tail padded with zeros ---- */

#define WIDE 4096 /* elements of such a tile: whole blocks and whole macro-blocks */

INLINE int wide_blocks(int size) { return size * TILE_BLOCKS <= WIDE ? TILE_BLOCKS : WIDE / size; }

static int64_t wide_tiles_per_row(int64_t columns, int64_t size)
{
    const int64_t each = wide_blocks((int)size);
    return ((columns + size - 1) / size + each - 1) / each;
}

/* Neighbours become their sum and their difference, sums to the lower half and differences to the upper: the lowest bit
   of the index becomes the highest. After all stages every bit is back, and stage k has met the elements whose index
   differs in bit k, as the butterfly of rotation.py does. */
INLINE void turn_once(const float *from, float *to, const int size)
{
    for (int i = 0; i < size / 2; i++) {
        float a = from[2 * i], b = from[2 * i + 1];
        to[i] = a + b;
        to[size / 2 + i] = a - b;
    }
}

/* Written out for the sizes that every format of the library has, so that the numbers stay in registers. */
INLINE void turn_block(float *x, const int size, float root)
{
    float y[MAX_BLOCK], z[MAX_BLOCK];
    turn_once(x, y, size);
    turn_once(y, z, size);
    if (size == 16 || size == 32) {
        turn_once(z, y, size);
        turn_once(y, z, size);
        if (size == 32)
            turn_once(z, y, size);
        for (int i = 0; i < size; i++)
            x[i] = (size == 32 ? y[i] : z[i]) * root;
        return;
    }
    for (int h = 4; h < size; h *= 2) {
        turn_once(z, y, size);
        memcpy(z, y, (size_t)size * sizeof *y);
    }
    for (int i = 0; i < size; i++)
        x[i] = z[i] * root;
}

static void turn(float *x, int blocks, int size, float root)
{
    if (size == 32)
        for (int b = 0; b < blocks; b++)
            turn_block(x + 32 * b, 32, root);
    else if (size == 16)
        for (int b = 0; b < blocks; b++)
            turn_block(x + 16 * b, 16, root);
    else
        for (int b = 0; b < blocks; b++)
            turn_block(x + size * b, size, root);
}

static void load_wide(const void *x, float *wide, int64_t count, int64_t padded, int dtype)
{
    if (dtype == BF16)
        for (int64_t i = 0; i < count; i++)
            wide[i] = as_float(load_bits(x, i, BF16));
    else
        memcpy(wide, x, (size_t)count * 4);
    memset(wide + count, 0, (size_t)(padded - count) * 4);
}

static void store_wide(void *out, const float *wide, int64_t count, int dtype)
{
    if (dtype == BF16)
        for (int64_t i = 0; i < count; i++)
            store_bits(out, i, as_bits(wide[i]), BF16);
    else
        memcpy(out, wide, (size_t)count * 4);
}

/* Finite peaks of the macro-blocks of a tile, the last one maybe short. */
static void macro_peaks(const float *x, int64_t count, int64_t macro, uint32_t *peak)
{
    for (int64_t at = 0; at < count; at += macro) {
        const int64_t end = count - at < macro ? count : at + macro;
        int32_t top = 0;
        for (int64_t i = at; i < end; i++) {
            int32_t m = (int32_t)(as_bits(x[i]) & ABS_MASK);
            top = larger(m < (int32_t)EXPONENT_MASK ? m : 0, top);
        }
        peak[at / macro] = (uint32_t)top;
    }
}

/* The fields of a finite magnitude that is not zero; of a subnormal, those of the number it is. */
INLINE uint32_t normalised(uint32_t bits, int32_t *exponent)
{
    const int subnormal = bits < 1u << 23;
    uint32_t m = pick(subnormal, as_bits((float)(int32_t)bits), bits);
    *exponent = (int32_t)(m >> 23) - 127 - 149 * subnormal;
    return m & 0x7fffffu;
}

/* Times or divided by the factor of its macro-block. */
static void by_factors(const float *x, float *out, const float *factor, int64_t count, int64_t macro, int divided)
{
    for (int64_t at = 0; at < count; at += macro) {
        const int64_t end = count - at < macro ? count : at + macro;
        const float f = factor[at / macro];
        if (divided)
            for (int64_t i = at; i < end; i++)
                out[i] = x[i] / f;
        else
            for (int64_t i = at; i < end; i++)
                out[i] = x[i] * f;
    }
}

/* `factor` of each macro-block of the tile; 16 candidates are tried where the rule compares errors. */
static void macro_factors(const Job *job, const float *x, int blocks, float *factor)
{
    const Plan *plan = job->plan;
    const int64_t macro = plan->macro_block, count = (int64_t)blocks * plan->block_size;
    const int groups = (int)((count + macro - 1) / macro);
    uint32_t peak[WIDE / 32];
    macro_peaks(x, count, macro, peak);
    if (plan->rule == E8M0_MSE) {
        float magnitude[WIDE], raised[WIDE], values[WIDE], best[WIDE / 32], trial[WIDE / 32], tree[WIDE];
        Plan nearest_plan = *plan;
        Job inner = *job;
        nearest_plan.rounding = NEAREST;
        inner.plan = &nearest_plan;
        for (int64_t i = 0; i < count; i++) {
            uint32_t bits = as_bits(x[i]) & ABS_MASK;
            magnitude[i] = as_float(bits < EXPONENT_MASK ? bits : 0);
        }
        for (int k = 0; k < groups; k++) {
            best[k] = as_float(EXPONENT_MASK);
            factor[k] = 1.0f;
        }
        for (int step = 0; step < 16; step++) { /* smallest factor first: it keeps a tie */
            for (int k = 0; k < groups; k++)
                trial[k] = 1.0f + (float)step * 0x1p-4f;
            by_factors(magnitude, raised, trial, count, macro, 0);
            quantize_tile(&inner, raised, values, 0, 0, blocks, 1.0f, 0);
            by_factors(values, values, trial, count, macro, 1);
            for (int k = 0; k < groups; k++) {
                const int64_t at = k * macro, end = count - at < macro ? count : at + macro;
                int32_t exponent = 0;
                if (peak[k])
                    normalised(peak[k], &exponent);
                const float unit = e8m0_value(smaller(larger(exponent, -127), 127) + 127);
                for (int64_t i = at; i < end; i++) {
                    float e = (values[i] - magnitude[i]) / unit;
                    tree[i - at] = e * e;
                }
                for (int64_t i = end; i < at + macro; i++)
                    tree[i - at] = 0.0f;
                for (int64_t half = macro / 2; half > 0; half /= 2)
                    for (int64_t i = 0; i < half; i++)
                        tree[i] += tree[i + half];
                if (tree[0] < best[k]) {
                    best[k] = tree[0];
                    factor[k] = trial[k];
                }
            }
        }
    }
    for (int k = 0; k < groups; k++) {
        if (peak[k] && plan->rule != E8M0_MSE) {
            int32_t exponent;
            float ratio = plan->max / as_float(normalised(peak[k], &exponent) | 0x3f800000u);
            factor[k] = as_float((as_bits(ratio) & 0x007f8000u) | 0x3f800000u);
        }
        if (!peak[k] || as_bits(factor[k] * as_float(peak[k])) >= EXPONENT_MASK)
            factor[k] = 1.0f;
    }
}

/* Q of a tile; x and out differ. */
static void one_pass(const Job *job, const float *x, float *out, int blocks, float gs, uint64_t index)
{
    if (!job->plan->macro_block) {
        quantize_tile(job, x, out, 0, 0, blocks, gs, index);
        return;
    }
    const int64_t count = (int64_t)blocks * job->plan->block_size;
    float factor[WIDE / 32], raised[WIDE];
    macro_factors(job, x, blocks, factor);
    by_factors(x, raised, factor, count, job->plan->macro_block, 0);
    quantize_tile(job, raised, out, 0, 0, blocks, gs, index);
    by_factors(out, out, factor, count, job->plan->macro_block, 1);
}

static void around_range(const Job *job)
{
    const Plan *plan = job->plan;
    const int64_t size = plan->block_size, bytes = dtype_bytes(plan->dtype), columns = job->columns;
    const int64_t row_blocks = (columns + size - 1) / size, per_row = wide_tiles_per_row(columns, size);
    Plan wide = *plan;
    Job inner = *job;
    wide.dtype = F32;
    inner.plan = &wide;
    for (int64_t unit = job->first; unit < job->last; unit++) {
        const int64_t row = unit / per_row, block = unit % per_row * wide_blocks((int)size);
        const int64_t left = row_blocks - block, at = row * columns + block * size;
        const int blocks = left < wide_blocks((int)size) ? (int)left : wide_blocks((int)size);
        const int64_t padded = blocks * size, count = smaller_count(columns - block * size, padded);
        const uint64_t index = job->offset + (uint64_t)at;
        const float gs = job->divisor ? job->divisor[row * job->divisor_stride] : 1.0f;
        float x[WIDE], y[WIDE];
        load_wide((const char *)job->x + at * bytes, x, count, padded, plan->dtype);
        if (plan->rotated)
            turn(x, blocks, (int)size, plan->root);
        if (job->codes) {
            const int64_t number = row * row_blocks + block;
            /* The sign of a NaN that came out of a sum depends on the machine. */
            for (int64_t i = 0; i < padded; i++)
                x[i] = pick_float(x[i] == x[i], x[i], as_float(NAN_BITS));
            quantize_tile(&inner, x, 0, job->codes + number * size * plan->bits / 8, job->scales + number, blocks, gs,
                          index);
            continue;
        }
        one_pass(&inner, x, y, blocks, gs, index);
        if (plan->residual >= 0.0f) {
            float rest[WIDE];
            for (int64_t i = 0; i < padded; i++)
                x[i] -= y[i];
            one_pass(&inner, x, rest, blocks, gs, index + ((uint64_t)1 << 63));
            for (int64_t i = 0; i < padded; i++)
                y[i] = y[i] + rest[i] * plan->residual;
        }
        if (plan->rotated)
            turn(y, blocks, (int)size, plan->root);
        store_wide((char *)job->out + at * bytes, y, count, plan->dtype);
    }
}

INLINE void value_blocks(const uint8_t *codes, const float *scale, void *out, int blocks, Grid g, const int size,
                         const int dtype, const int is_integer, const int bits)
{
    for (int b = 0; b < blocks; b++) {
        int32_t code[MAX_BLOCK];
        unpack_block(codes + (int64_t)b * size * bits / 8, code, size, bits);
        float value[MAX_BLOCK];
        if (is_integer)
            for (int i = 0; i < size; i++)
                value[i] = value_of(code[i], g, 1, bits);
        else
            for (int i = 0; i < size; i++)
                value[i] = value_of(code[i], g, 0, bits);
        for (int i = 0; i < size; i++)
            store_bits(out, (int64_t)b * size + i, as_bits(value[i] * scale[b]), dtype);
    }
}

/* Two 4-bit codes a byte, for block sizes known to the compiler, at most 32. Bytes are widened first, which leaves the
   rest to vectors of one width; two elements of bf16 make one word. */
INLINE void nibble_blocks(const uint8_t *codes, const float *scale, void *out, int blocks, Grid g, const int size,
                          const int dtype)
{
    uint32_t wide[TILE_BLOCKS * 16];
    for (int i = 0; i < blocks * size / 2; i++)
        wide[i] = codes[i];
    for (int b = 0; b < blocks; b++) {
        const float by = scale[b];
        const uint32_t *from = wide + b * size / 2;
        Word *to = (Word *)out + (int64_t)b * size / (dtype == BF16 ? 2 : 1);
#pragma GCC ivdep
        for (int i = 0; i < size / 2; i++) {
            const uint32_t low = as_bits(value_of((int32_t)from[i] & 15, g, 0, 4) * by);
            const uint32_t high = as_bits(value_of((int32_t)from[i] >> 4, g, 0, 4) * by);
            if (dtype == BF16) {
                to[i] = to_bf16(low) >> 16 | (to_bf16(high) & 0xffff0000u);
            } else {
                to[2 * i] = low;
                to[2 * i + 1] = high;
            }
        }
    }
}

INLINE void dequantize_tile(const Plan *plan, const uint8_t *codes, const uint8_t *bytes, void *out, int blocks,
                            float gs, const int dtype)
{
    const Grid g = grid_of(plan->max, plan->emin, plan->mantissa_bits);
    float scale[TILE_BLOCKS];
    if (plan->rule == E8M0 || plan->rule == E8M0_MSE)
        for (int b = 0; b < blocks; b++)
            scale[b] = bytes[b] == 0xff ? as_float(NAN_BITS) : e8m0_value(bytes[b]);
    else
        for (int b = 0; b < blocks; b++)
            scale[b] = value_of(bytes[b], e4m3_grid(), 0, 8) / gs;
    if (plan->bits == 4 && !plan->is_integer && plan->block_size == 32)
        nibble_blocks(codes, scale, out, blocks, g, 32, dtype);
    else if (plan->bits == 4 && !plan->is_integer && plan->block_size == 16)
        nibble_blocks(codes, scale, out, blocks, g, 16, dtype);
    else
        value_blocks(codes, scale, out, blocks, g, plan->block_size, dtype, plan->is_integer, plan->bits);
}

static void dequantize_range(const Job *job)
{
    const Plan *plan = job->plan;
    const int64_t size = plan->block_size, bytes = dtype_bytes(plan->dtype), columns = job->columns;
    const int64_t whole = columns / size, per_row = tiles_per_row(columns, size);
    const int64_t blocks_per_row = whole + (columns % size != 0);
    for (int64_t unit = job->first; unit < job->last; unit++) {
        const int64_t row = unit / per_row, block = unit % per_row * TILE_BLOCKS;
        const int64_t start = block < whole ? block * size : whole * size;
        const int64_t number = row * blocks_per_row + start / size;
        const uint8_t *codes = job->codes + number * size * plan->bits / 8, *scales = job->scales + number;
        char *out = (char *)job->out + (row * columns + start) * bytes;
        const float gs = job->divisor ? job->divisor[row * job->divisor_stride] : 1.0f;
        uint32_t result[MAX_BLOCK];
        const int64_t left = whole - block;
        const int blocks = block >= whole ? 1 : left < TILE_BLOCKS ? (int)left : TILE_BLOCKS;
        void *target = block < whole ? (void *)out : (void *)result;
        if (plan->dtype == F32)
            dequantize_tile(plan, codes, scales, target, blocks, gs, F32);
        else
            dequantize_tile(plan, codes, scales, target, blocks, gs, BF16);
        if (block >= whole)
            memcpy(out, result, (size_t)((columns - start) * bytes));
    }
}

/* The same, rotated back. */
static void turned_values_range(const Job *job)
{
    const Plan *plan = job->plan;
    const int64_t size = plan->block_size, bytes = dtype_bytes(plan->dtype), columns = job->columns;
    const int64_t row_blocks = (columns + size - 1) / size, per_row = wide_tiles_per_row(columns, size);
    for (int64_t unit = job->first; unit < job->last; unit++) {
        const int64_t row = unit / per_row, block = unit % per_row * wide_blocks((int)size);
        const int64_t left = row_blocks - block, number = row * row_blocks + block;
        const int blocks = left < wide_blocks((int)size) ? (int)left : wide_blocks((int)size);
        const int64_t count = smaller_count(columns - block * size, blocks * size);
        const float gs = job->divisor ? job->divisor[row * job->divisor_stride] : 1.0f;
        float values[WIDE];
        dequantize_tile(plan, job->codes + number * size * plan->bits / 8, job->scales + number, values, blocks, gs,
                        F32);
        turn(values, blocks, (int)size, plan->root);
        store_wide((char *)job->out + (row * columns + block * size) * bytes, values, count, plan->dtype);
    }
}

/* Largest finite magnitude of a row, as fp32 bits. Mostly no number is NaN or Inf: then one maximum is enough. */
static uint32_t finite_peak(const void *x, int64_t count, int dtype)
{
    int32_t top;
    uint32_t peak;
    if (dtype == BF16)
        peaks_of(x, 1, &peak, count, BF16);
    else
        peaks_of(x, 1, &peak, count, F32);
    if (peak < EXPONENT_MASK)
        return peak;
    top = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t m = (int32_t)(load_bits(x, i, dtype) & ABS_MASK);
        top = larger(m < (int32_t)EXPONENT_MASK ? m : 0, top);
    }
    return (uint32_t)top;
}

/* The rows [first, last) to `out`. */
static void amax_range(const Job *job)
{
    for (int64_t row = job->first; row < job->last; row++) {
        const char *x = (const char *)job->x + row * job->columns * dtype_bytes(job->plan->dtype);
        ((uint32_t *)job->out)[row] = finite_peak(x, job->columns, job->plan->dtype);
    }
}

/* The largest finite magnitude of each rotated tile to `out`. */
static void turned_amax_range(const Job *job)
{
    const Plan *plan = job->plan;
    const int64_t size = plan->block_size, bytes = dtype_bytes(plan->dtype), columns = job->columns;
    const int64_t per_row = wide_tiles_per_row(columns, size), most = wide_blocks((int)size) * size;
    for (int64_t unit = job->first; unit < job->last; unit++) {
        const int64_t row = unit / per_row, start = unit % per_row * most;
        const int64_t count = smaller_count(columns - start, most), padded = (count + size - 1) / size * size;
        float x[WIDE];
        load_wide((const char *)job->x + (row * columns + start) * bytes, x, count, padded, plan->dtype);
        turn(x, (int)(padded / size), (int)size, plan->root);
        ((uint32_t *)job->out)[unit] = finite_peak(x, padded, F32);
    }
}

/* ---- subnormals ---- */

#if defined(__x86_64__) && defined(__SSE2__)
#include <xmmintrin.h>
typedef unsigned int FloatMode;
static FloatMode keep_subnormals(void)
{
    FloatMode mode = _mm_getcsr();
    _mm_setcsr(mode & ~0x8040u); /* flush-to-zero and denormals-are-zero off */
    return mode;
}
static void restore_mode(FloatMode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
typedef uint64_t FloatMode;
static FloatMode keep_subnormals(void)
{
    FloatMode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    __asm__ volatile("msr fpcr, %0" : : "r"(mode & ~((FloatMode)1 << 24)) : "memory");
    return mode;
}
static void restore_mode(FloatMode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
typedef int FloatMode;
static FloatMode keep_subnormals(void) { return 0; }
static void restore_mode(FloatMode mode) { (void)mode; }
#endif

/* ---- threads ---- */

typedef void RangeFunction(const Job *);

typedef struct {
    RangeFunction *function;
    Job job;
} Task;

static void *run_task(void *task)
{
    FloatMode mode = keep_subnormals();
    /* Called through a volatile pointer: no arithmetic can be moved across the change of mode. */
    RangeFunction *volatile function = ((Task *)task)->function;
    function(&((Task *)task)->job);
    restore_mode(mode);
    return 0;
}

/* Split the units of `job` over at most `threads` threads. With OpenMP they are those of torch's own pool, if torch's
   runtime is the one this file is linked with: others would compete with its workers, which spin after each operation.
   Without OpenMP, a thread that cannot be started is done here instead. */
static void run(RangeFunction *function, const Job *job, int64_t units, int threads)
{
    Task tasks[MAX_THREADS];
    threads = threads > MAX_THREADS ? MAX_THREADS : threads < 1 ? 1 : threads;
    for (int i = 0; i < threads; i++) {
        tasks[i].function = function;
        tasks[i].job = *job;
        tasks[i].job.first = units * i / threads;
        tasks[i].job.last = units * (i + 1) / threads;
    }
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int i = 0; i < threads; i++)
        run_task(&tasks[i]);
#else
    pthread_t ids[MAX_THREADS];
    int started[MAX_THREADS] = {0};
    for (int i = 1; i < threads; i++) {
        started[i] = pthread_create(&ids[i], 0, run_task, &tasks[i]) == 0;
        if (!started[i])
            run_task(&tasks[i]);
    }
    run_task(&tasks[0]);
    for (int i = 1; i < threads; i++)
        if (started[i])
            pthread_join(ids[i], 0);
#endif
}

/* ---- what native.py calls; a block may be written where it was read ---- */

static void run_quantizer(const Job *job, int threads)
{
    const Plan *plan = job->plan;
    if (plan->rotated || plan->macro_block || plan->residual >= 0.0f)
        run(around_range, job, job->rows * wide_tiles_per_row(job->columns, plan->block_size), threads);
    else
        run(quantize_range, job, job->rows * tiles_per_row(job->columns, plan->block_size), threads);
}

EXPORT void qnoise_fake_quantize(const Plan *plan, const void *x, void *out, int64_t rows, int64_t columns,
                                 const float *divisor, int64_t divisor_stride, uint64_t seed, uint64_t offset,
                                 int threads)
{
    Job job = {plan, x, out, 0, 0, divisor, rows, columns, divisor_stride, seed, offset, 0, 0};
    run_quantizer(&job, threads);
}

EXPORT void qnoise_quantize(const Plan *plan, const void *x, uint8_t *codes, uint8_t *scales, int64_t rows,
                            int64_t columns, const float *divisor, int64_t divisor_stride, uint64_t seed,
                            uint64_t offset, int threads)
{
    Job job = {plan, x, 0, codes, scales, divisor, rows, columns, divisor_stride, seed, offset, 0, 0};
    run_quantizer(&job, threads);
}

EXPORT void qnoise_dequantize(const Plan *plan, const uint8_t *codes, const uint8_t *scales, void *out, int64_t rows,
                              int64_t columns, const float *divisor, int64_t divisor_stride, int threads)
{
    Job job = {plan, 0, out, (uint8_t *)codes, (uint8_t *)scales, divisor, rows, columns, divisor_stride, 0, 0, 0, 0};
    if (plan->rotated)
        run(turned_values_range, &job, rows * wide_tiles_per_row(columns, plan->block_size), threads);
    else
        run(dequantize_range, &job, rows * tiles_per_row(columns, plan->block_size), threads);
}

/* Numbers that qnoise_rotated_amax writes. */
EXPORT int64_t qnoise_rotated_tiles(const Plan *plan, int64_t rows, int64_t columns)
{
    return rows * wide_tiles_per_row(columns, plan->block_size);
}

/* Largest finite magnitude of each piece of the rotated rows. */
EXPORT void qnoise_rotated_amax(const Plan *plan, const void *x, float *out, int64_t rows, int64_t columns, int threads)
{
    Job job = {plan, x, out, 0, 0, 0, rows, columns, 0, 0, 0, 0, 0};
    run(turned_amax_range, &job, qnoise_rotated_tiles(plan, rows, columns), threads);
}

/* Largest finite magnitude of each row; a single row is cut in pieces for the threads. */
EXPORT void qnoise_amax(int dtype, const void *x, float *out, int64_t rows, int64_t columns, int threads)
{
    Plan plan = {0};
    plan.dtype = dtype;
    if (rows > 1 || threads <= 1 || columns < MAX_THREADS) {
        Job job = {&plan, x, out, 0, 0, 0, rows, columns, 0, 0, 0, 0, 0};
        run(amax_range, &job, rows, threads);
        return;
    }
    const int64_t piece = columns / MAX_THREADS, rest = columns % MAX_THREADS;
    float tops[MAX_THREADS + 1] = {0};
    Job job = {&plan, x, tops, 0, 0, 0, MAX_THREADS, piece, 0, 0, 0, 0, 0};
    run(amax_range, &job, MAX_THREADS, threads);
    if (rest)
        tops[MAX_THREADS] =
            as_float(finite_peak((const char *)x + (columns - rest) * dtype_bytes(dtype), rest, dtype));
    out[0] = 0.0f;
    for (int i = 0; i <= MAX_THREADS; i++)
        out[0] = tops[i] > out[0] ? tops[i] : out[0];
}

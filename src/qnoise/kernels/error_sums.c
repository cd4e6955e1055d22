/* Sums over (x, x_hat) from which every figure of an error follows, in one pass: see error_sums.py.

   Values are fp32 or bf16 and every sum is fp64, so no product overflows and none vanishes. The ideal scale and its
   rounding (metrics.py, `split_error`) are computed in fp32, operation by operation as there. Lanes are vectors of the
   compiler's own, eight elements each: without them it may not reorder a sum of floating-point numbers. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__FAST_MATH__) || FLT_EVAL_METHOD != 0
#error "this file needs fp32 arithmetic that rounds every operation to fp32"
#endif

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

#define MAX_BLOCK 256 /* error_sums.py refuses larger ones */
#define WIDTH 8

typedef float Floats __attribute__((vector_size(4 * WIDTH), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH), may_alias));
typedef double Doubles __attribute__((vector_size(8 * WIDTH), may_alias));
typedef int64_t Longs __attribute__((vector_size(8 * WIDTH), may_alias));

/* In the order of `FIELDS` in error_sums.py: what is added up, then what is the largest. */
enum {
    X, X2, X3, X4, E2, ABS_ERROR, RELATIVE, DEAD, CLIPPED, CLIPPED_BLOCKS, CREST, FILLED_BLOCKS,
    BIAS, DEADZONE, GRID, BIAS_GRID, BIAS_DEAD, LEFT_OUT, BLOCKS, AMAX, MAX_ABS_ERROR, TOP, FIELDS
};

enum { F32, BF16 };

/* Mirrored field by field by `_Plan` in error_sums.py. */
typedef struct {
    int32_t dtype, block_size, mantissa_bits, emin, parts;
    float max;
} Plan;

typedef struct {
    Doubles x, x2, x3, x4, e2, abs_error, relative, bias, loss, dead_loss, product, dead_product;
    Ints dead, clipped, peak_error, top;
} Lanes;

INLINE float as_float(int32_t bits) { float f; memcpy(&f, &bits, 4); return f; }

INLINE int32_t float_bits(float f) { int32_t bits; memcpy(&bits, &f, 4); return bits; }

#define WIDE(v) __builtin_convertvector(v, Doubles)
#define MASK(v) __builtin_convertvector(v, Longs)
#define EVERY(value) ((Ints){0} + (value))
#define EVERY_FLOAT(value) ((Floats){0} + (value))

INLINE Ints largest(Ints a, Ints b)
{
    Ints more = a > b;
    return (a & more) | (b & ~more);
}

INLINE double sum(Doubles v)
{
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

INLINE int32_t count(Ints v)
{
    int32_t n = 0;
    for (int i = 0; i < WIDTH; i++)
        n -= v[i];
    return n;
}

INLINE int32_t highest(Ints v)
{
    int32_t top = 0;
    for (int i = 0; i < WIDTH; i++)
        top = v[i] > top ? v[i] : top;
    return top;
}

/* `length` values from the i-th on, followed by zeros up to `size`. */
INLINE void load(const void *from, int64_t i, float *to, int length, int size, const int dtype)
{
    if (dtype == F32) {
        memcpy(to, (const float *)from + i, 4 * (size_t)length);
    } else {
        for (int k = 0; k < length; k++)
            ((int32_t *)to)[k] = (int32_t)((uint32_t)((const uint16_t *)from)[i + k] << 16);
    }
    for (int k = length; k < size; k++)
        to[k] = 0.0f;
}

/* The largest fp32 number that is at most max * scale. */
INLINE float limit_of(float max, float scale)
{
    const double exact = (double)max * (double)scale;
    const float limit = (float)exact;
    return (double)limit > exact ? nextafterf(limit, 0.0f) : limit;
}

/* What one block adds. `size` is a multiple of WIDTH. */
INLINE void add_block(const float *x, const float *hat, int size, float peak, float limit, const Plan *plan, Lanes *s,
                      double *energy)
{
    const Ints absolute = EVERY(0x7fffffff);
    const float ideal_scale = peak / plan->max;
    const Floats scale = EVERY_FLOAT(ideal_scale == 0.0f ? 1.0f : ideal_scale);
    const Floats most = EVERY_FLOAT(plan->max);
    const Floats ladder = EVERY_FLOAT(1.5f * as_float((127 + 23 - plan->mantissa_bits) << 23));
    const Ints lowest = EVERY((plan->emin + 127) << 23);
    const Floats half_step = EVERY_FLOAT(as_float((plan->emin - plan->mantissa_bits - 1 + 127) << 23));
    Doubles squares = {0};
    for (int i = 0; i < size; i += WIDTH) {
        Floats a, h;
        memcpy(&a, x + i, sizeof a);
        memcpy(&h, hat + i, sizeof h);
        const Doubles xd = WIDE(a), hd = WIDE(h), error = hd - xd, square = xd * xd;
        squares += square;
        s->x += xd;
        s->x3 += square * xd;
        s->x4 += square * square;
        s->e2 += error * error;
        const Floats size_of = (Floats)((Ints)a & absolute), loss = (Floats)((Ints)(h - a) & absolute);
        s->abs_error += WIDE(loss);
        s->peak_error = largest(s->peak_error, (Ints)loss);
        s->top = largest(s->top, (Ints)h & absolute);
        const Ints zero = size_of == 0.0f;
        /* 0 / 0 counts as 0; a zero that got an error has an infinite relative one. */
        const Ints relative = (Ints)(loss / size_of) & ~(zero & (loss == 0.0f));
        s->relative += WIDE((Floats)relative);
        s->dead += ~zero & (h == 0.0f);
        s->clipped += size_of > limit;
        if (plan->parts) {
            const Floats units = size_of / scale;
            const Ints over = units > most;
            const Floats u = (Floats)(((Ints)most & over) | ((Ints)units & ~over));
            const Floats step = (Floats)largest((Ints)u & 0x7f800000, lowest) * ladder;
            const Floats rounded = ((u + step) - step) * scale;
            const Doubles ideal = WIDE((Floats)((Ints)rounded | ((Ints)a & ~absolute)));
            const Doubles bias = hd - ideal, rest = ideal - xd, rest2 = rest * rest, product = bias * rest;
            const Longs dead = MASK(units < half_step);
            s->bias += bias * bias;
            s->loss += rest2;
            s->dead_loss += (Doubles)((Longs)rest2 & dead);
            s->product += product;
            s->dead_product += (Doubles)((Longs)product & dead);
        }
    }
    s->x2 += squares;
    *energy = sum(squares);
}

INLINE void add_row(const void *x, const void *hat, const float *scales, int64_t start, int64_t columns,
                    const Plan *plan, double *out, double *by_column, const int block_size, const int dtype)
{
    _Alignas(64) float a[MAX_BLOCK], h[MAX_BLOCK];
    const int padded = block_size < WIDTH ? WIDTH : block_size;
    Lanes s;
    memset(&s, 0, sizeof s);
    for (int i = 0; i < FIELDS; i++)
        out[i] = 0.0;
    int32_t amax = 0;
    for (int64_t block = 0, first = 0; first < columns; block++, first += block_size) {
        const int length = columns - first < block_size ? (int)(columns - first) : block_size;
        load(x, start + first, a, length, padded, dtype);
        int32_t bits[MAX_BLOCK], peak = 0;
        memcpy(bits, a, 4 * (size_t)padded);
        for (int i = 0; i < padded; i++) {
            const int32_t magnitude = bits[i] & 0x7fffffff;
            peak = magnitude > peak ? magnitude : peak;
        }
        if (peak >= 0x7f800000) { /* NaN or Inf */
            out[LEFT_OUT] += length;
            continue;
        }
        load(hat, start + first, h, length, padded, dtype);
        const float top = as_float(peak), limit = limit_of(plan->max, scales[block]);
        double energy;
        add_block(a, h, padded, top, limit, plan, &s, &energy);
        amax = peak > amax ? peak : amax;
        out[BLOCKS] += 1;
        out[CLIPPED_BLOCKS] += top > limit;
        if (energy > 0) {
            out[FILLED_BLOCKS] += 1;
            out[CREST] += top / sqrt(energy / length);
        }
        if (by_column)
            for (int i = 0; i < length; i++) {
                const double error = (double)h[i] - (double)a[i];
                by_column[first + i] += (double)a[i] * (double)a[i];
                by_column[columns + first + i] += error * error;
            }
    }
    const double dead_loss = sum(s.dead_loss), dead_product = sum(s.dead_product);
    out[X] = sum(s.x), out[X2] = sum(s.x2), out[X3] = sum(s.x3), out[X4] = sum(s.x4), out[E2] = sum(s.e2);
    out[ABS_ERROR] = sum(s.abs_error), out[RELATIVE] = sum(s.relative);
    out[DEAD] = count(s.dead), out[CLIPPED] = count(s.clipped);
    out[BIAS] = sum(s.bias), out[DEADZONE] = dead_loss, out[GRID] = sum(s.loss) - dead_loss;
    out[BIAS_GRID] = sum(s.product) - dead_product, out[BIAS_DEAD] = dead_product;
    out[AMAX] = as_float(amax), out[MAX_ABS_ERROR] = as_float(highest(s.peak_error)), out[TOP] = as_float(highest(s.top));
}

/* Constants let the compiler unroll: worth it for the blocks that every format of the library has. */
static void add_any_row(const void *x, const void *hat, const float *scales, int64_t start, int64_t columns,
                        const Plan *plan, double *out, double *by_column)
{
#define ROW(size, dtype) add_row(x, hat, scales, start, columns, plan, out, by_column, size, dtype)
    if (plan->block_size == 32 && plan->dtype == F32)
        ROW(32, F32);
    else if (plan->block_size == 32)
        ROW(32, BF16);
    else if (plan->block_size == 16 && plan->dtype == F32)
        ROW(16, F32);
    else if (plan->block_size == 16)
        ROW(16, BF16);
    else
        ROW(plan->block_size, plan->dtype);
#undef ROW
}

/* per_row: (rows, FIELDS), written. by_column: (2, columns), added to, or NULL; with it there is one thread.
   totals: FIELDS, added to row after row, so that they depend neither on threads nor on how rows come in chunks. */
EXPORT void qnoise_error_sums(const Plan *plan, const void *x, const void *hat, const float *scales, int64_t rows,
                              int64_t columns, double *per_row, double *by_column, double *totals, int threads)
{
    const int64_t blocks = (columns + plan->block_size - 1) / plan->block_size;
    if (by_column || threads < 1)
        threads = 1;
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
#endif
    for (int64_t row = 0; row < rows; row++)
        add_any_row(x, hat, scales + row * blocks, row * columns, columns, plan, per_row + row * FIELDS, by_column);
    for (int64_t row = 0; row < rows; row++)
        for (int i = 0; i < FIELDS; i++) {
            const double value = per_row[row * FIELDS + i];
            totals[i] = i < AMAX ? totals[i] + value : value > totals[i] ? value : totals[i];
        }
}

/* The distinct magnitudes that are at least `least`, and how many there are of each. Looked for in the rows whose TOP
   reaches it. Returns their number, or -1 if there are more than `room`. */
EXPORT int64_t qnoise_values_from(int dtype, const void *hat, int64_t rows, int64_t columns, const double *per_row,
                                  float least, float *values, int64_t *counts, int64_t room)
{
    const int32_t bound = float_bits(least);
    int64_t found = 0;
    for (int64_t row = 0; row < rows; row++) {
        if (!(per_row[row * FIELDS + TOP] >= least))
            continue;
        for (int64_t first = 0; first < columns; first += MAX_BLOCK) {
            int32_t h[MAX_BLOCK]; /* bits of magnitudes are ordered as they are; zeros fill the last piece */
            const int length = columns - first < MAX_BLOCK ? (int)(columns - first) : MAX_BLOCK;
            int32_t hits = 0;
            load(hat, row * columns + first, (float *)h, length, MAX_BLOCK, dtype);
            for (int i = 0; i < MAX_BLOCK; i++) {
                h[i] &= 0x7fffffff;
                hits += h[i] >= bound && h[i] <= 0x7f800000;
            }
            /* Almost always one that is known already. */
            for (int64_t at = 0; hits && at < found; at++) {
                const int32_t value = float_bits(values[at]);
                int32_t same = 0;
                for (int i = 0; i < MAX_BLOCK; i++)
                    same += h[i] == value;
                counts[at] += same;
                hits -= same;
            }
            for (int i = 0; hits && i < length; i++) {
                int known = !(h[i] >= bound && h[i] <= 0x7f800000);
                for (int64_t at = 0; !known && at < found; at++)
                    known = float_bits(values[at]) == h[i];
                if (known)
                    continue;
                if (found == room)
                    return -1;
                values[found] = as_float(h[i]);
                counts[found] = 0;
                for (int k = i; k < length; k++)
                    counts[found] += h[k] == h[i];
                hits -= (int32_t)counts[found++];
            }
        }
    }
    return found;
}

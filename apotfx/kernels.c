/* The quantizer's arithmetic in one pass over memory each; kernels.py compiles and calls it.

   An operand is `rows` rows of `cols` floats that lie one after another, with one clip per row. Encoding, decoding and
   gradients are those of functional.py, operation by operation in float32, so that the levels are the same: where torch
   divides a number by a tensor it multiplies with the reciprocal. Work is cut into blocks of fixed size, so that sums
   do not depend on the number of threads. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 4096 /* floats; with what is written to, half of a first-level cache */
#define MIN_CLIP 1e-8f

/* The OpenMP runtime that torch has loaded, as a second one would fight it for the cores: GNU's, or LLVM's, which has
   GNU's entry points. They are called by name, and not by pragmas, for which each compiler calls its own runtime. */
#ifdef __APPLE__
#define WEAK __attribute__((weak_import))
#else
#define WEAK __attribute__((weak))
#endif
extern void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags) WEAK;
extern int omp_get_thread_num(void) WEAK;
extern int omp_get_num_threads(void) WEAK;

typedef void Body(void *task, int64_t begin, int64_t end); /* works on the blocks from begin to end */

typedef struct {
    Body *body;
    void *task;
    int64_t blocks;
} Shared;

static void work_on_share(void *shared) {
    const Shared *s = shared;
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    s->body(s->task, s->blocks * thread / threads, s->blocks * (thread + 1) / threads);
}

/* Has the threads of the runtime work on all blocks, where that pays for so many floats. */
static void share(Body *body, void *task, int64_t blocks, int64_t floats) {
    Shared shared = {body, task, blocks};
    if (floats > 4 * BLOCK && GOMP_parallel && omp_get_num_threads && omp_get_thread_num)
        GOMP_parallel(work_on_share, &shared, 0, 0);
    else
        body(task, 0, blocks);
}

typedef struct {
    const float *table; /* the encoding table */
    int32_t max;        /* the largest level */
    int32_t is_signed;
    int32_t rectified;  /* the values go through clamp(low, high) first, which blocks gradients at both ends */
    float low, high;
} Levels;

typedef struct {
    const float *values; /* [rows, cols] */
    int64_t rows, cols;
    const float *clip;   /* [rows] */
    const float *unit;   /* [1], of the clip; or NULL */
    const Levels *levels;
} Operand;

static inline float clamp(float x, float low, float high) {
    x = x > low ? x : low; /* NaN becomes low */
    return x < high ? x : high;
}

static float used_clip(const Operand *o, int64_t row) {
    const float clip = o->unit ? o->clip[row] * *o->unit : o->clip[row];
    return clip < MIN_CLIP ? MIN_CLIP : clip; /* NaN stays */
}

/* steps [rows] = the float step of a level * factor, if there is a factor. */
void scale(const Operand *o, const float *factor, float *steps) {
    for (int64_t row = 0; row < o->rows; row++) {
        const float step = used_clip(o, row) / (float)o->levels->max;
        steps[row] = factor ? step * *factor : step;
    }
}

/* out = levels, or levels * (float step of a level) * factor if there is a factor, by a table of all encodings;
   returns whether any value or clip is NaN. */
#define ENCODE(NAME, OUT, TABLE)                                                                                       \
    typedef struct {                                                                                                   \
        const Operand *o;                                                                                              \
        const TABLE *encodings;                                                                                        \
        OUT *out;                                                                                                      \
        const float *factor;                                                                                           \
        int nan;                                                                                                       \
    } NAME##_task;                                                                                                     \
                                                                                                                       \
    static void NAME##_blocks(void *task, int64_t begin, int64_t end) {                                                \
        NAME##_task *t = task;                                                                                         \
        const Operand *o = t->o;                                                                                       \
        const Levels *l = o->levels;                                                                                   \
        const int64_t cols = o->cols, per_row = (cols + BLOCK - 1) / BLOCK;                                            \
        const float top = 2.0f * (float)l->max, bottom = l->is_signed ? -top : 0.0f;                                   \
        const float low = l->rectified ? l->low : -INFINITY, high = l->rectified ? l->high : INFINITY;                 \
        const TABLE *restrict table = t->encodings - (int32_t)bottom;                                                  \
        for (int64_t block = begin; block < end; block++) {                                                            \
            const int64_t row = block / per_row, start = block % per_row * BLOCK;                                      \
            const int64_t count = cols - start < BLOCK ? cols - start : BLOCK;                                         \
            const float *restrict from = o->values + row * cols + start;                                               \
            OUT *restrict to = t->out + row * cols + start;                                                            \
            const float clip = used_clip(o, row), by = 1.0f / clip * top;                                              \
            const OUT times = t->factor ? (OUT)(clip / (float)l->max * *t->factor) : (OUT)1;                           \
            int32_t bad = clip != clip;                                                                                \
            _Pragma("omp simd reduction(|:bad)")                                                                       \
            for (int64_t i = 0; i < count; i++) {                                                                      \
                const float v = from[i];                                                                               \
                bad |= v != v;                                                                                         \
                to[i] = (OUT)(table[(int32_t)clamp(clamp(v, low, high) * by, bottom, top)] * times);                   \
            }                                                                                                          \
            if (bad) __atomic_store_n(&t->nan, 1, __ATOMIC_RELAXED);                                                   \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    int NAME(const Operand *o, const TABLE *encodings, OUT *out, const float *factor) {                                \
        NAME##_task task = {o, encodings, out, factor, 0};                                                             \
        share(NAME##_blocks, &task, o->rows * ((o->cols + BLOCK - 1) / BLOCK), o->rows * o->cols);                     \
        return task.nan;                                                                                               \
    }

ENCODE(encode_float, float, float)
ENCODE(encode_byte, uint8_t, int32_t)

typedef struct {
    const Operand *o;
    const float *grad;
    float *grad_x;
    const float *factor;
    int32_t everywhere;
    double *sums; /* of the gradient for the clip, one per block */
} GradientTask;

static void gradient_blocks(void *task, int64_t begin, int64_t end) {
    const GradientTask *t = task;
    const Operand *o = t->o;
    const Levels *l = o->levels;
    const int64_t cols = o->cols, per_row = (cols + BLOCK - 1) / BLOCK;
    const float max = (float)l->max, top = 2.0f * max;
    const float bottom = l->is_signed ? -top : 0.0f, min = l->is_signed ? -max : 0.0f;
    const float low = l->rectified ? l->low : -INFINITY, high = l->rectified ? l->high : INFINITY;
    const int closed = !l->rectified, everywhere = t->everywhere;
    const float *restrict table = l->table - (int32_t)bottom;
    const float times = t->factor ? *t->factor : 1.0f;
    for (int64_t block = begin; block < end; block++) {
        const int64_t row = block / per_row, start = block % per_row * BLOCK;
        const int64_t count = cols - start < BLOCK ? cols - start : BLOCK;
        const float *restrict x = o->values + row * cols + start;
        const float *in = t->grad + row * cols + start;
        float *out = t->grad_x + row * cols + start;
        const float clip = used_clip(o, row), by = 1.0f / clip * top, to_level = 1.0f / clip * max;
        float sum = 0.0f;
        int32_t bad = clip != clip;
#pragma omp simd reduction(+ : sum) reduction(| : bad)
        for (int64_t i = 0; i < count; i++) {
            const float v = clamp(x[i], low, high), g = in[i] * times;
            const float level = table[(int32_t)clamp(v * by, bottom, top)];
            const float position = v * to_level, clamped = clamp(position, min, max);
            const int inside = position == clamped;
            const int passes = inside & (closed | ((x[i] > low) & (x[i] < high)));
            bad |= x[i] != x[i];
            sum += g * (level - (inside ? clamped : 0.0f));
            out[i] = (everywhere | passes) ? g : 0.0f;
        }
        t->sums[block] = bad ? NAN : sum;
    }
}

/* From grad, the gradient for levels * (float step) / factor, those for the values (grad_x, which may be grad) and the
   clips (grad_clip [rows]). Returns 0, or -1 if there is no memory. */
int gradient(const Operand *o, const float *grad, float *grad_x, const float *factor, int32_t everywhere,
             float *grad_clip) {
    const int64_t rows = o->rows, cols = o->cols, per_row = (cols + BLOCK - 1) / BLOCK;
    double *sums = malloc((size_t)(rows * per_row) * sizeof *sums);
    if (!sums) return -1;
    GradientTask task = {o, grad, grad_x, factor, everywhere, sums};
    share(gradient_blocks, &task, rows * per_row, rows * cols);
    const float unit = o->unit ? *o->unit : 1.0f;
    for (int64_t row = 0; row < rows; row++) {
        double total = 0.0;
        for (int64_t i = 0; i < per_row; i++) total += sums[row * per_row + i];
        grad_clip[row] = (float)(total / (float)o->levels->max) * unit;
    }
    free(sums);
    return 0;
}

typedef struct {
    const float *x;
    int64_t n;
    double *sums; /* two per block: of the values, and of their squares */
} DeviationTask;

static void deviation_blocks(void *task, int64_t begin, int64_t end) {
    const DeviationTask *t = task;
    for (int64_t block = begin; block < end; block++) {
        const float *restrict from = t->x + block * BLOCK;
        const int64_t count = t->n - block * BLOCK < BLOCK ? t->n - block * BLOCK : BLOCK;
        double sum = 0.0, squares = 0.0;
#pragma omp simd reduction(+ : sum, squares)
        for (int64_t i = 0; i < count; i++) {
            const double v = from[i];
            sum += v;
            squares += v * v;
        }
        t->sums[2 * block] = sum;
        t->sums[2 * block + 1] = squares;
    }
}

/* result = the standard deviation (unbiased) of n floats, at least MIN_CLIP. Returns 0, or -1 if there is no memory. */
int standard_deviation(const float *x, int64_t n, float *result) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    double *sums = malloc((size_t)(2 * blocks) * sizeof *sums);
    if (!sums) return -1;
    DeviationTask task = {x, n, sums};
    share(deviation_blocks, &task, blocks, n);
    double sum = 0.0, squares = 0.0;
    for (int64_t block = 0; block < blocks; block++) {
        sum += sums[2 * block];
        squares += sums[2 * block + 1];
    }
    free(sums);
    const double variance = (squares - sum * sum / (double)n) / (double)(n > 1 ? n - 1 : 1);
    *result = variance < (double)MIN_CLIP * MIN_CLIP ? MIN_CLIP : (float)sqrt(variance); /* NaN stays */
    return 0;
}

/* What lies between two integer layers, in inference: x = clamp(term[0] + term[1], low, high), where a term is one value
   per channel and position, (value + bias) * multiplier + offset, each operation rounded. x goes out as floats, as bytes
   of levels for any number of encoders, or both. */
#define PIECE 1024 /* floats that are worked on at a time */

typedef struct {
    const float *bias, *multiplier, *offset; /* [channels + PIECE], repeating; or NULL; the last two go together */
} Term;

typedef uint8_t Bytes __attribute__((vector_size(64)));

typedef struct {
    float low, high, by, bottom, top; /* as in ENCODE */
    int32_t zero_point;
    int32_t is_uniform;              /* the levels are all integers from 0 or -max on */
    int32_t num_steps;               /* 0 where the table is looked up instead */
    const uint8_t *start, *step;     /* [num_steps]: the positions, from bottom on, where the level rises, and by how much */
    const int32_t *table;            /* the encoding table, plus the zero point */
} Encoder;

typedef struct {
    int64_t channels;
    Term term[2];
    float low, high;
    int32_t num_encoders;
    const Encoder *encoder;
} Pointwise;

/* v = term, or v += term unless it is the first; a piece of channels from `channel` on. */
static inline void add_term(const Term *t, const float *from, float *v, int64_t channel, int64_t count, int first) {
    float own[PIECE];
    float *x = first ? v : own;
    const float *bias = t->bias + channel, *multiplier = t->multiplier + channel, *offset = t->offset + channel;
    if (t->bias) {
#pragma omp simd
        for (int64_t i = 0; i < count; i++) x[i] = from[i] + bias[i];
        from = x;
    }
    if (t->multiplier) {
#pragma omp simd
        for (int64_t i = 0; i < count; i++) x[i] = from[i] * multiplier[i] + offset[i];
        from = x;
    }
    if (!first) {
#pragma omp simd
        for (int64_t i = 0; i < count; i++) v[i] += from[i];
    } else if (from != x) {
        memcpy(v, from, (size_t)count * sizeof *v);
    }
}

/* A table of few levels is a sum of steps, which many bytes take at once. */
static void encode_piece(const Encoder *c, const float *restrict v, uint8_t *restrict to, int64_t count) {
    const float low = c->low, high = c->high, by = c->by, bottom = c->bottom, top = c->top;
    const int32_t zero_point = c->zero_point, first = (int32_t)bottom;
    const int32_t *restrict table = c->table - first;
    if (c->is_uniform) {
        for (int64_t i = 0; i < count; i++) {
            const int32_t position = (int32_t)clamp(clamp(v[i], low, high) * by, bottom, top);
            to[i] = (uint8_t)(((position + (position >= 0)) >> 1) + zero_point);
        }
    } else if (c->num_steps) {
        Bytes position[PIECE / sizeof(Bytes)];
        uint8_t *restrict bytes = (uint8_t *)position;
        for (int64_t i = 0; i < count; i++)
            bytes[i] = (uint8_t)((int32_t)clamp(clamp(v[i], low, high) * by, bottom, top) - first);
        for (int64_t i = 0; i * (int64_t)sizeof(Bytes) < count; i++) {
            Bytes level = {0};
            for (int32_t k = 0; k < c->num_steps; k++) level += (Bytes)(position[i] >= c->start[k]) & c->step[k];
            position[i] = level + (uint8_t)table[first];
        }
        memcpy(to, position, (size_t)count);
    } else {
        for (int64_t i = 0; i < count; i++)
            to[i] = (uint8_t)table[(int32_t)clamp(clamp(v[i], low, high) * by, bottom, top)];
    }
}

typedef struct {
    const Pointwise *p;
    int64_t n;
    const float *a, *b;
    float *out;
    uint8_t *const *codes;
    int nan;
} PointwiseTask;

static void pointwise_pieces(void *task, int64_t begin, int64_t end) {
    PointwiseTask *t = task;
    const Pointwise *p = t->p;
    const float low = p->low, high = p->high;
    for (int64_t start = begin * PIECE; start < t->n && start < end * PIECE; start += PIECE) {
        const int64_t count = t->n - start < PIECE ? t->n - start : PIECE, channel = start % p->channels;
        float own[PIECE];
        float *restrict v = t->out ? t->out + start : own;
        int32_t bad = 0;
        add_term(&p->term[0], t->a + start, v, channel, count, 1);
        if (t->b) add_term(&p->term[1], t->b + start, v, channel, count, 0);
#pragma omp simd reduction(| : bad)
        for (int64_t i = 0; i < count; i++) {
            bad |= v[i] != v[i];
            v[i] = clamp(v[i], low, high);
        }
        if (bad) __atomic_store_n(&t->nan, 1, __ATOMIC_RELAXED);
        for (int32_t e = 0; e < p->num_encoders; e++) encode_piece(&p->encoder[e], v, t->codes[e] + start, count);
    }
}

/* Channels are innermost in memory. `b` and `out` may be NULL. Returns whether any x is NaN. */
int pointwise(const Pointwise *p, int64_t n, const float *a, const float *b, float *out, uint8_t *const *codes) {
    PointwiseTask task = {p, n, a, b, out, codes, 0};
    share(pointwise_pieces, &task, (n + PIECE - 1) / PIECE, n);
    return task.nan;
}

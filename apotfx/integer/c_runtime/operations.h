/* The operations of the network: integer arithmetic, and float32 operations in the order in which PyTorch's evaluation
   rounds them. Numbers are finite. network.c says how large MAX_LEVELS, MAX_KERNEL and MAX_TERMS are. */
#ifndef APOTFX_OPERATIONS_H
#define APOTFX_OPERATIONS_H

#include <float.h>
#include <stddef.h>
#include <stdint.h>

/* A fused multiply-add, extra precision or reordered sums would change the last bit. */
#if defined(__FAST_MATH__) || FLT_EVAL_METHOD == 1 || FLT_EVAL_METHOD == 2
#error "float must be IEEE float32: compile without -ffast-math, and on 32-bit x86 with -msse2 -mfpmath=sse"
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#else
#pragma STDC FP_CONTRACT OFF
#endif

typedef struct { int channels, height, width; } Shape;
typedef struct { int y, x; } Pair;
typedef struct { Shape in, out; Pair kernel, stride, padding, dilation; } Window;

/* A level of a weight: `value` is the sum of 2^shift[t] over its `terms`. */
typedef struct { uint16_t value; uint8_t terms, shift[MAX_TERMS]; } Level;

/* From a float to a level: `by` times the float, clamped to [low, high], counts half levels. */
typedef struct {
    const int16_t *nearest; /* the level nearest to each number of half levels from 0 on */
    float by, low, high;
} Encoder;

/* A convolution of integers; a linear layer is one of 1 x 1 pixel. */
typedef struct {
    const char *name;
    Window window;
    int groups;
    Encoder encoder;
    const uint8_t *codes; /* weights [out, in / groups, kernel y, kernel x]: `bits` each, the level's index and its sign */
    int bits, magnitude_bits;
    const Level *levels;
    const float *scale; /* from accumulators to floats, of each output channel or one for all */
    int per_channel;
    const float *bias; /* or NULL */
} Layer;

static int16_t levels[MAX_LEVELS]; /* of a layer's input */

static inline size_t size_of(Shape shape) { return (size_t)shape.channels * shape.height * shape.width; }

static inline void encode(const Encoder *encoder, size_t count, const float *x) {
    for (size_t i = 0; i < count; i++) {
        float position = x[i] * encoder->by;
        position = position > encoder->low ? position : encoder->low;
        position = position < encoder->high ? position : encoder->high;
        const int half_levels = (int)position; /* truncates: a tie goes to the larger magnitude */
        levels[i] = (int16_t)(half_levels < 0 ? -encoder->nearest[-half_levels] : encoder->nearest[half_levels]);
    }
}

/* The i-th of the codes of `bits` bits each, 8 at most, that lie one after another. A byte must follow the last one. */
static inline unsigned code_at(const uint8_t *codes, size_t i, int bits) {
    const size_t bit = i * (size_t)bits;
    const unsigned two_bytes = codes[bit / 8] | (unsigned)codes[bit / 8 + 1] << 8;
    return (two_bytes >> bit % 8) & ((1u << bits) - 1);
}

/* One row or column of a kernel meets `count` inputs from `in` on, for the outputs from `out` on; the rest is padding. */
typedef struct { int in, out, count; } Span;

static Span rows[MAX_KERNEL], columns[MAX_KERNEL];

static inline Span span(int size, int outputs, int stride, int offset) {
    const int first = offset < 0 ? (stride - 1 - offset) / stride : 0;
    const int last = offset < size ? (size - 1 - offset) / stride : -1;
    const int end = last < outputs ? last + 1 : outputs;
    return (Span){first * stride + offset, first, end > first ? end - first : 0};
}

static inline void find_spans(const Window *w) {
    for (int k = 0; k < w->kernel.y; k++)
        rows[k] = span(w->in.height, w->out.height, w->stride.y, k * w->dilation.y - w->padding.y);
    for (int k = 0; k < w->kernel.x; k++)
        columns[k] = span(w->in.width, w->out.width, w->stride.x, k * w->dilation.x - w->padding.x);
}

/* Batch norm. */
static inline void affine(const float *multiplier, const float *offset, int channels, size_t pixels, const float *x,
                          float *y) {
    for (int c = 0; c < channels; c++, x += pixels, y += pixels)
        for (size_t i = 0; i < pixels; i++) y[i] = x[i] * multiplier[c] + offset[c];
}

static inline void relu(size_t count, const float *x, float *y) {
    for (size_t i = 0; i < count; i++) y[i] = x[i] > 0 ? x[i] : 0;
}

static inline void clamp(float low, float high, size_t count, const float *x, float *y) {
    for (size_t i = 0; i < count; i++) y[i] = x[i] < low ? low : x[i] > high ? high : x[i];
}

static inline void add(size_t count, const float *a, const float *b, float *y) {
    for (size_t i = 0; i < count; i++) y[i] = a[i] + b[i];
}

static inline void copy(size_t count, const float *x, float *y) {
    for (size_t i = 0; i < count; i++) y[i] = x[i];
}

static inline void max_pool(const Window *w, const float *x, float *y) {
    for (int c = 0; c < w->out.channels; c++, x += (size_t)w->in.height * w->in.width)
        for (int oy = 0; oy < w->out.height; oy++)
            for (int ox = 0; ox < w->out.width; ox++) {
                float max = -FLT_MAX;
                for (int ky = 0; ky < w->kernel.y; ky++)
                    for (int kx = 0; kx < w->kernel.x; kx++) {
                        const int iy = oy * w->stride.y - w->padding.y + ky * w->dilation.y;
                        const int ix = ox * w->stride.x - w->padding.x + kx * w->dilation.x;
                        if (iy < 0 || iy >= w->in.height || ix < 0 || ix >= w->in.width) continue;
                        const float value = x[(size_t)iy * w->in.width + ix];
                        if (value > max) max = value;
                    }
                *y++ = max;
            }
}

static inline int at_least(int x, int low) { return x < low ? low : x; }
static inline int at_most(int x, int high) { return x > high ? high : x; }

/* Sums in double, which torch does as well, and rounds once. */
static inline void average_pool(const Window *w, int count_padding, const float *x, float *y) {
    for (int c = 0; c < w->out.channels; c++, x += (size_t)w->in.height * w->in.width)
        for (int oy = 0; oy < w->out.height; oy++)
            for (int ox = 0; ox < w->out.width; ox++) {
                int top = oy * w->stride.y - w->padding.y, left = ox * w->stride.x - w->padding.x;
                int bottom = at_most(top + w->kernel.y, w->in.height + w->padding.y);
                int right = at_most(left + w->kernel.x, w->in.width + w->padding.x);
                const int padded = (bottom - top) * (right - left);
                top = at_least(top, 0), bottom = at_most(bottom, w->in.height);
                left = at_least(left, 0), right = at_most(right, w->in.width);
                const int inside = at_least(bottom - top, 0) * at_least(right - left, 0);
                double sum = 0;
                for (int iy = top; iy < bottom; iy++)
                    for (int ix = left; ix < right; ix++) sum += x[(size_t)iy * w->in.width + ix];
                *y++ = inside ? (float)(sum / (count_padding ? padded : inside)) : 0;
            }
}

#endif

/* Convolution of integers, summed in 32 bits. Sums are two's complement numbers in unsigned integers, so that shifting
   and adding negative ones is defined. Every weight is decoded once and meets all the pixels that it is for. */

static uint32_t accumulators32[MAX_ACCUMULATORS]; /* of one output channel */

static inline int32_t signed32(uint32_t n) {
    return n <= INT32_MAX ? (int32_t)n : -1 - (int32_t)(UINT32_MAX - n);
}

/* sums[i] += level * x[i * step], or -= where `minus` is all ones and not 0. */
static inline void accumulate32(uint32_t *sums, const int16_t *x, int count, int step, const Level *level,
                                uint32_t minus) {
#ifdef APOTFX_MULTIPLY
    const uint32_t weight = (level->value ^ minus) - minus;
    for (int i = 0; i < count; i++) sums[i] += (uint32_t)x[i * step] * weight;
#else
    int t = 0;
    for (; t + 1 < level->terms; t += 2) {
        const int a = level->shift[t], b = level->shift[t + 1];
        for (int i = 0; i < count; i++) {
            const uint32_t n = ((uint32_t)x[i * step] ^ minus) - minus;
            sums[i] += (n << a) + (n << b);
        }
    }
    if (t < level->terms) {
        const int a = level->shift[t];
        for (int i = 0; i < count; i++) {
            const uint32_t n = ((uint32_t)x[i * step] ^ minus) - minus;
            sums[i] += n << a;
        }
    }
#endif
}

static inline void convolve32(const Layer *layer, const float *x, float *y) {
    const Window *w = &layer->window;
    const size_t in_plane = (size_t)w->in.height * w->in.width, out_plane = (size_t)w->out.height * w->out.width;
    const int in_channels = w->in.channels / layer->groups, out_channels = w->out.channels / layer->groups;
    size_t position = 0; /* of the weight */
    encode(&layer->encoder, size_of(w->in), x);
    find_spans(w);
    for (int o = 0; o < w->out.channels; o++) {
        for (size_t i = 0; i < out_plane; i++) accumulators32[i] = 0;
        for (int c = 0; c < in_channels; c++) {
            const int16_t *in = levels + (size_t)(o / out_channels * in_channels + c) * in_plane;
            for (int ky = 0; ky < w->kernel.y; ky++)
                for (int kx = 0; kx < w->kernel.x; kx++, position++) {
                    const Span row = rows[ky], column = columns[kx];
                    if (!row.count || !column.count) continue;
                    const unsigned code = code_at(layer->codes, position, layer->bits);
                    const Level *level = &layer->levels[code & ((1u << layer->magnitude_bits) - 1)];
                    const uint32_t minus = code >> layer->magnitude_bits ? UINT32_MAX : 0;
                    if (!level->value) continue;
                    for (int i = 0; i < row.count; i++)
                        accumulate32(accumulators32 + (size_t)(row.out + i) * w->out.width + column.out,
                                     in + (size_t)(row.in + i * w->stride.y) * w->in.width + column.in, column.count,
                                     w->stride.x, level, minus);
                }
        }
        for (size_t i = 0; i < out_plane; i++, y++) {
            const int32_t accumulator = signed32(accumulators32[i]);
            if (apotfx_trace) apotfx_trace(layer->name, (size_t)o * out_plane + i, accumulator);
            *y = (float)accumulator * layer->scale[layer->per_channel ? o : 0];
            if (layer->bias) *y += layer->bias[o];
        }
    }
}

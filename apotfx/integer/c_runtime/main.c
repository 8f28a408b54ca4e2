/* Reads images in MNIST's format (idx), prints the network's prediction for each and, given labels, the accuracy. */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "network.h"

#define PIXELS (APOTFX_HEIGHT * APOTFX_WIDTH)

typedef struct {
    FILE *file;
    const char *path;
    uint32_t count;
} Items;

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(2);
}

static void read_bytes(const Items *items, void *bytes, size_t count) {
    if (fread(bytes, 1, count, items->file) != count) fail("%s: truncated, or it cannot be read", items->path);
}

static uint32_t read_number(const Items *items) {
    uint8_t b[4];
    read_bytes(items, b, 4);
    return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

/* An idx file of bytes: a magic number that ends with the number of dimensions, their sizes, and the items. */
static Items open_items(const char *path, int dimensions, const uint32_t *sizes) {
    Items items = {fopen(path, "rb"), path, 0};
    if (!items.file) fail("%s: cannot be opened", path);
    const uint32_t magic = read_number(&items), expected_magic = 0x801 + (uint32_t)dimensions;
    if (magic != expected_magic)
        fail("%s: starts with %08" PRIx32 ", expected %08" PRIx32 "; pass an idx file, unpacked", path, magic,
             expected_magic);
    items.count = read_number(&items);
    uint64_t expected = items.count;
    for (int i = 0; i < dimensions; i++) {
        const uint32_t size = read_number(&items);
        if (size != sizes[i])
            fail("%s: its images have size %" PRIu32 " where the network takes %" PRIu32, path, size, sizes[i]);
        expected *= size;
    }
    const long start = ftell(items.file);
    if (start < 0 || fseek(items.file, 0, SEEK_END)) fail("%s: cannot be read", path);
    const uint64_t found = (uint64_t)(ftell(items.file) - start);
    if (found != expected)
        fail("%s: holds %" PRIu64 " bytes of items, expected %" PRIu64 "; it is truncated or damaged", path, found,
             expected);
    fseek(items.file, start, SEEK_SET);
    return items;
}

static int predict(const Items *images, float *output) {
    static const float mean[] = APOTFX_MEAN, std[] = APOTFX_STD;
    static uint8_t bytes[APOTFX_CHANNELS * PIXELS];
    static float image[APOTFX_CHANNELS * PIXELS];
    read_bytes(images, bytes, sizeof bytes);
    for (int i = 0; i < APOTFX_CHANNELS * PIXELS; i++)
        image[i] = ((float)bytes[i] / 255.0f - mean[i / PIXELS]) / std[i / PIXELS];
    apotfx_infer(image, output);
    int best = 0;
    for (int i = 1; i < APOTFX_OUTPUTS; i++)
        if (output[i] > output[best]) best = i;
    return best;
}

static void print_accumulator(const char *layer, size_t index, int64_t accumulator) {
    printf("%s %" PRIu64 " %" PRId64 "\n", layer, (uint64_t)index, accumulator);
}

/* The accumulators of every layer on image `number`, "layer index value", then the outputs. */
static void trace(const Items *images, const char *number) {
    float output[APOTFX_OUTPUTS];
    char *end;
    const unsigned long n = strtoul(number, &end, 10);
    if (*number < '0' || *number > '9' || *end || n >= images->count)
        fail("--trace %s: expected the number of an image, 0 to %" PRId64, number, (int64_t)images->count - 1);
    if (fseek(images->file, (long)(n * APOTFX_CHANNELS * PIXELS), SEEK_CUR)) fail("%s: cannot be read", images->path);
    apotfx_trace = print_accumulator;
    predict(images, output);
    for (int i = 0; i < APOTFX_OUTPUTS; i++) printf("output %d %a\n", i, (double)output[i]);
}

int main(int argc, char **argv) {
    const uint32_t sizes[] = {APOTFX_CHANNELS, APOTFX_HEIGHT, APOTFX_WIDTH};
    const int gray = APOTFX_CHANNELS == 1; /* then the images have no dimension for channels */
    if (argc == 4 && !strcmp(argv[2], "--trace")) {
        const Items images = open_items(argv[1], 3 - gray, sizes + gray);
        trace(&images, argv[3]);
        fclose(images.file);
        return 0;
    }
    if (argc != 2 && argc != 3) fail("usage: %s IMAGES [LABELS | --trace N]", argc ? argv[0] : "network");
    const Items images = open_items(argv[1], 3 - gray, sizes + gray);
    const Items labels = argc == 3 ? open_items(argv[2], 0, sizes) : (Items){NULL, "", images.count};
    if (labels.count != images.count)
        fail("%s: %" PRIu32 " labels, expected %" PRIu32 ", one per image", labels.path, labels.count, images.count);
    uint32_t correct = 0;
    for (uint32_t i = 0; i < images.count; i++) {
        float output[APOTFX_OUTPUTS];
        const int prediction = predict(&images, output);
        printf("%d\n", prediction);
        if (labels.file) {
            uint8_t label;
            read_bytes(&labels, &label, 1);
            correct += label == prediction;
        }
    }
    fclose(images.file);
    if (labels.file) {
        fclose(labels.file);
        printf("accuracy %.2f%% (%" PRIu32 " of %" PRIu32 ")\n", images.count ? 100.0 * correct / images.count : 0.0,
               correct, images.count);
    }
    return 0;
}

// What ggml asks of any turbo type.

#include "turbo/types.h"

#include "turbo/scalar-impl.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

// One bit for the magnitude must be left.
bool ggml_turbo_decays(enum ggml_type type) {
    switch (type) {
#define DECAYS(ENUM, NAME, C_NAME, FAMILY, BITS) \
    case GGML_TYPE_##ENUM:                       \
        return BITS > 2;
        GGML_TURBO_SCALAR_TYPES_X(DECAYS)
        default:
            return false;
    }
}

static size_t block_bytes(enum ggml_type type) {
    switch (type) {
#define BLOCK_BYTES(ENUM, NAME, C_NAME, FAMILY, BITS) \
    case GGML_TYPE_##ENUM:                            \
        return sizeof(block_##C_NAME);
        GGML_TURBO_TYPES_X(BLOCK_BYTES)
        default:
            return 0;
    }
}

// Bytes of n values
static size_t bytes_of(enum ggml_type type, int64_t n) {
    const int64_t block = ggml_turbo_is_trellis(type) ? QK_TRELLIS : QK_SCALAR;
    assert(n % block == 0);
    return (size_t) (n / block) * block_bytes(type);
}

// A row is a whole number of blocks and blocks do not depend on each other, so the rows are encoded as one.
size_t ggml_turbo_quantize(enum ggml_type              type,
                           const float * GGML_RESTRICT src,
                           void * GGML_RESTRICT        dst,
                           int64_t                     start,
                           int64_t                     nrows,
                           int64_t                     n_per_row) {
    const int64_t n   = nrows * n_per_row;
    char *        out = (char *) dst + bytes_of(type, start);
    if (ggml_turbo_is_trellis(type)) {
        ggml_turbo_quantize_row_trellis(type, src + start, out, n);
    } else {
        ggml_turbo_quantize_row_scalar(type, ggml_turbo_get_scale(), true, src + start, out, n);
    }
    return bytes_of(type, n);
}

// Whether the scale that a block starts with is neither infinite nor NaN: whether not all bits of its exponent are set
static bool has_finite_scale(enum ggml_type type, const void * block) {
    if (ggml_turbo_is_trellis(type)) {
        return *(const uint8_t *) block <= TRELLIS_SCALE_MAX;
    }
    ggml_fp16_t d;
    memcpy(&d, block, sizeof(d));
    return scalar_is_finite(d);
}

bool ggml_turbo_validate_row(enum ggml_type type, const void * data, size_t nbytes) {
    const size_t size = block_bytes(type);
    if (size == 0 || nbytes % size != 0) {
        fprintf(stderr, "%s: %zu bytes are no whole number of blocks of type %d\n", __func__, nbytes, (int) type);
        return false;
    }
    for (size_t ib = 0; ib < nbytes / size; ++ib) {
        if (!has_finite_scale(type, (const char *) data + ib * size)) {
            fprintf(stderr, "%s: found inf or nan scale at block %zu\n", __func__, ib);
            return false;
        }
    }
    return true;
}

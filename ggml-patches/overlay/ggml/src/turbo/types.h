#pragma once

// What ggml asks of any turbo type.

#include "turbo/trellis.h"

#ifdef __cplusplus
extern "C" {
#endif

// For ggml_quantize_chunk: encodes rows of src into those of dst, from value `start` on, which begins a row. Returns the bytes written.
GGML_API size_t ggml_turbo_quantize(enum ggml_type              type,
                                    const float * GGML_RESTRICT src,
                                    void * GGML_RESTRICT        dst,
                                    int64_t                     start,
                                    int64_t                     nrows,
                                    int64_t                     n_per_row);

// For ggml_validate_row_data: whether nbytes are whole blocks and no scale is infinite or NaN.
GGML_API bool ggml_turbo_validate_row(enum ggml_type type, const void * data, size_t nbytes);

#ifdef __cplusplus
}
#endif

#include "fwht.h"

#include "ggml-impl.h"
#include "simd.h"

#include <algorithm>
#include <cmath>

namespace {

// All stages within a vector
template <int D = 1> vf butterflies(vf x) {
    if constexpr (D < LANES) {
        return butterflies<2 * D>(butterfly<D>(x));
    } else {
        return x;
    }
}

void transform_row(const float * x, float * y, int64_t n) {
    const vf scale = splat(1.0f / std::sqrt((float) n));
    // Two loops, so that no compiler fuses the product with a sum.
    for (int64_t i = 0; i < n; i += LANES) {
        store(y + i, mul(load(x + i), scale));
    }
    for (int64_t i = 0; i < n; i += LANES) {
        store(y + i, butterflies(load(y + i)));
    }
    for (int64_t len = LANES; len < n; len *= 2) {
        for (int64_t i = 0; i < n; i += 2 * len) {
            for (int64_t j = i; j < i + len; j += LANES) {
                const vf a = load(y + j);
                const vf b = load(y + j + len);
                store(y + j, add(a, b));
                store(y + j + len, sub(a, b));
            }
        }
    }
}

}  // namespace

bool ggml_turbo_cpu_fwht(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[1];
    const int64_t       n   = src->ne[0];

    const bool is_hadamard = ggml_get_op_params_i32(dst, 1) == GGML_HINT_SRC0_IS_HADAMARD;
    if (!is_hadamard || params->use_ref || src->type != GGML_TYPE_F32 || src->nb[0] != sizeof(float) || n < LANES) {
        return false;
    }
    GGML_ASSERT((n & (n - 1)) == 0);

    const int64_t n_rows = ggml_nrows(src);
    const int64_t end    = n_rows * (params->ith + 1) / params->nth;
    for (int64_t row = n_rows * params->ith / params->nth; row < end; ++row) {
        const int64_t i1 = row % src->ne[1];
        const int64_t i2 = row / src->ne[1] % src->ne[2];
        const int64_t i3 = row / src->ne[1] / src->ne[2];

        transform_row((const float *) ((const char *) src->data + i1 * src->nb[1] + i2 * src->nb[2] + i3 * src->nb[3]),
                      (float *) ((char *) dst->data + i1 * dst->nb[1] + i2 * dst->nb[2] + i3 * dst->nb[3]), n);
    }
    return true;
}

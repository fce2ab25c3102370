// Attention over caches of turbo types, a tile of keys at a time.
//
// A unit of work is one KV head and up to TILE of the rows that share it: all query heads of its group, for one query or several. For
// each tile of keys, each block of K and V is unpacked once per unit:
//
//     scores    Q has become int8 blocks with a scale. Keys are unpacked into registers, transposed: lane i holds four values of key i,
//               so that a dot product needs no sum over lanes and its scales are a vector too. Keys of other types are unpacked to
//               floats and take the product of matrices.
//     weights   online softmax: weights relative to the largest score so far, and a factor for the sum up to here
//     values    keys that no row gives weight are left out, the others unpacked, a block of columns at a time, and multiplied
//
// With few units the keys are split: thread i takes tiles i, i + n, .. of all units and the partial sums are merged at the end. With
// many units each thread takes whole units. Either way the memory needed does not depend on the number of keys.
//
// The tiles of a second segment of keys (ggml_turbo_flash_attn_add_segment) follow those of the first.

#include "attn.h"

#include "attn-threads.h"
#include "turbo/env.h"

namespace {

enum attn_use { USE_NEVER, USE_TURBO, USE_ALWAYS };

attn_use attn_use_from_environment() {
    const char * value = ggml_turbo_getenv("GGML_TURBO_CPU_ATTN", "GGML_TURBO_CPU_FATTN", true);
    return !value || !strcmp(value, "1") ? USE_TURBO : !strcmp(value, "all") ? USE_ALWAYS : USE_NEVER;
}

}  // namespace

const char * ggml_turbo_cpu_attn_isa(void) {
    return SIMD_NAME;
}

bool ggml_turbo_cpu_attn_supported(const ggml_tensor * op) {
    attention a;
    return init(a, const_cast<ggml_tensor *>(op));
}

bool ggml_turbo_cpu_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    static const attn_use use = attn_use_from_environment();

    attention  a;
    const bool has_turbo = ggml_is_turbo(dst->src[1]->type) || ggml_is_turbo(dst->src[2]->type);
    const bool wanted    = !params->use_ref && use != USE_NEVER && (use == USE_ALWAYS || has_turbo);
    if (ggml_turbo_flash_attn_has_segment(dst)) {
        GGML_ASSERT(init(a, dst));  // nobody else knows segments
    } else if (!wanted || !init(a, dst)) {
        return false;
    }

    const thread_team team = { params, a };
    const scratch     w    = team.buffer_of(params->ith);
    GGML_ASSERT(w.n_states >= std::min<int64_t>(TILE, a.rows_of_group()) && "work buffer too small");

    if (!a.is_narrow && a.rows_of_group() > TILE / 2 && a.n_units() >= 4 * params->nth) {
        split_units(team, w);
    } else if (few_keys(a, params->nth)) {
        deal_units(team, w);
    } else {
        split_keys(team, w);
    }
    return true;
}

#include "rotation.h"

#include "compat.h"

#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <string>

// Upstream rotates head sizes that are multiples of this; the rest is ours.
static constexpr int64_t UPSTREAM_GROUP_MIN = 64;

static bool env_is_set(const char * name) {
    const char * value = getenv(name);
    return value && atoi(value) != 0;
}

// Largest power of two that divides the head size, up to a limit that is one, too, or the head size.
static int64_t largest_group(int64_t n_embd_head, int64_t group_max) {
    int64_t group = 1;
    while (group < group_max && n_embd_head % (2 * group) == 0) {
        group *= 2;
    }

    return group;
}

int64_t llama_turbo_rotation_group(int64_t n_embd_head) {
    return largest_group(n_embd_head, 128);
}

bool llama_turbo_rotates(ggml_type type) {
    return ggml_is_turbo(type) || (type == GGML_TYPE_F32 && env_is_set("LLAMA_TURBO_ROTATE_F32"));
}

// Sylvester's construction: H[i][j] = (-1)^popcount(i & j) / sqrt(n)
static std::vector<float> hadamard_matrix(int64_t n) {
    std::vector<float> res(n * n);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            bool odd = false;
            for (int64_t bits = i & j; bits != 0; bits &= bits - 1) {
                odd = !odd;
            }
            res[i * n + j] = (odd ? -1.0f : 1.0f) / sqrtf(n);
        }
    }

    return res;
}

void llama_turbo_init_rotation(ggml_type                                         type_k,
                               ggml_type                                         type_v,
                               int32_t                                           n_embd_head_k,
                               int32_t                                           n_embd_head_v,
                               uint32_t &                                        rot_k,
                               uint32_t &                                        rot_v,
                               std::unordered_map<int64_t, std::vector<float>> & hadamard,
                               bool                                              is_mixed) {
    if (env_is_set("LLAMA_ATTN_ROT_DISABLE")) {
        return;
    }

    const auto init = [&](ggml_type type, int32_t n_embd_head, uint32_t & rot, int64_t group_max) {
        const int64_t group = n_embd_head > 0 ? largest_group(n_embd_head, group_max) : 0;
        if (is_mixed && group >= UPSTREAM_GROUP_MIN && ggml_is_quantized(type)) {
            rot = group;
        }
        if (!llama_turbo_rotates(type) || n_embd_head == 0) {
            return;
        }
        if (n_embd_head < 0) {
            throw std::runtime_error(std::string("cache type ") + ggml_type_name(type) +
                                     " does not support layers of different head sizes in one cache: use q8_0 or f16");
        }
        rot = group;
        if (group < UPSTREAM_GROUP_MIN && hadamard.count(group) == 0) {
            hadamard[group] = hadamard_matrix(group);
        }
    };

    // the groups that upstream takes: whole heads of K, where they are powers of two, and 64 values of V
    init(type_k, n_embd_head_k, rot_k, n_embd_head_k);
    init(type_v, n_embd_head_v, rot_v, UPSTREAM_GROUP_MIN);
}

void llama_turbo_init_rotation(llama_kv_cache & kv, bool is_mixed) {
    uint32_t rot_k = llama_turbo_access::rot_k(kv, 0);
    uint32_t rot_v = llama_turbo_access::rot_v(kv, 0);
    for (const auto & layer : llama_turbo_access::layers(kv)) {
        llama_turbo_init_rotation(layer.k->type, layer.v ? layer.v->type : GGML_TYPE_F32,
                                  llama_turbo_access::n_embd_head_k(kv), llama_turbo_access::n_embd_head_v(kv), rot_k,
                                  rot_v, llama_turbo_access::hadamard(kv), is_mixed);
    }
    llama_turbo_access::rot_k(kv, 0) = rot_k;
    llama_turbo_access::rot_v(kv, 0) = rot_v;
}

// Where upstream keeps sizes, its own graph takes ours.
static ggml_tensor * build_rot(ggml_context * ctx, bool is_rotated, int32_t n_embd_head, const char * name) {
    if (llama_turbo_access::has_rot_sizes() || !is_rotated || n_embd_head <= 0 ||
        n_embd_head % UPSTREAM_GROUP_MIN == 0) {
        return nullptr;
    }

    const int64_t group = llama_turbo_rotation_group(n_embd_head);

    ggml_tensor * res = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, group, group);
    ggml_set_input(res);
    ggml_set_name(res, name);

    return res;
}

ggml_tensor * llama_turbo_build_k_rot(const llama_kv_cache & kv, ggml_context * ctx) {
    return build_rot(ctx, llama_turbo_access::rot_k(kv, 0), llama_turbo_access::n_embd_head_k(kv), "attn_inp_k_rot");
}

ggml_tensor * llama_turbo_build_v_rot(const llama_kv_cache & kv, ggml_context * ctx) {
    return build_rot(ctx, llama_turbo_access::rot_v(kv, 0), llama_turbo_access::n_embd_head_v(kv), "attn_inp_v_rot");
}

void llama_turbo_rotate_rows(std::vector<float> & matrices, int64_t n) {
    const int64_t group = largest_group(n, n);
    for (int64_t step = 1; step < group; step *= 2) {
        for (size_t row = 0; row < matrices.size() / n; ++row) {
            if (row / step % 2 == 1) {
                continue;
            }
            float * a = matrices.data() + row * n;
            float * b = a + step * n;
            for (int64_t i = 0; i < n; ++i) {
                const float sum = a[i] + b[i];

                b[i] = a[i] - b[i];
                a[i] = sum;
            }
        }
    }
    for (float & value : matrices) {
        value /= sqrtf(group);
    }
}

//
// K-shift
//

// Head size of a view of the cache [n_rot, n_head_kv, n_cells], whose rows may be a part of the head.
static int64_t n_embd_head_of(const ggml_tensor * cur) {
    return cur->nb[1] / ggml_type_size(cur->type) * ggml_blck_size(cur->type);
}

// llama-impl.h has the same since 0.3.34 only
ggml_tensor * llama_turbo_rotate(ggml_context * ctx, ggml_tensor * cur, ggml_tensor * rot) {
    const int64_t n = rot->ne[0];

    ggml_tensor * groups = ggml_is_contiguous(cur) ? ggml_reshape_2d(ctx, cur, n, ggml_nelements(cur) / n) :
                                                     ggml_cont_2d(ctx, cur, n, ggml_nelements(cur) / n);

    ggml_tensor * res = ggml_mul_mat(ctx, rot, groups);
    ggml_mul_mat_set_hint(res, GGML_HINT_SRC0_IS_HADAMARD);

    return ggml_reshape_3d(ctx, res, cur->ne[0], cur->ne[1], cur->ne[2]);
}

bool llama_turbo_shifts(const ggml_tensor * cur, const ggml_tensor * rot, bool is_mixed) {
    if (llama_turbo_rotates(cur->type) || cur->type == GGML_TYPE_BF16) {
        return true;
    }
    if (is_mixed && rot && !ggml_is_quantized(cur->type)) {
        return true;
    }

    const bool is_whole_head = cur->ne[0] == n_embd_head_of(cur);
    return ggml_is_quantized(cur->type) && cur->view_offs == 0 && (!rot || !is_whole_head);
}

ggml_tensor * llama_turbo_build_shift(ggml_context *                                      ctx,
                                      ggml_tensor *                                       cur,
                                      ggml_tensor *                                       rot,
                                      const std::function<ggml_tensor *(ggml_tensor *)> & rope) {
    // models with RoPE at the end of the head are refused by llama_turbo_check_context
    GGML_ASSERT(cur->view_offs == 0);

    // the rotation mixes the whole head, so all of it is decoded, also where RoPE covers only its beginning
    ggml_tensor * k =
        ggml_view_3d(ctx, cur->view_src, n_embd_head_of(cur), cur->ne[1], cur->ne[2], cur->nb[1], cur->nb[2], 0);

    ggml_tensor * res = ggml_cast(ctx, k, GGML_TYPE_F32);
    if (rot) {
        res = llama_turbo_rotate(ctx, res, rot);
    }
    res = rope(res);
    if (rot) {
        res = llama_turbo_rotate(ctx, res, rot);
    }

    return ggml_cpy(ctx, res, k);
}

// Attention of many queries: slices of the keys, through upstream's kernels.

#include "convert.cuh"
#include "fattn.cuh"
#include "turbo/attn-ways.cuh"
#include "turbo/prefill-slices.cuh"
#include "turbo/prefill.cuh"
#include "turbo/turbo.cuh"

static bool turbo_is_view_of(const ggml_tensor * V, const ggml_tensor * K) {
    return V->data == K->data && V->type == K->type && V->nb[1] == K->nb[1] && V->nb[2] == K->nb[2] &&
           V->nb[3] == K->nb[3];
}

//
// slices
//

// n elements of dimension dim, from the i-th on.
static ggml_tensor turbo_part_of(const ggml_tensor & t, const int dim, const int64_t i, const int64_t n) {
    ggml_tensor part = t;
    part.ne[dim]     = n;
    part.data        = (char *) t.data + i * t.nb[dim];
    part.view_src    = nullptr;
    return part;
}

static ggml_tensor turbo_f16_tensor(half * data, const int64_t (&ne)[GGML_MAX_DIMS]) {
    ggml_tensor t = {};
    t.type        = GGML_TYPE_F16;
    t.data        = data;
    t.nb[0]       = sizeof(half);
    for (int i = 0; i < GGML_MAX_DIMS; ++i) {
        t.ne[i] = ne[i];
        t.nb[i] = i == 0 ? sizeof(half) : t.nb[i - 1] * t.ne[i - 1];
    }
    return t;
}

// n keys of a cache from key0 on, as f16; unpacked into scratch unless they are f16 already.
static ggml_tensor turbo_slice_of(const ggml_tensor * cache,
                                  const int64_t       key0,
                                  const int64_t       n,
                                  half *              scratch,
                                  cudaStream_t        stream) {
    const ggml_tensor t = turbo_part_of(*cache, 1, key0, n);
    if (cache->type == GGML_TYPE_F16) {
        return t;
    }

    if (ggml_is_turbo(cache->type)) {
        ggml_cuda_turbo_to_f16(cache->type, (const char *) t.data, scratch, t.ne, t.nb, n, stream);
    } else {
        const size_t ts = ggml_type_size(cache->type);
        ggml_get_to_fp16_nc_cuda(cache->type)(t.data, scratch, t.ne[0], t.ne[1], t.ne[2], t.ne[3], t.nb[1] / ts,
                                              t.nb[2] / ts, t.nb[3] / ts, stream);
    }
    return turbo_f16_tensor(scratch, t.ne);
}

// The keys of kv, which are f16, are a slice of dst.
static turbo_slice turbo_make_slice(const ggml_tensor * dst,
                                    turbo_kv            kv,
                                    float2 *            state,
                                    const bool          first,
                                    const bool          last) {
    turbo_slice slice;
    (ggml_tensor &) slice = *dst;
    slice.state           = state;
    slice.first           = first;
    slice.last            = last;
    slice.src[1]          = const_cast<ggml_tensor *>(kv.K);
    slice.src[2]          = const_cast<ggml_tensor *>(kv.V);
    slice.src[3]          = const_cast<ggml_tensor *>(kv.mask);
    slice.src[4]          = last ? dst->src[4] : nullptr;  // sinks count once
    ggml_set_op_params_i32(&slice, 4, 0);                  // no list of selected keys
    return slice;
}

static void turbo_attend_slice(ggml_backend_cuda_context & ctx, turbo_slice & slice) {
    // upstream's kernels for 576/512 take V from K
    const bool whole =
        slice.first && slice.last && (slice.src[1]->ne[0] != 576 || turbo_is_view_of(slice.src[2], slice.src[1]));
    if (whole && ggml_cuda_flash_attn_ext_supported(ctx.device, &slice)) {
        ggml_cuda_flash_attn_ext(ctx, &slice);
    } else if (ggml_cuda_turbo_prefill_mma_supported(ctx.device, slice)) {
        ggml_cuda_turbo_prefill_mma(ctx, slice);
    } else {
        ggml_cuda_turbo_prefill_tile(ctx, slice);
    }
}

// Attention over one of the segments of keys of dst. state: between the first segment and the last.
static void turbo_prefill_kv(ggml_backend_cuda_context & ctx,
                             const ggml_tensor *         dst,
                             const turbo_kv &            kv,
                             float2 *                    state,
                             const bool                  is_first,
                             const bool                  is_last) {
    const ggml_tensor * K = kv.K;
    const ggml_tensor * V = kv.V;

    const bool    V_is_K_view = turbo_is_view_of(V, K);
    const int64_t n_keys      = turbo_slice_keys(ctx.device, dst->src[0]->ne[1], K, V);
    const int64_t n_max       = std::min(K->ne[1], n_keys + 2 * FATTN_KQ_STRIDE);

    // allocated in this order too: the pool wants it back in reverse
    ggml_cuda_pool_alloc<half> K_f16(ctx.pool());
    ggml_cuda_pool_alloc<half> V_f16(ctx.pool());
    if (K->type != GGML_TYPE_F16) {
        K_f16.alloc(K->ne[0] * n_max * K->ne[2] * K->ne[3]);
    }
    if (V->type != GGML_TYPE_F16 && !V_is_K_view) {
        V_f16.alloc(V->ne[0] * n_max * V->ne[2] * V->ne[3]);
    }

    int64_t n;
    for (int64_t key0 = 0; key0 < K->ne[1]; key0 += n) {
        // a short rest goes with the slice before it
        n = K->ne[1] - key0;
        n = n <= n_keys + 2 * FATTN_KQ_STRIDE ? n : n_keys;

        ggml_tensor K_slice = turbo_slice_of(K, key0, n, K_f16.ptr, ctx.stream());
        ggml_tensor V_slice = V_is_K_view ? K_slice : turbo_slice_of(V, key0, n, V_f16.ptr, ctx.stream());
        V_slice.ne[0]       = V->ne[0];
        ggml_tensor mask;
        if (kv.mask) {
            mask = turbo_part_of(*kv.mask, 0, key0, n);
        }

        turbo_slice slice = turbo_make_slice(dst, { &K_slice, &V_slice, kv.mask ? &mask : nullptr }, state,
                                             is_first && key0 == 0, is_last && key0 + n == K->ne[1]);
        turbo_attend_slice(ctx, slice);
    }
}

//
// both segments in one slice
//

// One launch saves two merges, which move some 40 bytes for each value of the result. A copy of both masks takes 4 bytes for each query and
// key. So this is how many keys it pays for, for each value of a query's result.
static constexpr int64_t TURBO_JOINED_KEYS = 10;

// Whether both segments are attended as one slice. Their keys are multiples of what upstream's kernels for groups of heads ask for.
static bool turbo_joins_segments(const int device, const ggml_tensor * dst) {
    const turbo_kv kv    = turbo_first_kv(dst);
    const int64_t  n     = kv.K->ne[1];
    const int64_t  more  = turbo_second_kv(dst).K->ne[1];
    const int64_t  n_max = TURBO_JOINED_KEYS * dst->ne[0] * dst->ne[1];
    return ggml_is_turbo(kv.K->type) && ggml_is_turbo(kv.V->type) && !turbo_is_view_of(kv.V, kv.K) &&
           n % FATTN_KQ_STRIDE == 0 && more % FATTN_KQ_STRIDE == 0 && n + more <= n_max &&
           n <= turbo_slice_keys(device, dst->src[0]->ne[1], kv.K, kv.V);
}

// Attends the second segment behind the first, as one slice. False: rows are not aligned, the result is not written.
static bool turbo_prefill_joined(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    const turbo_kv first  = turbo_first_kv(dst);
    const turbo_kv second = turbo_second_kv(dst);

    const ggml_tensor & K = *first.K;
    const ggml_tensor & V = *first.V;

    const int64_t n     = K.ne[1];
    const int64_t more  = second.K->ne[1];
    const int64_t n_all = n + more;
    const int64_t n_q   = std::min(first.mask->ne[1], second.mask->ne[1]);
    const int64_t n_seq = std::max(first.mask->ne[3], second.mask->ne[3]);

    ggml_cuda_pool_alloc<half> K_f16(ctx.pool(), K.ne[0] * n_all * K.ne[2] * K.ne[3]);
    ggml_cuda_pool_alloc<half> V_f16(ctx.pool(), V.ne[0] * n_all * V.ne[2] * V.ne[3]);
    ggml_cuda_pool_alloc<half> mask_f16(ctx.pool(), n_all * n_q * n_seq);

    const ggml_tensor K_all    = turbo_f16_tensor(K_f16.ptr, { K.ne[0], n_all, K.ne[2], K.ne[3] });
    const ggml_tensor V_all    = turbo_f16_tensor(V_f16.ptr, { V.ne[0], n_all, V.ne[2], V.ne[3] });
    const ggml_tensor mask_all = turbo_f16_tensor(mask_f16.ptr, { n_all, n_q, 1, n_seq });

    const ggml_tensor first_mask    = turbo_part_of(*first.mask, 1, 0, n_q);
    const ggml_tensor second_mask   = turbo_part_of(*second.mask, 1, 0, n_q);
    const ggml_tensor first_of_all  = turbo_part_of(mask_all, 0, 0, n);
    const ggml_tensor second_of_all = turbo_part_of(mask_all, 0, n, more);
    const ggml_tensor K_of_all      = turbo_part_of(K_all, 1, n, more);
    const ggml_tensor V_of_all      = turbo_part_of(V_all, 1, n, more);

    const turbo_copied masks[2] = {
        { &first_mask,  &first_of_all  },
        { &second_mask, &second_of_all }
    };
    const turbo_copied keys[2] = {
        { second.K, &K_of_all },
        { second.V, &V_of_all }
    };

    cudaStream_t stream = ctx.stream();
    if (!ggml_cuda_turbo_copy_rows(masks, stream) || !ggml_cuda_turbo_copy_rows(keys, stream)) {
        return false;
    }
    ggml_cuda_turbo_to_f16(K.type, (const char *) K.data, K_f16.ptr, K.ne, K.nb, n_all, stream);
    ggml_cuda_turbo_to_f16(V.type, (const char *) V.data, V_f16.ptr, V.ne, V.nb, n_all, stream);

    turbo_slice slice = turbo_make_slice(dst, { &K_all, &V_all, &mask_all }, nullptr, true, true);
    turbo_attend_slice(ctx, slice);
    return true;
}

//
// entry
//

void ggml_cuda_turbo_prefill(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    const bool has_second = ggml_turbo_flash_attn_has_segment(dst);
    if (has_second && turbo_joins_segments(ctx.device, dst) && turbo_prefill_joined(ctx, dst)) {
        return;
    }

    ggml_cuda_pool_alloc<float2> state(ctx.pool(), ggml_nrows(dst));
    turbo_prefill_kv(ctx, dst, turbo_first_kv(dst), state.ptr, true, !has_second);
    if (has_second) {
        turbo_prefill_kv(ctx, dst, turbo_second_kv(dst), state.ptr, false, true);
    }
}

bool ggml_cuda_turbo_slices_use_matrix_cores(const int device, const ggml_tensor * dst) {
    turbo_slice slice;
    (ggml_tensor &) slice = *dst;
    slice.state           = nullptr;
    slice.first = slice.last = true;
    return ggml_cuda_turbo_prefill_mma_supported(device, slice);
}

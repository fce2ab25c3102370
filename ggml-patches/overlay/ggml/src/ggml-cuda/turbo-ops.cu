#include "turbo/launch.cuh"
#include "turbo/ops-host.cuh"
#include "turbo/ops.cuh"
#include "turbo/scalar.cuh"
#include "turbo/trellis-encode.cuh"
#include "turbo/turbo.cuh"
#include "turbo/view.cuh"

// All kernels here count the blocks of one tensor and find the place of each in both tensors: either indices name the rows of the other
// one (SET_ROWS, GET_ROWS), or it has as many blocks in the same order (CPY, conversions). Decay works on the blocks of one tensor.
// SET_ROWS of few rows: turbo-write.cu.

//
// kernels
//
// type: of the turbo tensor. src_t, dst_t: float, half or nv_bfloat16. other_t: how the block in the tensor that is not counted is found,
// turbo_by_index or turbo_in_order.

// To a turbo type: eight lanes per block, counted in src.
template <ggml_type type, typename src_t, typename other_t>
static __global__ void __launch_bounds__(TURBO_OPS_THREADS) turbo_quantize(const char *           src,
                                                                           char *                 dst,
                                                                           const turbo_view       src_view,
                                                                           const turbo_view       dst_view,
                                                                           const other_t          other,
                                                                           const uint32_t         n_blocks,
                                                                           const ggml_turbo_scale scale) {
    ggml_cuda_pdl_sync();
    const uint32_t i_block = blockIdx.x * (TURBO_OPS_THREADS / 8) + threadIdx.x / 8;
    const int      lane    = threadIdx.x % 8;
    const bool     store   = i_block < n_blocks;

    float x[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
    if (store) {
        const turbo_place from  = src_view.place(i_block);
        const char *      first = src + src_view.offset(from) + lane * src_view.value;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[i] = turbo_read((const src_t *) (first + 8 * i * src_view.value));
        }
        dst += dst_view.offset(other.place(dst_view, i_block, from));
    }
    turbo_encode_block<type>(x, scale, lane, store, (typename turbo_traits<type>::block *) dst);
}

// The same for trellis types.
template <ggml_type type, typename src_t, typename other_t>
static __global__ void __launch_bounds__(TRELLIS_THREADS) turbo_quantize_trellis(const char *     src,
                                                                                 char *           dst,
                                                                                 const turbo_view src_view,
                                                                                 const turbo_view dst_view,
                                                                                 const other_t    other,
                                                                                 const uint32_t   n_blocks) {
    __shared__ turbo_trellis_scratch            scratch;
    __align__(16) __shared__ turbo_shared_costs costs;

    ggml_cuda_pdl_sync();
    turbo_load_costs<type>(costs, threadIdx.x);
    __syncthreads();

    const uint32_t i_block = blockIdx.x * TRELLIS_BLOCKS + threadIdx.x / TRELLIS_LANES;
    const bool     store   = i_block < n_blocks;

    float x[8] = {};
    if (store) {
        const turbo_place from  = src_view.place(i_block);
        const char *      first = src + src_view.offset(from) + threadIdx.x % TRELLIS_LANES * src_view.value;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            x[i] = turbo_read((const src_t *) (first + 8 * i * src_view.value));
        }
        dst += dst_view.offset(other.place(dst_view, i_block, from));
    }
    turbo_encode_trellis<type>(x, threadIdx.x, store, costs, scratch, (typename turbo_traits<type>::block *) dst);
}

// Blocks are aligned to 2 bytes only.
static __device__ __forceinline__ uint32_t turbo_load_word(const uint8_t * p) {
    const uint16_t * h = (const uint16_t *) p;
    return h[0] | (uint32_t) h[1] << 16;
}

static __device__ __forceinline__ uint32_t turbo_load_signs(const block_turbo3_0 * block) {
    return turbo_load_word(block->signs);
}

template <typename block_t> static __device__ __forceinline__ uint32_t turbo_load_signs(const block_t *) {
    return 0;
}

// Two words of a block, and their scale. i: which quarter of the block; of a trellis type, those of its first half come first.
template <ggml_type type>
static __device__ __forceinline__ float turbo_load_quarter(const typename turbo_traits<type>::block * block,
                                                           int                                        i,
                                                           int32_t                                    w[2]) {
    const int quarter = i % 4;
    if constexpr (turbo_is_trellis<type>) {
        const int       half  = i / 4;
        const uint8_t * words = (const uint8_t *) block + 2;
        const auto      load  = [words](int i) {
            return turbo_load_word(words + 4 * i);
        };
        turbo_unpack_trellis_quarter<type>(turbo_read_half(load(half), load(1 - half), block->selectors >> 4 * half),
                                           load(turbo_low_word<type>(half, quarter)), load(turbo_high_word<type>(half)),
                                           quarter, w);
        return turbo_trellis_scale(block->d) * (1.0f / TRELLIS_LEVEL_STEPS);
    } else {
        turbo_unpack_quarter<type>(turbo_load_word(block->qs + 4 * turbo_quarter_qs<type>(quarter)),
                                   turbo_load_signs(block), quarter, w);
        return __half2float(block->d);
    }
}

// From a turbo type: a lane for each quarter of 32 values, counted in dst.
template <ggml_type type, typename dst_t, typename other_t>
static __global__ void __launch_bounds__(TURBO_OPS_THREADS) turbo_dequantize(const char *     src,
                                                                             char *           dst,
                                                                             const turbo_view src_view,
                                                                             const turbo_view dst_view,
                                                                             const other_t    other,
                                                                             const uint32_t   n_blocks,
                                                                             const bool       as_one) {
    ggml_cuda_pdl_sync();
    constexpr int  quarters = turbo_block_values(type) / 8;
    const uint32_t i_block  = blockIdx.x * (TURBO_OPS_THREADS / quarters) + threadIdx.x / quarters;
    const int      quarter  = threadIdx.x % quarters;
    if (i_block >= n_blocks) {
        return;
    }
    const turbo_place to = dst_view.place(i_block);
    const auto *      block =
        (const typename turbo_traits<type>::block *) (src + src_view.offset(other.place(src_view, i_block, to)));

    int32_t     w[2];
    const float d = turbo_load_quarter<type>(block, quarter, w);
    float       x[2][4];  // values 4 (quarter % 4) .. and 16 + 4 (quarter % 4) .. of 32
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int value           = turbo_value_order(turbo_quarter_word(0, i / 4), i % 4);
        x[value / 16][value % 16] = d * (float) (int8_t) (w[i / 4] >> 8 * (i % 4));
    }

    char * y = dst + dst_view.offset(to) + (32 * (quarter / 4) + 4 * (quarter % 4)) * dst_view.value;
    turbo_write4<dst_t>(y, dst_view.value, as_one, x[0]);
    turbo_write4<dst_t>(y + 16 * dst_view.value, dst_view.value, as_one, x[1]);
}

// Blocks of block_bytes as they are, one lane for each 2 bytes.
template <int block_bytes>
static __global__ void __launch_bounds__(TURBO_OPS_THREADS) turbo_copy_blocks(const char *     src,
                                                                              char *           dst,
                                                                              const turbo_view src_view,
                                                                              const turbo_view dst_view,
                                                                              const uint32_t   n_blocks) {
    ggml_cuda_pdl_sync();
    constexpr int  units   = block_bytes / 2;
    const int64_t  i       = (int64_t) blockIdx.x * TURBO_OPS_THREADS + threadIdx.x;
    const uint32_t i_block = (uint32_t) (i / units);
    const int      unit    = (int) (i % units);
    if (i_block >= n_blocks) {
        return;
    }
    const uint16_t * from = (const uint16_t *) (src + src_view.offset(src_view.place(i_block)));
    uint16_t *       to   = (uint16_t *) (dst + dst_view.offset(dst_view.place(i_block)));
    to[unit]              = from[unit];
}

//
// decay
//
// Eight neighbouring lanes per block hold its values as for encoding.

// What turbo_store_indices stored, as selectors.
static __device__ __forceinline__ uint32_t turbo_load_indices(const block_turbo3_0 * block, int lane) {
    const uint32_t low     = block->qs[lane];
    const uint32_t high    = block->signs[lane % 4] >> lane / 4;
    uint32_t       indices = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        indices |= ((low >> 2 * i & 3) | (high >> 2 * i & 1) << 2) << TURBO_SELECTOR_BITS * i;
    }
    return indices;
}

static __device__ __forceinline__ uint32_t turbo_load_indices(const block_turbo4_0 * block, int lane) {
    const uint32_t even = block->qs[lane];  // values lane and lane+16
    const uint32_t odd  = block->qs[lane + 8];
    return (even & 15) | (odd & 15) << TURBO_SELECTOR_BITS | (even >> 4) << 2 * TURBO_SELECTOR_BITS |
           (odd >> 4) << 3 * TURBO_SELECTOR_BITS;
}

// ggml_turbo_decay_row's map on the indices of a lane, and its new d; d: that of the block so far.
template <ggml_type type>
static __device__ __forceinline__ turbo_code turbo_decay(uint32_t indices, uint16_t d, ggml_turbo_scale rule) {
    constexpr uint32_t n    = turbo_traits<type>::magnitudes;
    constexpr uint32_t ones = TURBO_SELECTOR_BITS == 4 ? 0x1111 : 0x01010101;

    const uint32_t high = indices / n & ones;
    const uint32_t kept = (indices & ~ones) | high;

    // index ^ flip is the magnitude's: of n, the m-th has index n + m = m ^ n, or n - 1 - m = m ^ (n - 1) where negative
    const uint32_t flip = (n - 1) * ones + high;
    const uint32_t mag0 = turbo_traits<type>::magnitude_word(0);
    const uint32_t mag1 = turbo_traits<type>::magnitude_word(1);
    const int      t    = (int) turbo_permute(mag0, mag1, indices ^ flip);
    const int      c    = (int) turbo_permute(mag0, mag1, kept ^ flip);

    const turbo_fit fit = { kept, turbo_sum8(ggml_cuda_dp4a(t, c, 0)), turbo_sum8(ggml_cuda_dp4a(c, c, 0)) };
    const int32_t   tt  = turbo_sum8(ggml_cuda_dp4a(t, t, 0));
    return { __half_as_ushort(turbo_scale(rule, fit, tt, __half2float(__ushort_as_half(d)))), kept };
}

// In place.
template <ggml_type type>
static __global__ void __launch_bounds__(TURBO_OPS_THREADS)
turbo_decay_blocks(typename turbo_traits<type>::block * blocks, const uint32_t n_blocks, const ggml_turbo_scale scale) {
    ggml_cuda_pdl_sync();
    const uint32_t i_block = blockIdx.x * (TURBO_OPS_THREADS / 8) + threadIdx.x / 8;
    const int      lane    = threadIdx.x % 8;
    const bool     is_ours = i_block < n_blocks;
    auto *         block   = blocks + i_block;

    const uint32_t indices = is_ours ? turbo_load_indices(block, lane) : 0;

    // only lane 0 reads d, because it stores it: nothing would keep another lane from reading the new one
    const uint32_t own = is_ours && lane == 0 ? __half_as_ushort(block->d) : 0;
    const uint16_t d   = (uint16_t) __shfl_sync(0xffffffff, own, 0, 8);

    const turbo_code code      = turbo_decay<type>(indices, d, scale);
    const bool       is_finite = (d & 0x7c00) != 0x7c00;
    turbo_store(block, lane, code, is_ours && is_finite);
}

//
// launches
//

// Calls function with a null pointer to the type of floats.
template <typename F> static void turbo_with_floats(ggml_type type, F function) {
    switch (type) {
        case GGML_TYPE_F32:
            return function((float *) nullptr);
        case GGML_TYPE_F16:
            return function((half *) nullptr);
        case GGML_TYPE_BF16:
            return function((nv_bfloat16 *) nullptr);
        default:
            GGML_ABORT("not a type of floats: %d", (int) type);
    }
}

template <typename src_t, typename other_t>
static void turbo_launch_quantize(const turbo_transfer & t, ggml_type dst_type, const other_t & other) {
    turbo_with_type(dst_type, [&](auto type) {
        if constexpr (turbo_is_trellis<decltype(type)::value>) {
            const dim3 grid((t.n_blocks + TRELLIS_BLOCKS - 1) / TRELLIS_BLOCKS);
            turbo_launch(turbo_quantize_trellis<decltype(type)::value, src_t, other_t>, grid, dim3(TRELLIS_THREADS), 0,
                         t.stream, t.src, t.dst, t.src_view, t.dst_view, other, t.n_blocks);
        } else {
            const dim3 grid = turbo_grid((uint64_t) t.n_blocks * 8);
            turbo_launch(turbo_quantize<decltype(type)::value, src_t, other_t>, grid, dim3(TURBO_OPS_THREADS), 0,
                         t.stream, t.src, t.dst, t.src_view, t.dst_view, other, t.n_blocks, ggml_turbo_get_scale());
        }
    });
}

template <typename dst_t, typename other_t>
static void turbo_launch_dequantize(const turbo_transfer & t, ggml_type src_type, const other_t & other) {
    const turbo_view & v       = t.dst_view;
    const int64_t      strides = (int64_t) (intptr_t) t.dst | v.nb1 | v.nb2 | v.nb3;
    const bool         as_one  = v.value == sizeof(dst_t) && strides % (4 * sizeof(dst_t)) == 0;
    const dim3         grid    = turbo_grid((uint64_t) t.n_blocks * (turbo_block_values(src_type) / 8));
    turbo_with_type(src_type, [&](auto type) {
        turbo_launch(turbo_dequantize<decltype(type)::value, dst_t, other_t>, grid, dim3(TURBO_OPS_THREADS), 0,
                     t.stream, t.src, t.dst, t.src_view, t.dst_view, other, t.n_blocks, as_one);
    });
}

static void turbo_launch_copy_blocks(const turbo_transfer & t, ggml_type type) {
    turbo_with_type(type, [&](auto type) {
        constexpr int bytes = sizeof(typename turbo_traits<decltype(type)::value>::block);
        turbo_launch(turbo_copy_blocks<bytes>, turbo_grid((uint64_t) t.n_blocks * (bytes / 2)), dim3(TURBO_OPS_THREADS),
                     0, t.stream, t.src, t.dst, t.src_view, t.dst_view, t.n_blocks);
    });
}

template <ggml_type type> static constexpr bool turbo_decays = !turbo_is_trellis<type> && turbo_traits<type>::bits > 2;

template <ggml_type type> static void turbo_launch_decay(ggml_tensor * dst, cudaStream_t stream) {
    const uint32_t n_blocks = turbo_count_blocks(dst->ne, QK_SCALAR);
    if (n_blocks > 0) {
        turbo_launch(turbo_decay_blocks<type>, turbo_grid((uint64_t) n_blocks * 8), dim3(TURBO_OPS_THREADS), 0, stream,
                     (typename turbo_traits<type>::block *) dst->data, n_blocks, ggml_turbo_get_scale());
    }
}

template <typename dst_t>
static void turbo_to_contiguous(ggml_type     type,
                                const char *  x,
                                dst_t *       y,
                                const int64_t ne[4],
                                const size_t  nb[4],
                                const int64_t n_rows,
                                cudaStream_t  stream) {
    size_t nb_y[4] = { sizeof(dst_t) };
    for (int i = 1; i < 4; ++i) {
        nb_y[i] = nb_y[i - 1] * (size_t) (i == 2 ? n_rows : ne[i - 1]);
    }
    const int64_t  values   = turbo_block_values(type);
    const uint32_t n_blocks = turbo_count_blocks(ne, values);
    if (n_blocks > 0) {
        const turbo_transfer t = { x,
                                   (char *) y,
                                   turbo_make_view(type, ne, nb, values),
                                   turbo_make_view(GGML_TYPE_F32, ne, nb_y, values),
                                   n_blocks,
                                   stream };
        turbo_launch_dequantize<dst_t>(t, type, turbo_in_order());
    }
}

//
// entry points
//

void ggml_cuda_turbo_to_f16(ggml_type     type,
                            const char *  x,
                            half *        y,
                            const int64_t ne[4],
                            const size_t  nb[4],
                            const int64_t n_rows,
                            cudaStream_t  stream) {
    if (!ggml_cuda_turbo_unpack(type, x, y, ne, nb, n_rows, stream)) {
        turbo_to_contiguous(type, x, y, ne, nb, n_rows, stream);
    }
}

void ggml_cuda_turbo_to_f32(ggml_type     type,
                            const char *  x,
                            float *       y,
                            const int64_t ne[4],
                            const size_t  nb[4],
                            cudaStream_t  stream) {
    turbo_to_contiguous(type, x, y, ne, nb, ne[1], stream);
}

void ggml_cuda_turbo_set_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (ggml_cuda_turbo_set_few_rows(ctx, dst)) {
        return;
    }
    const ggml_tensor *  src = dst->src[0];
    const turbo_transfer t   = turbo_make_transfer(src, dst, src->ne, ctx.stream());
    if (t.n_blocks == 0) {
        return;
    }
    const turbo_by_index by_index = turbo_make_index(dst->src[1]);
    if (src->type == GGML_TYPE_F16) {
        turbo_launch_quantize<half>(t, dst->type, by_index);
    } else {
        turbo_launch_quantize<float>(t, dst->type, by_index);
    }
}

void ggml_cuda_turbo_get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor *  src = dst->src[0];
    const turbo_transfer t   = turbo_make_transfer(src, dst, dst->ne, ctx.stream());
    if (t.n_blocks > 0) {
        turbo_launch_dequantize<float>(t, src->type, turbo_make_index(dst->src[1]));
    }
}

void ggml_cuda_turbo_copy(ggml_backend_cuda_context & ctx, const ggml_tensor * src, ggml_tensor * dst) {
    const turbo_transfer t = turbo_make_transfer(src, dst, dst->ne, ctx.stream());
    if (t.n_blocks == 0) {
        return;
    }
    if (src->type == dst->type) {
        turbo_launch_copy_blocks(t, dst->type);
    } else if (ggml_is_turbo(dst->type)) {
        turbo_with_floats(src->type, [&](auto * p) {
            turbo_launch_quantize<std::decay_t<decltype(*p)>>(t, dst->type, turbo_in_order());
        });
    } else {
        turbo_with_floats(dst->type, [&](auto * p) {
            turbo_launch_dequantize<std::decay_t<decltype(*p)>>(t, src->type, turbo_in_order());
        });
    }
}

void ggml_cuda_turbo_decay(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    turbo_with_type(dst->type, [&](auto type) {
        if constexpr (turbo_decays<decltype(type)::value>) {
            turbo_launch_decay<decltype(type)::value>(dst, ctx.stream());
        } else {
            GGML_ABORT("%d does not decay", (int) type);
        }
    });
}

#pragma once

// Unpacking a slice of a cache to f16, for attention of many queries: rows of all heads of a KV cache, one after the other for each key.
//
// A lane has two quarters of a block, whose values are eight neighbours twice, in both blocks of a pair, and goes from key to key. So what
// it needs to know of places it computes once. The words of a pair are whole words of memory, unlike those of a block.

#include "scalar.cuh"
#include "trellis.cuh"

static constexpr int TURBO_UNPACK_KEYS  = 4;  // of a lane
static constexpr int TURBO_UNPACK_WARPS = 4;  // of a block of threads, which have different keys

// Where the rows are. Strides of keys and sequences in bytes; heads of a key are neighbours.
struct turbo_unpack_args {
    const char * x;
    half *       y;           // [D, n_rows, n_heads, n_seq], of which keys are written
    int64_t      nb1, nb3;
    uint3        row_blocks;  // of a head, for fast_div_modulo
    int          n_blocks;    // of all heads
    int          n_heads, n_rows, D;
};

// Word i of a block, after the 2 bytes at its beginning. b: the first block of a pair, or the second.
template <ggml_type type, int b>
static __device__ __forceinline__ uint32_t turbo_pair_word(const uint32_t * pair, const int i) {
    return b == 0 ? pair[i] >> 16 | pair[i + 1] << 16 : pair[turbo_traits<type>::words + 1 + i];
}

// int8 in the bytes of the two words of a quarter, as f16: the first four values of the quarter, and the others.
static __device__ __forceinline__ void turbo_quarter_to_half(const int32_t (&w)[2], half2 * first, half2 * second) {
    // 1024 + 128 + x has the bits of x + 128 at its end
    const half2 bias = make_half2(-1152.0f, -1152.0f);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t u = (uint32_t) w[i] ^ 0x80808080;
        // see turbo_value_order
        const uint32_t a = turbo_permute(u, 0x64646464, TURBO_SELECTOR_BITS == 4 ? 0x4240 : 0x04010400);
        const uint32_t c = turbo_permute(u, 0x64646464, TURBO_SELECTOR_BITS == 4 ? 0x4341 : 0x04030402);

        half2 h[2];
        memcpy(&h[0], &a, sizeof(a));
        memcpy(&h[1], &c, sizeof(c));
        (TURBO_SELECTOR_BITS == 4 || i == 0 ? first : second)[TURBO_SELECTOR_BITS == 4 ? i : 0] = h[0] + bias;
        (TURBO_SELECTOR_BITS != 4 && i == 0 ? first : second)[TURBO_SELECTOR_BITS == 4 ? i : 1] = h[1] + bias;
    }
}

// Quarters 2p and 2p + 1 of 32 values of a block; part: p, and of a trellis type behind it which half of the block. Values 8p .. and
// 16 + 8p .. of the 32.
template <ggml_type type, int b>
static __device__ __forceinline__ void turbo_unpack_part(const uint32_t * pair,
                                                         const int        part,
                                                         half2 (&first)[4],
                                                         half2 (&second)[4]) {
    constexpr int words = turbo_traits<type>::words;

    const int      p    = part % 2;
    const uint32_t head = b == 0 ? pair[0] & 0xffff : pair[words] >> 16;

    int32_t w[2][2];
    half    d;
    if constexpr (turbo_is_trellis<type>) {
        const int      h        = part / 2;
        const uint32_t coded[2] = { turbo_pair_word<type, b>(pair, 0), turbo_pair_word<type, b>(pair, 1) };

        const turbo_trellis_half half_block =
            turbo_read_half(h ? coded[1] : coded[0], h ? coded[0] : coded[1], head >> 8 >> 4 * h);
        const uint32_t high = turbo_pair_word<type, b>(pair + h, turbo_high_word<type>(0));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // of an even quarter and an odd one
            const uint32_t low =
                turbo_pair_word<type, b>(pair + (turbo_low_word<type>(0, 0) ? 2 * h : 0), turbo_low_word<type>(0, i));
            turbo_unpack_trellis_quarter<type>(half_block, low, high, 2 * p + i, w[i]);
        }
        d = __float2half(turbo_trellis_scale(head & 0xff) * (1.0f / TRELLIS_LEVEL_STEPS));
    } else {
        // turbo4 has a word for each quarter
        const uint32_t * lane = pair + turbo_quarter_qs<type>(2) * p;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            turbo_unpack_quarter<type>(turbo_pair_word<type, b>(lane, i), turbo_pair_word<type, b>(pair, words - 1),
                                       2 * p + i, w[i]);
        }
        d = __ushort_as_half((unsigned short) head);
    }

    const half2 d2 = __half2half2(d);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        turbo_quarter_to_half(w[i], first + 2 * i, second + 2 * i);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        first[i]  = first[i] * d2;
        second[i] = second[i] * d2;
    }
}

// Grid: pairs of blocks of a key, keys, sequences. All keys of a lane are there.
template <ggml_type type>
static __global__ void __launch_bounds__(32 * TURBO_UNPACK_WARPS) turbo_unpack_keys(const turbo_unpack_args a) {
    constexpr int values = turbo_block_values(type);
    constexpr int parts  = values / 16;  // lanes of a pair

    ggml_cuda_pdl_sync();
    const int i    = blockIdx.x * 32 + threadIdx.x;
    const int pair = i / parts;
    const int part = i % parts;
    const int key0 = blockIdx.y * TURBO_UNPACK_WARPS * TURBO_UNPACK_KEYS + threadIdx.y;
    const int seq  = blockIdx.z;
    if (2 * pair >= a.n_blocks) {
        return;
    }

    const char * x = a.x + seq * a.nb3 + key0 * a.nb1 + pair * (int) (2 * sizeof(typename turbo_traits<type>::block));

    half * y[2];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
        const uint2 place = fast_div_modulo((uint32_t) (2 * pair + b), a.row_blocks);  // head, and block in its row
        const int   at    = (int) place.y * values + part / 2 * 32 + part % 2 * 8;
        y[b]              = a.y + ((int64_t) (seq * a.n_heads + (int) place.x) * a.n_rows + key0) * a.D + at;
    }

#pragma unroll
    for (int k = 0; k < TURBO_UNPACK_KEYS; ++k) {
        __align__(16) half2 first[4];
        __align__(16) half2 second[4];
        const uint32_t *    words = (const uint32_t *) (x + k * TURBO_UNPACK_WARPS * a.nb1);
        const int           row   = k * TURBO_UNPACK_WARPS * a.D;

        turbo_unpack_part<type, 0>(words, part, first, second);
        ggml_cuda_memcpy_1<16>(y[0] + row, first);
        ggml_cuda_memcpy_1<16>(y[0] + row + 16, second);
        turbo_unpack_part<type, 1>(words, part, first, second);
        ggml_cuda_memcpy_1<16>(y[1] + row, first);
        ggml_cuda_memcpy_1<16>(y[1] + row + 16, second);
    }
}

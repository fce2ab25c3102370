// Encoding and dot products of the trellis types on the CPU.
//
// The encoder takes as many blocks at a time as a vector has lanes, one block to a lane, so that a step of Viterbi's algorithm is sums and
// minima of whole vectors: of 16-bit words, the lower one of a lane for the fine codebook and the upper one for the coarse one. What a
// station costs is a row of a table, for each lane another one. What the encoder looks for, and why it finds it, is in
// turbo/trellis.c: the same bits are a test.

#include "kernels.h"
#include "trellis-blocks.h"

#include <algorithm>
#include <cassert>

namespace {

//
// paths
//

constexpr int reverse3(int x) {
    return (x & 1) << 2 | (x & 2) | (x >> 2 & 1);
}

// Coded bits and selectors
void trace_back(const decisions & how, const job * jobs, trellis_path * paths) {
    int32_t last[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
        last[lane] = reverse3(jobs[lane].state);
    }
    vi      state = load_i32(last);  // the oldest bit lowest
    int32_t bytes[N_SEGMENTS][LANES];
    for (int segment = N_SEGMENTS - 1; segment >= 0; --segment) {
        vi from = how[segment][0];
        for (int i = 1; i < N_STATES; ++i) {
            from = select_eq_i16(state, splat_i32(reverse3(i)), how[segment][i], from);
        }
        // three coded bits before the segment, its first five, and the codebook
        const vi first = bit_and(shift_right<3>(from), splat_i32((1 << (SEGMENT - 3)) - 1));
        const vi book  = bit_and(from, splat_i32(1 << SEGMENT));
        store_i32(bytes[segment], bit_or(bit_or(first, shift_right<3 - SEGMENT>(state)), book));
        state = bit_and(from, splat_i32(7));
    }
    for (int lane = 0; lane < LANES; ++lane) {
        paths[lane] = {};
        for (int segment = 0; segment < N_SEGMENTS; ++segment) {
            paths[lane].coded |= (uint64_t) (bytes[segment][lane] & 0xff) << 8 * segment;
            paths[lane].selectors |= (uint8_t) (bytes[segment][lane] >> SEGMENT << segment);
        }
    }
}

// What a value must exceed to be nearer to a level than to the one before in its subset: by codebook and subset
template <int BITS> struct level_middles {
    int16_t x[1 << (BITS - 1)][8] = {};

    constexpr level_middles() {
        for (int i = 1; i < 1 << (BITS - 1); ++i) {
            for (int k = 0; k < 8; ++k) {
                const int8_t * levels = TRELLIS<BITS>.codebooks[k / 4];
                const int      sum    = levels[4 * i + k % 4] + levels[4 * i + k % 4 - 4];
                x[i][k]               = (int16_t) (ROW_BYTES * (TRELLIS<BITS>.x_steps * sum >> 1));
            }
        }
    }
};

template <int BITS> constexpr level_middles<BITS> MIDDLES{};

// Plain bits, those of the nearest levels
template <int BITS> void add_plain_bits(const int16_t * x, trellis_path & path) {
    const uint64_t z1   = trellis_high_subset_bits(path.coded);
    const uint64_t z0   = trellis_low_subset_bits(path.coded);
    const uint64_t ones = trellis_spread(path.selectors) | (uint64_t) trellis_spread(path.selectors >> 4) << 32;
    const uint64_t book = ones * 0xff;

    uint64_t plane[3] = {};
    for (int n = 0; n < QK_TRELLIS; n += N_WORDS16) {
        const auto bits = [&](uint64_t word, int i) {
            return spread_bits((uint32_t) (word >> n), splat_i16(i * 0x0202));
        };
        const vi index = bit_or(bit_or(splat_i16(0x0100), bits(z0, 1)), bit_or(bits(z1, 2), bits(book, 4)));
        const vi value = load_words16(x + n);
        vi       plain = splat_i16(0);
        for (int i = 1; i < 1 << (BITS - 1); ++i) {
            plain = count_gt_i16(plain, value, lookup_words(MIDDLES<BITS>.x[i], index));
        }
        for (int bit = 0; bit < BITS - 1; ++bit) {
            plane[bit] |= (uint64_t) gather_bits(plain, bit) << n;
        }
    }
    if constexpr (BITS >= 3) {
        const uint64_t even_bits = 0x5555555555555555;
        const uint64_t even      = (plane[0] & even_bits) | (plane[1] & even_bits) << 1;
        const uint64_t odd       = (plane[0] >> 1 & even_bits) | (plane[1] & ~even_bits);
        path.low[0]              = (even & 0xffffffff) | odd << 32;
        path.low[1]              = even >> 32 | (odd >> 32 << 32);
    }
    if constexpr (BITS != 3) {
        path.high = plane[BITS - 2];
    }
}

template <int BITS> void encode_group(const float * x, int n_blocks, char * y) {
    const block_group<BITS> group(x, n_blocks);
    candidates              waiting(n_blocks);
    result                  best[N_BLOCKS];
    job                     jobs[LANES];
    find_candidates(group, waiting);
    std::fill(best, best + N_BLOCKS, NO_RESULT);
    while (const int n = waiting.take(best, jobs)) {
        group.run_closed(jobs, n, best);
    }

    trellis_path paths[LANES];
    for (int block = 0; block < n_blocks; ++block, y += BLOCK_BYTES<BITS>) {
        if (block % LANES == 0) {
            decisions how;
            for (int lane = 0; lane < LANES; ++lane) {
                jobs[lane] = job_of(best[block + lane], block + lane);
            }
            group.trace_closed(jobs, how);
            trace_back(how, jobs, paths);
        }
        if (group.kind[block] == TRELLIS_BLOCK_ORDINARY) {
            const job & j = jobs[block % LANES];
            add_plain_bits<BITS>(group.x[j.scale][block], paths[block % LANES]);
            trellis_pack_block(BITS, group.first_scale[block] + j.scale, &paths[block % LANES], y);
        } else {
            memset(y, 0, BLOCK_BYTES<BITS>);
            y[0] = group.kind[block] == TRELLIS_BLOCK_NAN ? (char) TRELLIS_SCALE_NAN : 0;
        }
    }
}

template <int BITS> void quantize_row(const float * x, void * y, int64_t k) {
    assert(k % QK_TRELLIS == 0);
    const int64_t n_blocks = k / QK_TRELLIS;
    for (int64_t i = 0; i < n_blocks; i += N_BLOCKS) {
        encode_group<BITS>(x + i * QK_TRELLIS, (int) std::min<int64_t>(N_BLOCKS, n_blocks - i),
                           (char *) y + i * BLOCK_BYTES<BITS>);
    }
}

//
// dot products: for products of matrices; attention has its own
//

// Each product has at most 15 + 20 significant bits, so it is exact in binary64.
template <int BITS> float vec_dot(int n, const void * vx, const void * vy) {
    assert(n % QK_TRELLIS == 0);
    const char *       x   = (const char *) vx;
    const block_q8_0 * y   = (const block_q8_0 *) vy;
    double             sum = 0.0;
    for (int i = 0; i < n; i += QK_TRELLIS, x += BLOCK_BYTES<BITS>) {
        int8_t levels[QK_TRELLIS];
        trellis_unpack_levels(&TRELLIS<BITS>, x, levels);
        const float d = trellis_scale_of((uint8_t) x[0]) / TRELLIS_LEVEL_STEPS;
        for (const int8_t * half = levels; half < levels + QK_TRELLIS; half += QK8_0, ++y) {
            int32_t dot = 0;
            for (int j = 0; j < QK8_0; ++j) {
                dot += half[j] * y->qs[j];
            }
            sum += (double) (d * GGML_CPU_FP16_TO_FP32(y->d)) * dot;
        }
    }
    return (float) sum;
}

}  // namespace

#define DEFINE_TRELLIS(ENUM, NAME, C_NAME, FAMILY, BITS)                                                             \
    void quantize_row_##C_NAME(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {                   \
        quantize_row<BITS>(x, y, k);                                                                                 \
    }                                                                                                                \
                                                                                                                     \
    void ggml_vec_dot_##C_NAME##_q8_0(int n, float * GGML_RESTRICT s, size_t, const void * GGML_RESTRICT vx, size_t, \
                                      const void * GGML_RESTRICT vy, size_t, int) {                                  \
        *s = vec_dot<BITS>(n, vx, vy);                                                                               \
    }
GGML_TURBO_TRELLIS_TYPES_X(DEFINE_TRELLIS)

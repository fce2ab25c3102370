// Rows of turbo types on a device, bit for bit what the C reference stores and reads: row_bits DEVICE [TYPE]...
//
// Encoders get blocks of all sizes of numbers, spikes, ties, NaN, infinities, zeros and denormals, as f32, f16 and bf16, through SET_ROWS
// with both kinds of indices and through CPY. Decoders and decay get random bytes. Ends with 1 when a bit differs.

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"
#include "turbo/scalar.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

static constexpr int64_t N_COLS = 192;  // whole blocks of all types
static constexpr int64_t N_ROWS = 320;

using bytes = std::vector<uint8_t>;

//
// graphs of one op
//

struct input {
    ggml_tensor * tensor;
    bytes         data;
};

// Of an op that make() adds to a context, with its inputs: the bytes of its result, which is one of the inputs if it works in place.
static bytes compute(ggml_backend_t                                                             backend,
                     const std::function<ggml_tensor *(ggml_context *, std::vector<input> &)> & make) {
    ggml_context_ptr ctx(ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));

    std::vector<input> inputs;
    ggml_tensor *      result = make(ctx.get(), inputs);
    if (!ggml_backend_supports_op(backend, result)) {
        printf("error: %s does not support %s to %s\n", ggml_backend_name(backend), ggml_op_name(result->op),
               ggml_type_name(result->type));
        exit(1);
    }
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(graph, result);
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), backend));
    for (const input & in : inputs) {
        ggml_backend_tensor_set(in.tensor, in.data.data(), 0, in.data.size());
    }
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
        printf("error: %s did not compute %s\n", ggml_backend_name(backend), ggml_op_name(result->op));
        exit(1);
    }
    bytes out(ggml_nbytes(result));
    ggml_backend_tensor_get(result, out.data(), 0, out.size());
    return out;
}

static ggml_tensor * add_input(ggml_context * ctx, std::vector<input> & inputs, ggml_type type, const bytes & data) {
    ggml_tensor * t = ggml_new_tensor_2d(ctx, type, N_COLS, N_ROWS);
    inputs.push_back({ t, data });
    return t;
}

template <typename T> static bytes to_bytes(const std::vector<T> & values) {
    bytes data(values.size() * sizeof(T));
    memcpy(data.data(), values.data(), data.size());
    return data;
}

// A permutation of all rows
template <typename T> static std::vector<T> shuffled_rows() {
    std::vector<T> rows(N_ROWS);
    std::iota(rows.begin(), rows.end(), T(0));
    std::mt19937 gen(7);
    std::shuffle(rows.begin(), rows.end(), gen);
    return rows;
}

//
// values
//

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

// Ordinary values of one size, from denormals to beyond what a scale can be
static void fill_random(float * x, int64_t n, std::mt19937 & gen) {
    std::normal_distribution<float> normal;
    const float                     size = std::ldexp(1.0f, (int) (gen() % 150) - 60);
    for (int64_t i = 0; i < n; ++i) {
        x[i] = normal(gen) * size;
    }
}

// Integers below a power of two: many of them lie between two levels
static void fill_integers(float * x, int64_t n, std::mt19937 & gen) {
    const uint32_t end = 2u << gen() % 14;
    for (int64_t i = 0; i < n; ++i) {
        x[i] = (float) (gen() % end) - (float) (end / 2);
    }
}

static void fill_bits(float * x, int64_t n, std::mt19937 & gen) {
    const uint32_t exponents = gen() % 2 ? 0xff : 0x3f;  // with NaN and infinities, or without
    for (int64_t i = 0; i < n; ++i) {
        x[i] = float_of((gen() & 0x807fffff) | (gen() & exponents) << 23);
    }
}

static void fill_one(float * x, int64_t n, std::mt19937 & gen) {
    static const float special[] = { 0.0f,
                                     -0.0f,
                                     1e-45f,
                                     -1e-40f,
                                     1.17549435e-38f,
                                     9.0949470e-13f,
                                     9.094e-13f,
                                     3.8146973e-06f,
                                     3.814e-06f,
                                     65504.0f,
                                     -65519.9f,
                                     3.4028235e38f,
                                     INFINITY,
                                     -INFINITY,
                                     NAN,
                                     -NAN,
                                     float_of(0x7f800001),
                                     1e30f };
    const float        value     = special[gen() % (sizeof(special) / sizeof(special[0]))];
    fill_random(x, n, gen);
    if (gen() % 2) {
        std::fill(x, x + n, 0.0f);
    }
    for (int64_t i = gen() % n; i < n; i += 1 + (int64_t) (gen() % n)) {
        x[i] = value;
    }
}

static std::vector<float> make_values() {
    std::mt19937       gen(20261129);
    std::vector<float> x(N_COLS * N_ROWS);
    using fill                = void (*)(float *, int64_t, std::mt19937 &);
    static const fill fills[] = { fill_random, fill_integers, fill_bits, fill_one };
    constexpr int64_t n       = 32;
    for (int64_t i = 0; i < (int64_t) x.size(); i += 2 * n) {
        const fill one = fills[gen() % 4];
        one(x.data() + i, n, gen);
        (gen() % 4 ? one : fills[gen() % 4])(x.data() + i + n, n, gen);
    }
    return x;
}

// Values as a type of floats has them, and their bytes
struct floats {
    ggml_type          type;
    bytes              data;
    std::vector<float> values;
};

static floats make_floats(ggml_type type) {
    floats f = { type, {}, make_values() };
    if (type == GGML_TYPE_F32) {
        f.data = to_bytes(f.values);
        return f;
    }
    // half of the blocks in reach of f16
    for (size_t i = 0; i < f.values.size(); ++i) {
        const bool far = std::fabs(f.values[i]) > 65504.0f || std::fabs(f.values[i]) < 1e-7f;
        f.values[i] *= far && i / 64 % 2 == 0 ? std::fabs(f.values[i]) > 1.0f ? 1e-30f : 1e30f : 1.0f;
    }
    const int64_t n = (int64_t) f.values.size();
    f.data.resize(n * ggml_type_size(type));
    const ggml_type_traits * traits = ggml_get_type_traits(type);
    traits->from_float_ref(f.values.data(), f.data.data(), n);
    traits->to_float(f.data.data(), f.values.data(), n);
    return f;
}

static bytes make_blocks(ggml_type type, bool finite) {
    std::mt19937 gen(11);
    bytes        blocks(ggml_row_size(type, N_COLS) * N_ROWS);
    for (uint8_t & b : blocks) {
        b = (uint8_t) gen();
    }
    for (size_t i = 0; finite && i < blocks.size(); i += ggml_type_size(type)) {
        blocks[i + 1] &= 0x3f;
    }
    return blocks;
}

//
// comparisons
//

static int g_failed = 0;

static void report(const std::string & what, size_t n_different, size_t n, size_t first) {
    if (n_different) {
        printf("%-40s FAIL: %zu of %zu differ, the first one is number %zu\n", what.c_str(), n_different, n, first);
        ++g_failed;
    } else {
        printf("%-40s ok: %zu equal\n", what.c_str(), n);
    }
}

static void compare_blocks(const std::string & what, const bytes & is, const bytes & expected, size_t block_bytes) {
    size_t n_different = 0;
    size_t first       = 0;
    for (size_t i = expected.size() / block_bytes; i-- > 0;) {
        if (memcmp(is.data() + i * block_bytes, expected.data() + i * block_bytes, block_bytes) != 0) {
            ++n_different;
            first = i;
        }
    }
    report(what, n_different, expected.size() / block_bytes, first);
}

// NaN is NaN, whatever its bits are.
static void compare_floats(const std::string &        what,
                           ggml_type                  type,
                           const bytes &              is,
                           const std::vector<float> & expected) {
    const ggml_type_traits * traits = ggml_get_type_traits(type);
    const int64_t            n      = (int64_t) expected.size();
    std::vector<float>       values(n), rounded(n);
    bytes                    buffer(n * ggml_type_size(type));
    if (type == GGML_TYPE_F32) {
        rounded = expected;
        memcpy(values.data(), is.data(), is.size());
    } else {
        traits->from_float_ref(expected.data(), buffer.data(), n);
        traits->to_float(buffer.data(), rounded.data(), n);
        traits->to_float(is.data(), values.data(), n);
    }
    size_t n_different = 0;
    size_t first       = 0;
    for (size_t i = expected.size(); i-- > 0;) {
        const bool equal =
            std::isnan(rounded[i]) ? std::isnan(values[i]) : memcmp(&rounded[i], &values[i], sizeof(float)) == 0;
        if (!equal) {
            ++n_different;
            first = i;
        }
    }
    report(what, n_different, expected.size(), first);
}

//
// checks
//

static bytes encode(ggml_type type, const std::vector<float> & values) {
    bytes blocks(ggml_row_size(type, N_COLS) * N_ROWS);
    ggml_get_type_traits(type)->from_float_ref(values.data(), blocks.data(), N_COLS * N_ROWS);
    return blocks;
}

// Row rows[i] of the result is row i.
template <typename T> static bytes scatter(const bytes & data, const std::vector<T> & rows) {
    const size_t row = data.size() / rows.size();
    bytes        out(data.size());
    for (size_t i = 0; i < rows.size(); ++i) {
        memcpy(out.data() + rows[i] * row, data.data() + i * row, row);
    }
    return out;
}

template <typename T>
static void check_set_rows(ggml_backend_t backend, ggml_type type, const floats & f, ggml_type type_idx) {
    const std::vector<T> rows = shuffled_rows<T>();
    const bytes          is   = compute(backend, [&](ggml_context * ctx, std::vector<input> & inputs) {
        ggml_tensor * dst = add_input(ctx, inputs, type, bytes(ggml_row_size(type, N_COLS) * N_ROWS, 0xaa));
        ggml_tensor * src = add_input(ctx, inputs, f.type, f.data);
        ggml_tensor * indices = ggml_new_tensor_1d(ctx, type_idx, N_ROWS);
        inputs.push_back({ indices, to_bytes(rows) });
        return ggml_set_rows(ctx, dst, src, indices);
    });
    compare_blocks(
        std::string("SET_ROWS ") + ggml_type_name(f.type) + " " + ggml_type_name(type_idx) + " " + ggml_type_name(type),
        is, scatter(encode(type, f.values), rows), ggml_type_size(type));
}

static void check_copy_to(ggml_backend_t backend, ggml_type type, const floats & f) {
    const bytes is = compute(backend, [&](ggml_context * ctx, std::vector<input> & inputs) {
        ggml_tensor * src = add_input(ctx, inputs, f.type, f.data);
        return ggml_cpy(ctx, src, ggml_new_tensor_2d(ctx, type, N_COLS, N_ROWS));
    });
    compare_blocks(std::string("CPY ") + ggml_type_name(f.type) + " " + ggml_type_name(type), is,
                   encode(type, f.values), ggml_type_size(type));
}

static std::vector<float> decode(ggml_type type, const bytes & blocks) {
    std::vector<float> values(N_COLS * N_ROWS);
    ggml_get_type_traits(type)->to_float(blocks.data(), values.data(), N_COLS * N_ROWS);
    return values;
}

static void check_copy_from(ggml_backend_t backend, ggml_type type, ggml_type type_dst) {
    const bytes blocks = make_blocks(type, false);
    const bytes is     = compute(backend, [&](ggml_context * ctx, std::vector<input> & inputs) {
        ggml_tensor * src = add_input(ctx, inputs, type, blocks);
        return ggml_cpy(ctx, src, ggml_new_tensor_2d(ctx, type_dst, N_COLS, N_ROWS));
    });
    compare_floats(std::string("CPY ") + ggml_type_name(type) + " " + ggml_type_name(type_dst), type_dst, is,
                   decode(type, blocks));
}

static void check_copy_same(ggml_backend_t backend, ggml_type type) {
    const bytes blocks = make_blocks(type, false);
    const bytes is     = compute(backend, [&](ggml_context * ctx, std::vector<input> & inputs) {
        ggml_tensor * src = add_input(ctx, inputs, type, blocks);
        return ggml_cpy(ctx, src, ggml_new_tensor_2d(ctx, type, N_COLS, N_ROWS));
    });
    compare_blocks(std::string("CPY ") + ggml_type_name(type) + " " + ggml_type_name(type), is, blocks,
                   ggml_type_size(type));
}

static void check_decay(ggml_backend_t backend, ggml_type type, ggml_turbo_scale rule) {
    bytes blocks = make_blocks(type, rule != GGML_TURBO_SCALE_MATCHED_NORM);
    ggml_turbo_set_scale(rule);
    const bytes is = compute(backend, [&](ggml_context * ctx, std::vector<input> & inputs) {
        return ggml_turbo_decay(ctx, add_input(ctx, inputs, type, blocks));
    });
    ggml_turbo_decay_row(type, rule, blocks.data(), N_COLS * N_ROWS);
    compare_blocks(std::string("decay ") + ggml_type_name(type) + " rule " + std::to_string(rule), is, blocks,
                   ggml_type_size(type));
}

static void check_rules(ggml_backend_t backend, ggml_type type, const floats & f) {
    for (ggml_turbo_scale rule :
         { GGML_TURBO_SCALE_LEAST_SQUARES, GGML_TURBO_SCALE_INNER_PRODUCT, GGML_TURBO_SCALE_MATCHED_NORM }) {
        ggml_turbo_set_scale(rule);
        printf("rule %d: ", (int) rule);
        check_copy_to(backend, type, f);
        if (ggml_turbo_decays(type)) {
            check_decay(backend, type, rule);
        }
    }
}

static void check_type(ggml_backend_t backend, ggml_type type) {
    for (ggml_type type_src : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 }) {
        const floats f = make_floats(type_src);
        if (type_src != GGML_TYPE_BF16) {
            check_set_rows<int32_t>(backend, type, f, GGML_TYPE_I32);
            check_set_rows<int64_t>(backend, type, f, GGML_TYPE_I64);
        }
        check_copy_to(backend, type, f);
        check_copy_from(backend, type, type_src);
        if (type_src == GGML_TYPE_F32 && !ggml_turbo_is_trellis(type)) {
            check_rules(backend, type, f);
        }
    }
    check_copy_same(backend, type);
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        printf("usage: row_bits DEVICE [TYPE]...\n");
        return 2;
    }
    ggml_backend_load_all();
    ggml_backend_dev_t device = ggml_backend_dev_by_name(argv[1]);
    if (!device) {
        printf("error: there is no device %s\n", argv[1]);
        return 2;
    }
    ggml_backend_ptr         backend(ggml_backend_dev_init(device, nullptr));
    std::vector<std::string> wanted(argv + 2, argv + argc);
    for (ggml_type type : { GGML_TURBO_TYPES }) {
        if (wanted.empty() || std::find(wanted.begin(), wanted.end(), ggml_type_name(type)) != wanted.end()) {
            check_type(backend.get(), type);
        }
    }
    printf("%d failed\n", g_failed);
    return g_failed ? 1 : 0;
}

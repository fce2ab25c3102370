// Time of single ops of a KV cache on one device: attention over a cache, writing rows to it, and dot products with its rows.
//
//   test-turbo-perf DEVICE [SECONDS [THREADS]] < cases
//
// A case is a line "OP TYPE_K TYPE_V HEAD_SIZE N_HEAD_KV GQA N_QUERIES N_KEYS [DEVIATION [EXACT]]", OP being fattn, set_rows (which
// ignores TYPE_V and GQA, and writes N_QUERIES rows) or vec_dot (N_KEYS rows of all heads with one vector, by the CPU's function for
// TYPE_K, on one thread; ignores the others). DEVIATION: standard deviation of the scores of fattn, 1 if left out: the larger it is,
// the fewer keys have weight. EXACT: the last so many keys are attended in f16, 0 if left out. For each case a line of JSON is printed.
// What the device does not support says so.
//
// As in a model, the cache has several layers, in memory as llama.cpp lays it out: [head size, head, key]. The layers together are
// larger than a GPU's L2 and a CPU's L3 cache in every type, so that no layer finds its keys there. On the CPU, where that would take
// minutes, there are fewer when many queries use each key: then arithmetic decides, not memory. Without THREADS the CPU gets two, to
// try the program. The rows of vec_dot fit in a cache.

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

static constexpr double MIN_F16_BYTES = 768e6;  // of all layers, if they were f16; a 2.5-bit cache then has 120 MB
static constexpr int    MAX_LAYERS    = 48;
static constexpr int    CPU_LAYERS    = 2;
static constexpr double CPU_USES      = 4;  // of a key by queries, beyond which the CPU gets fewer layers
static constexpr int    MIN_ROUNDS    = 3;

struct perf_case {
    std::string op;
    ggml_type   type_k, type_v;
    int64_t     head_size, n_head_kv, gqa, n_queries, n_keys;
    float       deviation;
    int64_t     n_exact;  // keys of the second segment

    int64_t row() const { return head_size * n_head_kv; }

    bool is_fattn() const { return op == "fattn"; }

    bool is_vec_dot() const { return op == "vec_dot"; }

    // Bytes of the cache that the op reads, or writes.
    double bytes() const {
        return is_fattn() ? (double) n_keys * (ggml_row_size(type_k, row()) + ggml_row_size(type_v, row())) :
                            (double) (is_vec_dot() ? n_keys : n_queries) * ggml_row_size(type_k, row());
    }

    int n_layers(bool is_cpu) const {
        const double uses = is_cpu && is_fattn() ? std::max(1.0, gqa * n_queries / CPU_USES) : 1.0;
        const double f16  = 2.0 * n_keys * row() * sizeof(ggml_fp16_t);
        return std::clamp((int) std::ceil(MIN_F16_BYTES / f16 / uses), is_cpu ? CPU_LAYERS : 1, MAX_LAYERS);
    }
};

static bool type_from_name(const char * name, ggml_type & type) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * other = ggml_type_name((ggml_type) i);
        if (other && strcmp(name, other) == 0) {
            type = (ggml_type) i;
            return true;
        }
    }
    return false;
}

static bool parse(const char * line, perf_case & c) {
    char      op[16], k[32], v[32];
    long long n[5];
    long long exact = 0;
    c.deviation     = 1.0f;
    if (sscanf(line, "%15s %31s %31s %lld %lld %lld %lld %lld %f %lld", op, k, v, &n[0], &n[1], &n[2], &n[3], &n[4],
               &c.deviation, &exact) < 8) {
        return false;
    }
    c.op        = op;
    c.head_size = n[0];
    c.n_head_kv = n[1];
    c.gqa       = n[2];
    c.n_queries = n[3];
    c.n_keys    = n[4];
    c.n_exact   = exact;
    return (c.is_fattn() || c.op == "set_rows" || c.is_vec_dot()) && type_from_name(k, c.type_k) &&
           type_from_name(v, c.type_v) && *std::min_element(n, n + 5) > 0 && c.n_queries <= c.n_keys && exact >= 0 &&
           exact < c.n_keys;
}

//
// data
//

static std::vector<float> random_values(size_t n) {
    std::mt19937                    rng(42);
    std::normal_distribution<float> normal;
    std::vector<float>              x(n);
    std::generate(x.begin(), x.end(), [&] { return normal(rng); });
    return x;
}

static std::vector<unsigned char> random_rows(ggml_type type, int64_t ne0, int64_t n_rows) {
    const std::vector<float>   x = random_values(ne0 * n_rows);
    std::vector<unsigned char> rows(ggml_row_size(type, ne0) * n_rows);
    if (type == GGML_TYPE_F32) {
        memcpy(rows.data(), x.data(), rows.size());
    } else {
        ggml_quantize_chunk(type, x.data(), rows.data(), 0, n_rows, ne0, nullptr);
    }
    return rows;
}

// Rows of a cache, the same few over and over: their values decide nothing but that no block is degenerate. They are kept from layer to
// layer and case to case, because a trellis type takes a tenth of a second.
static void fill_cache(ggml_tensor * t) {
    static std::map<std::pair<ggml_type, int64_t>, std::vector<unsigned char>> known;

    const int64_t n_rows = std::min<int64_t>(256, t->ne[1]);
    const size_t  size   = ggml_row_size(t->type, t->ne[0]);

    std::vector<unsigned char> & rows = known[{ t->type, t->ne[0] }];
    if (rows.size() < size * n_rows) {
        rows = random_rows(t->type, t->ne[0], n_rows);
    }
    for (int64_t i = 0; i < t->ne[1]; i += n_rows) {
        ggml_backend_tensor_set(t, rows.data(), i * size, std::min(n_rows, t->ne[1] - i) * size);
    }
}

// The queries are the last tokens of the sequence. The first key of the mask is "from"; keys from "to" on are in another segment.
static void fill_mask(ggml_tensor * mask, const perf_case & c, int64_t from, int64_t to) {
    const ggml_fp16_t        seen   = ggml_fp32_to_fp16(0.0f);
    const ggml_fp16_t        hidden = ggml_fp32_to_fp16(-INFINITY);
    std::vector<ggml_fp16_t> row(mask->ne[0]);
    for (int64_t i = 0; i < mask->ne[1]; ++i) {
        const int64_t last = c.n_keys - c.n_queries + std::min(i, c.n_queries - 1);
        for (int64_t j = 0; j < mask->ne[0]; ++j) {
            row[j] = from + j < to && from + j <= last ? seen : hidden;
        }
        ggml_backend_tensor_set(mask, row.data(), i * mask->nb[1], row.size() * sizeof(row[0]));
    }
}

static void fill_indices(ggml_tensor * indices, const perf_case & c) {
    std::vector<int64_t> rows(c.n_queries);
    for (int64_t i = 0; i < c.n_queries; ++i) {
        rows[i] = c.n_keys - c.n_queries + i;
    }
    ggml_backend_tensor_set(indices, rows.data(), 0, rows.size() * sizeof(rows[0]));
}

//
// graph
//

struct perf_graph {
    ggml_context *             ctx = nullptr;
    ggml_cgraph *              graph;
    ggml_tensor *              input;      // queries, or rows to write
    ggml_tensor *              selection;  // mask, or indices
    ggml_tensor *              mask_exact = nullptr;
    std::vector<ggml_tensor *> caches;
    std::vector<ggml_tensor *> ops;

    perf_graph(const perf_case & c, int layers) {
        ctx   = ggml_init({ ggml_tensor_overhead() * (16 * layers + 8) + ggml_graph_overhead(), nullptr, true });
        graph = ggml_new_graph(ctx);
        if (c.is_fattn()) {
            input     = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, c.head_size, c.n_head_kv * c.gqa, c.n_queries);
            selection = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, c.n_keys, c.n_queries);
            if (c.n_exact > 0) {
                mask_exact = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, c.n_exact, c.n_queries);
            }
        } else {
            input     = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, c.row(), c.n_queries);
            selection = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, c.n_queries);
        }
        for (int i = 0; i < layers; ++i) {
            ops.push_back(c.is_fattn() ? attention(c) :
                                         ggml_set_rows(ctx, cache(c.type_k, c, c.n_keys), input, selection));
            ggml_build_forward_expand(graph, ops.back());
        }
    }

    perf_graph(const perf_graph &)             = delete;
    perf_graph & operator=(const perf_graph &) = delete;

    ~perf_graph() { ggml_free(ctx); }

    ggml_tensor * cache(ggml_type type, const perf_case & c, int64_t n_keys) {
        caches.push_back(ggml_new_tensor_2d(ctx, type, c.row(), n_keys));
        return caches.back();
    }

    ggml_tensor * heads(ggml_type type, const perf_case & c, int64_t n_keys) {
        ggml_tensor * t = cache(type, c, n_keys);
        t = ggml_view_3d(ctx, t, c.head_size, c.n_head_kv, n_keys, ggml_row_size(t->type, c.head_size), t->nb[1], 0);
        return ggml_permute(ctx, t, 0, 2, 1, 3);
    }

    ggml_tensor * attention(const perf_case & c) {
        ggml_tensor * k   = heads(c.type_k, c, c.n_keys);
        ggml_tensor * v   = heads(c.type_v, c, c.n_keys);
        ggml_tensor * q   = ggml_permute(ctx, input, 0, 2, 1, 3);
        ggml_tensor * out = ggml_flash_attn_ext(ctx, q, k, v, selection, 1.0f / std::sqrt((float) c.head_size), 0, 0);
        if (mask_exact) {
            k = heads(GGML_TYPE_F16, c, c.n_exact);
            v = heads(GGML_TYPE_F16, c, c.n_exact);
            ggml_turbo_flash_attn_add_segment(out, k, v, mask_exact);
        }
        return out;
    }
};

//
// measurement
//

static double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Sorted seconds of one op: of rounds that each do it n_ops times.
template <typename F> static std::vector<double> measure(int n_ops, double time, F && round) {
    std::vector<double> rounds;
    const double        start = seconds();
    while ((int) rounds.size() < MIN_ROUNDS || seconds() - start < time) {
        const double begin = seconds();
        round();
        rounds.push_back((seconds() - begin) / n_ops);
    }
    std::sort(rounds.begin(), rounds.end());
    return rounds;
}

static const ggml_type_traits_cpu * cpu_traits([[maybe_unused]] ggml_type type) {
#ifdef GGML_BACKEND_DL  // the CPU's functions are in a library that is not linked
    return nullptr;
#else
    return ggml_get_type_traits_cpu(type);
#endif
}

struct perf_run {
    ggml_backend_t backend;
    double         time;       // seconds of measuring each case
    int            n_threads;  // 0: the backend's default

    bool is_cpu() const {
        return ggml_backend_dev_type(ggml_backend_get_device(backend)) == GGML_BACKEND_DEVICE_TYPE_CPU;
    }

    void print(const perf_case & c, int layers, const std::vector<double> & rounds, const char * status) const {
        printf(
            "{\"op\": \"%s\", \"type_k\": \"%s\", \"type_v\": \"%s\", \"head_size\": %lld, "
            "\"n_head_kv\": %lld, \"gqa\": %lld, \"n_queries\": %lld, \"n_keys\": %lld, \"threads\": %d, "
            "\"bytes\": %.0f, \"layers\": %d, \"exact\": %lld, \"rounds\": %zu, "
            "\"us\": %.3f, \"us_min\": %.3f, \"us_max\": %.3f, \"status\": \"%s\"}\n",
            c.op.c_str(), ggml_type_name(c.type_k), ggml_type_name(c.type_v), (long long) c.head_size,
            (long long) c.n_head_kv, (long long) c.gqa, (long long) c.n_queries, (long long) c.n_keys, n_threads,
            c.bytes(), layers, (long long) c.n_exact, rounds.size(),
            rounds.empty() ? 0.0 : 1e6 * rounds[rounds.size() / 2], rounds.empty() ? 0.0 : 1e6 * rounds.front(),
            rounds.empty() ? 0.0 : 1e6 * rounds.back(), status);
        fflush(stdout);
    }

    void operator()(const perf_case & c) const { c.is_vec_dot() ? vec_dot(c) : graph(c); }

    void graph(const perf_case & c) const {
        const int  layers = is_cpu() && n_threads == 0 ? CPU_LAYERS : c.n_layers(is_cpu());
        perf_graph g(c, layers);
        for (ggml_tensor * op : g.ops) {
            if (!ggml_backend_supports_op(backend, op)) {
                print(c, layers, {}, "not supported");
                return;
            }
        }
        ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(g.ctx, backend);
        if (!buffer) {
            print(c, layers, {}, "out of memory");
            return;
        }
        std::vector<float> x = random_values(ggml_nelements(g.input));
        std::transform(x.begin(), x.end(), x.begin(), [&](float y) { return c.deviation * y; });
        ggml_backend_tensor_set(g.input, x.data(), 0, ggml_nbytes(g.input));
        if (c.is_fattn()) {
            fill_mask(g.selection, c, 0, c.n_keys - c.n_exact);
            if (g.mask_exact) {
                fill_mask(g.mask_exact, c, c.n_keys - c.n_exact, c.n_keys);
            }
        } else {
            fill_indices(g.selection, c);
        }
        for (ggml_tensor * t : g.caches) {
            fill_cache(t);
        }
        // a GPU's first rounds allocate, load kernels, and record a graph
        for (int i = 0; i < (is_cpu() ? 1 : MIN_ROUNDS); ++i) {
            ggml_backend_graph_compute(backend, g.graph);
        }
        print(c, layers, measure(layers, time, [&] { ggml_backend_graph_compute(backend, g.graph); }), "ok");
        ggml_backend_buffer_free(buffer);
    }

    // The vector is quantized to the type that the function takes, as a matrix product does with its activations.
    void vec_dot(const perf_case & c) const {
        const ggml_type_traits_cpu * traits = is_cpu() ? cpu_traits(c.type_k) : nullptr;
        if (!traits || !traits->vec_dot) {
            print(c, 1, {}, "not supported");
            return;
        }
        const size_t               size = ggml_row_size(c.type_k, c.row());
        const std::vector<float>   x    = random_values(c.row() * c.n_keys);
        std::vector<unsigned char> rows(size * c.n_keys);
        std::vector<unsigned char> y(ggml_row_size(traits->vec_dot_type, c.row()));
        std::vector<float>         products(c.n_keys);
        ggml_quantize_chunk(c.type_k, x.data(), rows.data(), 0, c.n_keys, c.row(), nullptr);
        cpu_traits(traits->vec_dot_type)->from_float(x.data(), y.data(), c.row());
        const auto all_rows = [&] {
            for (int64_t i = 0; i < c.n_keys; ++i) {
                traits->vec_dot(c.row(), &products[i], 0, rows.data() + i * size, 0, y.data(), 0, 1);
            }
        };
        print(c, 1, measure(1, time, all_rows), "ok");
    }
};

// False where the backend has no threads to set.
static bool set_threads(ggml_backend_t backend, int n_threads) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    auto set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set) {
        set(backend, n_threads);
    }
    return set != nullptr;
}

int main(int argc, char ** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: test-turbo-perf DEVICE [SECONDS [THREADS]] < cases\n");
        return 2;
    }
    ggml_backend_load_all();
    ggml_backend_dev_t device  = ggml_backend_dev_by_name(argv[1]);
    ggml_backend_t     backend = device ? ggml_backend_dev_init(device, nullptr) : nullptr;
    if (!backend) {
        fprintf(stderr, "no device %s; there are:", argv[1]);
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            fprintf(stderr, " %s", ggml_backend_dev_name(ggml_backend_dev_get(i)));
        }
        fprintf(stderr, "\n");
        return 1;
    }
    const perf_run run{ backend, argc > 2 ? atof(argv[2]) : 0.3, argc > 3 ? atoi(argv[3]) : 0 };
    if (run.n_threads > 0 && !set_threads(backend, run.n_threads)) {
        fprintf(stderr, "%s has no threads to set\n", argv[1]);
        return 1;
    }
    char line[256];
    int  rc = 0;
    while (fgets(line, sizeof(line), stdin)) {
        perf_case c;
        if (parse(line, c)) {
            run(c);
        } else {
            fprintf(stderr, "not a case: %s", line);
            rc = 2;
        }
    }
    ggml_backend_free(backend);
    return rc;
}

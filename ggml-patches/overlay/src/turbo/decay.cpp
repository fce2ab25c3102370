#include "decay.h"

#include "compat.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cells.h"

#include <algorithm>
#include <cinttypes>

enum decayed_side : uint8_t {
    DECAYED_K = 1,
    DECAYED_V = 2,
};

llama_turbo_decay::llama_turbo_decay(const llama_kv_cache & kv, int percent) : percent(percent) {
    if (llama_turbo_access::has_window(kv)) {
        return;
    }
    for (const auto & layer : llama_turbo_access::layers(kv)) {
        if (ggml_turbo_decays(layer.k->type)) {
            decaying_k.push_back(layer.k_stream);
        }
        if (layer.v && ggml_turbo_decays(layer.v->type)) {
            decaying_v.push_back(layer.v_stream);
        }
    }
}

llama_turbo_decay::~llama_turbo_decay() {
    if (any()) {
        LLAMA_LOG_INFO("llama_turbo_cache: decay: %" PRIu64 " passes, %" PRIu64 " cells of K, %" PRIu64 " cells of V\n",
                       n_passes, n_cells_k, n_cells_v);
    }
}

//
// which cells
//

struct cold_sequence {
    llama_seq_id id;
    llama_pos    end;  // positions below are cold
};

static std::vector<cold_sequence> cold_sequences(const llama_kv_cells & cells, int percent) {
    std::vector<cold_sequence> res;
    for (llama_seq_id id = 0; id < LLAMA_MAX_SEQ; ++id) {
        const llama_pos first = cells.seq_pos_min(id);
        if (first >= 0) {
            const int64_t   n_pos  = cells.seq_pos_max(id) + 1 - first;
            const llama_pos n_cold = n_pos * percent / 100;
            res.push_back({ id, first + n_cold - n_cold % llama_turbo_decay::BOUNDARY_STEP });
        }
    }

    return res;
}

static bool is_cold(const llama_kv_cells & cells, uint32_t i, const std::vector<cold_sequence> & sequences) {
    const llama_pos pos = cells.pos_get(i);
    return std::all_of(sequences.begin(), sequences.end(), [&](const cold_sequence & sequence) {
        return pos < sequence.end || !cells.seq_has(i, sequence.id);
    });
}

void llama_turbo_decay::append_cell(std::vector<range> & ranges, uint32_t i) {
    if (ranges.empty() || ranges.back().end != i) {
        ranges.push_back({ i, i });
    }
    ranges.back().end = i + 1;
}

// Counts and marks them, too.
llama_turbo_decay::ranges llama_turbo_decay::find_cold(const llama_kv_cells & cells, std::vector<uint8_t> & decayed) {
    const std::vector<cold_sequence> sequences = cold_sequences(cells, percent);

    const uint8_t sides = (decaying_k.empty() ? 0 : DECAYED_K) | (decaying_v.empty() ? 0 : DECAYED_V);

    ranges res;
    for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
        const uint8_t missing = sides & ~decayed[i];
        if (missing == 0 || cells.is_empty(i) || !is_cold(cells, i, sequences)) {
            continue;
        }
        if (missing & DECAYED_K) {
            append_cell(res.k, i);
            ++n_cells_k;
        }
        if (missing & DECAYED_V) {
            append_cell(res.v, i);
            ++n_cells_v;
        }
        decayed[i] |= missing;
    }

    return res;
}

void llama_turbo_decay::forget_moved(llama_kv_cache & kv) {
    for (llama_kv_cells & cells : llama_turbo_access::cells(kv)) {
        for (uint32_t i = 0; cells.get_has_shift() && i < cells.turbo_decayed.size(); ++i) {
            if (!cells.is_empty(i) && cells.get_shift(i) != 0) {
                cells.turbo_decayed[i] &= ~DECAYED_K;
            }
        }
    }
}

//
// graph
//

// The backend that works on the memory of a tensor.
static ggml_backend_t backend_of(ggml_backend_sched_t sched, const ggml_tensor * tensor) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(tensor->buffer));
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(backend) == dev) {
            return backend;
        }
    }

    return ggml_backend_sched_get_backend(sched, ggml_backend_sched_get_n_backends(sched) - 1);  // the CPU
}

// Ops on views of the cache, which need no memory of their own.
struct decay_graph {
    ggml_backend_t   backend;
    ggml_context_ptr ctx;
    ggml_cgraph *    graph;

    decay_graph(ggml_backend_t backend, size_t n_ops) : backend(backend) {
        const size_t n_nodes = 4 * n_ops;  // the op, its rows, and what these are views of

        const ggml_init_params params = {
            /*.mem_size   =*/2 * n_ops * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false),
            /*.mem_buffer =*/nullptr,
            /*.no_alloc   =*/true,
        };
        ctx.reset(ggml_init(params));
        graph = ggml_new_graph_custom(ctx.get(), n_nodes, false);
    }

    void add(ggml_tensor * cells, uint32_t begin, uint32_t end) {
        ggml_tensor * rows =
            ggml_view_2d(ctx.get(), cells, cells->ne[0], end - begin, cells->nb[1], begin * cells->nb[1]);
        ggml_backend_view_init(rows);

        ggml_tensor * decayed = ggml_turbo_decay(ctx.get(), rows);
        ggml_backend_view_init(decayed);

        ggml_build_forward_expand(graph, decayed);
    }
};

bool llama_turbo_decay::run_stream(llama_context * lctx, uint32_t stream, const ranges & cold) {
    ggml_backend_sched_t sched = lctx->get_sched();
    ggml_backend_sched_synchronize(sched);

    const size_t n_ops = decaying_k.size() * cold.k.size() + decaying_v.size() * cold.v.size();

    std::vector<decay_graph> graphs;  // one per backend

    const auto graph_of = [&](ggml_backend_t backend) -> decay_graph & {
        for (decay_graph & graph : graphs) {
            if (graph.backend == backend) {
                return graph;
            }
        }
        return graphs.emplace_back(backend, n_ops);
    };
    const auto add = [&](const std::vector<std::vector<ggml_tensor *>> & layers, const std::vector<range> & ranges) {
        for (const auto & streams : layers) {
            decay_graph & graph = graph_of(backend_of(sched, streams[stream]));
            for (const range & range : ranges) {
                graph.add(streams[stream], range.begin, range.end);
            }
        }
    };
    add(decaying_k, cold.k);
    add(decaying_v, cold.v);

    for (const decay_graph & graph : graphs) {
        if (ggml_backend_graph_compute(graph.backend, graph.graph) != GGML_STATUS_SUCCESS) {
            LLAMA_LOG_ERROR("%s: failed to decay the cache on %s\n", __func__, ggml_backend_name(graph.backend));
            return false;
        }
    }

    return true;
}

bool llama_turbo_decay::run(llama_kv_cache & kv, llama_context * lctx) {
    if (!any() || !lctx) {
        return true;  // training has no context here, since it makes no updates
    }

    bool ok = true;
    for (uint32_t s = 0; s < llama_turbo_access::n_stream(kv); ++s) {
        llama_kv_cells & cells = llama_turbo_access::cells(kv)[s];
        cells.turbo_decayed.resize(cells.size(), 0);
        if (!ok) {
            continue;
        }
        const ranges cold = find_cold(cells, cells.turbo_decayed);
        if (!cold.k.empty() || !cold.v.empty()) {
            ++n_passes;
            ok = run_stream(lctx, s, cold);
        }
    }

    return ok;
}

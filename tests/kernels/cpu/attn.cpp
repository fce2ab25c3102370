// Runs attention ops that come in through standard input, on the implementation that this program was linked with.
//
//     request  a line of the numbers of struct request, then the bytes of Q, K, V, mask and sinks, and K, V and mask
//              of the second segment
//     answer   a line "ISA OURS ALLOCATIONS WORK_SIZE INTACT", then the bytes of the result
//
// OURS: threads for which ggml_turbo_cpu_attn took the op. ALLOCATIONS: those it made. WORK_SIZE: what ggml_graph_plan wants.
// INTACT: whether the bytes before each buffer were left alone; behind each lies a page that nobody may touch.

#include "turbo/attn.h"

#include "ggml-cpu.h"
#include "ggml.h"
#include "program.h"

#include <algorithm>
#include <atomic>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>

//
// what happens within ggml_turbo_cpu_attn
//

static thread_local bool inside = false;
static std::atomic<int>  allocations{ 0 };
static std::atomic<int>  taken{ 0 };

extern "C" {
void * __real_malloc(size_t size);
void * __real_calloc(size_t n, size_t size);
void * __real_realloc(void * p, size_t size);
void * __real_aligned_alloc(size_t alignment, size_t size);
int    __real_posix_memalign(void ** p, size_t alignment, size_t size);
void * __real__Znwm(size_t size);  // operator new
void * __real__Znam(size_t size);  // operator new[]
bool   __real_ggml_turbo_cpu_attn(const ggml_compute_params * params, ggml_tensor * dst);

void * __wrap_malloc(size_t size) {
    allocations += inside;
    return __real_malloc(size);
}

void * __wrap_calloc(size_t n, size_t size) {
    allocations += inside;
    return __real_calloc(n, size);
}

void * __wrap_realloc(void * p, size_t size) {
    allocations += inside;
    return __real_realloc(p, size);
}

void * __wrap_aligned_alloc(size_t alignment, size_t size) {
    allocations += inside;
    return __real_aligned_alloc(alignment, size);
}

int __wrap_posix_memalign(void ** p, size_t alignment, size_t size) {
    allocations += inside;
    return __real_posix_memalign(p, alignment, size);
}

void * __wrap__Znwm(size_t size) {
    allocations += inside;
    return __real__Znwm(size);
}

void * __wrap__Znam(size_t size) {
    allocations += inside;
    return __real__Znam(size);
}

bool __wrap_ggml_turbo_cpu_attn(const ggml_compute_params * params, ggml_tensor * dst) {
    inside             = true;
    const bool is_ours = __real_ggml_turbo_cpu_attn(params, dst);
    inside             = false;
    taken += is_ours;
    return is_ours;
}
}

//
// requests
//

struct request {
    std::string type_k, type_v;
    int64_t     dk, dv, heads_kv, gqa, n_queries, n_keys;
    int64_t     n_cells;     // of K and V; those behind n_keys are no part of the op
    int64_t     n_seqs;
    int64_t     mask_heads;  // 0: no mask
    int64_t     mask_seqs;
    int64_t     n_second;    // keys of the second segment, f16
    int         has_sinks;
    int         n_threads;
    int         use_ref;  // of the plan
    int         compute;  // 0: only plan
    float       scale, max_bias, softcap;

    bool read(const std::string & line) {
        std::istringstream s(line);
        s >> type_k >> type_v >> dk >> dv >> heads_kv >> gqa >> n_queries >> n_keys >> n_cells >> n_seqs >>
            mask_heads >> mask_seqs >> n_second >> has_sinks >> n_threads >> use_ref >> compute >> scale >> max_bias >>
            softcap;
        return !s.fail();
    }
};

static memory fill(ggml_tensor * t) {
    memory m = std::make_unique<guarded>(ggml_nbytes(t));
    m->read();
    t->data = m->data();
    return m;
}

// [head size, cells, heads, sequences] of what lies as [sequences][cells][heads][head size], as in a cache
static ggml_tensor * cache_view(ggml_context * ctx, ggml_tensor * t, int64_t n_keys) {
    return ggml_view_4d(ctx, t, t->ne[0], n_keys, t->ne[1], t->ne[3], t->nb[2], t->nb[1], t->nb[3], 0);
}

static void answer(const request & r) {
    std::unique_ptr<ggml_context, decltype(&ggml_free)> context(ggml_init({ 1 << 20, nullptr, true }), ggml_free);

    ggml_context * ctx    = context.get();
    const auto     tensor = [&](ggml_type type, int64_t a, int64_t b, int64_t c, int64_t d) {
        return ggml_new_tensor_4d(ctx, type, a, b, c, d);
    };
    const int64_t n_heads = r.heads_kv * r.gqa;

    ggml_tensor * q     = tensor(GGML_TYPE_F32, r.dk, n_heads, r.n_queries, r.n_seqs);
    ggml_tensor * k     = tensor(type_of(r.type_k), r.dk, r.heads_kv, r.n_cells, r.n_seqs);
    ggml_tensor * v     = tensor(type_of(r.type_v), r.dv, r.heads_kv, r.n_cells, r.n_seqs);
    ggml_tensor * mask  = nullptr;
    ggml_tensor * sinks = nullptr;

    memory memories[10];
    if (r.compute) {
        memories[0] = fill(q);
        memories[1] = fill(k);
        memories[2] = fill(v);
    }
    if (r.mask_heads) {
        mask        = tensor(GGML_TYPE_F16, r.n_keys, r.n_queries, r.mask_heads, r.mask_seqs);
        memories[3] = r.compute ? fill(mask) : nullptr;
    }
    if (r.has_sinks) {
        sinks       = tensor(GGML_TYPE_F32, n_heads, 1, 1, 1);
        memories[4] = r.compute ? fill(sinks) : nullptr;
    }
    ggml_tensor * out = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), cache_view(ctx, k, r.n_keys),
                                            cache_view(ctx, v, r.n_keys), mask, r.scale, r.max_bias, r.softcap);
    if (sinks) {
        ggml_flash_attn_ext_add_sinks(out, sinks);
    }
    if (r.n_second) {
        ggml_tensor * second_k = tensor(GGML_TYPE_F16, r.dk, r.heads_kv, r.n_second, r.n_seqs);
        ggml_tensor * second_v = tensor(GGML_TYPE_F16, r.dv, r.heads_kv, r.n_second, r.n_seqs);
        ggml_tensor * second_m = tensor(GGML_TYPE_F16, r.n_second, r.n_queries, 1, r.mask_seqs);
        if (r.compute) {
            memories[7] = fill(second_k);
            memories[8] = fill(second_v);
            memories[9] = fill(second_m);
        }
        ggml_turbo_flash_attn_add_segment(out, cache_view(ctx, second_k, r.n_second),
                                          cache_view(ctx, second_v, r.n_second), second_m);
    }
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);

    ggml_cplan plan = ggml_graph_plan(graph, r.n_threads, nullptr);
    taken = allocations = 0;
    if (r.compute) {
        memories[5]    = std::make_unique<guarded>(ggml_nbytes(out));
        memories[6]    = std::make_unique<guarded>(plan.work_size);
        out->data      = memories[5]->data();
        plan.work_data = (uint8_t *) memories[6]->data();
        plan.use_ref   = r.use_ref != 0;
        if (ggml_graph_compute(graph, &plan) != GGML_STATUS_SUCCESS) {
            fail("ggml_graph_compute");
        }
    }
    const bool intact =
        std::all_of(std::begin(memories), std::end(memories), [](const memory & m) { return !m || m->intact(); });
    std::cout << ggml_turbo_cpu_attn_isa() << ' ' << taken << ' ' << allocations << ' ' << plan.work_size << ' '
              << intact << '\n';
    if (r.compute) {
        memories[5]->write();
    }
    std::cout.flush();
}

int main() {
    ggml_cpu_init();
    for (std::string line; std::getline(std::cin, line);) {
        request r;
        if (!r.read(line)) {
            fail("not a request: " + line);
        }
        answer(r);
    }
    return 0;
}

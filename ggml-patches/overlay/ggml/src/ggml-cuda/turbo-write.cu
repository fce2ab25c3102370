#include "turbo/launch.cuh"
#include "turbo/ops-host.cuh"
#include "turbo/ops.cuh"
#include "turbo/scalar.cuh"
#include "turbo/trellis-wide.cuh"
#include "turbo/turbo.cuh"

// SET_ROWS of few rows, as for one token: what counts is how long it takes from the first instruction to the last. A trellis-coded block has
// a block of threads for itself, and K and V of a layer are written by one launch.

//
// kernel
//

// A tensor that gets rows.
struct turbo_job {
    const char *   src;
    char *         dst;
    turbo_view     src_view;
    turbo_view     dst_view;
    turbo_by_index index;
    uint32_t       n_blocks;
    ggml_type      type;
};

// One or two of them. n_groups: blocks of threads for each
struct turbo_jobs {
    turbo_job        at[2];
    uint32_t         n_groups[2];
    ggml_turbo_scale scale;
};

static constexpr int TURBO_SCALAR_GROUP = TRELLIS_WIDE_THREADS / 8;  // scalar blocks that a block of threads encodes

// Where a block comes from and goes to.
struct turbo_ends {
    const char * src;
    char *       dst;

    __device__ __forceinline__ turbo_ends(const turbo_job & job, uint32_t i_block) {
        const turbo_place from = job.src_view.place(i_block);
        src                    = job.src + job.src_view.offset(from);
        dst                    = job.dst + job.dst_view.offset(job.index.place(job.dst_view, i_block, from));
    }
};

// group: number of a block of threads
static __device__ __forceinline__ void turbo_write_scalar(const turbo_job & job,
                                                          uint32_t          group,
                                                          ggml_turbo_scale  scale) {
    const uint32_t i_block = group * TURBO_SCALAR_GROUP + threadIdx.x / 8;
    const int      lane    = threadIdx.x % 8;
    const bool     store   = i_block < job.n_blocks;

    float            x[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
    const turbo_ends ends(job, store ? i_block : 0);
    if (store) {
        const char * first = ends.src + lane * job.src_view.value;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[i] = *(const float *) (first + 8 * i * job.src_view.value);
        }
    }
    switch (job.type) {
#define TURBO_ENCODE(ENUM, NAME, C_NAME, FAMILY, BITS)                                            \
    case GGML_TYPE_##ENUM:                                                                        \
        turbo_encode_block<GGML_TYPE_##ENUM>(x, scale, lane, store, (block_##C_NAME *) ends.dst); \
        break;
        GGML_TURBO_SCALAR_TYPES_X(TURBO_ENCODE)
#undef TURBO_ENCODE
        default:
            break;
    }
}

static __global__ void __launch_bounds__(TRELLIS_WIDE_THREADS) turbo_quantize_few(const turbo_jobs jobs) {
    __shared__ turbo_wide_scratch scratch;

    const bool        second = blockIdx.x >= jobs.n_groups[0];
    const uint32_t    group  = blockIdx.x - (second ? jobs.n_groups[0] : 0);
    const turbo_job & job    = jobs.at[second];

    const turbo_trellis_numbers t = turbo_trellis_numbers_of(job.type);
    if (t.costs == nullptr) {
        ggml_cuda_pdl_sync();
        ggml_cuda_pdl_lc();
        turbo_write_scalar(job, group, jobs.scale);
        return;
    }
    turbo_wide_table table;
    table.load(t.costs, threadIdx.x);  // constants: what ran before may still be running
    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();

    const turbo_ends ends(job, group);
    const char *     first = ends.src + threadIdx.x % 32 * job.src_view.value;
    const float      x[2]  = { *(const float *) first, *(const float *) (first + 32 * job.src_view.value) };
    turbo_encode_wide(x, threadIdx.x, t, table, scratch, (uint8_t *) ends.dst);
}

//
// launches
//

static bool turbo_sets_rows(const ggml_tensor * t) {
    return t->op == GGML_OP_SET_ROWS && ggml_is_turbo(t->type) && t->src[0]->type == GGML_TYPE_F32;
}

static uint32_t turbo_n_groups(const ggml_tensor * dst) {
    const uint32_t n_blocks = turbo_count_blocks(dst->src[0]->ne, turbo_block_values(dst->type));
    return ggml_turbo_is_trellis(dst->type) ? n_blocks : (n_blocks + TURBO_SCALAR_GROUP - 1) / TURBO_SCALAR_GROUP;
}

// Beyond, sixteen lanes for a trellis-coded block get more done: such a block takes 3,000 cycles of 4 warps that have little to wait for,
// here it takes 1,800 cycles of a multiprocessor.
static bool turbo_is_few(const ggml_backend_cuda_context & ctx, uint32_t n_groups) {
    return n_groups > 0 && n_groups <= 4u * ggml_cuda_info().devices[ctx.device].nsm;
}

static turbo_job turbo_make_job(const ggml_tensor * dst) {
    const turbo_transfer t = turbo_make_transfer(dst->src[0], dst, dst->src[0]->ne, nullptr);
    return { t.src, t.dst, t.src_view, t.dst_view, turbo_make_index(dst->src[1]), t.n_blocks, dst->type };
}

// second: or nullptr
static void turbo_launch_few(ggml_backend_cuda_context & ctx, const ggml_tensor * first, const ggml_tensor * second) {
    turbo_jobs jobs;
    jobs.at[0]       = turbo_make_job(first);
    jobs.at[1]       = second ? turbo_make_job(second) : jobs.at[0];
    jobs.n_groups[0] = turbo_n_groups(first);
    jobs.n_groups[1] = second ? turbo_n_groups(second) : 0;
    jobs.scale       = ggml_turbo_get_scale();
    turbo_launch(turbo_quantize_few, dim3(jobs.n_groups[0] + jobs.n_groups[1]), dim3(TRELLIS_WIDE_THREADS), 0,
                 ctx.stream(), jobs);
}

bool ggml_cuda_turbo_set_few_rows(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    if (!turbo_sets_rows(dst) || !ggml_turbo_is_trellis(dst->type) || !turbo_is_few(ctx, turbo_n_groups(dst))) {
        return false;
    }
    turbo_launch_few(ctx, dst, nullptr);
    return true;
}

//
// K and V
//

static bool turbo_computes_nothing(const ggml_tensor * t) {
    switch (t->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return true;
        default:
            return ggml_is_empty(t);
    }
}

static bool turbo_overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * first  = (const char *) a->data;
    const char * second = (const char *) b->data;
    return first < second + ggml_nbytes(b) && second < first + ggml_nbytes(a);
}

// Whether neither of two writes can see what the other one does.
static bool turbo_are_independent(const ggml_tensor * a, const ggml_tensor * b) {
    return !turbo_overlap(a, b) && !turbo_overlap(a, b->src[0]) && !turbo_overlap(a, b->src[1]) &&
           !turbo_overlap(b, a->src[0]) && !turbo_overlap(b, a->src[1]);
}

// Nothing between the two computes anything: whatever the second one needs is there when the first one may begin. That holds on one stream
// only, and where upstream uses several, K and V have different ones.
int ggml_cuda_turbo_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * cgraph, int i) {
    const ggml_tensor * first = cgraph->nodes[i];
    if (!turbo_sets_rows(first) || !ctx.stream_context().concurrent_events.empty()) {
        return 0;
    }
    int next = i + 1;
    while (next < cgraph->n_nodes && turbo_computes_nothing(cgraph->nodes[next])) {
        ++next;
    }
    if (next >= cgraph->n_nodes) {
        return 0;
    }
    const ggml_tensor * second = cgraph->nodes[next];
    if (!turbo_sets_rows(second) || !(second->flags & GGML_TENSOR_FLAG_COMPUTE) ||
        !turbo_are_independent(first, second)) {
        return 0;
    }
    const uint32_t n_groups[2] = { turbo_n_groups(first), turbo_n_groups(second) };
    if (n_groups[0] == 0 || n_groups[1] == 0 || !turbo_is_few(ctx, n_groups[0] + n_groups[1])) {
        return 0;
    }
    turbo_launch_few(ctx, first, second);
    return next - i;
}

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

// A tensor that gets rows: of float, neighbours in memory, as many blocks in each as row.z says.
struct turbo_job {
    const char * src;
    char *       dst;
    const char * indices;
    int64_t      src_step;  // from row to row, in bytes
    int64_t      dst_step;
    int64_t      index_step;
    uint3        row;  // for fast_div_modulo
    uint32_t     n_blocks;
    ggml_type    type;
    bool         is_i64;
};

// One or two of them. n_groups: blocks of threads for each
struct turbo_jobs {
    turbo_job        at[2];
    uint32_t         n_groups[2];
    ggml_turbo_scale scale;
};

static constexpr int TURBO_FEW_MATRICES = 16;
static constexpr int TURBO_SCALAR_GROUP = TRELLIS_WIDE_THREADS / 8;  // scalar blocks that a block of threads encodes

// A block on its way. Where it goes is asked for last: until then the row's number may be under way.
struct turbo_block_write {
    const float * src;
    uint32_t      row;
    uint32_t      i0;  // number of the block in its row

    __device__ __forceinline__ turbo_block_write(const turbo_job & job, uint32_t i_block, int values) {
        const uint2  place = fast_div_modulo(i_block, job.row);
        const char * index = job.indices + place.x * job.index_step;
        src                = (const float *) (job.src + place.x * job.src_step) + place.y * values;
        row                = job.is_i64 ? (uint32_t) * (const int64_t *) index : *(const uint32_t *) index;
        i0                 = place.y;
    }

    __device__ __forceinline__ char * dst(const turbo_job & job, int block_bytes) const {
        return job.dst + row * job.dst_step + i0 * block_bytes;
    }
};

// group: number of a block of threads
static __device__ __forceinline__ void turbo_write_scalar(const turbo_job & job,
                                                          uint32_t          group,
                                                          ggml_turbo_scale  scale) {
    const uint32_t i_block = group * TURBO_SCALAR_GROUP + threadIdx.x / 8;
    const int      lane    = threadIdx.x % 8;
    const bool     store   = i_block < job.n_blocks;

    const turbo_block_write block(job, store ? i_block : 0, QK_SCALAR);

    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[i] = block.src[lane + 8 * i];
    }
    switch (job.type) {
#define TURBO_ENCODE(ENUM, NAME, C_NAME, FAMILY, BITS)                                                   \
    case GGML_TYPE_##ENUM:                                                                               \
        turbo_encode_block<GGML_TYPE_##ENUM>(x, scale, lane, store,                                      \
                                             (block_##C_NAME *) block.dst(job, sizeof(block_##C_NAME))); \
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
    turbo_wide_table            table;
    if (t.costs != nullptr) {
        table.load(t.costs, threadIdx.x);  // constants: what ran before may still be running
    }
    ggml_cuda_pdl_sync();
    ggml_cuda_pdl_lc();

    if (t.costs == nullptr) {
        turbo_write_scalar(job, group, jobs.scale);
        return;
    }
    const turbo_block_write block(job, group, QK_TRELLIS);
    const float             x[2] = { block.src[threadIdx.x % 32], block.src[32 + threadIdx.x % 32] };
    turbo_encode_wide(x, threadIdx.x, t, table, scratch, [&](int block_bytes) { return block.dst(job, block_bytes); });
}

//
// launches
//

// Rows of floats to a turbo type, as those of a cache are.
static bool turbo_sets_rows(const ggml_tensor * t) {
    const ggml_tensor * src = t->src[0];
    return t->op == GGML_OP_SET_ROWS && ggml_is_turbo(t->type) && src->type == GGML_TYPE_F32 &&
           src->nb[0] == sizeof(float);
}

static bool turbo_sets_a_matrix(const ggml_tensor * t) {
    return turbo_sets_rows(t) && t->src[0]->ne[2] * t->src[0]->ne[3] == 1;
}

static uint32_t turbo_n_groups(ggml_type type, uint32_t n_blocks) {
    return ggml_turbo_is_trellis(type) ? n_blocks : (n_blocks + TURBO_SCALAR_GROUP - 1) / TURBO_SCALAR_GROUP;
}

// Where each multiprocessor gets more blocks of threads, eight lanes for a trellis-coded block are done sooner: they take a fifth of the
// instructions, and the time of 3 such blocks passes before they have finished the first.
static bool turbo_sets_few_rows(const ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    const uint32_t n_blocks = turbo_count_blocks(dst->src[0]->ne, turbo_block_values(dst->type));
    return n_blocks > 0 && turbo_n_groups(dst->type, n_blocks) <= 3u * ggml_cuda_info().devices[ctx.device].nsm;
}

// i: which matrix
static turbo_job turbo_make_job(const ggml_tensor * dst, int64_t i) {
    const ggml_tensor * src     = dst->src[0];
    const ggml_tensor * indices = dst->src[1];
    const int64_t       values  = turbo_block_values(dst->type);
    const int64_t       i2      = i % src->ne[2];
    const int64_t       i3      = i / src->ne[2];

    turbo_job job;
    job.src = (const char *) src->data + i2 * src->nb[2] + i3 * src->nb[3];
    job.dst = (char *) dst->data + i2 * dst->nb[2] + i3 * dst->nb[3];
    job.indices =
        (const char *) indices->data + i2 % indices->ne[1] * indices->nb[1] + i3 % indices->ne[2] * indices->nb[2];
    job.src_step   = (int64_t) src->nb[1];
    job.dst_step   = (int64_t) dst->nb[1];
    job.index_step = (int64_t) indices->nb[0];
    job.row        = init_fastdiv_values((uint64_t) (src->ne[0] / values));
    job.n_blocks   = (uint32_t) (src->ne[0] / values * src->ne[1]);
    job.type       = dst->type;
    job.is_i64     = indices->type == GGML_TYPE_I64;
    return job;
}

// n: 1 or 2
static void turbo_launch_few(ggml_backend_cuda_context & ctx, const turbo_job * job, int n) {
    turbo_jobs jobs;
    jobs.at[0]       = job[0];
    jobs.at[1]       = job[n - 1];
    jobs.n_groups[0] = turbo_n_groups(job[0].type, job[0].n_blocks);
    jobs.n_groups[1] = n == 2 ? turbo_n_groups(job[1].type, job[1].n_blocks) : 0;
    jobs.scale       = ggml_turbo_get_scale();
    turbo_launch(turbo_quantize_few, dim3(jobs.n_groups[0] + jobs.n_groups[1]), dim3(TRELLIS_WIDE_THREADS), 0,
                 ctx.stream(), jobs);
}

// A cache is written as one matrix. Of several, two are written at once.
bool ggml_cuda_turbo_set_few_rows(ggml_backend_cuda_context & ctx, const ggml_tensor * dst) {
    const int64_t n_matrices = dst->src[0]->ne[2] * dst->src[0]->ne[3];
    if (!turbo_sets_rows(dst) || !ggml_turbo_is_trellis(dst->type) || n_matrices > TURBO_FEW_MATRICES ||
        !turbo_sets_few_rows(ctx, dst)) {
        return false;
    }
    for (int64_t i = 0; i < n_matrices; i += 2) {
        const turbo_job job[2] = { turbo_make_job(dst, i), turbo_make_job(dst, std::min(i + 1, n_matrices - 1)) };
        turbo_launch_few(ctx, job, i + 1 < n_matrices ? 2 : 1);
    }
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
    if (!turbo_sets_a_matrix(first) || !ctx.stream_context().concurrent_events.empty()) {
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
    if (!turbo_sets_a_matrix(second) || !(second->flags & GGML_TENSOR_FLAG_COMPUTE) ||
        !turbo_are_independent(first, second)) {
        return 0;
    }
    if (!turbo_sets_few_rows(ctx, first) || !turbo_sets_few_rows(ctx, second)) {
        return 0;
    }
    const turbo_job job[2] = { turbo_make_job(first, 0), turbo_make_job(second, 0) };
    turbo_launch_few(ctx, job, 2);
    return next - i;
}

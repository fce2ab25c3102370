// The merge of turbo/prefill.cuh for Python: see test_lanes_prefill.py.

#include "lanes_library.h"
#include "turbo/prefill.cuh"

// Parts of a row lie one after the other, but for the last one, which lies where last tells.
template <int DV> struct lanes_parts {
    const float *  values;
    const float *  last;
    const float2 * meta;
    int            n_parts;

    const float * values_of(int64_t row, int ip) const {
        return ip + 1 == n_parts ? last + row * DV : values + (row * n_parts + ip) * DV;
    }

    float2 meta_of(int64_t row, int ip) const { return meta[row * n_parts + ip]; }
};

template <int DV> static void merge(turbo_slice & slice, const lanes_parts<DV> & parts) {
    ggml_backend_cuda_context ctx;
    turbo_attn_merge<DV>(ctx, slice, parts);
}

// dst: [n_rows, DV]. state: [n_rows, 2]. values: [n_rows, n_parts, DV]. meta: [n_rows, n_parts, 2].
LANES_EXPORT const char * lanes_merge(int64_t       DV,
                                      int64_t       n_rows,
                                      float *       dst,
                                      float *       state,
                                      const float * values,
                                      const float * last,
                                      const float * meta,
                                      int64_t       n_parts,
                                      bool          is_first,
                                      bool          is_last) {
    return lanes::guarded([&] {
        turbo_slice slice = {};
        slice.ne[0]       = DV;
        slice.ne[1]       = n_rows;
        slice.ne[2] = slice.ne[3] = 1;
        slice.data                = dst;
        slice.state               = reinterpret_cast<float2 *>(state);
        slice.first               = is_first;
        slice.last                = is_last;
        const auto * pairs        = reinterpret_cast<const float2 *>(meta);
        switch (DV) {
            case 64:
                return merge<64>(slice, { values, last, pairs, int(n_parts) });
            case 96:
                return merge<96>(slice, { values, last, pairs, int(n_parts) });
            case 512:
                return merge<512>(slice, { values, last, pairs, int(n_parts) });
            default:
                throw std::invalid_argument("head size");
        }
    });
}

#include "exact-input.h"

#include "compat.h"
#include "ggml-backend.h"
#include "memory.h"
#include "parts.h"

#include <algorithm>
#include <map>
#include <memory>
#include <stdexcept>

// Of the sequence that has the most
static uint32_t n_tokens_of_sequence(const llama_ubatch & ubatch) {
    std::map<llama_seq_id, uint32_t> n_tokens;
    uint32_t                         res = 0;
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        res = std::max(res, ++n_tokens[ubatch.seq_id[i][0]]);
    }

    return res;
}

// Whether a ubatch of n_all tokens, n_tokens in each stream, is copied before it is attended. While llama.cpp reserves memory there is no ubatch,
// and all tokens may be in one stream.
static bool is_copied_first(const llama_kv_cache_context & mctx, uint32_t n_all, uint32_t n_tokens) {
    const llama_turbo_exact & exact = llama_turbo_exact_of(mctx);

    return llama_turbo_access::is_reserving(mctx) ?
               exact.is_copied_first(n_all, 1) :
               exact.is_copied_first(n_tokens, n_tokens_of_sequence(mctx.get_ubatch()));
}

// Streams of the cache that a graph attends. While memory is reserved these are all of them, and the mask of upstream may have fewer: some
// architectures reserve a prompt of a single sequence.
static int64_t n_attended_streams(const llama_kv_cache_context & mctx) {
    const auto & slots = llama_turbo_access::slots(mctx);

    return slots.s1 - slots.s0 + 1;
}

llama_turbo_exact_input::llama_turbo_exact_input(ggml_context *                 ctx,
                                                 const llama_kv_cache_context & mctx,
                                                 ggml_tensor *                  packed_mask) :
    packed_mask(packed_mask),
    kv(llama_turbo_access::cache(mctx)),
    mctx(&mctx) {
    if (packed_mask->type != GGML_TYPE_F16) {
        throw std::runtime_error("an exact sink and tail need flash attention: use -fa on");
    }
    const llama_turbo_exact & exact    = llama_turbo_exact_of(mctx);
    const int64_t             n_stream = n_attended_streams(mctx);
    const int64_t             n_all    = packed_mask->ne[1] * packed_mask->ne[3];
    const int64_t             n_tokens = (n_all + n_stream - 1) / n_stream;
    const bool                is_first = is_copied_first(mctx, n_all, n_tokens);
    const int64_t             n_keys   = is_first ? exact.n_rows : exact.n_keys(n_tokens);
    const int64_t             n_copied = is_first ? n_all : exact.n_copied(n_tokens) * n_stream;

    mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_keys, packed_mask->ne[1], 1, packed_mask->ne[3]);
    rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_copied);
    if (!is_first) {
        copied   = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_copied);
        attended = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, (n_keys - exact.n_rows) * n_stream);
    }
    for (ggml_tensor * tensor : { mask, rows, copied, attended }) {
        if (tensor) {
            ggml_set_input(tensor);
        }
    }
}

struct llama_turbo_exact_input::cursor {
    uint16_t * packed_mask;
    uint16_t * mask;
    int64_t *  row;
    int32_t *  copied;
    int32_t *  attended;
    uint32_t   first_token = 0;
};

void llama_turbo_exact_input::set_input(const llama_ubatch * ubatch) {
    for (ggml_tensor * tensor : { packed_mask, mask, rows, copied, attended }) {
        GGML_ASSERT(!tensor || ggml_backend_buffer_is_host(tensor->buffer));
    }

    cursor at;
    at.packed_mask = (uint16_t *) packed_mask->data;
    at.mask        = (uint16_t *) mask->data;
    at.row         = (int64_t *) rows->data;
    at.copied      = attended ? (int32_t *) copied->data : nullptr;
    at.attended    = attended ? (int32_t *) attended->data : nullptr;
    for (uint32_t s = 0; s < llama_turbo_access::slots(*mctx).n_stream(); ++s) {
        set_stream(s, *ubatch, at);
    }
}

void llama_turbo_exact_input::set_stream(uint32_t s, const llama_ubatch & ubatch, cursor & at) {
    static const std::vector<uint32_t> none;

    llama_turbo_exact & exact = llama_turbo_exact_of(*mctx);

    const auto &                  slots     = llama_turbo_access::slots(*mctx);
    const uint32_t                stream    = slots.strm[s];
    const llama_kv_cells &        cells     = llama_turbo_access::cells(kv)[stream];
    const std::vector<uint32_t> & new_cells = slots.idxs[s];
    const uint32_t                n_tokens  = new_cells.size();
    const bool                    is_first  = !attended;

    exact.forget(stream, new_cells);

    std::vector<llama_turbo_exact::copy> copies;
    if (is_first) {
        copies = exact.place_all(stream, cells, new_cells);
    }
    for (uint32_t i = 0; i < n_tokens; ++i) {
        exact.split_mask(stream, cells, is_first ? none : new_cells, ubatch.pos[at.first_token + i], at.packed_mask,
                         packed_mask->ne[0], at.mask, mask->ne[0]);
        at.packed_mask += packed_mask->ne[0];
        at.mask += mask->ne[0];
    }
    if (!is_first) {
        copies = exact.place_needed(stream, cells, new_cells);
        for (uint32_t i = 0; i < mask->ne[0] - exact.n_rows; ++i) {
            *at.attended++ = at.first_token + (i < n_tokens ? i : 0);
        }
    }
    for (const llama_turbo_exact::copy & copy : copies) {
        *at.row++ = (int64_t) stream * exact.n_rows + copy.row;
        if (at.copied) {
            *at.copied++ = at.first_token + copy.token;
        }
    }
    at.first_token += n_tokens;
}

bool llama_turbo_exact_input::can_reuse(const llm_graph_params & params) {
    mctx = nullptr;
    for (const llama_kv_cache_context * cache : llama_turbo_caches(params.mctx)) {
        if (cache && &llama_turbo_access::cache(*cache) == &kv) {
            mctx = cache;
            break;
        }
    }

    return mctx && mask->ne[1] * mask->ne[3] == params.ubatch.n_tokens &&
           is_copied_first(*mctx, params.ubatch.n_tokens, mask->ne[1]) == !attended;
}

llama_turbo_exact_input & llama_turbo_exact_input_of(const llm_graph_context &      graph,
                                                     const llama_kv_cache_context & mctx,
                                                     ggml_tensor *                  packed_mask) {
    for (const auto & input : graph.res->inputs) {
        auto * found = dynamic_cast<llama_turbo_exact_input *>(input.get());
        if (found && found->packed_mask == packed_mask) {
            return *found;
        }
    }
    auto input = std::make_unique<llama_turbo_exact_input>(graph.ctx0, mctx, packed_mask);

    return *static_cast<llama_turbo_exact_input *>(graph.res->add_input(std::move(input)));
}

std::pair<ggml_tensor *, ggml_tensor *> llama_turbo_exact_views(ggml_context *                 ctx,
                                                                const llama_kv_cache_context & mctx,
                                                                int32_t                        il) {
    const llama_turbo_exact::layer & layer = *llama_turbo_exact_layer_of(mctx, il);

    const auto view = [&](ggml_tensor * copies, int64_t n_embd_head, int64_t n_head_kv) {
        return ggml_view_4d(ctx, copies, n_embd_head, n_head_kv, copies->ne[1], n_attended_streams(mctx),
                            ggml_row_size(copies->type, n_embd_head), copies->nb[1], copies->nb[2],
                            copies->nb[2] * llama_turbo_access::slots(mctx).s0);
    };
    const llama_hparams & hparams = llama_turbo_access::hparams(llama_turbo_access::cache(mctx));

    return { view(layer.k, hparams.n_embd_head_k(il), hparams.n_head_kv(il)),
             view(layer.v, hparams.n_embd_head_v(il), hparams.n_head_kv(il)) };
}

//
// K-shift
//

namespace {

class exact_shift_input : public llm_graph_input_i {
  public:
    exact_shift_input(const llama_turbo_exact &           exact,
                      const std::vector<llama_kv_cells> & cells,
                      ggml_tensor *                       shifts) :
        shifts(shifts),
        exact(exact),
        cells(cells) {}

    void set_input(const llama_ubatch *) override {
        GGML_ASSERT(ggml_backend_buffer_is_host(shifts->buffer));
        for (size_t s = 0; s < cells.size(); ++s) {
            exact.get_shifts(s, cells[s], (int32_t *) shifts->data + s * exact.n_rows);
        }
    }

    ggml_tensor * const shifts;  // I32 [n_rows * n_stream]

  private:
    const llama_turbo_exact &           exact;
    const std::vector<llama_kv_cells> & cells;
};

}  // namespace

void llama_turbo_shift_exact(const llama_kv_cache &                                    kv,
                             llm_graph_result &                                        res,
                             uint32_t                                                  il,
                             const std::function<void(ggml_tensor *, ggml_tensor *)> & shift) {
    const llama_turbo_parts * parts = llama_turbo_access::parts(kv);
    if (!parts || !parts->exact) {
        return;
    }
    const llama_turbo_exact & exact   = *parts->exact;
    const llama_hparams &     hparams = llama_turbo_access::hparams(kv);

    ggml_tensor * shifts = nullptr;
    for (const auto & input : res.inputs) {
        if (const auto * found = dynamic_cast<const exact_shift_input *>(input.get())) {
            shifts = found->shifts;
        }
    }
    if (!shifts) {
        shifts =
            ggml_new_tensor_1d(res.get_ctx(), GGML_TYPE_I32, (int64_t) exact.n_rows * llama_turbo_access::n_stream(kv));
        ggml_set_input(shifts);
        res.add_input(std::make_unique<exact_shift_input>(exact, llama_turbo_access::cells(kv), shifts));
    }

    ggml_tensor * k = exact.layers.at(il).k;
    shift(ggml_view_3d(res.get_ctx(), k, hparams.n_rot(il), hparams.n_head_kv(il), k->ne[1] * k->ne[2],
                       ggml_row_size(k->type, hparams.n_embd_head_k(il)), k->nb[1], 0),
          shifts);
}

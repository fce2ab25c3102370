#pragma once

#include "llama.h"

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

struct ggml_tensor;
class llama_io_read_i;
class llama_io_write_i;
class llama_kv_cells;

// Exact tokens of a KV cache: the first tokens of each sequence (sink) and the last ones (tail) are attended in f16, whatever its type.
//
//   a query at position p attends the copy of a key    where its position is < sink, or > p - tail
//
// The cache holds every token in its own type. Of some tokens it also has a copy in f16, as K and V were before quantization. Attention takes
// the cache and the copies as two segments of keys in one softmax (ggml_turbo_flash_attn_add_segment), and the masks give each key to one of
// them. So what a query sees does not depend on how its batch was cut. Dropping a copy loses precision, never a token.
//
// Each stream of the cache has rows for copies: sink + tail + rewind for each sequence in it. There are two ways to attend a ubatch:
//   few tokens, as in decoding   they are copied first, and attention takes the rows
//   more                         attention takes the rows, and behind them all tokens of the ubatch from the graph that computes them; then
//                                rows are written for those that later queries need
//
// A token's row follows from its position, so that sums are in the same order whatever the width of the batch: what is drafted and verified is
// computed as what is decoded. Where another token needs that row, it is any.
//
// A copy stays until its row is needed for another token. After tokens are removed from the end of a sequence, older tokens enter the tail.
// If their copies were overwritten, they are attended from the cache. Where several tokens share a position (images with M-RoPE), there may be
// more of them than rows.

// Number of tokens; sink and tail both 0: none.
struct llama_turbo_exact_sizes {
    uint32_t sink   = 0;
    uint32_t tail   = 0;
    uint32_t rewind = 16;  // may go from the end of a sequence without the loss of a copy

    explicit operator bool() const { return sink > 0 || tail > 0; }
};

class llama_turbo_exact {
  public:
    // Copies of a layer, f16 [n_embd_gqa, n_rows, n_stream].
    struct layer {
        ggml_tensor * k = nullptr;
        ggml_tensor * v = nullptr;

        mutable bool is_built = false;  // into a graph of attention
    };

    // n_seq, n_cells: of each stream
    llama_turbo_exact(llama_turbo_exact_sizes sizes, uint32_t n_seq, uint32_t n_cells, uint32_t n_stream);

    const llama_turbo_exact_sizes sizes;
    const uint32_t                n_rows;  // of each stream

    std::map<uint32_t, layer> layers;      // by number in the model

    // How attention takes a ubatch, by the number of its tokens in a stream. One that is copied first has to spare all that its queries need: it
    // has no more tokens of a sequence than this one has rows beyond sink and tail.
    bool     is_copied_first(uint32_t n_tokens, uint32_t n_of_sequence) const;
    uint32_t n_keys(uint32_t n_tokens) const;  // of one that is not: rows, and the tokens of the ubatch behind them
    uint32_t n_copied(uint32_t n_tokens) const;

    struct copy {
        uint32_t token;  // of those of the ubatch in this stream
        uint32_t row;
    };

    // A row for each token of a ubatch that is copied first.
    //   new_cells: where the tokens are about to be stored; the cells have their positions already
    std::vector<copy> place_all(uint32_t stream, const llama_kv_cells & cells, const std::vector<uint32_t> & new_cells);

    // Rows for the tokens of another ubatch, after its masks are split: the n_copied() tokens that later queries need most. What nobody needs yet
    // takes no row but its own, so that no other sequence loses what it would need after a removal. The rest repeats the first.
    std::vector<copy> place_needed(uint32_t                      stream,
                                   const llama_kv_cells &        cells,
                                   const std::vector<uint32_t> & new_cells);

    // For a query at pos: takes what it attends in f16 out of the mask of the cache [n_kv] and puts it into that of the copies [n_keys].
    // behind: cells of the tokens behind the rows.
    void split_mask(uint32_t                      stream,
                    const llama_kv_cells &        cells,
                    const std::vector<uint32_t> & behind,
                    llama_pos                     pos,
                    uint16_t *                    mask,
                    int64_t                       n_kv,
                    uint16_t *                    exact_mask,
                    int64_t                       n_keys) const;

    // By how much the positions of the copies have moved, [n_rows].
    void get_shifts(uint32_t stream, const llama_kv_cells & cells, int32_t * shifts) const;

    // All rows of a stream become those of another.
    void copy_stream(uint32_t from, uint32_t to);

    // Writes the copies of the given cells that later queries need: their number, the bytes of one, the cell of each (as an index of the list),
    // then K and V of each layer.
    void write(llama_io_write_i &            io,
               uint32_t                      stream,
               const llama_kv_cells &        cells,
               const std::vector<uint32_t> & state_cells) const;

    // Reads what write() wrote after the number of copies. It keeps those that are needed here, as long as there are rows that nobody needs.
    // False: the state is damaged, or of another model.
    bool read(llama_io_read_i &             io,
              uint32_t                      n_copies,
              uint32_t                      stream,
              const llama_kv_cells &        cells,
              const std::vector<uint32_t> & state_cells);

    // The copies of these cells are void.
    void forget(uint32_t stream, const std::vector<uint32_t> & forgotten);

    // For a cache without copies.
    static void skip(llama_io_read_i & io, uint32_t n_copies);

  private:
    static constexpr int32_t NONE = -1;

    // Attention of many queries is faster with keys of this multiple.
    static constexpr uint32_t KEY_STEP = 256;

    const uint32_t n_spare;  // rows beyond sink + tail of each sequence, sizes.rewind for each or more
    const uint32_t n_part;   // rows of a sequence

    // The rows of a stream. A cell that has been emptied may still have one.
    struct rows {
        std::vector<int32_t> cell_of;  // [n_rows]
        std::vector<int32_t> row_of;   // [n_cells]
    };

    std::vector<rows> streams;

    struct sequence {
        llama_seq_id id;
        llama_pos    next;  // position of the first query to come
    };

    static std::vector<sequence> sequences_of(const llama_kv_cells & cells, const std::vector<uint32_t> & query_cells);

    // A state has the copies to go on from a few tokens before its end, since programs often compute the last ones again.
    std::vector<sequence> sequences_after_state(const llama_kv_cells & cells) const;

    bool is_in_tail(int64_t from_query) const;  // position, relative to that of a query

    // Eviction order, cheapest first: free, not needed (oldest first), tail (oldest first), sink (token 0 last).
    enum kind { FREE, NOT_NEEDED, IN_TAIL, IN_SINK };

    using rank = std::pair<kind, llama_pos>;

    using ranked = std::vector<std::pair<rank, uint32_t>>;  // rows or tokens, cheapest first

    static bool is_needed(const rank & rank) { return rank.first >= IN_TAIL; }

    rank rank_of(const llama_kv_cells & cells, uint32_t cell, const std::vector<sequence> & sequences) const;

    std::vector<rank> rank_rows(uint32_t                      stream,
                                const llama_kv_cells &        cells,
                                const std::vector<sequence> & sequences) const;

    uint32_t home_of(const llama_kv_cells & cells, uint32_t cell) const;

    // A row for each of these tokens: its home, where that is worth less and nobody needs it, else the cheapest.
    std::vector<uint32_t> choose_rows(const llama_kv_cells &        cells,
                                      const std::vector<rank> &     rows,
                                      const ranked &                tokens,
                                      const std::vector<uint32_t> & new_cells) const;

    void assign(uint32_t stream, uint32_t row, uint32_t cell);

    // Rows for copies that a state has of these cells; NONE where a copy is not needed, or no row is free. The sink comes first, then the
    // newest tokens.
    std::vector<int64_t> place_state(uint32_t                      stream,
                                     const llama_kv_cells &        cells,
                                     const std::vector<uint32_t> & copied);

    // K and V of each layer, for these rows.
    void read_rows(llama_io_read_i & io, const std::vector<int64_t> & rows) const;

    uint64_t n_bytes_of_copy() const;
};

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

// Exact sink and tail of a KV cache: the first and the last tokens of each sequence are attended in f16, whatever the type of the cache.
//
//   a query at position p attends the copy of a key    where its position is < sink, or > p - tail
//
// The cache holds every token in its own type, and copies of some in f16, as they were before quantization. Attention takes both as two
// segments of keys in one softmax (ggml_turbo_flash_attn_add_segment), and each key from one of them: its mask says from which. So what a
// query sees does not depend on how its batch was cut, and dropping a copy loses precision, never a token.
//
// Each stream of the cache has rows for the copies that the sequences in it need, sink + tail of each, and a few to spare. A ubatch of so few
// tokens, as in decoding, is copied first, and attention takes the rows. A larger one is attended from the graph that computes it: attention
// takes the rows and behind them all tokens of the ubatch, and rows are written for those that queries to come need.
//
// A copy stays until its row is needed for another token. What a removal of the last tokens uncovers may have been overwritten, and then
// comes from the cache. Where several tokens share a position (images with M-RoPE) there may be more of them than rows.

// Number of tokens; both 0: none.
struct llama_turbo_exact_sizes {
    uint32_t sink = 0;
    uint32_t tail = 0;

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

    // How attention takes a ubatch, by the number of its tokens in a stream.
    bool     is_copied_first(uint32_t n_tokens) const;
    uint32_t n_keys(uint32_t n_tokens) const;  // of one that is not: rows, and the tokens of the ubatch behind them
    uint32_t n_copied(uint32_t n_tokens) const;

    struct copy {
        uint32_t token;  // of those of the ubatch in this stream
        uint32_t row;
    };

    // A row for each token of a ubatch that is copied first. new_cells: where they are about to be stored, which the cells know already;
    // what was in these cells is forgotten.
    std::vector<copy> place_all(uint32_t stream, const llama_kv_cells & cells, const std::vector<uint32_t> & new_cells);

    // For another one, once its masks are split: rows for those tokens that queries to come need most, n_copied(). If fewer are needed than
    // there are rows, the rest repeats the first.
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

    // Copies of the given cells that queries to come need: their number, the bytes of one, which cells they are of (as indices of the list), K
    // and V of each layer.
    void write(llama_io_write_i &            io,
               uint32_t                      stream,
               const llama_kv_cells &        cells,
               const std::vector<uint32_t> & state_cells) const;

    // What write() wrote behind the number of copies: those that are needed here, as far as rows are free or hold what nobody needs.
    // False: the state is damaged, or of another model.
    bool read(llama_io_read_i &             io,
              uint32_t                      n_copies,
              uint32_t                      stream,
              const llama_kv_cells &        cells,
              const std::vector<uint32_t> & state_cells);

    // These cells have no copies any more.
    void forget(uint32_t stream, const std::vector<uint32_t> & forgotten);

    // For a cache without copies.
    static void skip(llama_io_read_i & io, uint32_t n_copies);

  private:
    static constexpr int32_t NONE = -1;

    // Attention of many queries is faster with keys of this multiple.
    static constexpr uint32_t KEY_STEP = 256;

    // A state has the copies for going on from so many tokens before its end: the last ones are often computed again.
    static constexpr llama_pos REWIND = 16;

    const uint32_t n_spare;  // rows beyond sink + tail of each sequence, REWIND for each or more

    // Of a stream. Cells that have been emptied since may still have a row.
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
    static std::vector<sequence> sequences_after_state(const llama_kv_cells & cells);

    bool is_in_tail(int64_t from_query) const;  // position, relative to that of a query

    // How hard it is to do without a copy: less is easier. Of a tail, and of what is not needed, the farthest from the end of its sequence goes
    // first; the first token of all last.
    enum kind { FREE, NOT_NEEDED, IN_TAIL, IN_SINK };

    using rank = std::pair<kind, llama_pos>;

    using ranked = std::vector<std::pair<rank, uint32_t>>;  // rows or tokens, what is easiest to do without first

    static bool is_needed(const rank & rank) { return rank.first >= IN_TAIL; }

    rank rank_of(const llama_kv_cells & cells, uint32_t cell, const std::vector<sequence> & sequences) const;

    ranked rank_rows(uint32_t                      stream,
                     const llama_kv_cells &        cells,
                     const std::vector<sequence> & sequences,
                     size_t                        n) const;

    void assign(uint32_t stream, uint32_t row, uint32_t cell);

    uint64_t n_bytes_of_copy() const;
};

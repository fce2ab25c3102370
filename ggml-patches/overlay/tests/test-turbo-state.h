#pragma once

// What is in a KV cache, read from its saved state: types and rows of each layer, position and sequences of each cell.
//
// The layout is that of llama_kv_cache::state_write(). Rows of V are there with flash attention only. A model has one such cache, or with sliding windows
// two: of the layers without a window first. What recurrent layers add behind it is not read.

#include "../ggml/src/turbo/scalar.h"
#include "test-turbo-session.h"

#include <functional>
#include <map>
#include <set>

constexpr uint32_t SIZES_STATE      = 0x5A495354;  // src/turbo/state.cpp
constexpr uint32_t CALIBRATED_STATE = 0x4C414354;
constexpr uint32_t EXACT_STATE      = 0x43455854;

// Whether the sizes of rotations follow the number of layers.
constexpr bool STATES_HAVE_ROT_SIZES = LLAMA_STATE_SEQ_VERSION >= 4;

// Rows of K or V of one layer and stream, one for each cell.
struct saved_tensor {
    ggml_type type;
    size_t    row_size;
    size_t    offset;  // of the first row, in the bytes of the state
};

struct saved_cell {
    llama_pos              pos;
    std::set<llama_seq_id> seqs;
};

struct saved_stream {
    std::vector<saved_cell>   cells;
    std::vector<saved_tensor> k, v;  // by layer of this cache

    // Where, in the bytes of the state.
    size_t marks_at;  // of ours, or what follows them
    size_t sizes_at;  // of rotations of K and V, or what follows the number of layers

    // Copies of an exact sink and tail: the cell that each is of, and K and V of each layer (of one size) with rows for these.
    std::vector<uint32_t>     copied_cells;
    std::vector<saved_tensor> copies;
};

struct saved_state {
    bytes_t                                bytes;
    std::vector<std::vector<saved_stream>> caches;  // [cache][stream that is not empty]

    uint8_t * row(const saved_tensor & tensor, size_t cell) {
        return bytes.data() + tensor.offset + cell * tensor.row_size;
    }

    bytes_t copy_row(const saved_tensor & tensor, size_t cell) const {
        const auto begin = bytes.begin() + tensor.offset + cell * tensor.row_size;
        return bytes_t(begin, begin + tensor.row_size);
    }
};

// Reads a state; what does not fit the layout ends the program.
class state_reader {
  public:
    explicit state_reader(const bytes_t & bytes) : bytes(bytes) {}

    void read_caches(size_t header, saved_state & state) {
        pos = header;

        const int n_caches = llama_model_n_swa(model) > 0 ? 2 : 1;
        for (int i = 0; i < n_caches; ++i) {
            state.caches.push_back(read_cache());
        }
        require(pos == bytes.size() || llama_model_is_hybrid(model), "ends here");
    }

  private:
    const bytes_t & bytes;
    size_t          pos = 0;

    void require(bool ok, const char * what) const {
        if (!ok) {
            printf("FAIL the state of %zu bytes has another layout at %zu: %s\n", bytes.size(), pos, what);
            exit(1);
        }
    }

    template <typename T> T read() {
        T value;
        require(pos + sizeof(T) <= bytes.size(), "too short");
        memcpy(&value, bytes.data() + pos, sizeof(T));
        pos += sizeof(T);
        return value;
    }

    std::vector<saved_stream> read_cache() {
        std::vector<saved_stream> streams;

        const uint32_t n_stream = read<uint32_t>();
        for (uint32_t s = 0; s < n_stream; ++s) {
            const uint32_t n_cells = read<uint32_t>();
            if (n_cells > 0) {
                streams.push_back(read_stream(n_cells));
            }
        }
        return streams;
    }

    saved_stream read_stream(uint32_t n_cells) {
        saved_stream res;

        for (uint32_t i = 0; i < n_cells; ++i) {
            saved_cell cell{ read<llama_pos>(), {} };
            for (uint32_t n_seqs = read<uint32_t>(); n_seqs > 0; --n_seqs) {
                cell.seqs.insert(read<llama_seq_id>());
            }
            res.cells.push_back(cell);
        }

        res.marks_at     = pos;
        uint32_t v_trans = read<uint32_t>();
        if (v_trans == SIZES_STATE) {
            require(STATES_HAVE_ROT_SIZES, "states have no sizes of rotations");
            v_trans = read<uint32_t>();
        }
        if (v_trans == CALIBRATED_STATE) {
            read<uint32_t>();  // its digest
            v_trans = read<uint32_t>();
        }
        size_t first_copy = 0;
        size_t n_bytes    = 0;  // of a copy of a cell in all layers
        if (v_trans == EXACT_STATE) {
            const uint32_t n_copies = read<uint32_t>();
            n_bytes                 = read<uint64_t>();
            for (uint32_t i = 0; i < n_copies; ++i) {
                res.copied_cells.push_back(read<uint32_t>());
            }
            first_copy = pos;
            pos += n_copies * n_bytes;
            v_trans = read<uint32_t>();
        }
        require(v_trans <= 1, "V is transposed or not");
        const uint32_t n_layer = read<uint32_t>();
        res.sizes_at           = pos;
        pos += STATES_HAVE_ROT_SIZES ? 2 * sizeof(uint32_t) : 0;
        for (uint32_t i = 0; n_bytes > 0 && i < 2 * n_layer; ++i) {
            const size_t row_size = n_bytes / (2 * n_layer);
            res.copies.push_back({ GGML_TYPE_F16, row_size, first_copy + i * row_size * res.copied_cells.size() });
        }
        for (uint32_t i = 0; i < n_layer; ++i) {
            res.k.push_back(read_tensor(n_cells));
        }
        for (uint32_t i = 0; i < n_layer; ++i) {
            if (v_trans) {
                skip_transposed(n_cells);
            } else {
                res.v.push_back(read_tensor(n_cells));
            }
        }
        return res;
    }

    // V without flash attention: values of a channel stand together.
    void skip_transposed(uint32_t n_cells) {
        read<int32_t>();  // type
        const uint32_t size   = read<uint32_t>();
        const uint32_t n_embd = read<uint32_t>();
        pos += (size_t) n_cells * n_embd * size;
        require(pos <= bytes.size(), "values");
    }

    saved_tensor read_tensor(uint32_t n_cells) {
        const int32_t  type     = read<int32_t>();
        const uint64_t row_size = read<uint64_t>();
        require(type >= 0 && type < GGML_TYPE_COUNT && ggml_type_size((ggml_type) type) > 0, "a type");
        require(row_size > 0 && row_size % ggml_type_size((ggml_type) type) == 0, "the size of a row");

        const saved_tensor res = { (ggml_type) type, row_size, pos };
        pos += n_cells * row_size;
        require(pos <= bytes.size(), "rows");
        return res;
    }
};

inline saved_state read_state(const session & s) {
    saved_state state{ get_state(s), {} };
    uint32_t    n_arch = 0;  // the name of the architecture comes first
    memcpy(&n_arch, state.bytes.data(), sizeof(n_arch));
    state_reader(state.bytes).read_caches(sizeof(n_arch) + n_arch, state);
    return state;
}

inline saved_state read_seq_state(const session & s, llama_seq_id seq) {
    saved_state state{ get_seq_state(s, seq), {} };
    state_reader(state.bytes).read_caches(sizeof(uint32_t) + sizeof(llama_seq_id), state);  // magic, sequence
    return state;
}

// Every tensor of a cache, K first.
inline void for_each_tensor(const saved_stream &                                         stream,
                            const std::function<void(const saved_tensor &, bool is_k)> & f) {
    for (const saved_tensor & tensor : stream.k) {
        f(tensor, true);
    }
    for (const saved_tensor & tensor : stream.v) {
        f(tensor, false);
    }
}

//
// the layout of other upstreams
//

// The state as an upstream would have saved it whose states have the sizes of rotations, if these have none, and the other way round.
inline bytes_t with_other_layout(const saved_state & state) {
    bytes_t res;
    size_t  copied = 0;  // bytes of the state that are done

    const auto copy_to = [&](size_t end) {
        res.insert(res.end(), state.bytes.begin() + copied, state.bytes.begin() + end);
        copied = end;
    };
    const auto add = [&](std::initializer_list<uint32_t> numbers) {
        res.insert(res.end(), (const uint8_t *) numbers.begin(), (const uint8_t *) numbers.end());
    };
    for (const auto & cache : state.caches) {
        for (const saved_stream & stream : cache) {
            copy_to(stream.marks_at);
            if (!STATES_HAVE_ROT_SIZES) {
                add({ SIZES_STATE });
            } else if (memcmp(&state.bytes[copied], &SIZES_STATE, sizeof(SIZES_STATE)) == 0) {
                copied += sizeof(SIZES_STATE);
            }
            copy_to(stream.sizes_at);
            if (!STATES_HAVE_ROT_SIZES) {
                add({ 64, 64 });
            } else {
                copied += 2 * sizeof(uint32_t);
            }
        }
    }
    copy_to(state.bytes.size());
    return res;
}

// A cache of ours refuses such a state, with the reason.
inline void check_other_layout_refused(const session & writer, const setup & s) {
    check_refused("state with the layout of another upstream refused", s, with_other_layout(read_state(writer)),
                  with_other_layout(read_seq_state(writer, 0)));

    const session reader = session::make(s);
    set_state(reader, with_other_layout(read_state(writer)));
    check_log_has("... with the reason", std::string("the state was saved by a build of ") +
                                             (STATES_HAVE_ROT_SIZES ? "an older" : "a newer") +
                                             " llama.cpp, whose states have another layout");
}

//
// decay, from its definition
//

// Blocks of a row of turbo3 or turbo4 in which all low bits of the indices are copies of the high ones. A block that has not decayed is
// such a one in 1 of 2^32 cases.
inline int n_decayed_blocks(ggml_type type, const uint8_t * row, size_t row_size) {
    const auto is_copy = [&](const uint8_t * block, int i) {
        if (type == GGML_TYPE_TURBO3_0) {
            const block_turbo3_0 * b = (const block_turbo3_0 *) block;
            return (b->qs[i % 8] >> 2 * (i / 8) & 1) == (b->signs[i % 4] >> i / 4 & 1);
        }
        const block_turbo4_0 * b     = (const block_turbo4_0 *) block;
        const int              index = i < 16 ? b->qs[i] & 15 : b->qs[i - 16] >> 4;
        return (index & 1) == index >> 3;
    };

    int n = 0;
    for (size_t offset = 0; offset < row_size; offset += ggml_type_size(type)) {
        bool all = true;
        for (int i = 0; i < QK_SCALAR; ++i) {
            all = all && is_copy(row + offset, i);
        }
        n += all;
    }
    return n;
}

// Cold positions of a sequence of n tokens from position 0 on.
inline int n_cold(int n, int percent) {
    return n * percent / 100 / 32 * 32;
}

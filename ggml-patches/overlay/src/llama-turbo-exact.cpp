#include "llama-turbo-exact.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "llama-impl.h"
#include "llama-io.h"

#include <algorithm>
#include <tuple>

static constexpr uint16_t HALF_MINUS_INF = 0xfc00;

llama_turbo_exact::llama_turbo_exact(llama_turbo_exact_sizes sizes,
                                     uint32_t                n_rows,
                                     uint32_t                n_cells,
                                     uint32_t                n_stream) :
    sizes(sizes),
    n_rows(n_rows),
    streams(n_stream, rows{ std::vector<int32_t>(n_rows, NONE), std::vector<int32_t>(n_cells, NONE) }) {}

//
// which tokens have a copy
//

// query_cells: of tokens that are about to attend
std::vector<llama_turbo_exact::sequence> llama_turbo_exact::sequences_of(const llama_kv_cells &        cells,
                                                                         const std::vector<uint32_t> & query_cells) {
    std::vector<sequence> res;
    for (llama_seq_id id = 0; id < LLAMA_MAX_SEQ; ++id) {
        if (cells.seq_pos_min(id) < 0) {
            continue;
        }
        llama_pos next = cells.seq_pos_max(id) + 1;
        for (uint32_t cell : query_cells) {
            if (cells.seq_has(cell, id)) {
                next = std::min(next, cells.pos_get(cell));
            }
        }
        res.push_back({ id, next });
    }

    return res;
}

bool llama_turbo_exact::is_needed(const llama_kv_cells &        cells,
                                  uint32_t                      cell,
                                  const std::vector<sequence> & sequences) const {
    const int64_t pos = cells.pos_get(cell);

    return pos < sizes.sink || std::any_of(sequences.begin(), sequences.end(), [&](const sequence & sequence) {
               return pos > (int64_t) sequence.next - sizes.tail && cells.seq_has(cell, sequence.id);
           });
}

std::vector<llama_turbo_exact::sequence> llama_turbo_exact::sequences_after_state(const llama_kv_cells & cells) {
    std::vector<sequence> res = sequences_of(cells, {});
    for (sequence & sequence : res) {
        sequence.next -= REWIND;
    }

    return res;
}

bool llama_turbo_exact::row_rank::operator<(const row_rank & other) const {
    return std::tie(why, order, row) < std::tie(other.why, other.order, other.row);
}

// The oldest of the tail goes first, the first token of all last.
std::vector<llama_turbo_exact::row_rank> llama_turbo_exact::rank_rows(uint32_t                      stream,
                                                                      const llama_kv_cells &        cells,
                                                                      const std::vector<sequence> & sequences) const {
    std::vector<row_rank> res;
    res.reserve(n_rows);
    for (uint32_t row = 0; row < n_rows; ++row) {
        const int32_t cell = streams[stream].cell_of[row];
        if (cell == NONE || cells.is_empty(cell)) {
            res.push_back({ FREE, 0, row });
            continue;
        }
        const llama_pos pos = cells.pos_get(cell);
        if (!is_needed(cells, cell, sequences)) {
            res.push_back({ NOT_NEEDED, pos, row });
        } else if (pos < (int64_t) sizes.sink) {
            res.push_back({ IN_SINK, -pos, row });
        } else {
            res.push_back({ IN_TAIL, pos, row });
        }
    }

    return res;
}

void llama_turbo_exact::assign(uint32_t stream, uint32_t row, uint32_t cell) {
    rows & r = streams[stream];
    if (r.cell_of[row] != NONE) {
        r.row_of[r.cell_of[row]] = NONE;
    }
    r.cell_of[row] = cell;
    r.row_of[cell] = row;
}

std::vector<uint32_t> llama_turbo_exact::place(uint32_t                      stream,
                                               const llama_kv_cells &        cells,
                                               const std::vector<uint32_t> & new_cells) {
    forget(stream, new_cells);

    std::vector<row_rank> ranks = rank_rows(stream, cells, sequences_of(cells, new_cells));
    std::partial_sort(ranks.begin(), ranks.begin() + new_cells.size(), ranks.end());

    std::vector<uint32_t> res;
    for (size_t i = 0; i < new_cells.size(); ++i) {
        assign(stream, ranks[i].row, new_cells[i]);
        res.push_back(ranks[i].row);
    }

    return res;
}

void llama_turbo_exact::forget(uint32_t stream, const std::vector<uint32_t> & forgotten) {
    rows & r = streams[stream];
    for (uint32_t cell : forgotten) {
        if (r.row_of[cell] != NONE) {
            r.cell_of[r.row_of[cell]] = NONE;
            r.row_of[cell]            = NONE;
        }
    }
}

void llama_turbo_exact::copy_stream(uint32_t from, uint32_t to) {
    streams[to] = streams[from];

    for (const auto & [il, layer] : layers) {
        for (ggml_tensor * tensor : { layer.k, layer.v }) {
            std::vector<uint8_t> values(tensor->nb[2]);
            ggml_backend_tensor_get(tensor, values.data(), from * tensor->nb[2], tensor->nb[2]);
            ggml_backend_tensor_set(tensor, values.data(), to * tensor->nb[2], tensor->nb[2]);
        }
    }
}

//
// inputs of graphs
//

void llama_turbo_exact::split_mask(uint32_t               stream,
                                   const llama_kv_cells & cells,
                                   llama_pos              pos,
                                   uint16_t *             mask,
                                   int64_t                n_kv,
                                   uint16_t *             exact_mask) const {
    std::fill(exact_mask, exact_mask + n_rows, HALF_MINUS_INF);
    for (uint32_t row = 0; row < n_rows; ++row) {
        const int32_t cell = streams[stream].cell_of[row];
        if (cell == NONE || cell >= n_kv || cells.is_empty(cell)) {
            continue;
        }
        const int64_t key_pos = cells.pos_get(cell);
        if (key_pos < sizes.sink || (sizes.tail > 0 && key_pos > (int64_t) pos - sizes.tail)) {
            std::swap(exact_mask[row], mask[cell]);
        }
    }
}

void llama_turbo_exact::get_shifts(uint32_t stream, const llama_kv_cells & cells, int32_t * shifts) const {
    for (uint32_t row = 0; row < n_rows; ++row) {
        const int32_t cell = streams[stream].cell_of[row];
        shifts[row]        = cell == NONE || cells.is_empty(cell) ? 0 : cells.get_shift(cell);
    }
}

//
// state
//

uint64_t llama_turbo_exact::n_bytes_of_copy() const {
    uint64_t n = 0;
    for (const auto & [il, layer] : layers) {
        n += layer.k->nb[1] + layer.v->nb[1];
    }

    return n;
}

// Calls f(row, n) for each run of n rows that lie one behind the other; rows that are NONE are runs, too.
template <typename F> static void for_runs(const std::vector<int64_t> & rows, F f) {
    for (size_t i = 0, n; i < rows.size(); i += n) {
        n = 1;
        while (i + n < rows.size() && rows[i + n] == (rows[i] < 0 ? rows[i] : rows[i] + (int64_t) n)) {
            ++n;
        }
        f(rows[i], n);
    }
}

void llama_turbo_exact::write(llama_io_write_i &            io,
                              uint32_t                      stream,
                              const llama_kv_cells &        cells,
                              const std::vector<uint32_t> & state_cells) const {
    const std::vector<sequence> sequences = sequences_after_state(cells);

    std::vector<std::pair<int64_t, uint32_t>> copies;  // row, index of the cell
    for (size_t i = 0; i < state_cells.size(); ++i) {
        const int32_t row = streams[stream].row_of[state_cells[i]];
        if (row != NONE && is_needed(cells, state_cells[i], sequences)) {
            copies.emplace_back((int64_t) stream * n_rows + row, i);
        }
    }
    std::sort(copies.begin(), copies.end());

    const uint32_t n_copies = copies.size();
    const uint64_t n_bytes  = n_bytes_of_copy();
    io.write(&n_copies, sizeof(n_copies));
    io.write(&n_bytes, sizeof(n_bytes));

    std::vector<int64_t> rows;
    for (const auto & [row, index] : copies) {
        io.write(&index, sizeof(index));
        rows.push_back(row);
    }
    for (const auto & [il, layer] : layers) {
        for (ggml_tensor * tensor : { layer.k, layer.v }) {
            for_runs(rows, [&, tensor = tensor](int64_t row, size_t n) {
                io.write_tensor(tensor, row * tensor->nb[1], n * tensor->nb[1]);
            });
        }
    }
}

bool llama_turbo_exact::read(llama_io_read_i &             io,
                             uint32_t                      n_copies,
                             uint32_t                      stream,
                             const llama_kv_cells &        cells,
                             const std::vector<uint32_t> & state_cells) {
    uint64_t n_bytes;
    io.read(&n_bytes, sizeof(n_bytes));
    if (n_bytes != n_bytes_of_copy() || n_copies > state_cells.size()) {
        LLAMA_LOG_ERROR(
            "%s: the state is damaged, or of another model: f16 copies of %llu bytes, here they have %llu\n", __func__,
            (unsigned long long) n_bytes, (unsigned long long) n_bytes_of_copy());
        return false;
    }

    std::vector<uint32_t> copied;  // cell of each
    std::vector<bool>     is_copied(state_cells.size(), false);
    for (uint32_t i = 0; i < n_copies; ++i) {
        uint32_t index;
        io.read(&index, sizeof(index));
        if (index >= state_cells.size() || is_copied[index]) {
            LLAMA_LOG_ERROR("%s: the state is damaged: copy of cell %u of %zu\n", __func__, index, state_cells.size());
            return false;
        }
        is_copied[index] = true;
        copied.push_back(state_cells[index]);
    }

    // the sink is taken first, then the newest; rows in their order, so that those of a state are runs again
    const std::vector<sequence> sequences = sequences_after_state(cells);

    std::vector<uint32_t> wanted;  // indices of copied
    for (uint32_t i = 0; i < n_copies; ++i) {
        if (is_needed(cells, copied[i], sequences)) {
            wanted.push_back(i);
        }
    }
    const auto value = [&](uint32_t i) {
        const int64_t pos = cells.pos_get(copied[i]);
        return pos < sizes.sink ? std::make_pair(1, -pos) : std::make_pair(0, pos);
    };
    std::vector<row_rank> ranks = rank_rows(stream, cells, sequences_of(cells, {}));
    std::sort(ranks.begin(), ranks.end());
    const size_t n_free =
        std::count_if(ranks.begin(), ranks.end(), [](const row_rank & rank) { return rank.why <= NOT_NEEDED; });
    if (wanted.size() > n_free) {
        std::sort(wanted.begin(), wanted.end(), [&](uint32_t a, uint32_t b) { return value(a) > value(b); });
        wanted.resize(n_free);
        std::sort(wanted.begin(), wanted.end());
    }

    std::vector<int64_t> rows(n_copies, NONE);
    for (size_t i = 0; i < wanted.size(); ++i) {
        assign(stream, ranks[i].row, copied[wanted[i]]);
        rows[wanted[i]] = (int64_t) stream * n_rows + ranks[i].row;
    }
    std::vector<uint8_t> unused;
    for (const auto & [il, layer] : layers) {
        for (ggml_tensor * tensor : { layer.k, layer.v }) {
            for_runs(rows, [&, tensor = tensor](int64_t row, size_t n) {
                if (row == NONE) {
                    unused.resize(n * tensor->nb[1]);
                    io.read(unused.data(), unused.size());
                } else {
                    io.read_tensor(tensor, row * tensor->nb[1], n * tensor->nb[1]);
                }
            });
        }
    }

    return true;
}

void llama_turbo_exact::skip(llama_io_read_i & io, uint32_t n_copies) {
    uint64_t n_bytes;
    io.read(&n_bytes, sizeof(n_bytes));

    std::vector<uint8_t> part(1 << 16);
    for (uint64_t rest = n_copies * (sizeof(uint32_t) + n_bytes), n; rest > 0; rest -= n) {
        n = std::min<uint64_t>(rest, part.size());
        io.read(part.data(), n);
    }
}

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

// Rows that are free come first, then those that no query to come needs, then the oldest of the tail, then the sink.
std::vector<uint32_t> llama_turbo_exact::assign(uint32_t                      stream,
                                                const llama_kv_cells &        cells,
                                                const std::vector<uint32_t> & new_cells,
                                                const std::vector<sequence> & sequences) {
    forget(stream, new_cells);

    rows & r = streams[stream];

    std::vector<std::tuple<int, llama_pos, uint32_t>> order;  // kind, position, row
    order.reserve(n_rows);
    for (uint32_t row = 0; row < n_rows; ++row) {
        const int32_t cell = r.cell_of[row];
        if (cell == NONE || cells.is_empty(cell)) {
            order.emplace_back(0, 0, row);
        } else {
            const llama_pos pos  = cells.pos_get(cell);
            const int       kind = !is_needed(cells, cell, sequences) ? 1 : pos < (int64_t) sizes.sink ? 3 : 2;
            order.emplace_back(kind, pos, row);
        }
    }
    std::partial_sort(order.begin(), order.begin() + new_cells.size(), order.end());

    std::vector<uint32_t> res;
    for (size_t i = 0; i < new_cells.size(); ++i) {
        const uint32_t row = std::get<2>(order[i]);
        if (r.cell_of[row] != NONE) {
            r.row_of[r.cell_of[row]] = NONE;
        }
        r.cell_of[row]         = new_cells[i];
        r.row_of[new_cells[i]] = row;
        res.push_back(row);
    }

    return res;
}

std::vector<uint32_t> llama_turbo_exact::place(uint32_t                      stream,
                                               const llama_kv_cells &        cells,
                                               const std::vector<uint32_t> & new_cells) {
    return assign(stream, cells, new_cells, sequences_of(cells, new_cells));
}

void llama_turbo_exact::forget(uint32_t stream, const std::vector<uint32_t> & state_cells) {
    rows & r = streams[stream];
    for (uint32_t cell : state_cells) {
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

// Calls f(row, n) for each run of n rows that lie one behind the other.
template <typename F> static void for_runs(const std::vector<uint32_t> & rows, F f) {
    for (size_t i = 0, n; i < rows.size(); i += n) {
        n = 1;
        while (i + n < rows.size() && rows[i + n] == rows[i] + n) {
            ++n;
        }
        f(rows[i], n);
    }
}

void llama_turbo_exact::write(llama_io_write_i & io, uint32_t stream, const std::vector<uint32_t> & state_cells) const {
    std::vector<std::pair<uint32_t, uint32_t>> copies;  // row, index of the cell
    for (size_t i = 0; i < state_cells.size(); ++i) {
        const int32_t row = streams[stream].row_of[state_cells[i]];
        if (row != NONE) {
            copies.emplace_back(row, i);
        }
    }
    std::sort(copies.begin(), copies.end());

    const uint32_t n_copies = copies.size();
    const uint64_t n_bytes  = n_bytes_of_copy();
    io.write(&n_copies, sizeof(n_copies));
    io.write(&n_bytes, sizeof(n_bytes));

    std::vector<uint32_t> rows;
    for (const auto & [row, index] : copies) {
        io.write(&index, sizeof(index));
        rows.push_back(stream * n_rows + row);
    }
    for (const auto & [il, layer] : layers) {
        for (ggml_tensor * tensor : { layer.k, layer.v }) {
            for_runs(rows, [&, tensor = tensor](uint32_t row, size_t n) {
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

    std::vector<uint32_t> new_cells;
    for (uint32_t i = 0; i < n_copies; ++i) {
        uint32_t index;
        io.read(&index, sizeof(index));
        if (index >= state_cells.size()) {
            LLAMA_LOG_ERROR("%s: the state is damaged: cell %u of %zu\n", __func__, index, state_cells.size());
            return false;
        }
        new_cells.push_back(state_cells[index]);
    }

    forget(stream, state_cells);

    // a smaller window has room for some of the copies, or for none
    std::vector<uint32_t> rows;
    if (n_copies <= n_rows) {
        rows = assign(stream, cells, new_cells, sequences_of(cells, {}));
        for (uint32_t & row : rows) {
            row += stream * n_rows;
        }
    }
    std::vector<uint8_t> unused;
    for (const auto & [il, layer] : layers) {
        for (ggml_tensor * tensor : { layer.k, layer.v }) {
            for_runs(rows, [&, tensor = tensor](uint32_t row, size_t n) {
                io.read_tensor(tensor, row * tensor->nb[1], n * tensor->nb[1]);
            });
            if (rows.empty()) {
                unused.resize(n_copies * tensor->nb[1]);
                io.read(unused.data(), unused.size());
            }
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

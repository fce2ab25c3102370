#include "exact.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cells.h"

#include <algorithm>
#include <limits>

static constexpr uint16_t HALF_MINUS_INF = 0xfc00;

static uint32_t rows_of_stream(uint64_t n_needed, uint64_t n_spare, uint32_t n_cells) {
    static constexpr uint64_t ROW_STEP = 32;  // a tile of attention

    return std::min<uint64_t>(GGML_PAD(n_needed + n_spare, ROW_STEP), n_cells);
}

llama_turbo_exact::llama_turbo_exact(llama_turbo_exact_sizes sizes,
                                     uint32_t                n_seq,
                                     uint32_t                n_cells,
                                     uint32_t                n_stream) :
    sizes(sizes),
    n_rows(rows_of_stream((uint64_t) n_seq * (sizes.sink + sizes.tail), (uint64_t) n_seq * sizes.rewind, n_cells)),
    n_spare(n_rows == n_cells ? n_cells : n_rows - n_seq * (sizes.sink + sizes.tail)),
    n_part(n_rows / n_seq),
    streams(n_stream, rows{ std::vector<int32_t>(n_rows, NONE), std::vector<int32_t>(n_cells, NONE) }) {}

bool llama_turbo_exact::is_copied_first(uint32_t n_tokens, uint32_t n_of_sequence) const {
    const bool all_have_rows = n_spare == streams[0].row_of.size();

    return n_tokens <= n_spare && (all_have_rows || n_of_sequence <= n_part - sizes.sink - sizes.tail);
}

uint32_t llama_turbo_exact::n_keys(uint32_t n_tokens) const {
    return GGML_PAD(n_rows + n_tokens, KEY_STEP);
}

uint32_t llama_turbo_exact::n_copied(uint32_t n_tokens) const {
    return std::min(n_tokens, n_rows);
}

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

bool llama_turbo_exact::is_in_tail(int64_t from_query) const {
    return sizes.tail > 0 && from_query > -(int64_t) sizes.tail;
}

std::vector<llama_turbo_exact::sequence> llama_turbo_exact::sequences_after_state(const llama_kv_cells & cells) const {
    std::vector<sequence> res = sequences_of(cells, {});
    for (sequence & sequence : res) {
        sequence.next -= sizes.rewind;
    }

    return res;
}

llama_turbo_exact::rank llama_turbo_exact::rank_of(const llama_kv_cells &        cells,
                                                   uint32_t                      cell,
                                                   const std::vector<sequence> & sequences) const {
    const llama_pos pos = cells.pos_get(cell);
    if (pos < (int64_t) sizes.sink) {
        return { IN_SINK, -pos };
    }
    llama_pos from_end = std::numeric_limits<llama_pos>::min();  // of the sequence that it is nearest to, negative
    for (const sequence & sequence : sequences) {
        if (cells.seq_has(cell, sequence.id)) {
            from_end = std::max(from_end, pos - sequence.next);
        }
    }

    return { is_in_tail(from_end) ? IN_TAIL : NOT_NEEDED, from_end };
}

std::vector<llama_turbo_exact::rank> llama_turbo_exact::rank_rows(uint32_t                      stream,
                                                                  const llama_kv_cells &        cells,
                                                                  const std::vector<sequence> & sequences) const {
    std::vector<rank> res;
    for (int32_t cell : streams[stream].cell_of) {
        res.push_back(cell == NONE || cells.is_empty(cell) ? rank{ FREE, 0 } : rank_of(cells, cell, sequences));
    }

    return res;
}

uint32_t llama_turbo_exact::home_of(const llama_kv_cells & cells, uint32_t cell) const {
    const uint32_t pos = cells.pos_get(cell);

    uint32_t seq = 0;
    while (!cells.seq_has(cell, seq)) {
        ++seq;
    }
    const uint32_t row =
        pos < sizes.sink || n_part <= sizes.sink ? pos : sizes.sink + (pos - sizes.sink) % (n_part - sizes.sink);

    return (seq * n_part + row) % n_rows;
}

std::vector<uint32_t> llama_turbo_exact::choose_rows(const llama_kv_cells &        cells,
                                                     const std::vector<rank> &     rows,
                                                     const ranked &                tokens,
                                                     const std::vector<uint32_t> & new_cells) const {
    std::vector<bool>     is_taken(n_rows, false);
    std::vector<uint32_t> res;
    for (const auto & [rank, i] : tokens) {
        const uint32_t home = home_of(cells, new_cells[i]);
        const bool     fits = !is_taken[home] && !is_needed(rows[home]) && rows[home] < rank;
        is_taken[home]      = is_taken[home] || fits;
        res.push_back(fits ? home : n_rows);
    }

    ranked others;
    for (uint32_t row = 0; row < n_rows; ++row) {
        if (!is_taken[row]) {
            others.emplace_back(rows[row], row);
        }
    }
    const size_t n = std::count(res.begin(), res.end(), n_rows);
    std::partial_sort(others.begin(), others.begin() + n, others.end());
    auto other = others.begin();
    for (uint32_t & row : res) {
        row = row == n_rows ? other++->second : row;
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

std::vector<llama_turbo_exact::copy> llama_turbo_exact::place_all(uint32_t                      stream,
                                                                  const llama_kv_cells &        cells,
                                                                  const std::vector<uint32_t> & new_cells) {
    const std::vector<sequence> sequences = sequences_of(cells, new_cells);

    ranked tokens;
    for (uint32_t i = 0; i < new_cells.size(); ++i) {
        tokens.emplace_back(rank_of(cells, new_cells[i], sequences), i);
    }
    const std::vector<uint32_t> rows = choose_rows(cells, rank_rows(stream, cells, sequences), tokens, new_cells);

    std::vector<copy> res;
    for (uint32_t i = 0; i < new_cells.size(); ++i) {
        assign(stream, rows[i], new_cells[i]);
        res.push_back({ i, rows[i] });
    }

    return res;
}

std::vector<llama_turbo_exact::copy> llama_turbo_exact::place_needed(uint32_t                      stream,
                                                                     const llama_kv_cells &        cells,
                                                                     const std::vector<uint32_t> & new_cells) {
    const std::vector<sequence> sequences = sequences_of(cells, {});
    const uint32_t              n         = n_copied(new_cells.size());
    const std::vector<rank>     ranks     = rank_rows(stream, cells, sequences);

    ranked tokens;
    for (uint32_t i = 0; i < new_cells.size(); ++i) {
        tokens.emplace_back(rank_of(cells, new_cells[i], sequences), i);
    }
    std::sort(tokens.rbegin(), tokens.rend());
    tokens.resize(n);
    const std::vector<uint32_t> rows = choose_rows(cells, ranks, tokens, new_cells);

    std::vector<copy> res;
    for (uint32_t i = 0; i < n; ++i) {
        const auto & [rank, token] = tokens[i];
        const bool is_worth        = is_needed(rank) || rows[i] == home_of(cells, new_cells[token]);
        if (i > 0 && (!is_worth || ranks[rows[i]] >= rank)) {
            res.push_back(res.front());
            continue;
        }
        assign(stream, rows[i], new_cells[token]);
        res.push_back({ token, rows[i] });
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

void llama_turbo_exact::split_mask(uint32_t                      stream,
                                   const llama_kv_cells &        cells,
                                   const std::vector<uint32_t> & behind,
                                   llama_pos                     pos,
                                   uint16_t *                    mask,
                                   int64_t                       n_kv,
                                   uint16_t *                    exact_mask,
                                   int64_t                       n_keys) const {
    std::fill(exact_mask, exact_mask + n_keys, HALF_MINUS_INF);

    const auto move = [&](int32_t cell, uint32_t key) {
        const int64_t key_pos = cells.pos_get(cell);
        if (key_pos < sizes.sink || is_in_tail(key_pos - pos)) {
            std::swap(exact_mask[key], mask[cell]);
        }
    };
    for (uint32_t row = 0; row < n_rows; ++row) {
        const int32_t cell = streams[stream].cell_of[row];
        if (cell != NONE && cell < n_kv && !cells.is_empty(cell)) {
            move(cell, row);
        }
    }
    for (uint32_t i = 0; i < behind.size(); ++i) {
        move(behind[i], n_rows + i);
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
        if (row != NONE && is_needed(rank_of(cells, state_cells[i], sequences))) {
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
            for_runs(rows,
                     [&](int64_t row, size_t n) { io.write_tensor(tensor, row * tensor->nb[1], n * tensor->nb[1]); });
        }
    }
}

// The cells that copies of a state are of. False: the state is damaged.
static bool read_copied_cells(llama_io_read_i &             io,
                              uint32_t                      n_copies,
                              const std::vector<uint32_t> & state_cells,
                              std::vector<uint32_t> &       copied) {
    std::vector<bool> is_copied(state_cells.size(), false);
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

    return true;
}

std::vector<int64_t> llama_turbo_exact::place_state(uint32_t                      stream,
                                                    const llama_kv_cells &        cells,
                                                    const std::vector<uint32_t> & copied) {
    const std::vector<sequence> sequences = sequences_after_state(cells);
    const std::vector<rank>     ranks     = rank_rows(stream, cells, sequences);

    ranked wanted;
    for (uint32_t i = 0; i < copied.size(); ++i) {
        wanted.emplace_back(rank_of(cells, copied[i], sequences), i);
    }
    std::sort(wanted.rbegin(), wanted.rend());
    const size_t n_needed =
        std::count_if(wanted.begin(), wanted.end(), [](const auto & one) { return is_needed(one.first); });
    const size_t n_free = std::count_if(ranks.begin(), ranks.end(), [](const rank & one) { return !is_needed(one); });
    wanted.resize(std::min(n_needed, n_free));
    const std::vector<uint32_t> chosen = choose_rows(cells, ranks, wanted, copied);

    std::vector<int64_t> rows(copied.size(), NONE);
    for (size_t i = 0; i < wanted.size(); ++i) {
        const uint32_t index = wanted[i].second;
        assign(stream, chosen[i], copied[index]);
        rows[index] = (int64_t) stream * n_rows + chosen[i];
    }

    return rows;
}

void llama_turbo_exact::read_rows(llama_io_read_i & io, const std::vector<int64_t> & rows) const {
    std::vector<uint8_t> unused;
    for (const auto & [il, layer] : layers) {
        for (ggml_tensor * tensor : { layer.k, layer.v }) {
            for_runs(rows, [&](int64_t row, size_t n) {
                if (row == NONE) {
                    unused.resize(n * tensor->nb[1]);
                    io.read(unused.data(), unused.size());
                } else {
                    io.read_tensor(tensor, row * tensor->nb[1], n * tensor->nb[1]);
                }
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

    std::vector<uint32_t> copied;
    if (!read_copied_cells(io, n_copies, state_cells, copied)) {
        return false;
    }
    read_rows(io, place_state(stream, cells, copied));

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

#include "state.h"

#include "compat.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "parts.h"

#include <algorithm>

static constexpr uint32_t SIZES_STATE      = 0x5A495354;  // "TSIZ"
static constexpr uint32_t CALIBRATED_STATE = 0x4C414354;  // "TCAL"
static constexpr uint32_t EXACT_STATE      = 0x43455854;  // "TXEC"

static bool has_turbo_types(const llama_kv_cache & kv) {
    const auto & layers = llama_turbo_access::layers(kv);

    return std::any_of(layers.begin(), layers.end(), [](const auto & layer) {
        return ggml_is_turbo(layer.k->type) || (layer.v && ggml_is_turbo(layer.v->type));
    });
}

static std::vector<uint32_t> cells_in(const std::vector<std::pair<uint32_t, uint32_t>> & ranges) {
    std::vector<uint32_t> cells;
    for (const auto & [begin, end] : ranges) {
        for (uint32_t cell = begin; cell < end; ++cell) {
            cells.push_back(cell);
        }
    }

    return cells;
}

void llama_turbo_write_state(const llama_kv_cache &                             kv,
                             llama_io_write_i &                                 io,
                             uint32_t                                           stream,
                             const std::vector<std::pair<uint32_t, uint32_t>> & ranges) {
    const llama_turbo_parts *      parts      = llama_turbo_access::parts(kv);
    const llama_turbo_calibrated * calibrated = parts ? parts->calibrated.get() : nullptr;
    const llama_turbo_exact *      exact      = parts ? parts->exact.get() : nullptr;

    if (llama_turbo_access::has_rot_sizes() && (calibrated || exact || has_turbo_types(kv))) {
        io.write(&SIZES_STATE, sizeof(SIZES_STATE));
    }
    if (calibrated) {
        io.write(&CALIBRATED_STATE, sizeof(CALIBRATED_STATE));
        io.write(&calibrated->digest, sizeof(calibrated->digest));
    }
    if (exact) {
        io.write(&EXACT_STATE, sizeof(EXACT_STATE));
        exact->write(io, stream, llama_turbo_access::cells(kv)[stream], cells_in(ranges));
    }
}

//
// reading: each takes its part, and reads the word behind it
//

static uint32_t read_word(llama_io_read_i & io) {
    uint32_t word;
    io.read(&word, sizeof(word));

    return word;
}

static bool read_layout(const llama_kv_cache & kv, llama_io_read_i & io, uint32_t & word) {
    const bool has_sizes = word == SIZES_STATE;
    const bool is_marked = has_sizes || word == CALIBRATED_STATE || word == EXACT_STATE;
    if (has_sizes && !llama_turbo_access::has_rot_sizes()) {
        LLAMA_LOG_ERROR(
            "%s: the state was saved by a build of a newer llama.cpp, whose states have another layout: save it again "
            "with this one\n",
            __func__);
        return false;
    }
    if (llama_turbo_access::has_rot_sizes() && !has_sizes && (is_marked || has_turbo_types(kv))) {
        LLAMA_LOG_ERROR(
            "%s: the state was saved by a build of an older llama.cpp, whose states have another layout, or with other "
            "cache types: save it again with this one\n",
            __func__);
        return false;
    }
    if (has_sizes) {
        word = read_word(io);
    }

    return true;
}

static bool read_calibration(const llama_turbo_calibrated * calibrated, llama_io_read_i & io, uint32_t & word) {
    const bool is_state_calibrated = word == CALIBRATED_STATE;
    if (!is_state_calibrated && !calibrated) {
        return true;
    }

    const char * hint =
        "give the same --cache-calibration to the program that saves a state and to the one that loads it; of an "
        "automatic one keep the file in the "
        "cache folder, or copy it along";
    if (!is_state_calibrated) {
        LLAMA_LOG_ERROR("%s: the state was saved without a calibration, this cache has one: %s\n", __func__, hint);
        return false;
    }
    const uint32_t digest = read_word(io);
    if (!calibrated) {
        LLAMA_LOG_ERROR("%s: the state was saved with calibration %08x, this cache has none: %s\n", __func__, digest,
                        hint);
        return false;
    }
    if (digest != calibrated->digest) {
        LLAMA_LOG_ERROR("%s: the state was saved with calibration %08x, this cache has %08x: %s\n", __func__, digest,
                        calibrated->digest, hint);
        return false;
    }
    word = read_word(io);

    return true;
}

bool llama_turbo_read_state(const llama_kv_cache &        kv,
                            llama_io_read_i &             io,
                            uint32_t                      stream,
                            const std::vector<uint32_t> & cells,
                            uint32_t &                    v_trans) {
    const llama_turbo_parts * parts = llama_turbo_access::parts(kv);
    llama_turbo_exact *       exact = parts ? parts->exact.get() : nullptr;

    if (!read_layout(kv, io, v_trans) || !read_calibration(parts ? parts->calibrated.get() : nullptr, io, v_trans)) {
        return false;
    }
    if (exact) {
        exact->forget(stream, cells);
    }
    if (v_trans == EXACT_STATE) {
        const uint32_t n_copies = read_word(io);
        if (!exact) {
            llama_turbo_exact::skip(io, n_copies);
        } else if (!exact->read(io, n_copies, stream, llama_turbo_access::cells(kv)[stream], cells)) {
            return false;
        }
        v_trans = read_word(io);
    }

    return true;
}

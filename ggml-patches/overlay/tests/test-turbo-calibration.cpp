// Calibration of a KV cache must not change what a model computes, whatever the numbers in the file are.
//
//   test-turbo-calibration MODEL SCENARIO TYPE_K TYPE_V [-t THREADS] [-v]
//
// The files are random: scales over two decades, not the same in the two channels of a RoPE pair, and means larger than the keys.

#include "test-turbo-calibration.h"

#include <numeric>

//
// equal: the same logits
//

static void test_equal(const setup & types) {
    GGML_UNUSED(types);

    setup flash      = f32_setup();
    flash.flash_attn = LLAMA_FLASH_ATTN_TYPE_ENABLED;

    setup half  = f32_setup();
    half.type_k = GGML_TYPE_F16;
    half.type_v = GGML_TYPE_F16;

    setup exact      = half;
    exact.flash_attn = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    exact.sink       = "4";
    exact.tail       = "8";

    const struct {
        const char * what;
        setup        s;
        double       bound;
    } caches[] = {
        { "f32",                  f32_setup(),          nmse_equal() },
        { "f32, rotated",         rotated(f32_setup()), nmse_equal() },
        { "f32, flash attention", flash,                NMSE_HALF    },
        { "f16",                  half,                 NMSE_HALF    },
        { "f16, exact",           exact,                NMSE_HALF    },
    };

    const std::pair<const char *, part> files[] = {
        { "K centered",  K_MEAN     },
        { "K scaled",    K_SCALE    },
        { "K mapped",    K_MAP      },
        { "V centered",  V_MEAN     },
        { "V scaled",    V_SCALE    },
        { "all, scaled", ALL_SCALED },
        { "all, mapped", ALL        },
    };

    for (const auto & cache : caches) {
        const logits_t expected = prompt_and_generate(session::make(cache.s));
        for (const auto & [what, part] : files) {
            if ((part == K_MEAN || part == V_MEAN) && !can_center(part)) {
                continue;
            }
            const calibration_file file = random_file(part);
            const logits_t         got  = prompt_and_generate(session::make(with(cache.s, file)));
            check_at_most(std::string(cache.what) + ": " + what, nmse(expected, got), cache.bound);
        }
    }

    setup no_offload     = f32_setup();
    no_offload.on_device = false;

    const calibration_file file     = random_file(ALL);
    const logits_t         expected = prompt_and_generate(session::make(f32_setup()));
    check_at_most("f32, cache in host memory: all",
                  nmse(expected, prompt_and_generate(session::make(with(no_offload, file)))), nmse_equal());
}

//
// stored: the cache holds what the file says
//

// Numbers of the layers of a cache, in the order of the state.
static std::vector<uint32_t> layers_of_cache(size_t cache, size_t n_caches) {
    std::vector<uint32_t> res;
    for (uint32_t il : kv_layers()) {
        if (n_caches == 1 || model->hparams.is_swa(il) == (cache == 1)) {
            res.push_back(il);
        }
    }
    return res;
}

// Error of the rows of one side of the cache against what plain rows and the file give.
static double stored_error(saved_state & plain, saved_state & got, const calibration_file & file, bool is_k) {
    logits_t expected_rows;
    logits_t rows;

    for (size_t c = 0; c < plain.caches.size(); ++c) {
        const std::vector<uint32_t> layers = layers_of_cache(c, plain.caches.size());
        for (size_t i = 0; i < layers.size(); ++i) {
            const saved_stream & a = plain.caches[c].at(0);
            const saved_stream & b = got.caches[c].at(0);
            const saved_tensor & x = is_k ? a.k.at(i) : a.v.at(i);
            const saved_tensor & y = is_k ? b.k.at(i) : b.v.at(i);

            const std::vector<float> mean  = file.values(layers[i], is_k ? "k_mean" : "v_mean");
            const std::vector<float> scale = file.values(layers[i], is_k ? "k_scale" : "v_scale");
            const std::vector<float> map   = is_k ? file.values(layers[i], "k_map") : std::vector<float>();
            const size_t             n     = is_k ? model->hparams.n_embd_head_k(layers[i]) : 1;

            for (size_t cell = 0; cell < a.cells.size(); ++cell) {
                const float *      from = (const float *) plain.row(x, cell);
                const float *      to   = (const float *) got.row(y, cell);
                std::vector<float> centered(from, from + x.row_size / sizeof(float));
                for (size_t j = 0; j < centered.size(); ++j) {
                    centered[j] -= mean.empty() ? 0.0f : mean[j];
                }
                for (size_t j = 0; j < centered.size(); ++j) {
                    const float * head = centered.data() + j / n * n;
                    expected_rows.push_back(map.empty() ? centered[j] * scale[j] :
                                                          std::inner_product(head, head + n, map.data() + j * n, 0.0f));
                    rows.push_back(to[j]);
                }
            }
        }
    }

    return nmse(expected_rows, rows);
}

static void test_stored(const setup & types) {
    GGML_UNUSED(types);

    setup flash      = f32_setup();
    flash.flash_attn = LLAMA_FLASH_ATTN_TYPE_ENABLED;

    const session plain = session::make(flash);
    plain.decode(text(16));
    saved_state expected = read_state(plain);

    for (part parts : { ALL_SCALED, ALL }) {
        const calibration_file file  = random_file(parts);
        const calibration_file other = random_file(parts, 1);

        const session calibrated = session::make(with(flash, file));
        check_cache_line_has("the log tells it", " cal=");
        calibrated.decode(text(16));
        saved_state got = read_state(calibrated);

        // flash attention reads f16, so layers behind the first differ by its rounding
        check_at_most("K is stored as the file says", stored_error(expected, got, file, true), NMSE_HALF);
        check_at_most("V is stored as the file says", stored_error(expected, got, file, false), NMSE_HALF);
        check_at_least("control: K of another file", stored_error(expected, got, other, true), NMSE_MISTAKE);
        check_at_least("control: V of another file", stored_error(expected, got, other, false), NMSE_MISTAKE);
    }
}

//
// types: scales that are powers of two change no bit, whatever the type
//

static void test_types(const setup & types) {
    calibration_file file("types");
    for (uint32_t il : kv_layers()) {
        file.add(il, "k_scale", model->hparams.n_embd_head_k(il), [&] { return il % 2 == 0 ? 2.0f : 0.5f; });
        file.add(il, "v_scale", model->hparams.n_embd_head_v(il), [&] { return il % 2 == 0 ? 0.25f : 4.0f; });
    }
    file.write();

    // f16 has fewer bits for values below 6e-5
    const bool is_half = types.type_k == GGML_TYPE_F16 || types.type_v == GGML_TYPE_F16;

    const auto compare = [&](const char * what, const logits_t & expected, const logits_t & got) {
        if (is_half) {
            check_at_most(what, nmse(expected, got), nmse_equal());
        } else {
            check_same(what, expected, got);
        }
    };
    compare("scales that are powers of two", prompt_and_generate(session::make(types)),
            prompt_and_generate(session::make(with(types, file))));

    if (llama_memory_can_shift(session::make(types).memory()) && !llama_model_is_hybrid(model)) {
        compare("... and a shift", shift_and_continue(session::make(types), 1),
                shift_and_continue(session::make(with(types, file)), 1));
    }
}

//
// refusals
//

static void check_file_refused(const std::string & what, calibration_file & file, const std::string & reason) {
    file.write();
    check_no_session(what, with(f32_setup(), file), "calibration " + file.path + ": " + reason);
}

static float one() {
    return 1.0f;
}

// No file, a file of another kind, and parts of a file.
static void check_files() {
    setup none       = f32_setup();
    none.calibration = "test-turbo-calibration-missing.gguf";
    check_no_session("a missing file", none, "calibration test-turbo-calibration-missing.gguf: No such file");

    setup own       = f32_setup();
    own.calibration = model_path;
    check_no_session("the model itself", own, "no calibration: write one with turbo-gguf calibrate");

    {
        const calibration_file file = random_file(ALL);
        for (int percent : { 0, 3, 30, 60, 99 }) {
            FILE *  in = fopen(file.path.c_str(), "rb");
            bytes_t bytes(1 << 24);
            bytes.resize(fread(bytes.data(), 1, bytes.size(), in));
            fclose(in);

            calibration_file cut("cut");
            FILE *           out = fopen(cut.path.c_str(), "wb");
            fwrite(bytes.data(), 1, bytes.size() * percent / 100, out);
            fclose(out);
            check_no_session("truncated to " + std::to_string(percent) + " %", with(f32_setup(), cut), "truncated");
        }
    }
}

static void check_metadata() {
    {
        calibration_file file = random_file(ALL);
        file.version          = 1;
        check_file_refused("another version", file, "it has version 1, this build reads version 2: write it again");
    }
    {
        calibration_file file = random_file(ALL);
        file.arch             = "mamba";
        check_file_refused("another architecture", file, "it was made for the architecture mamba, this model is ");
    }
    {
        calibration_file file = random_file(ALL);
        file.fingerprint      = "00000000";
        check_file_refused(
            "another model", file,
            "it was made for another model: its norms have the fingerprint 00000000, those of this one " +
                llama_turbo_model_fingerprint(*model));
    }
    {
        calibration_file file("empty");
        check_file_refused("no layer", file, "it has no layer");
    }
}

static void check_tensors() {
    const uint32_t    il    = kv_layers().front();
    const std::string layer = "blk." + std::to_string(il) + ".";

    {
        calibration_file file("unknown");
        file.add(il, "q_mean", model->hparams.n_embd_head_k(il), one);
        check_file_refused("an unknown tensor", file, "unknown tensor " + layer + "q_mean");
    }
    {
        calibration_file file("layer");
        file.add(il, "k_scale", model->hparams.n_embd_head_k(il), one);
        file.tensors.back().name = "blk.99.k_scale";
        check_file_refused("a layer that there is not", file, "blk.99.k_scale: this model has no KV cache in layer 99");
    }
    {
        calibration_file file("head");
        file.add(il, "k_scale", model->hparams.n_embd_head_k(il) / 2, one);
        check_file_refused("another head size", file, layer + "k_scale: f32 [");
    }
    {
        calibration_file file("heads");
        file.add(il, "v_scale", model->hparams.n_embd_head_v(il), one);
        file.tensors.back().n_embd /= 2;
        file.tensors.back().n_head *= 2;
        check_file_refused("another number of heads", file, layer + "v_scale: f32 [");
    }
}

static void check_values() {
    const uint32_t    il    = kv_layers().front();
    const std::string layer = "blk." + std::to_string(il) + ".";

    for (float wrong : { 0.0f, -1.0f, INFINITY, NAN, 1e9f, 1e-9f }) {
        calibration_file file("scale");
        file.add(il, "v_scale", model->hparams.n_embd_head_v(il), one);
        file.tensors.back().values[3] = wrong;
        check_file_refused(format("a scale of %g", wrong), file,
                           layer + "v_scale: a scale is not within 2^-20 and 2^20");
    }
    for (part what : { K_MEAN, V_MEAN }) {
        const bool        is_k = what == K_MEAN;
        const std::string name = is_k ? "k_mean" : "v_mean";
        calibration_file  file("mean");
        file.add(il, name.c_str(), is_k ? model->hparams.n_embd_head_k(il) : model->hparams.n_embd_head_v(il),
                 [] { return 0.0f; });
        if (can_center(what)) {
            file.tensors.back().values[3] = NAN;
            check_file_refused("a mean that is no number", file, layer + name + ": a value is not finite");
        } else {
            check_file_refused("a mean where there can't be one", file,
                               layer + name + (is_k ? ": keys" : ": values") + " of this model can't be centered: ");
        }
    }
}

static void check_maps() {
    const uint32_t    il    = kv_layers().front();
    const std::string layer = "blk." + std::to_string(il) + ".";

    const auto check_maps_refused = [&](const char * what, const auto & change, const std::string & reason) {
        std::mt19937                          random(0);
        std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);

        calibration_file file("maps");
        file.add_maps(il, [&] { return uniform(random); });
        change(file.tensors);
        check_file_refused(what, file, layer + reason);
    };
    using tensors = std::vector<calibration_file::tensor>;

    check_maps_refused("a map of K alone", [](tensors & t) { t.pop_back(); }, "k_map: it has to stand beside q_map");
    check_maps_refused(
        "a map that is not the inverse", [](tensors & t) { t[1].values[1] += 1.0f; },
        "k_map: q_map is not its inverse, transposed");
    check_maps_refused("a map of another shape", [](tensors & t) { t[0].n_to /= 2, t[0].n_head *= 2; }, "k_map: f32 [");
    check_maps_refused(
        "a map that is no number", [](tensors & t) { t[0].values[5] = NAN; }, "k_map: an element is not within 2^20");

    calibration_file file("map-and-scale");
    file.add_maps(il, [] { return 0.5f; });
    file.add(il, "k_scale", model->hparams.n_embd_head_k(il), one);
    check_file_refused("a map and scales", file, layer + "k_map: it has to stand beside q_map, and not beside k_scale");
}

static void test_refusals(const setup & types) {
    GGML_UNUSED(types);

    check_files();
    check_metadata();
    check_tensors();
    check_values();
    check_maps();

    // one layer is enough, and the environment is read anew for each context
    const uint32_t   il = kv_layers().front();
    calibration_file file("one");
    file.add(il, "v_scale", model->hparams.n_embd_head_v(il), one);
    file.write();
    check("one layer is enough", session(with(f32_setup(), file)).ctx != nullptr);
    check_cache_line_has("... and the log counts it", " | calibrated K 0 0 V 0 1 of ");
    const session plain = session::make(f32_setup());
    check("no calibration without the variable", !cache_line_has(" cal=") && !cache_line_has("calibrated"));
}

//
// main
//

int main(int argc, char ** argv) {
    const test_program program{
        "test-turbo-calibration",
        {
          { "equal", test_equal },
          { "stored", test_stored },
          { "types", test_types },
          { "shift", test_shift },
          { "sequences", test_sequences },
          { "state", test_state },
          { "refusals", test_refusals },
          },
        /*needs_turbo =*/
        false,
    };

    return program.main(argc, argv);
}

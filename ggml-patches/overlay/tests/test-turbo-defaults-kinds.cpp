// Defaults in contexts of all kinds: sizes, planned memory, embeddings, drafts, and the architectures of upstream. Scenarios of
// test-turbo-defaults.

#include "ggml-cpp.h"
#include "gguf.h"
#include "test-turbo-defaults.h"

#include <cmath>
#include <set>

//
// sizes
//

static void check_tail(uint32_t n_ctx, uint32_t n_seq, const std::string & exact, bool unified = false) {
    setup s   = with_defaults({ GGML_TYPE_TURBO3_0, GGML_TYPE_TURBO3_0 });
    s.n_ctx   = n_ctx;
    s.n_seq   = n_seq;
    s.unified = unified;

    const session res = session::make(s);
    check_cache_line_has(std::to_string(n_seq) + " of " + std::to_string(n_ctx) + (unified ? " in all" : " each"),
                         exact);
    for (uint32_t seq : std::set<uint32_t>{ 0, n_seq - 1 }) {
        check("... computes", !res.decode(text(12, 0, seq)).empty());
    }
}

void test_sizes(const setup &) {
    check_tail(2048, 1, " sink=4 tail=64 ");
    check_tail(1024, 1, " sink=4 tail=64 ");
    check_tail(700, 1, " sink=4 tail=64 ");  // of 768 cells
    check_tail(512, 1, " sink=4 tail=44 ");
    check_tail(256, 1, " sink=4 tail=12 ");
    check_tail(100, 1, " sink=4 tail=12 ");
    check_tail(64, 4, " sink=4 tail=12 ");
    check_tail(1024, 4, " sink=4 tail=12 ", /*unified =*/true);
    check_tail(512, 4, " | no exact tokens: 128 cells for each sequence are too few", /*unified =*/true);

    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 0;  // that of the model, 1024
    params.type_k               = GGML_TYPE_TURBO3_0;

    log_text.clear();
    const llama_context_ptr ctx{ llama_init_from_model(model, params) };
    check_cache_line_has("a context of the model's own size", " sink=4 tail=64 ");
}

//
// planned memory
//

// What the cache line says from a word on, without the rest of the log.
static std::string part_of_line(const std::string & head) {
    const std::string lines = cache_lines();
    const size_t      at    = lines.find(head);
    return at == std::string::npos ? "" : lines.substr(at, lines.find('\n', at) - at);
}

static std::string size_of_buffers() {
    std::string res;
    for (const char * head : { "llama_kv_cache: size = ", " compute buffer size = " }) {
        const size_t at = log_text.find(head);
        res += at == std::string::npos ? "?" : log_text.substr(at, log_text.find('\n', at) - at) + "\n";
    }
    return res;
}

// Without mapping the file. Older upstreams have a flag for it, later ones a mode, of which 0 is none.
template <typename T> static auto map_no_file(T & params, int) -> decltype((void) params.load_mode) {
    params.load_mode = static_cast<decltype(params.load_mode)>(0);
}

template <typename T> static void map_no_file(T & params, long) {
    params.use_mmap = false;
}

void test_planned(const setup & types) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers       = 0;
    params.no_alloc           = true;
    map_no_file(params, 0);

    llama_model *         loaded = model;
    const llama_model_ptr planned{ llama_model_load_from_file(model_path.c_str(), params) };
    model                   = planned.get();
    const session     plan  = session::make(with_defaults(types));
    const std::string line  = part_of_line(" | ");
    const std::string sizes = size_of_buffers();
    check("a planned context reads nothing", !has_read_text() && kept_files().empty());
    check_cache_line_has("... and counts on a calibration", " cal=");
    check_cache_line_has("... and on copies", " | copies ");
    model = loaded;

    const session real = session::make(with_defaults(types));
    report(part_of_line(" | ") == line, "... as the real one has them", part_of_line(" | ") + " for" + line);
    report(size_of_buffers() == sizes, "... with the same buffers", size_of_buffers() + "for\n" + sizes);
}

//
// kinds of contexts
//

static void test_embeddings(const setup & types) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 256;
    params.type_k               = types.type_k;
    params.type_v               = types.type_v;
    params.embeddings           = true;
    params.pooling_type         = LLAMA_POOLING_TYPE_MEAN;

    forget_files();
    log_text.clear();
    const llama_context_ptr  ctx{ llama_init_from_model(model, params) };
    std::vector<llama_token> tokens(24, 70);
    check("a context for embeddings calibrates", has_read_text() && !digest_in_log().empty());
    check("... and computes", llama_decode(ctx.get(), llama_batch_get_one(tokens.data(), tokens.size())) == 0);
    const float * embedding = llama_get_embeddings_seq(ctx.get(), 0);
    check("... an embedding", embedding && std::isfinite(embedding[0]) && embedding[0] != 0.0f);
}

void test_kinds(const setup & types) {
    test_embeddings(types);

    const session one   = session::make(with_defaults(types));
    setup         draft = with_defaults(types);
    draft.other         = one.ctx.get();
    const session other = session::make(draft);
    check("a draft has the defaults of its types", !digest_in_log().empty() && cache_line_has(" sink=4 tail=12"));
    check("... and computes", !prompt_and_generate(other).empty());

    const session none = session::make(with_defaults({ GGML_TYPE_F16, GGML_TYPE_F16 }));
    check("f16 has none", digest_in_log().empty() && !cache_line_has(" sink=") && !cache_line_has("no calibration"));
    const session q8 = session::make(with_defaults({ GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }));
    check("types of upstream have none", digest_in_log().empty() && !cache_line_has(" sink="));
    const session asked = session::make(with_auto({ GGML_TYPE_Q4_0, GGML_TYPE_Q4_0 }));
    check("... unless they are asked to", !digest_in_log().empty() && !cache_line_has(" sink="));
    check("... and compute", !prompt_and_generate(asked).empty());

    for (const setup & s : {
             setup{ types.type_k,  GGML_TYPE_F16 },
             setup{ GGML_TYPE_F16, types.type_v  }
    }) {
        const session side = session::make(with_defaults(s));
        check("one side is enough", !digest_in_log().empty() && cache_line_has(" sink=4 tail=12"));
        check("... and computes", !prompt_and_generate(side).empty());
    }
    setup by_layer      = with_defaults({ GGML_TYPE_F16, GGML_TYPE_F16 });
    by_layer.layers_v   = std::string("0:") + ggml_type_name(types.type_v);
    const session layer = session::make(by_layer);
    check("one layer is enough", !digest_in_log().empty() && cache_line_has(" sink=4 tail=12"));
    check("... and computes", !prompt_and_generate(layer).empty());
}

// Of a model that has no KV cache, so that a type means nothing.
void test_encoder(const setup & types) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 256;
    params.n_ubatch             = 256;
    params.type_k               = types.type_k;
    params.type_v               = types.type_v;
    params.embeddings           = true;

    log_text.clear();
    const llama_context_ptr  ctx{ llama_init_from_model(model, params) };
    std::vector<llama_token> tokens(24, 7);
    check("an encoder has a context", ctx != nullptr);
    check("... for which it reads nothing", !has_read_text() && !log_has("calibrated"));
    check("... that computes", ctx && llama_encode(ctx.get(), llama_batch_get_one(tokens.data(), tokens.size())) == 0);
    const float * embedding = ctx ? llama_get_embeddings_seq(ctx.get(), 0) : nullptr;
    check("... an embedding", embedding && std::isfinite(embedding[0]) && embedding[0] != 0.0f);
}

//
// architectures
//

static llama_model_ptr load_without_vocabulary() {
    ggml_context *         data = nullptr;
    const gguf_context_ptr old{ gguf_init_from_file(model_path.c_str(), { /*no_alloc =*/false, &data }) };
    const ggml_context_ptr tensors{ data };
    const gguf_context_ptr file{ gguf_init_empty() };
    gguf_set_kv(file.get(), old.get());
    for (int64_t i = 0; i < gguf_get_n_tensors(old.get()); ++i) {
        gguf_add_tensor(file.get(), ggml_get_tensor(data, gguf_get_tensor_name(old.get(), i)));
    }
    const std::string arch = gguf_get_val_str(old.get(), gguf_find_key(old.get(), "general.architecture"));
    gguf_set_val_str(file.get(), "tokenizer.ggml.model", "none");
    gguf_set_val_u32(file.get(), (arch + ".vocab_size").c_str(), llama_vocab_n_tokens(llama_model_get_vocab(model)));

    const std::string path = "test-turbo-defaults-none.gguf";
    gguf_write_to_file(file.get(), path.c_str(), /*only_meta =*/false);

    llama_model_ptr res{ llama_model_load_from_file(path.c_str(), llama_model_default_params()) };
    std::filesystem::remove(path);
    return res;
}

static bool compute(llama_context * ctx, int n) {
    std::vector<llama_token> tokens;
    for (int i = 0; i < n; ++i) {
        tokens.push_back(5 + i * 7 % 90);
    }
    llama_batch batch = llama_batch_get_one(tokens.data(), n);
    if (llama_model_has_encoder(model) && n > 1 && llama_encode(ctx, batch) != 0) {
        return false;
    }
    if (!llama_model_has_decoder(model)) {
        return true;
    }
    if (llama_decode(ctx, batch) != 0) {
        return false;
    }
    const float * logits = llama_get_logits_ith(ctx, -1);
    return logits && std::isfinite(logits[0]);
}

static bool computes(const setup & s, const std::string & what) {
    const session made(s);
    if (!made.ctx) {
        return false;
    }
    check(what + " computes a prompt", compute(made.ctx.get(), 24));
    check("... and a token", compute(made.ctx.get(), 1));
    return true;
}

// Prints "plain" and "default", and how the contexts came out.
void test_architecture(const setup & types) {
    const bool is_plain = computes(types, "the type alone");
    printf("plain: %s\n", is_plain ? "works" : log_text.c_str());

    const bool is_default = computes(with_defaults(types), "the default");
    report(is_default == is_plain, "... where the type alone does", is_default ? "both" : log_text);
    printf("default: %s\n", cache_lines().c_str());
}

void test_no_vocabulary(const setup & types) {
    llama_model *         loaded = model;
    const llama_model_ptr bare   = load_without_vocabulary();
    forget_files();
    model = bare.get();
    check("without a vocabulary there is a context", computes(with_defaults(types), "it"));
    check_cache_line_has("... that says why it is not calibrated", " | no calibration: it has no vocabulary");
    check_cache_line_has("... and has its exact tokens", " sink=4 tail=12 ");
    check("... and no file is kept", kept_files().empty());
    model = loaded;
}

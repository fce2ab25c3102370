// Logits of a model for tokens that are always the same, as f32 in a file: for comparisons of two files of a model.
//
//   test-turbo-logits MODEL TYPE_K TYPE_V FILE [N_TOKENS]
//
// Settings of the cache come from the environment (src/turbo/settings.h). An f32 cache is attended without flash attention, which would make an
// f16 copy of it.

#include "llama-cpp.h"
#include "llama.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

static ggml_type type_of(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * found = ggml_type_name((ggml_type) i);
        if (found && name == found) {
            return (ggml_type) i;
        }
    }
    fprintf(stderr, "unknown type %s\n", name.c_str());
    exit(2);
}

static std::vector<llama_token> some_tokens(size_t n, int32_t n_vocab) {
    std::vector<llama_token> res(n);
    uint32_t                 state = 1;
    for (llama_token & token : res) {
        state = state * 1664525u + 1013904223u;
        token = (llama_token) ((state >> 8) % (uint32_t) n_vocab);
    }

    return res;
}

int main(int argc, char ** argv) {
    if (argc < 5) {
        fprintf(stderr, "usage: %s MODEL TYPE_K TYPE_V FILE [N_TOKENS]\n", argv[0]);
        return 2;
    }
    const size_t n_tokens = argc > 5 ? atoi(argv[5]) : 96;

    llama_backend_init();
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers       = 0;
    llama_model_ptr model{ llama_model_load_from_file(argv[1], model_params) };
    if (!model) {
        fprintf(stderr, "can't load %s\n", argv[1]);
        return 1;
    }

    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 256;
    params.n_batch              = 256;
    params.n_ubatch             = 32;  // so that the cache is read
    params.n_threads            = 1;
    params.n_threads_batch      = 1;
    params.type_k               = type_of(argv[2]);
    params.type_v               = type_of(argv[3]);
    params.flash_attn_type =
        params.type_v == GGML_TYPE_F32 ? LLAMA_FLASH_ATTN_TYPE_DISABLED : LLAMA_FLASH_ATTN_TYPE_AUTO;
    llama_context_ptr ctx{ llama_init_from_model(model.get(), params) };
    if (!ctx) {
        fprintf(stderr, "can't make a context\n");
        return 1;
    }

    const int32_t                  n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model.get()));
    const std::vector<llama_token> tokens  = some_tokens(n_tokens, n_vocab);

    llama_batch batch = llama_batch_init((int32_t) n_tokens, 0, 1);
    for (size_t i = 0; i < n_tokens; ++i) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = (llama_pos) i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = true;
    }
    batch.n_tokens = (int32_t) n_tokens;
    const int rc   = llama_decode(ctx.get(), batch);
    llama_batch_free(batch);
    if (rc != 0) {
        fprintf(stderr, "llama_decode gives %d\n", rc);
        return 1;
    }

    FILE * file = fopen(argv[4], "wb");
    if (!file) {
        perror(argv[4]);
        return 1;
    }
    for (size_t i = 0; i < n_tokens; ++i) {
        fwrite(llama_get_logits_ith(ctx.get(), (int32_t) i), sizeof(float), n_vocab, file);
    }

    return fclose(file) == 0 ? 0 : 1;
}

// What turbo types get by default: the calibration that the first context makes, where it is kept, and who may make one at the same time.

#include "test-turbo-defaults.h"

#include <atomic>
#include <functional>
#include <mutex>
#include <thread>

//
// contexts and models of one process
//

static void test_contexts(const setup & types) {
    const session     first  = session::make(with_defaults(types));
    const std::string digest = digest_in_log();
    check("the first context reads a text", has_read_text());
    check_log_has("... and keeps what it found", "wrote " + cache_folder().string());
    check("... in one file", kept_files().size() == 1);
    check_cache_line_has("... for all of its layers", " of " + std::to_string(llama_model_n_layer(model)));
    check_cache_line_has("... with a sink and a tail", " sink=4 tail=12 ");
    const logits_t expected = prompt_and_generate(first);

    const session second = session::make(with_defaults(types));
    check("the second context reads none", !has_read_text());
    check("... and has the same calibration", digest_in_log() == digest && !digest.empty());
    check_same("... and computes the same", expected, prompt_and_generate(second));

    setup on_host       = with_defaults(types);
    on_host.on_device   = false;
    const session third = session::make(on_host);
    check("... as one with its cache in host memory", !has_read_text() && digest_in_log() == digest);

    llama_model *         one = model;
    const llama_model_ptr other{ llama_model_load_from_file(model_path.c_str(), llama_model_default_params()) };
    model                = other.get();
    const session fourth = session::make(with_defaults(types));
    check("a second model from the same file reads none", !has_read_text() && digest_in_log() == digest);
    check_same("... and computes the same", expected, prompt_and_generate(fourth));
    model = one;

    forget_files();
    const session fifth = session::make(with_defaults(types));
    check("without the file the text is read again", has_read_text() && kept_files().size() == 1);
    check("... and gives the same calibration", digest_in_log() == digest);
}

static void test_less_error(const setup & types) {
    const logits_t expected = prompt_and_generate(session::make(f32_setup()));

    const auto error_of = [&](const setup & s) {
        return nmse(expected, prompt_and_generate(session::make(s)));
    };
    const double plain      = error_of(types);
    setup        calibrated = types;
    calibrated.calibration  = "auto";
    setup exact             = types;
    exact.sink              = "";
    exact.tail              = "";
    check_at_most("a calibration takes error away", error_of(calibrated), 0.85 * plain);
    check_at_most("... an exact sink and tail, too", error_of(exact), 0.9 * plain);
    check_at_most("... and both more", error_of(with_defaults(types)), 0.75 * plain);
}

//
// states
//

static void test_state(const setup & types) {
    session           first  = session::make(with_defaults(types));
    const std::string digest = digest_in_log();
    first.decode(text(80));
    const bytes_t  state    = get_state(first);
    const logits_t expected = generate(first, 8, 80);

    const auto continues = [&](const char * what, const session & s) {
        check(what, digest_in_log() == digest && set_state(s, state));
        check_float("... continues", expected, generate(s, 8, 80));  // copies lie in another order
    };
    continues("a state is read by a later context", session::make(with_defaults(types)));
    forget_files();
    continues("... by one that calibrates again", session::make(with_defaults(types)));
    forget_files();
    n_threads = 3;
    continues("... with another number of threads", session::make(with_defaults(types)));
    n_threads = 1;

    const session plain = session::make(types);
    check("one without a calibration refuses it", !set_state(plain, state));
    check_log_has("... and says what to do", "give the same --cache-calibration");

    setup other          = with_defaults(types);
    other.n_ctx          = 1024;
    const session larger = session::make(other);
    check_cache_line_has("a larger context has a longer tail", " tail=64 ");
    check("... and reads the state", set_state(larger, state));
    check_at_most("... and continues, as far as it has copies", nmse(expected, generate(larger, 8, 80)), NMSE_MISTAKE);
}

//
// threads
//

// The log of several threads, in place of the one of sessions.
struct shared_log {
    std::mutex  mutex;
    std::string text;

    shared_log() { llama_log_set(write, this); }

    ~shared_log() { llama_log_set(on_log, nullptr); }

    static void write(ggml_log_level, const char * line, void * user_data) {
        shared_log &                      self = *(shared_log *) user_data;
        const std::lock_guard<std::mutex> lock(self.mutex);
        self.text += line;
    }

    bool is_in_use() const {
        ggml_log_callback callback  = nullptr;
        void *            user_data = nullptr;
        llama_log_get(&callback, &user_data);
        return callback == write && user_data == this;
    }

    size_t count(const std::string & part) const {
        size_t res = 0;
        for (size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) {
            ++res;
        }
        return res;
    }
};

static llama_context_params bare_params(const setup & types) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx                = 256;
    params.n_threads            = n_threads;
    params.n_threads_batch      = n_threads;
    params.type_k               = types.type_k;
    params.type_v               = types.type_v;
    return params;
}

static void test_threads(const setup & types) {
    static constexpr int N_THREADS = 3;
    static constexpr int N_ROUNDS  = 3;

    for (int round = 0; round < N_ROUNDS; ++round) {
        forget_files();
        shared_log                     log;
        std::vector<llama_context_ptr> contexts(N_THREADS);
        std::atomic<int>               n_ready{ 0 };
        std::vector<std::thread>       threads;
        for (llama_context_ptr & ctx : contexts) {
            threads.emplace_back([&] {
                for (++n_ready; n_ready < N_THREADS;) {
                    std::this_thread::yield();
                }
                ctx.reset(llama_init_from_model(model, bare_params(types)));
            });
        }
        for (std::thread & thread : threads) {
            thread.join();
        }
        check("each thread has its context", contexts[0] && contexts[1] && contexts[2]);
        check("... the log is where it was", log.is_in_use());
        check("... and tells of three caches, and not of those that only measure",
              log.count("llama_kv_cache: size =") == 3);

        const size_t      at     = log.text.find(" cal=");
        const std::string digest = at == std::string::npos ? "none" : log.text.substr(at, 13);
        check("... all with the same calibration", log.count(digest) == N_THREADS);
        check("... in one file", kept_files().size() == 1);
    }
}

//
// interruption
//

static bool always(void * /*data*/) {
    return true;
}

static void test_interrupted(const setup & types) {
    llama_context_params params = bare_params(types);
    params.abort_callback       = always;

    log_text.clear();
    const llama_context_ptr interrupted{ llama_init_from_model(model, params) };
    check("an interrupted calibration leaves a context", interrupted != nullptr);
    check_cache_line_has("... without one", " | no calibration: it was interrupted");
    check("... that has its exact tokens", cache_line_has(" sink=4 tail=12"));
    check("... and no file", kept_files().empty());

    const session next = session::make(with_defaults(types));
    check("the next context makes it", has_read_text() && !digest_in_log().empty() && kept_files().size() == 1);
}

int main(int argc, char ** argv) {
    const test_program program{
        "test-turbo-defaults",
        {
          { "contexts", test_contexts },
          { "less-error", test_less_error },
          { "state", test_state },
          { "threads", test_threads },
          { "interrupted", test_interrupted },
          { "sizes", test_sizes },
          { "planned", test_planned },
          { "kinds", test_kinds },
          { "encoder", test_encoder },
          { "architecture", test_architecture },
          { "no-vocabulary", test_no_vocabulary },
          },
        /*needs_turbo =*/
        true,
    };
    return program.main(argc, argv);
}

// Writes a calibration of a model (src/turbo/calibrate.h), from texts of one's own. Run by turbo-gguf calibrate.
//
//   llama-turbo-calibrate -m MODEL -o FILE [-f TEXT]... [-n TOKENS] [-t THREADS] [-ngl N]
//
// Without a text it takes the one that is built in, as --cache-calibration auto does. -n: read so many tokens at most (default: 4096).
//
// Exit code: 0, 1 if something failed, 2 for a wrong command line or input.

#include "../../src/llama-model.h"
#include "../../src/turbo/auto-calibration.h"
#include "../../src/turbo/calibrate.h"
#include "llama-cpp.h"
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// A wrong command line, model or text.
struct input_error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct options {
    std::string              model;
    std::string              out;
    std::vector<std::string> texts;
    int                      n_tokens     = 4096;
    int                      n_threads    = 1;
    int                      n_gpu_layers = 0;
};

static options parse_options(int argc, char ** argv) {
    options res;
    for (int i = 1; i < argc; ++i) {
        const std::string name = argv[i];
        if (i + 1 == argc) {
            throw input_error(name + ": unknown, or without a value");
        }
        const std::string value = argv[++i];

        const std::map<std::string, int *> numbers = {
            { "-n",   &res.n_tokens     },
            { "-t",   &res.n_threads    },
            { "-ngl", &res.n_gpu_layers },
        };
        if (name == "-m") {
            res.model = value;
        } else if (name == "-o") {
            res.out = value;
        } else if (name == "-f") {
            res.texts.push_back(value);
        } else if (numbers.count(name) > 0) {
            *numbers.at(name) = atoi(value.c_str());
        } else {
            throw input_error(name + ": unknown option");
        }
    }
    if (res.model.empty() || res.out.empty() || res.n_tokens < 1 || res.n_threads < 1) {
        throw input_error("-m MODEL and -o FILE are needed, -n and -t are at least 1");
    }

    return res;
}

static std::string read_text(const std::string & path) {
    std::ifstream     file(path, std::ios::binary);
    std::stringstream content;
    content << file.rdbuf();
    if (!file || content.str().empty()) {
        throw input_error(path + ": can't be read, or empty");
    }

    return content.str();
}

static void on_log(ggml_log_level level, const char * text, void * /*user_data*/) {
    if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

static void run(const options & opts) {
    std::vector<std::string> text;
    for (const std::string & path : opts.texts) {
        text.push_back(read_text(path));
    }
    if (text.empty()) {
        text = llama_turbo_calibration_text();
    }

    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers       = opts.n_gpu_layers;
    llama_model_ptr model{ llama_model_load_from_file(opts.model.c_str(), model_params) };
    if (!model) {
        throw input_error(opts.model + ": failed to load the model");
    }
    if (const char * why = llama_turbo_cant_calibrate(*model)) {
        throw input_error(std::string("this model can't be calibrated: ") + why);
    }

    llama_context_params params = llama_context_default_params();
    params.n_threads            = opts.n_threads;
    params.n_threads_batch      = opts.n_threads;

    llama_turbo_calibrate_options options;
    options.n_tokens = opts.n_tokens;
    options.progress = [](int n_read, int n_all) {
        fprintf(stderr, "%d of %d tokens\n", n_read, n_all);
    };
    try {
        const auto calibration = llama_turbo_calibrate(*model, params, text, options);
        llama_turbo_save_calibration(*calibration, *model, opts.out);
        printf("%u tokens, %zu layers, digest %08x\n", calibration->n_tokens, calibration->layers.size(),
               calibration->digest());
        printf(
            "token %u of the first ones is the farthest: its K lies %.1f times as far from the mean as that of "
            "others\n",
            calibration->sink, calibration->sink_distance);
    } catch (const std::invalid_argument & err) {
        throw input_error(err.what());
    }
}

int main(int argc, char ** argv) {
    try {
        const options opts = parse_options(argc, argv);
        llama_log_set(on_log, nullptr);
        llama_backend_init();
        run(opts);
    } catch (const input_error & err) {
        fprintf(stderr, "error: %s\n", err.what());
        return 2;
    } catch (const std::exception & err) {
        fprintf(stderr, "error: %s\n", err.what());
        return 1;
    }

    return 0;
}

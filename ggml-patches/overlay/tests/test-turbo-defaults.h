#pragma once

// Contexts with what turbo types get by default: an automatic calibration, and an exact sink and tail (src/turbo/settings.h).
//
// Calibrations are kept in LLAMA_CACHE, which the caller sets to a folder of its own.

#include "test-turbo-session.h"

#include <filesystem>
#include <string>
#include <vector>

inline setup with_defaults(setup s) {
    s.calibration = "";
    s.sink        = "";
    s.tail        = "";
    return s;
}

inline setup with_auto(setup s) {
    s.calibration = "auto";
    return s;
}

inline std::filesystem::path cache_folder() {
    const char * folder = getenv("LLAMA_CACHE");
    if (!folder || !*folder) {
        printf("FAIL LLAMA_CACHE is not set\n");
        exit(1);
    }
    return folder;
}

// Names of all files there.
inline std::vector<std::string> kept_files() {
    std::vector<std::string> res;
    if (std::filesystem::exists(cache_folder())) {
        for (const auto & entry : std::filesystem::directory_iterator(cache_folder())) {
            res.push_back(entry.path().filename().string());
        }
    }
    return res;
}

inline void forget_files() {
    std::filesystem::remove_all(cache_folder());
}

// What the log says of the last session made.
inline bool has_read_text() {
    return log_has(" tokens to calibrate the KV cache");
}

// Digest of the calibration of the first cache, as it is logged; empty: none.
inline std::string digest_in_log() {
    static const std::string head = " cal=";

    const std::string lines = cache_lines();
    const size_t      at    = lines.find(head);
    return at == std::string::npos ? "" : lines.substr(at + head.size(), 8);
}

//
// scenarios in test-turbo-defaults-kinds.cpp
//

void test_sizes(const setup & types);
void test_planned(const setup & types);
void test_kinds(const setup & types);
void test_encoder(const setup & types);
void test_architecture(const setup & types);
void test_no_vocabulary(const setup & types);

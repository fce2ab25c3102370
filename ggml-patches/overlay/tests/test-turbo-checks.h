#pragma once

// Checks that print what they measured, and how far logits may differ.
//
// Every check prints the measured value and its bound. Where the maths says "the same", the bound is 0 (bit-identical) or float error. Where
// quantization is in play, it is bounded from both sides: an error that is too small means that something else than the type under test was
// cached.

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <utility>
#include <vector>

using logits_t = std::vector<float>;
using bytes_t  = std::vector<uint8_t>;

inline int         n_failed = 0;
inline std::string log_text;  // of llama, since the last session was made
inline bool        verbose = false;

//
// checks
//

inline void report(bool ok, const std::string & what, const std::string & measured) {
    printf("%-4s %-64s %s\n", ok ? "ok" : "FAIL", what.c_str(), measured.c_str());
    n_failed += !ok;
}

inline std::string format(const char * fmt, double a, double b = 0.0, double c = 0.0) {
    char buf[128];
    snprintf(buf, sizeof(buf), fmt, a, b, c);
    return buf;
}

inline void check(const std::string & what, bool ok) {
    report(ok, what, ok ? "yes" : "no");
}

inline void check_at_most(const std::string & what, double value, double bound) {
    report(value <= bound, what, format("nmse %.3e <= %.3e", value, bound));
}

inline void check_at_least(const std::string & what, double value, double bound) {
    report(value >= bound, what, format("nmse %.3e >= %.3e", value, bound));
}

inline void check_between(const std::string & what, double value, double lower, double upper) {
    report(value >= lower && value <= upper, what, format("nmse %.3e in [%.3e, %.3e]", value, lower, upper));
}

inline void check_count(const std::string & what, int64_t count, int64_t expected) {
    report(count == expected, what, format("%.0f, expected %.0f", (double) count, (double) expected));
}

// Normalized mean squared error, infinity for logits that aren't finite.
inline double nmse(const logits_t & expected, const logits_t & got) {
    if (expected.size() != got.size() || expected.empty()) {
        return std::numeric_limits<double>::infinity();
    }
    double err = 0.0;
    double sum = 0.0;
    for (size_t i = 0; i < expected.size(); ++i) {
        const double diff = (double) expected[i] - got[i];
        err += diff * diff;
        sum += (double) expected[i] * expected[i];
    }
    return std::isfinite(err) && sum > 0.0 ? err / sum : std::numeric_limits<double>::infinity();
}

// That of the median token, if logits are rows of `n_vocab`.
inline double nmse_of_median(const logits_t & expected, const logits_t & got, size_t n_vocab) {
    if (expected.size() != got.size() || expected.empty()) {
        return std::numeric_limits<double>::infinity();
    }
    std::vector<double> errors;
    for (size_t i = 0; i < expected.size(); i += n_vocab) {
        const auto row = [&](const logits_t & from) {
            return logits_t(from.begin() + i, from.begin() + i + n_vocab);
        };
        errors.push_back(nmse(row(expected), row(got)));
    }
    std::sort(errors.begin(), errors.end());
    return errors[errors.size() / 2];
}

inline void check_same(const std::string & what, const logits_t & expected, const logits_t & got) {
    const bool same = !expected.empty() && expected.size() == got.size() &&
                      memcmp(expected.data(), got.data(), expected.size() * sizeof(float)) == 0;
    report(same, what, same ? "bit-identical" : format("nmse %.3e, must be bit-identical", nmse(expected, got)));
}

inline bool log_has(const std::string & part) {
    return log_text.find(part) != std::string::npos;
}

inline void check_log_has(const std::string & what, const std::string & part) {
    report(log_has(part), what, (log_has(part) ? "'" : "not in the log: '") + part.substr(0, part.find('\n')) + "'");
}

// The lines that tell of caches: one for each, see src/turbo/log.h.
inline std::string cache_lines() {
    static const std::string head = "llama_turbo_cache: ";

    std::string res;
    for (size_t begin = 0; (begin = log_text.find(head, begin)) != std::string::npos; begin += head.size()) {
        res += log_text.substr(begin, log_text.find('\n', begin) + 1 - begin);
    }
    return res;
}

inline bool cache_line_has(const std::string & part) {
    return cache_lines().find(part) != std::string::npos;
}

inline void check_cache_line_has(const std::string & what, const std::string & part) {
    const bool        ok   = cache_line_has(part);
    const std::string name = "'" + part.substr(0, part.find('\n')) + "'";
    report(ok, what, ok ? name : name + " not in " + cache_lines());
}

// Whether the graph rotates K ('k'), or V ('v'), of all caches.
inline bool is_rotated(char side) {
    const std::string lines = cache_lines();
    const std::string head  = " | rotated ";

    bool found = false;
    for (size_t at = 0; (at = lines.find(head, at)) != std::string::npos; found = true) {
        at += head.size();
        if (lines[at + (side == 'k' ? 0 : 2)] != '1') {
            return false;
        }
    }
    return found;
}

// Float error only: measured 1e-13 to 4e-13.
constexpr double NMSE_FLOAT         = 3e-8;
// The same with Gemma 2, whose GELU rounds to f16 on the CPU: measured up to 3.3e-8 with AVX2.
constexpr double NMSE_FLOAT_GELU    = 1e-7;
// As above with one side of the cache in f16, or flash attention, which reads f32 as f16: measured up to 2e-6.
constexpr double NMSE_HALF          = 1e-5;
// The same values in another batch: float error may move some across a decision level of the quantizer, or choose another path of a
// trellis, for all values of a block: measured up to 1e-3 for the latter.
constexpr double NMSE_BATCH         = 1e-3;
constexpr double NMSE_BATCH_TRELLIS = 4e-3;
// What a mistake in the rotation or in the positions gives at least: measured .1 to 1.4.
constexpr double NMSE_MISTAKE       = 3e-2;

// Whether layers are on a GPU, by -ngl. GPUs round to f16 what the CPU does not, such as f32 operands of a product that are permuted.
inline bool on_gpu = false;

// Error of the logits when only K or only V is of a type: the range over the models of tests/llama, as measured.
struct type_error {
    double k_min, k_max;
    double v_min, v_max;
};

inline type_error measured_error(ggml_type type) {
    switch (type) {
        case GGML_TYPE_TURBO2_0:
            return { 0.107, 0.440, 0.115, 0.213 };
        case GGML_TYPE_TURBO3_0:
            return { 0.029, 0.124, 0.030, 0.060 };
        case GGML_TYPE_TURBO4_0:
            return { 0.0068, 0.033, 0.0071, 0.0145 };
        case GGML_TYPE_TURBO2_T:
            return { 0.065, 0.270, 0.070, 0.130 };
        case GGML_TYPE_TURBO3_T:
            return { 0.018, 0.078, 0.019, 0.038 };
        case GGML_TYPE_TURBO4_T:
            return { 0.0048, 0.023, 0.0050, 0.0102 };
        case GGML_TYPE_Q4_0:
            return { 0.007, 0.075, 0.007, 0.045 };  // not rotated in heads of 96
        case GGML_TYPE_Q5_0:
            return { 0.001, 0.012, 0.001, 0.012 };
        default:
            return { 0.0, 0.001, 0.0, 0.001 };
    }
}

// Measured errors may be off by so much on another machine, or with a better encoder.
constexpr double ERROR_HEADROOM = 1.6;

// The scale rule of all encoders of a process.

#include "turbo/env.h"
#include "turbo/scalar.h"

#include <stdlib.h>
#include <string.h>

#if !defined(__GNUC__) && !defined(__clang__)
#    include <intrin.h>
#endif

#define SCALE_UNSET (-1)

static int g_scale = SCALE_UNSET;

#if defined(__GNUC__) || defined(__clang__)
static int scale_load(void) {
    return __atomic_load_n(&g_scale, __ATOMIC_RELAXED);
}

static void scale_store(int scale) {
    __atomic_store_n(&g_scale, scale, __ATOMIC_RELAXED);
}

// Whether it was stored: a value that another thread or ggml_turbo_set_scale has set in the meantime wins.
static bool scale_store_first(int scale) {
    int expected = SCALE_UNSET;
    return __atomic_compare_exchange_n(&g_scale, &expected, scale, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}
#else
static int scale_load(void) {
    return *(volatile int *) &g_scale;
}

static void scale_store(int scale) {
    *(volatile int *) &g_scale = scale;
}

static bool scale_store_first(int scale) {
    return _InterlockedCompareExchange((volatile long *) &g_scale, scale, SCALE_UNSET) == SCALE_UNSET;
}
#endif

static enum ggml_turbo_scale scale_from_environment(bool warns) {
    const char * name = ggml_turbo_getenv("GGML_TURBO_SCALE", "TURBO_SCALE", warns);
    if (name == NULL || strcmp(name, "matched") == 0) {
        return GGML_TURBO_SCALE_MATCHED_NORM;
    }
    if (strcmp(name, "ls") == 0) {
        return GGML_TURBO_SCALE_LEAST_SQUARES;
    }
    if (strcmp(name, "ip") == 0) {
        return GGML_TURBO_SCALE_INNER_PRODUCT;
    }
    if (warns) {
        GGML_LOG_WARN("GGML_TURBO_SCALE=%s is not one of ls, matched, ip: using matched\n", name);
    }
    return GGML_TURBO_SCALE_MATCHED_NORM;
}

void ggml_turbo_set_scale(enum ggml_turbo_scale scale) {
    scale_store((int) scale);
}

enum ggml_turbo_scale ggml_turbo_get_scale(void) {
    if (scale_load() == SCALE_UNSET && scale_store_first((int) scale_from_environment(false))) {
        scale_from_environment(true);  // one thread warns
    }
    return (enum ggml_turbo_scale) scale_load();
}

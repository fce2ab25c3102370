#pragma once

// Environment variables of ggml that were named otherwise: the old name is read for one more release.

#include "ggml-impl.h"

#include <stdbool.h>
#include <stdlib.h>

// warns: say so where only the old name is set. Who asks more than once, or in many threads, says it once.
static inline const char * ggml_turbo_getenv(const char * name, const char * old_name, bool warns) {
    const char * value = getenv(name);
    if (value == NULL) {
        value = getenv(old_name);
        if (value != NULL && warns) {
            GGML_LOG_WARN("environment variable %s is now called %s; the old name will go with the next release\n",
                          old_name, name);
        }
    }
    return value;
}

#pragma once

// Environment variables of ggml that were named otherwise: the old name is read for one more release.

#include "ggml-impl.h"

#include <stdlib.h>

// Warns where only the old name is set, so ask once.
static inline const char * ggml_turbo_getenv(const char * name, const char * old_name) {
    const char * value = getenv(name);
    if (value == NULL) {
        value = getenv(old_name);
        if (value != NULL) {
            GGML_LOG_WARN("environment variable %s is now called %s: the old name will not be read any more\n",
                          old_name, name);
        }
    }
    return value;
}

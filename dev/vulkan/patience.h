// Included before upstream's Vulkan backend where tests run it on a driver for CPUs. Upstream spins while it waits for the device, with a macro
// that ends in _mm_pause(). Here that would take a core from the driver's own threads, so each 1,000th pause is a sleep.
#pragma once

#if defined(__x86_64__) && defined(__cplusplus)
#    include <immintrin.h>
#    include <unistd.h>

static inline void pause_or_sleep() {
    static thread_local unsigned count;
    if (++count % 1000 == 0) {
        usleep(100);
    } else {
        __builtin_ia32_pause();
    }
}

#    define _mm_pause pause_or_sleep
#endif

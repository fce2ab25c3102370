// Exports of what mma.cpp, wmma.cpp and mfma.cpp do with fragments of a type, which they have defined: dot_keys and sum_values, of a block of
// fragment_threads.

LANES_EXPORT const char * lanes_dot_keys(const char *   x,
                                         int64_t        stride,
                                         int64_t        n_valid,
                                         const int8_t * q,
                                         int32_t *      dots,
                                         float *        scales) {
    return lanes::guarded(
        [&] { lanes::launch(dot_keys, dim3(1), fragment_threads, x, int(stride), int(n_valid), q, dots, scales); });
}

LANES_EXPORT const char * lanes_sum_values(const char * x, int64_t stride, int64_t n_valid, float * y) {
    return lanes::guarded(
        [&] { lanes::launch(sum_values, dim3(1), fragment_threads, x, int(stride), int(n_valid), y); });
}

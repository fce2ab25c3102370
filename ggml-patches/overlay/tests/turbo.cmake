# Our own tests, included by upstream's tests/CMakeLists.txt. Run by tests/llama with models that it makes.

llama_build(test-turbo-cache.cpp)
llama_build(test-turbo-layers.cpp test-turbo-layers-contexts.cpp)
llama_build(test-turbo-decay.cpp test-turbo-decay-life.cpp)
llama_build(test-turbo-calibration.cpp test-turbo-calibration-life.cpp)
llama_build(test-turbo-exact.cpp test-turbo-exact-life.cpp)
llama_build(test-turbo-defaults.cpp test-turbo-defaults-kinds.cpp)

# They look into ggml's own headers.
foreach(subject cache layers decay calibration exact defaults)
    target_include_directories(test-turbo-${subject} PRIVATE ${PROJECT_SOURCE_DIR}/ggml/src)
endforeach()

# Logits of two files of a model, for tests/llama/test_fused_logits.py.
llama_build(test-turbo-logits.cpp)

# Times of single ops, run by scripts/gpu/prove.sh and scripts/bench/bench_cpu.py.
llama_build(test-turbo-perf.cpp)

# For turbo-gguf calibrate. Here and not among the tools, where it would need a hook.
set(LLAMA_TEST_NAME llama-turbo-calibrate)
llama_build(../tools/turbo-calibrate/turbo-calibrate.cpp)
unset(LLAMA_TEST_NAME)

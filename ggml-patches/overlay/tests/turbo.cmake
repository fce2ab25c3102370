# Our own native tests, included by upstream's tests/CMakeLists.txt. Run by tests/native with models that it makes.

llama_build(test-turbo-cache.cpp)
llama_build(test-turbo-layers.cpp)
llama_build(test-turbo-decay.cpp)

# Times of single ops, run by scripts/bench_gpu.py and scripts/bench_cpu.py.
llama_build(test-turbo-perf.cpp)

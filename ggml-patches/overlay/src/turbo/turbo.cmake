# Sources of turbo caches, included by upstream's src/CMakeLists.txt before the library is made.

list(APPEND LLAMA_MODELS_SOURCES
    turbo/advice.cpp
    turbo/attn.cpp
    turbo/auto-calibration.cpp
    turbo/balance.cpp
    turbo/cache.cpp
    turbo/calibrate.cpp
    turbo/calibrated.cpp
    turbo/calibration.cpp
    turbo/check.cpp
    turbo/decay.cpp
    turbo/exact-input.cpp
    turbo/exact.cpp
    turbo/layers.cpp
    turbo/log.cpp
    turbo/memory.cpp
    turbo/model.cpp
    turbo/moments.cpp
    turbo/observed.cpp
    turbo/parts.cpp
    turbo/rope-mean.cpp
    turbo/rotation.cpp
    turbo/settings.cpp
    turbo/state.cpp
)

# What the hook of ggml/src/ggml-cpu/CMakeLists.txt adds to each variant of the CPU backend.

foreach (source attn.cpp fwht.cpp ops.cpp scalar.c trellis.cpp)
    list(APPEND GGML_CPU_SOURCES ggml-cpu/turbo/${source})
endforeach()

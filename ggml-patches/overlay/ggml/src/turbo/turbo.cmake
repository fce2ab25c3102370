# What the hook of ggml/src/CMakeLists.txt adds to ggml-base.

foreach (source ops.c scalar.c scale-rule.c trellis.c types.c)
    target_sources(ggml-base PRIVATE ${CMAKE_CURRENT_LIST_DIR}/${source})
endforeach()

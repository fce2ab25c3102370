# Given to CMake as CMAKE_PROJECT_ggml_INCLUDE: compiles of ggml-hip only what emulated tests call. Upstream's template instances are nine
# tenths of the compile time; a call of one that is left out ends with "undefined symbol", since functions are bound when they are first called.
# Programs wait for the emulator, so they are compiled with -O1.
#
#   EMULATED_TILE   head sizes of K and V of the tile kernel of flash attention: 64-64;192-128
#   EMULATED_MMA    instances of its kernel for matrix cores, as head size, ncols1, ncols2: 64-4-4;128-8-8
#   EMULATED_SKIP   regular expression of names of other files that are left out

function(emulated_slim)
    set(cuda ${CMAKE_SOURCE_DIR}/ggml/src/ggml-cuda)
    get_target_property(sources ggml-hip SOURCES)
    list(FILTER sources EXCLUDE REGEX "template-instances/(mmq|mmf|fattn-mma|fattn-tile)")
    if (EMULATED_SKIP)
        list(FILTER sources EXCLUDE REGEX "/ggml-cuda/(${EMULATED_SKIP})\\.cu$")
    endif()

    foreach(sizes IN LISTS EMULATED_TILE)
        string(REPLACE "-" "-dv" sizes ${sizes})
        list(APPEND sources ${cuda}/template-instances/fattn-tile-instance-dkq${sizes}.cu)
    endforeach()
    foreach(instance IN LISTS EMULATED_MMA)
        string(REPLACE "-" ";" fields ${instance})
        list(GET fields 0 size)
        list(GET fields 1 ncols1)
        list(GET fields 2 ncols2)
        set(file ${CMAKE_BINARY_DIR}/emulated-mma/${instance}.cu)
        file(CONFIGURE OUTPUT ${file} CONTENT
"#include \"fattn-mma-f16.cuh\"
DECL_FATTN_MMA_F16_CASE(@size@, @size@, @ncols1@, @ncols2@);
" @ONLY)
        set_source_files_properties(${file} TARGET_DIRECTORY ggml-hip PROPERTIES INCLUDE_DIRECTORIES ${cuda})
        list(APPEND sources ${file})
    endforeach()

    set_target_properties(ggml-hip PROPERTIES SOURCES "${sources}")
    list(FILTER sources INCLUDE REGEX "\\.cu$")
    set_source_files_properties(${sources} TARGET_DIRECTORY ggml-hip PROPERTIES LANGUAGE HIP)

    foreach(target IN ITEMS llama llama-common common cpp-httplib test-backend-ops)
        if (TARGET ${target})
            target_compile_options(${target} PRIVATE -O1)
        endif()
    endforeach()
endfunction()

# Deferred: the target does not exist yet.
cmake_language(DEFER DIRECTORY ${CMAKE_SOURCE_DIR} CALL emulated_slim)

// Shaders of the turbo types, for vulkan-shaders-gen: included in process_shaders() before its end.
//
// TYPE is a prefix of the constants in turbo-tables.glsl.

#include "../../../include/ggml-turbo-list.h"

#define TURBO_SHADER(NAME, ENUM, SOURCE) string_to_spv("turbo_" NAME "_" #ENUM, "turbo-" SOURCE ".comp", { { "TYPE", #ENUM } });

#define TURBO_UNPACK(ENUM, NAME, C_NAME, FAMILY, BITS) TURBO_SHADER("unpack", ENUM, "unpack")
GGML_TURBO_TYPES_X(TURBO_UNPACK)
#undef TURBO_UNPACK

#define TURBO_PACK(ENUM, NAME, C_NAME, FAMILY, BITS) TURBO_SHADER("pack", ENUM, "pack")
GGML_TURBO_SCALAR_TYPES_X(TURBO_PACK)
#undef TURBO_PACK

#define TURBO_PACK(ENUM, NAME, C_NAME, FAMILY, BITS) TURBO_SHADER("pack", ENUM, "pack-trellis")
GGML_TURBO_TRELLIS_TYPES_X(TURBO_PACK)
#undef TURBO_PACK

#define TURBO_DECAY(ENUM, NAME, C_NAME, FAMILY, BITS) \
    if (BITS > 2) { TURBO_SHADER("decay", ENUM, "decay") }
GGML_TURBO_SCALAR_TYPES_X(TURBO_DECAY)
#undef TURBO_DECAY

string_to_spv("turbo_copy", "turbo-copy.comp", {});

#undef TURBO_SHADER

string_to_spv("turbo_attn_merge", "turbo-attn-merge.comp", {});

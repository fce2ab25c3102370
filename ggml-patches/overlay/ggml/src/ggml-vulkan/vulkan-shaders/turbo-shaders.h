// Shaders of the turbo types, for vulkan-shaders-gen: included in process_shaders() before its end.

#include "../../../include/ggml-turbo-list.h"

// type: a prefix of the constants in turbo-tables.glsl
const auto turbo_shader = [](const std::string & name, const std::string & type, const std::string & source) {
    std::map<std::string, std::string> defines;
    defines["TYPE"] = type;
    string_to_spv("turbo_" + name + "_" + type, "turbo-" + source + ".comp", defines);
};

#define TURBO_UNPACK(ENUM, NAME, C_NAME, FAMILY, BITS) turbo_shader("unpack", #ENUM, "unpack");
GGML_TURBO_TYPES_X(TURBO_UNPACK)
#undef TURBO_UNPACK

#define TURBO_PACK(ENUM, NAME, C_NAME, FAMILY, BITS) turbo_shader("pack", #ENUM, "pack");
GGML_TURBO_SCALAR_TYPES_X(TURBO_PACK)
#undef TURBO_PACK

#define TURBO_PACK(ENUM, NAME, C_NAME, FAMILY, BITS) turbo_shader("pack", #ENUM, "pack-trellis");
GGML_TURBO_TRELLIS_TYPES_X(TURBO_PACK)
#undef TURBO_PACK

for (const char * type : { "TURBO3_0", "TURBO4_0" }) {  // those that decay
    turbo_shader("decay", type, "decay");
}

string_to_spv("turbo_copy", "turbo-copy.comp", {});
string_to_spv("turbo_attn_merge", "turbo-attn-merge.comp", {});

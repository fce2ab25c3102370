// Generated from turbo_gguf/codec/tables.py by `python -m turbo_gguf.codec.codegen`: do not edit.
#include "turbo/decode-wide-instances.cuh"

TURBO_DECODE_WIDE_INSTANCE(F16, TURBO2_T);
TURBO_DECODE_WIDE_INSTANCE(F16, TURBO3_T);
TURBO_DECODE_WIDE_INSTANCE(F16, TURBO4_T);

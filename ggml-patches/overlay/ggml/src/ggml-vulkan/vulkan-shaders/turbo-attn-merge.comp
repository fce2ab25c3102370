#version 450

// Merges the partial results that upstream's attention shaders leave over two segments of keys: a workgroup for each row of the result. A part has
// the sum of values, weighted by exp(score - m), and the sum L of these weights; it lies as flash_attn.comp stores it.

#extension GL_EXT_control_flow_attributes : enable

layout (local_size_x = 128, local_size_y = 1, local_size_z = 1) in;

layout (push_constant) uniform parameter {
    uint hsv;
    uint ne1, ne2, ne3;
    uint n_first, n_second;  // parts
    uint has_sinks;
} p;

layout (binding = 0) readonly buffer FIRST { float first[]; };
layout (binding = 1) readonly buffer SECOND { float second[]; };
layout (binding = 2) readonly buffer SINKS { float sinks[]; };
layout (binding = 3) writeonly buffer DST { float dst[]; };

// Part i of n for query q of all sequences
uint part_of(uint q, uint i, uint n) {
    return i + n * q;
}

// Where L of a row is, with m behind that of all heads
uint state_at(uint part, uint n) {
    return p.ne1 * (p.hsv * n * p.ne2 * p.ne3 + 2 * part) + gl_WorkGroupID.x;
}

float first_value(uint part, uint d) {
    return first[(part * p.ne1 + gl_WorkGroupID.x) * p.hsv + d];
}

float second_value(uint part, uint d) {
    return second[(part * p.ne1 + gl_WorkGroupID.x) * p.hsv + d];
}

// The largest m of all parts, and the sink
float largest(uint q) {
    float m = p.has_sinks != 0 ? sinks[gl_WorkGroupID.x] : uintBitsToFloat(0xff7fffff);
    for (uint i = 0; i < p.n_first; ++i) {
        m = max(m, first[state_at(part_of(q, i, p.n_first), p.n_first) + p.ne1]);
    }
    for (uint i = 0; i < p.n_second; ++i) {
        m = max(m, second[state_at(part_of(q, i, p.n_second), p.n_second) + p.ne1]);
    }
    return m;
}

void main() {
    const uint  q    = gl_WorkGroupID.y + p.ne2 * gl_WorkGroupID.z;
    const float m    = largest(q);
    const float sink = p.has_sinks != 0 ? exp(sinks[gl_WorkGroupID.x] - m) : 0.0;

    for (uint d = gl_LocalInvocationID.x; d < p.hsv; d += gl_WorkGroupSize.x) {
        float sum   = sink;
        float value = 0.0;
        for (uint i = 0; i < p.n_first; ++i) {
            const uint  part   = part_of(q, i, p.n_first);
            const uint  at     = state_at(part, p.n_first);
            const float factor = exp(first[at + p.ne1] - m);
            sum += factor * first[at];
            value += factor * first_value(part, d);
        }
        for (uint i = 0; i < p.n_second; ++i) {
            const uint  part   = part_of(q, i, p.n_second);
            const uint  at     = state_at(part, p.n_second);
            const float factor = exp(second[at + p.ne1] - m);
            sum += factor * second[at];
            value += factor * second_value(part, d);
        }
        dst[(q * p.ne1 + gl_WorkGroupID.x) * p.hsv + d] = sum == 0.0 ? 0.0 : value / sum;
    }
}

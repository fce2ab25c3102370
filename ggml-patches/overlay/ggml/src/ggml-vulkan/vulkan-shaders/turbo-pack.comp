#version 450
#extension GL_GOOGLE_include_directive : require

// SET_ROWS and CPY to a scalar turbo type, blocks counted in src: what turbo/scalar.c does, bit for bit.

#include "turbo-rows.glsl"
#include "turbo-scalar.glsl"

const uint TURBO_N_STEPS = OF_TYPE(_N_STEPS);
const int  turbo_thresholds[TURBO_N_STEPS][TURBO_N_MAGNITUDES - 1] = { OF_TYPE(_THRESHOLDS) };

// What lanes of a block share of each step: partial sums, then sums and what the step gains
shared int   turbo_shared_tc[TURBO_N_STEPS][GROUP];
shared int   turbo_shared_cc[TURBO_N_STEPS][GROUP];
shared float turbo_shared_gain[GROUP];

uint turbo_magnitude_index(int t, uint step) {
    uint m = 0;
    [[unroll]] for (uint k = 0; k < TURBO_N_MAGNITUDES - 1; ++k) {
        m += uint(t > turbo_thresholds[step][k]);
    }
    return m;
}

// <t,c>^2 / |c|^2: what the best scale takes off the squared error
float turbo_gain(int tc, int cc) {
    precise float square = float(tc) * float(tc);
    return turbo_divide(square, float(cc));
}

struct turbo_fit {
    uint step;
    int  tc;  // <t,c>
    int  cc;  // |c|^2
};

void turbo_share_steps(ivec4 t) {
    [[unroll]] for (uint step = 0; step < TURBO_N_STEPS; ++step) {
        int tc = 0;
        int cc = 0;
        [[unroll]] for (uint i = 0; i < 4; ++i) {
            const int c = turbo_magnitudes[turbo_magnitude_index(t[i], step)];
            tc += t[i] * c;
            cc += c * c;
        }
        turbo_shared_tc[step][gl_LocalInvocationID.x] = tc;
        turbo_shared_cc[step][gl_LocalInvocationID.x] = cc;
    }
    barrier();
}

// A lane for each step
void turbo_share_gains(uint lane, uint first) {
    const uint step = lane % TURBO_N_STEPS;
    int        tc   = 0;
    int        cc   = 0;
    [[unroll]] for (uint i = 0; i < LANES; ++i) {
        tc += turbo_shared_tc[step][first + i];
        cc += turbo_shared_cc[step][first + i];
    }
    barrier();
    turbo_shared_tc[step][first]    = tc;
    turbo_shared_cc[step][first]    = cc;
    turbo_shared_gain[first + step] = turbo_gain(tc, cc);
    barrier();
}

turbo_fit turbo_best_fit(ivec4 t) {
    const uint first = turbo_first_lane();
    turbo_share_steps(t);
    turbo_share_gains(turbo_lane(), first);

    uint  best = 0;
    float gain = turbo_shared_gain[first];
    [[unroll]] for (uint step = 1; step < TURBO_N_STEPS; ++step) {
        if (turbo_shared_gain[first + step] > gain) {  // the first of equals stays
            best = step;
            gain = turbo_shared_gain[first + step];
        }
    }
    return turbo_fit(best, turbo_shared_tc[best][first], turbo_shared_cc[best][first]);
}

// Of n magnitudes, the m-th has index n + m, or n - 1 - m where the value is negative.
uint turbo_indices(ivec4 t, uvec4 x, uint step) {
    uint code = 0;
    [[unroll]] for (uint i = 0; i < 4; ++i) {
        const uint m = turbo_magnitude_index(t[i], step);
        code |= ((x[i] >> 31) != 0 ? TURBO_N_MAGNITUDES - 1 - m : TURBO_N_MAGNITUDES + m) << 8 * i;
    }
    return code;
}

// Stores the block of values x, as bits. Magnitudes are compared as integers: their order is that of the numbers, NaN comes last.
void turbo_encode(uvec4 x, uint block, bool store) {
    const uvec4 magnitude = x & 0x7fffffffu;
    const uint  most      = turbo_max(max(max(magnitude[0], magnitude[1]), max(magnitude[2], magnitude[3])));
    const bool  is_nan    = most > TURBO_INFINITY_BITS;
    const bool  is_zero   = most < floatBitsToUint(SCALAR_AMAX_MIN);

    const float amax  = is_zero ? 1.0f : uintBitsToFloat(min(most, TURBO_FLT_MAX_BITS));
    const float scale = turbo_divide(float(SCALAR_T_MAX), amax);
    const float unit  = turbo_divide(amax, float(SCALAR_T_MAX));
    ivec4       t;
    [[unroll]] for (uint i = 0; i < 4; ++i) {
        precise float scaled = uintBitsToFloat(min(magnitude[i], TURBO_FLT_MAX_BITS)) * scale;
        t[i]                 = is_zero ? int(SCALAR_T_MAX) : int(roundEven(scaled));
    }

    const turbo_fit fit  = turbo_best_fit(t);
    const int       tt   = int(turbo_sum(uint(t[0] * t[0] + t[1] * t[1] + t[2] * t[2] + t[3] * t[3])));
    uint            d    = turbo_fitted_scale(fit.tc, fit.cc, tt, unit);
    uint            code = turbo_indices(t, x, fit.step);
    if (is_nan || is_zero || d == 0) {
        d    = is_nan ? SCALAR_HALF_NAN : 0;
        code = 0;
    }
    turbo_store(block, d, code, store);
}

void main() {
    const uint i_block = turbo_block_number();
    const bool store   = i_block < p.n_blocks;

    uvec4 x     = uvec4(0);
    uint  block = 0;
    if (store) {
        const uvec4 place = turbo_place(p.src, i_block);
        const uint  first = turbo_offset(p.src, place) + turbo_lane() * p.src.value;
        [[unroll]] for (uint i = 0; i < 4; ++i) {
            x[i] = turbo_read_float(first + 8 * i * p.src.value);
        }
        block = turbo_other_offset(p.dst, i_block, place);
    }
    turbo_encode(x, block, store);
}

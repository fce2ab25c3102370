// Division and square root, rounded to the nearest. Devices may be wrong by a few units in the last place, and the bits of a block must not
// depend on the device: their estimates are mended by integers. Arguments and results are positive, finite and normal.
// tests/kernels/vulkan compiles this file as C++, with estimates that are wrong by TURBO_OFF - 1 units.

const uint TURBO_ONE = 0x00800000u;  // of a mantissa
const uint TURBO_OFF = 8;            // estimates are wrong by less units

uint turbo_mantissa(uint bits) {
    return (bits & (TURBO_ONE - 1)) | TURBO_ONE;
}

// Below the integer that is looked for, by less than 2 * TURBO_OFF. estimate: of it, which is in TURBO_ONE .. 2 * TURBO_ONE - 1
uint turbo_below(float estimate) {
    return min(uint(estimate), 2 * TURBO_ONE - 1) - TURBO_OFF;
}

// exponent: of a mantissa in TURBO_ONE .. 2 * TURBO_ONE; the upper end carries.
float turbo_compose(int exponent, uint mantissa) {
    return uintBitsToFloat((uint(exponent) << 23) + (mantissa - TURBO_ONE));
}

float turbo_divide(float a, float b) {
    const uint bits_a = floatBitsToUint(a);
    const uint bits_b = floatBitsToUint(b);
    const uint ma     = turbo_mantissa(bits_a);
    const uint mb     = turbo_mantissa(bits_b);
    const bool below  = ma < mb;
    const uint shift  = below ? 24 : 23;

    uint q = turbo_below(float(ma) / float(mb) * float(1u << shift));
    uint r = (ma << shift) - q * mb;  // what is left is small, so that both terms may wrap
    [[unroll]] for (uint step = TURBO_OFF; step > 0; step >>= 1) {
        if (r >= step * mb) {
            r -= step * mb;
            q += step;
        }
    }
    q += uint(2 * r > mb);  // never equal: mb has too few bits
    return turbo_compose(int(bits_a >> 23) - int(bits_b >> 23) + (below ? 126 : 127), q);
}

float turbo_sqrt(float x) {
    const uint bits     = floatBitsToUint(x);
    const int  exponent = int(bits >> 23) - 127;
    const uint shift    = 23 + uint(exponent & 1);
    const uint m        = turbo_mantissa(bits);

    uint q = turbo_below(sqrt(float(m) * float(1u << shift)));
    uint r = (m << shift) - q * q;
    [[unroll]] for (uint step = TURBO_OFF; step > 0; step >>= 1) {
        const uint more = step * (2 * q + step);
        if (r >= more) {
            r -= more;
            q += step;
        }
    }
    q += uint(r > q);
    return turbo_compose((exponent >> 1) + 127, q);
}

// turbo-arithmetic.glsl as C++, on a device whose division and square root are wrong by some units in the last place: arithmetic UNITS.
// Prints how many of its results are not those of this machine, and ends with 1 when some are not.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

using uint = unsigned int;

static int32_t      g_units;  // the next estimate is wrong by as many
static std::mt19937 g_gen(20261129);

static uint bits_of(float x) {
    uint bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}

static float float_of(uint bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

static float estimate(float exact) {
    return float_of(bits_of(exact) + (uint) g_units);
}

// A number of the device
struct number {
    float value;

    explicit number(float x) : value(x) {}

    explicit number(uint x) : value((float) x) {}

    explicit operator uint() const { return (uint) value; }

    number operator*(number other) const { return number(value * other.value); }

    number operator/(number other) const { return number(estimate(value / other.value)); }
};

static number sqrt(number x) {
    return number(estimate(std::sqrt(x.value)));
}

static uint floatBitsToUint(number x) {
    return bits_of(x.value);
}

static number uintBitsToFloat(uint bits) {
    return number(float_of(bits));
}

using std::min;

#define float  number
#define unroll maybe_unused
#include "turbo-arithmetic.glsl"
#undef float

// Some mantissas are at an end of their range.
static float random_number(int exponents) {
    static const uint ends[]   = { 0, 1, 0x7ffffe, 0x7fffff };
    const uint        mantissa = g_gen() % 4 ? g_gen() & 0x7fffff : ends[g_gen() % 4];
    return float_of((127 + g_gen() % exponents - exponents / 2) << 23 | mantissa);
}

int main(int argc, char ** argv) {
    const int units = argc > 1 ? atoi(argv[1]) : 0;
    int       wrong = 0;
    for (int i = 0; i < 500000; ++i) {
        g_units       = (int32_t) (g_gen() % (2 * units + 1)) - units;
        const float a = random_number(120);
        const float b = random_number(120);
        wrong += turbo_divide(number(a), number(b)).value != a / b;
        wrong += turbo_sqrt(number(a)).value != std::sqrt(a);
    }
    printf("%d wrong\n", wrong);
    return wrong ? 1 : 0;
}

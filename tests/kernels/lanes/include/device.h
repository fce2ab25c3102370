// The vocabulary of CUDA and HIP device code, for lanes.h. Only what both vendors have in upstream's ggml-cuda: a kernel that uses
// more (__shfl_down_sync, __ballot_sync, masks of some lanes) would not compile, or not work, with HIP.

#pragma once

#include "lanes.h"

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <limits>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__    __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// One block runs at a time, so what all of its threads share is one variable. Of an array that a kernel declares `extern __shared__`,
// the test defines the memory: `thread_local char smem[49152];`
#define __shared__   thread_local

//
// vectors
//

#define LANES_VECTORS(type, name)                                   \
    struct alignas(2 * sizeof(type)) name##2 {                      \
        type x, y;                                                  \
    };                                                              \
    struct alignas(4 * sizeof(type)) name##4 {                      \
        type x, y, z, w;                                            \
    };                                                              \
    inline name##2 make_##name##2(type x, type y) {                 \
        return { x, y };                                            \
    }                                                               \
    inline name##4 make_##name##4(type x, type y, type z, type w) { \
        return { x, y, z, w };                                      \
    }

LANES_VECTORS(float, float)
LANES_VECTORS(int, int)
LANES_VECTORS(unsigned, uint)
LANES_VECTORS(short, short)
LANES_VECTORS(unsigned short, ushort)
LANES_VECTORS(signed char, char)
LANES_VECTORS(unsigned char, uchar)

inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) {
    return { x, y, z };
}

//
// meetings
//

#define LANES_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(LANES_HERE) {
    lanes::meet(lanes::block->all, { "__syncthreads", file, line });
}

inline void __syncwarp(unsigned = 0xffffffff, LANES_HERE) {
    lanes::meet(lanes::my_warp(), { "__syncwarp", file, line });
}

namespace lanes {

inline void check_mask(unsigned mask, int width) {
    if (mask != 0xffffffff) {
        fail("a mask of some lanes: HIP has none");
    }
    if (width < 1 || width > warp || (width & (width - 1))) {
        fail("width " + std::to_string(width) + " of a shuffle");
    }
}

// source: lane within the group of width lanes; one outside of it is the lane itself
template <typename T> T shuffle(T value, int source, int width, Site site) {
    const int         lane = rank() % warp;
    const Exchange<T> exchange(my_warp(), site, value);
    return exchange.of(source < 0 || source >= width ? lane : lane / width * width + source);
}

inline int lane_in(int width) {
    return rank() % width;
}

// Votes that are true, of how many.
struct Votes {
    int yes, all;
};

inline Votes vote(bool predicate, Site site) {
    Group &             group = my_wave();
    const Exchange<int> exchange(group, site, predicate);
    Votes               votes = { 0, group.members };
    for (int i = 0; i < group.members; ++i) {
        votes.yes += exchange.of(i);
    }
    return votes;
}

}  // namespace lanes

template <typename T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, LANES_HERE) {
    lanes::check_mask(mask, width);
    return lanes::shuffle(value, source & (width - 1), width, { "__shfl_sync", file, line });
}

template <typename T> T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, LANES_HERE) {
    lanes::check_mask(mask, width);
    return lanes::shuffle(value, lanes::lane_in(width) ^ lane_mask, width, { "__shfl_xor_sync", file, line });
}

template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, LANES_HERE) {
    lanes::check_mask(mask, width);
    return lanes::shuffle(value, lanes::lane_in(width) - static_cast<int>(delta), width,
                          { "__shfl_up_sync", file, line });
}

// Of all lanes of the wave: 64 of them on GCN and CDNA.
inline int __any_sync(unsigned mask, int predicate, LANES_HERE) {
    lanes::check_mask(mask, 32);
    return lanes::vote(predicate, { "__any_sync", file, line }).yes > 0;
}

inline int __all_sync(unsigned mask, int predicate, LANES_HERE) {
    lanes::check_mask(mask, 32);
    const lanes::Votes votes = lanes::vote(predicate, { "__all_sync", file, line });
    return votes.yes == votes.all;
}

inline void __threadfence() {}

inline void __threadfence_block() {}

//
// integers, floats
//

using std::max;
using std::min;

template <typename To, typename From> To lanes_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// clang-format off
inline float    __uint_as_float(unsigned u) { return lanes_bits<float>(u); }
inline float    __int_as_float(int i)       { return lanes_bits<float>(i); }
inline unsigned __float_as_uint(float f)    { return lanes_bits<unsigned>(f); }
inline int      __float_as_int(float f)     { return lanes_bits<int>(f); }
inline int      __float2int_rn(float f)     { return static_cast<int>(rintf(f)); }
inline float    __int2float_rn(int i)       { return static_cast<float>(i); }

inline float __fadd_rn(float a, float b)          { return a + b; }
inline float __fsub_rn(float a, float b)          { return a - b; }
inline float __fmul_rn(float a, float b)          { return a * b; }
inline float __fdiv_rn(float a, float b)          { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a)                   { return 1.0f / a; }
inline float __fdividef(float a, float b)         { return a / b; }
inline float rsqrtf(float a)                      { return 1.0f / sqrtf(a); }
inline float __expf(float a)                      { return expf(a); }
inline float __logf(float a)                      { return logf(a); }

#if !defined(GGML_USE_HIP)  // HIP's is the hardware's approximation
inline float __fsqrt_rn(float a)                  { return sqrtf(a); }
#endif

inline unsigned __umulhi(unsigned a, unsigned b)  { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int      __popc(unsigned x)                { return __builtin_popcount(x); }
inline int      __ffs(int x)                      { return __builtin_ffs(x); }
inline int      __clz(int x)                      { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
template <typename T> T __ldg(const T * p)        { return *p; }

// clang-format on

inline unsigned __byte_perm(unsigned lo, unsigned hi, unsigned sel) {
    const uint64_t bytes = static_cast<uint64_t>(hi) << 32 | lo;
    unsigned       r     = 0;
    for (int i = 0; i < 4; ++i) {
        r |= static_cast<unsigned>(bytes >> 8 * (sel >> 4 * i & 7) & 0xff) << 8 * i;
    }
    return r;
}

// The low word of hi:lo, shifted to the right by up to 32.
inline unsigned __funnelshift_rc(unsigned lo, unsigned hi, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(hi) << 32 | lo) >> std::min(shift, 32u));
}

// The low word, shifted to the right by shift % 32.
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(hi) << 32 | lo) >> (shift & 31));
}

// The high word, shifted to the left by shift % 32.
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(hi) << 32 | lo) << (shift & 31) >> 32);
}

inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) {
        c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
    }
    return c;
}

template <typename T> T atomicAdd(T * p, T v) {
    const T old = *p;
    *p          = old + v;
    return old;
}

template <typename T> T atomicMax(T * p, T v) {
    const T old = *p;
    *p          = std::max(old, v);
    return old;
}

inline unsigned atomicInc(unsigned * p, unsigned last) {
    const unsigned old = *p;
    *p                 = old >= last ? 0 : old + 1;
    return old;
}

//
// 16-bit floats
//

// Every operation rounds once: binary32 holds the exact sum's neighbours closely enough for + - * /, binary64 for fma.
struct half {
    uint16_t bits;

    half() = default;

    half(float f) : bits(lanes_bits<uint16_t>(static_cast<_Float16>(f))) {}

    half(double f) : bits(lanes_bits<uint16_t>(static_cast<_Float16>(f))) {}

    half(int i) : half(static_cast<float>(i)) {}

    operator float() const { return static_cast<float>(lanes_bits<_Float16>(bits)); }
};

struct alignas(4) half2 {
    half x, y;

    half2() = default;

    half2(half x_, half y_) : x(x_), y(y_) {}
};

using __half  = half;
using __half2 = half2;

// clang-format off
#define LANES_HALF_OPERATOR(op)                                                                                      \
    inline half    operator op(half a, half b)        { return half(static_cast<float>(a) op static_cast<float>(b)); } \
    inline half2   operator op(half2 a, half2 b)      { return { a.x op b.x, a.y op b.y }; }                         \
    inline half &  operator op##=(half & a, half b)   { return a = a op b; }                                         \
    inline half2 & operator op##=(half2 & a, half2 b) { return a = a op b; }

LANES_HALF_OPERATOR(+)
LANES_HALF_OPERATOR(-)
LANES_HALF_OPERATOR(*)
LANES_HALF_OPERATOR(/)

inline float  __half2float(half h)                  { return h; }
inline half   __float2half(float f)                 { return half(f); }
inline half   __float2half_rn(float f)              { return half(f); }
inline half   __int2half_rn(int i)                  { return half(i); }
inline half   __ushort_as_half(unsigned short u)    { return lanes_bits<half>(u); }
inline unsigned short __half_as_ushort(half h)      { return h.bits; }

inline half2  make_half2(half x, half y)            { return { x, y }; }
inline half2  __halves2half2(half x, half y)        { return { x, y }; }
inline half2  __half2half2(half h)                  { return { h, h }; }
inline half2  __float2half2_rn(float f)             { return { half(f), half(f) }; }
inline half2  __floats2half2_rn(float x, float y)   { return { half(x), half(y) }; }
inline half2  __float22half2_rn(float2 f)           { return { half(f.x), half(f.y) }; }
inline float2 __half22float2(half2 h)               { return { h.x, h.y }; }
inline half   __low2half(half2 h)                   { return h.x; }
inline half   __high2half(half2 h)                  { return h.y; }
inline half2  __low2half2(half2 h)                  { return { h.x, h.x }; }
inline half2  __high2half2(half2 h)                 { return { h.y, h.y }; }
inline float  __low2float(half2 h)                  { return h.x; }
inline float  __high2float(half2 h)                 { return h.y; }

inline half   __hadd(half a, half b)                { return a + b; }
inline half   __hsub(half a, half b)                { return a - b; }
inline half   __hmul(half a, half b)                { return a * b; }
inline half   __hmax(half a, half b)                { return half(fmaxf(a, b)); }
inline half   __hneg(half a)                        { return half(-static_cast<float>(a)); }
inline double lanes_double(half h)                  { return static_cast<float>(h); }
inline half   __hfma(half a, half b, half c)        { return half(lanes_double(a) * lanes_double(b) + lanes_double(c)); }
inline half2  __hadd2(half2 a, half2 b)             { return a + b; }
inline half2  __hsub2(half2 a, half2 b)             { return a - b; }
inline half2  __hmul2(half2 a, half2 b)             { return a * b; }
inline half2  __hmax2(half2 a, half2 b)             { return { __hmax(a.x, b.x), __hmax(a.y, b.y) }; }
inline half2  __hfma2(half2 a, half2 b, half2 c)    { return { __hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y) }; }
inline half   hexp(half a)                          { return half(expf(a)); }
inline half2  h2exp(half2 a)                        { return { hexp(a.x), hexp(a.y) }; }

// clang-format on

// Rounded to nearest even. NaN stays NaN.
struct nv_bfloat16 {
    uint16_t bits;

    nv_bfloat16() = default;

    nv_bfloat16(float f) {
        const uint32_t u = lanes_bits<uint32_t>(f);
        bits             = static_cast<uint16_t>(f != f ? u >> 16 | 64 : (u + 0x7fff + (u >> 16 & 1)) >> 16);
    }

    operator float() const { return lanes_bits<float>(static_cast<uint32_t>(bits) << 16); }
};

inline float __bfloat162float(nv_bfloat16 b) {
    return b;
}

inline nv_bfloat16 __float2bfloat16(float f) {
    return nv_bfloat16(f);
}

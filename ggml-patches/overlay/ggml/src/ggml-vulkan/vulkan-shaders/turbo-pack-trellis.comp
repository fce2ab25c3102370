#version 450
#extension GL_GOOGLE_include_directive : require

// SET_ROWS and CPY to a trellis type, blocks counted in src: what turbo/trellis.c does, bit for bit.
//
// Sixteen neighbouring invocations have a block. Two of them, one for each codebook, have the costs of all 8 states in registers, so that
// within a segment no station needs the other one; after it they keep the cheaper codebook. What the 8 pairs do:
//     open lap       pair i is at scale i and starts in all states at once: nothing closed is cheaper. So there are bounds for 40 candidates
//     closed laps    the eight candidates with the lowest bounds, one for each pair; again while a bound is below the best error
//
// Costs are below 2^19, which leaves room in a word for how a closed lap came about: below the cost stands the codebook, and below that a
// bit for each station of the segment, whether the path came from the higher state, the newest one highest. So the smaller word is the one
// that the reference keeps, also among equal costs. These bits are all of the path: station i's says which coded bit station i - 3 had.

const uint LANES = 16;

#include "turbo-rows.glsl"
#include "turbo-lanes.glsl"
#include "turbo-trellis.glsl"

const uint BLOCKS       = GROUP / LANES;
const uint SLOTS        = LANES / 2;
const uint N_CANDIDATES = TRELLIS_N_SCALES * TRELLIS_N_STATES;
const uint HOW_BITS     = TRELLIS_SEGMENT + 1;  // below a cost
const uint HOW_MASK     = (1u << HOW_BITS) - 1;

shared uvec2 turbo_cost[BLOCKS][TRELLIS_N_SCALES][QK_TRELLIS][2];  // of a codebook's four subsets
shared uint  turbo_least[BLOCKS][TRELLIS_N_SCALES];                // what all paths cost
shared uint  turbo_exchange[GROUP][TRELLIS_N_STATES];
shared uint  turbo_how[BLOCKS][TRELLIS_N_SEGMENTS][SLOTS][TRELLIS_N_STATES / 2];  // of two states
shared uint  turbo_bounds[BLOCKS][N_CANDIDATES];
shared uint  turbo_sorted[BLOCKS][N_CANDIDATES];
shared uvec2 turbo_found[BLOCKS][SLOTS];
shared uint  turbo_bytes[GROUP][2];
shared uint  turbo_wanted[N_CANDIDATES / SLOTS];

uint turbo_block() {
    return gl_LocalInvocationID.x / LANES;
}

//
// values
//

// Value i of a lane, 32 * (lane / 8) + lane % 8 + 8 * i, as a station
uint turbo_station_of(uint lane, uint i) {
    return 32 * (lane / 8) + 8 * (lane % 4) + lane / 4 % 2 + 2 * i;
}

struct turbo_start {
    uint first_scale;
    bool is_nan;
    bool is_zero;
};

// As prepare_block (turbo/trellis.c) has it. value: becomes the lane's four without infinities
turbo_start turbo_prepare(uvec4 x, out vec4 value) {
    uint most = 0;
    [[unroll]] for (uint i = 0; i < 4; ++i) {
        const uint magnitude = x[i] & 0x7fffffffu;
        most                 = max(most, magnitude);
        value[i]             = uintBitsToFloat(min(magnitude, TURBO_FLT_MAX_BITS) | (x[i] & 0x80000000u));
    }
    most = turbo_max(most);

    turbo_start start;
    start.is_nan  = most > TURBO_INFINITY_BITS;
    start.is_zero = most < floatBitsToUint(TRELLIS_AMAX_MIN);

    const float amax   = start.is_zero ? 1.0f : uintBitsToFloat(min(most, TURBO_FLT_MAX_BITS));
    const float to_rms = turbo_divide(float(TRELLIS_RMS_MAX), amax);
    uint        sum    = 0;
    [[unroll]] for (uint i = 0; i < 4; ++i) {
        precise float scaled = abs(value[i]) * to_rms;
        const uint    t      = start.is_zero ? TRELLIS_RMS_MAX : uint(roundEven(scaled));
        sum += t * t;
    }
    sum = turbo_sum(sum);

    precise float rms  = turbo_sqrt(float(sum) * (1.0f / QK_TRELLIS)) * turbo_divide(amax, float(TRELLIS_RMS_MAX));
    precise float low  = max(rms, amax * (1.0f / TRELLIS_AMAX_PART)) * OF_TYPE(_REACH);
    const int     code = int(floatBitsToUint(low) >> 20) - TRELLIS_CODE_BIAS;
    start.first_scale  = uint(clamp(code, TRELLIS_SCALE_MIN, TRELLIS_SCALE_MAX - TRELLIS_N_SCALES + 1));
    return start;
}

void turbo_measure(vec4 value, uint first_scale) {
    const uint block = turbo_block();
    const uint lane  = turbo_lane();
    if (lane < TRELLIS_N_SCALES) {
        turbo_least[block][lane] = 0;
    }
    barrier();
    [[dont_unroll]] for (uint scale = 0; scale < TRELLIS_N_SCALES; ++scale) {
        const float inverse = turbo_inverse(first_scale + scale);
        uint        sum     = 0;
        [[dont_unroll]] for (uint i = 0; i < 4; ++i) {
            uint        least;
            const uvec4 costs   = turbo_costs(turbo_integer(value[i], inverse), least);
            const uint  station = turbo_station_of(lane, i);

            turbo_cost[block][scale][station][0] = costs.xy;
            turbo_cost[block][scale][station][1] = costs.zw;
            sum += least;
        }
        atomicAdd(turbo_least[block][scale], sum);
    }
    barrier();
}

//
// laps
//

// One more station, number i of its segment. closed: costs carry how they came about
void turbo_pass_station(uvec2 costs, uint i, bool closed, inout uint state_cost[TRELLIS_N_STATES]) {
    const uint shift     = closed ? HOW_BITS : 0;
    const uint from_high = closed ? 1u << i : 0;
    const uint branch[4] = { (costs.x & 0xffffu) << shift, costs.x >> 16 << shift, (costs.y & 0xffffu) << shift,
                             costs.y >> 16 << shift };
    uint       after[TRELLIS_N_STATES];
    [[unroll]] for (uint state = 0; state < TRELLIS_N_STATES; ++state) {
        const uint low  = state >> 1;
        const uint high = low | TRELLIS_N_STATES / 2;
        after[state]    = min(state_cost[low] + branch[turbo_subset(low, state & 1u)],
                              state_cost[high] + (branch[turbo_subset(high, state & 1u)] + from_high));
    }
    state_cost = after;
}

// Both lanes of a pair get the cheaper codebook for each state.
void turbo_meet(inout uint state_cost[TRELLIS_N_STATES]) {
    const uint own = gl_LocalInvocationID.x;
    [[unroll]] for (uint state = 0; state < TRELLIS_N_STATES; ++state) {
        turbo_exchange[own][state] = state_cost[state];
    }
    barrier();
    [[unroll]] for (uint state = 0; state < TRELLIS_N_STATES; ++state) {
        state_cost[state] = min(state_cost[state], turbo_exchange[own ^ 1u][state]);
    }
    barrier();
}

// One lap of a pair, from the costs of the first states to those of the last. closed: leaves how they came about
void turbo_run_lap(uint scale, bool closed, inout uint state_cost[TRELLIS_N_STATES]) {
    const uint block = turbo_block();
    const uint lane  = turbo_lane();
    const uint book  = lane % 2;
    [[dont_unroll]] for (uint segment = 0; segment < TRELLIS_N_SEGMENTS; ++segment) {
        if (closed) {
            [[unroll]] for (uint state = 0; state < TRELLIS_N_STATES; ++state) {
                state_cost[state] = (state_cost[state] & ~HOW_MASK) | book << TRELLIS_SEGMENT;
            }
        }
        [[unroll]] for (uint i = 0; i < TRELLIS_SEGMENT; ++i) {
            turbo_pass_station(turbo_cost[block][scale][segment * TRELLIS_SEGMENT + i][book], i, closed, state_cost);
        }
        turbo_meet(state_cost);
        if (closed && book == 0) {
            [[unroll]] for (uint i = 0; i < TRELLIS_N_STATES / 2; ++i) {
                turbo_how[block][segment][lane / 2][i] =
                    (state_cost[2 * i] & HOW_MASK) | (state_cost[2 * i + 1] & HOW_MASK) << 16;
            }
        }
    }
}

//
// candidates: a scale and a first state, with what its closed paths cannot fall below: an error, rounded down, whose low bits are the
// candidate's number
//

const uint CANDIDATE_MASK = 63;

void turbo_bound_candidates(uint first_scale) {
    const uint block = turbo_block();
    const uint lane  = turbo_lane();
    const uint scale = min(lane / 2, TRELLIS_N_SCALES - 1);
    uint       state_cost[TRELLIS_N_STATES];
    [[unroll]] for (uint state = 0; state < TRELLIS_N_STATES; ++state) {
        state_cost[state] = 0;
    }
    turbo_run_lap(scale, false, state_cost);
    if (lane < TRELLIS_N_SCALES * 2 && lane % 2 == 0) {
        [[unroll]] for (uint state = 0; state < TRELLIS_N_STATES; ++state) {
            const uint number = scale * TRELLIS_N_STATES + state;
            const uint error  = turbo_path_error(turbo_least[block][scale] + state_cost[state], first_scale + scale);
            turbo_bounds[block][number] = (error & ~CANDIDATE_MASK) | number;
        }
    }
    barrier();
}

// No two are equal, so the rank of each is its place.
void turbo_sort_candidates() {
    const uint block = turbo_block();
    for (uint i = turbo_lane(); i < N_CANDIDATES; i += LANES) {
        const uint own  = turbo_bounds[block][i];
        uint       rank = 0;
        for (uint j = 0; j < N_CANDIDATES; ++j) {
            rank += uint(turbo_bounds[block][j] < own);
        }
        turbo_sorted[block][rank] = own;
    }
    barrier();
}

bool turbo_is_less(uvec2 a, uvec2 b) {
    return a.x < b.x || (a.x == b.x && a.y < b.y);
}

// Closed paths of eight candidates: error, and scale, cost, first state and pair from the highest bits down. Of two the smaller one is
// better; among equals of the first it is the one that the reference takes.
uvec2 turbo_run_closed(uint candidate, uint first_scale) {
    const uint unreachable = 1u << 20;
    const uint block       = turbo_block();
    const uint slot        = turbo_lane() / 2;
    const uint scale       = candidate / TRELLIS_N_STATES;
    const uint first       = candidate % TRELLIS_N_STATES;
    uint       state_cost[TRELLIS_N_STATES];
    [[unroll]] for (uint state = 0; state < TRELLIS_N_STATES; ++state) {
        state_cost[state] = state == first ? 0 : unreachable << HOW_BITS;
    }
    turbo_run_lap(scale, true, state_cost);

    uint cost = turbo_least[block][scale];
    [[unroll]] for (uint state = 0; state < TRELLIS_N_STATES; ++state) {
        cost += state == first ? state_cost[state] >> HOW_BITS : 0;
    }
    turbo_found[block][slot] =
        uvec2(turbo_path_error(cost, first_scale + scale), scale << 29 | cost << 6 | first << 3 | slot);
    barrier();
    uvec2 best = turbo_found[block][0];
    [[unroll]] for (uint i = 1; i < SLOTS; ++i) {
        best = turbo_is_less(turbo_found[block][i], best) ? turbo_found[block][i] : best;
    }
    return best;
}

//
// paths
//

struct turbo_path {
    uint  scale;
    uint  selectors;
    uvec2 coded;
};

uint turbo_reverse3(uint x) {
    return (x & 1u) << 2 | (x & 2u) | (x >> 2 & 1u);
}

// The path of a pair, from its end, which is its first state
turbo_path turbo_trace_back(uint scale, uint slot, uint state) {
    const uint block = turbo_block();
    turbo_path path  = turbo_path(scale, 0, uvec2(0));
    [[dont_unroll]] for (int segment = TRELLIS_N_SEGMENTS - 1; segment >= 0; --segment) {
        // coded bits of the three stations before the segment, of its first five, and a codebook
        const uint how   = turbo_how[block][segment][slot][state / 2] >> 16 * (state % 2) & HOW_MASK;
        const uint coded = (how >> 3 & 31u) | turbo_reverse3(state) << 5;
        path.coded       = uvec2(path.coded.x << 8 | coded, path.coded.y << 8 | path.coded.x >> 24);
        path.selectors   = path.selectors << 1 | how >> TRELLIS_SEGMENT;
        state            = turbo_reverse3(how & 7u);
    }
    return path;
}

// wanted: the same for all lanes of a block; one without is not searched for
turbo_path turbo_search(uint first_scale, bool wanted) {
    if (gl_LocalInvocationID.x < N_CANDIDATES / SLOTS) {
        turbo_wanted[gl_LocalInvocationID.x] = 0;
    }
    turbo_bound_candidates(first_scale);
    turbo_sort_candidates();

    turbo_path path = turbo_path(0, 0, uvec2(0));
    uvec2      best = uvec2(0xffffffffu);
    [[dont_unroll]] for (uint i = 0; i < N_CANDIDATES / SLOTS; ++i) {
        const uint lowest = turbo_sorted[turbo_block()][i * SLOTS];
        wanted            = wanted && (lowest & ~CANDIDATE_MASK) <= best.x;
        if (wanted) {
            turbo_wanted[i] = 1;
        }
        barrier();
        if (turbo_wanted[i] == 0) {
            break;  // blocks of a workgroup go on together
        }
        const uint  candidate = turbo_sorted[turbo_block()][i * SLOTS + turbo_lane() / 2] & CANDIDATE_MASK;
        const uvec2 found     = turbo_run_closed(candidate, first_scale);
        if (wanted && turbo_is_less(found, best)) {
            best = found;
            path = turbo_trace_back(found.y >> 29, found.y & 7u, found.y >> 3 & 7u);
        }
        barrier();  // before the next lap
    }
    return path;
}

//
// blocks
//

uvec2 turbo_rotate64(uvec2 x, uint n) {
    return x << n | x.yx >> (32 - n);
}

uint turbo_bit64(uvec2 x, uint n) {
    return x[n / 32] >> n % 32 & 1u;
}

// The lane's bytes of low and high: plain bits of its four values
void turbo_share_plain_bits(turbo_path path, vec4 value, uint first_scale) {
    const uint  lane    = turbo_lane();
    const uvec2 z0      = turbo_rotate64(path.coded, 2);
    const uvec2 z1      = path.coded ^ turbo_rotate64(path.coded, 1) ^ turbo_rotate64(path.coded, 3);
    const uint  book    = path.selectors >> (4 * (lane / 8) + lane % 4) & 1u;
    const float inverse = turbo_inverse(first_scale + path.scale);
    uint        low     = 0;
    uint        high    = 0;
    [[dont_unroll]] for (uint i = 0; i < 4; ++i) {
        const uint n      = turbo_station_of(lane, i);
        const uint subset = 2 * turbo_bit64(z1, n) + turbo_bit64(z0, n);
        const uint plain  = turbo_plain_bits(turbo_integer(value[i], inverse), book, subset);
        low |= (plain & 3u) << 2 * i;
        high |= plain >> (OF_TYPE(_BITS) - 2) << n % 8;
    }
    turbo_bytes[gl_LocalInvocationID.x] = uint[2](low, high);
    barrier();
}

// Byte i of a block behind d and selectors
uint turbo_packed_byte(turbo_path path, uint i) {
    const uint first   = turbo_first_lane();
    const uint coded   = QK_TRELLIS / 8;
    const uint low     = OF_TYPE(_BITS) >= 3 ? QK_TRELLIS / 4 : 0;
    const uint segment = i - coded - low;
    if (i < coded) {
        return path.coded[i / 4] >> 8 * (i % 4) & 0xffu;
    }
    if (i < coded + low) {
        return turbo_bytes[first + i - coded][0];
    }
    const uint lane = first + 8 * (segment / 4) + segment % 4;
    return turbo_bytes[lane][1] | turbo_bytes[lane + 4][1];
}

// A block that is not ordinary has d only.
void turbo_store(turbo_path path, uint block, uint d, bool is_ordinary) {
    const uint lane = turbo_lane();
    if (lane == 0) {
        dst16[block / 2] = uint16_t(is_ordinary ? d | path.selectors << 8 : d);
    }
    if (lane < OF_TYPE(_BLOCK_BYTES) / 2 - 1) {
        const uint word = turbo_packed_byte(path, 2 * lane) | turbo_packed_byte(path, 2 * lane + 1) << 8;
        dst16[block / 2 + 1 + lane] = uint16_t(is_ordinary ? word : 0);
    }
}

void main() {
    const uint lane    = turbo_lane();
    const uint i_block = turbo_block_number();
    const bool store   = i_block < p.n_blocks;

    uvec4 x     = uvec4(0);
    uint  block = 0;
    if (store) {
        const uvec4 place = turbo_place(p.src, i_block);
        const uint  first = turbo_offset(p.src, place) + (32 * (lane / 8) + lane % 8) * p.src.value;
        [[unroll]] for (uint i = 0; i < 4; ++i) {
            x[i] = turbo_read_float(first + 8 * i * p.src.value);
        }
        block = turbo_other_offset(p.dst, i_block, place);
    }

    vec4              value;
    const turbo_start start       = turbo_prepare(x, value);
    const bool        is_ordinary = !start.is_nan && !start.is_zero;
    turbo_measure(value, start.first_scale);
    const turbo_path path = turbo_search(start.first_scale, store && is_ordinary);
    turbo_share_plain_bits(path, value, start.first_scale);
    if (store) {
        const uint d = is_ordinary ? start.first_scale + path.scale : start.is_nan ? TRELLIS_SCALE_NAN : 0;
        turbo_store(path, block, d, is_ordinary);
    }
}

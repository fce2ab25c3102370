// Neighbouring invocations, LANES of them, have a block. They meet in shared memory, so that the size of a subgroup does not matter: all
// invocations of a workgroup take part, also those without a block.

const uint GROUP = gl_WorkGroupSize.x;

shared uint turbo_shared[GROUP];

uint turbo_lane() {
    return gl_LocalInvocationID.x % LANES;
}

// Number of the block's first invocation
uint turbo_first_lane() {
    return gl_LocalInvocationID.x - turbo_lane();
}

uint turbo_block_number() {
    return turbo_workgroup() * (GROUP / LANES) + gl_LocalInvocationID.x / LANES;
}

// Over the lanes of a block
uint turbo_sum(uint x) {
    turbo_shared[gl_LocalInvocationID.x] = x;
    barrier();
    uint sum = 0;
    [[unroll]] for (uint i = 0; i < LANES; ++i) {
        sum += turbo_shared[turbo_first_lane() + i];
    }
    barrier();
    return sum;
}

uint turbo_max(uint x) {
    turbo_shared[gl_LocalInvocationID.x] = x;
    barrier();
    uint most = 0;
    [[unroll]] for (uint i = 0; i < LANES; ++i) {
        most = max(most, turbo_shared[turbo_first_lane() + i]);
    }
    barrier();
    return most;
}

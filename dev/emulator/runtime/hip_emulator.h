// What the parts of the emulated libamdhip64 share: device memory, launches, and how an error ends the program.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

constexpr size_t SPAN = size_t(1) << 33;  // of device memory; reserved, not taken: pages come with their first use
constexpr const char * ARCHITECTURE = "gfx1100";

// Start of device memory, a span of host memory.
char * base();

// New device memory, full of NaN; nullptr when there is no room.
void * allocate(size_t size);
void   release(void * pointer);

// How much of the span is not taken.
size_t room();

// Copy or set, where the program ends if a side in device memory is not within one allocation.
void copy(void * to, const void * from, size_t size);
void fill(void * to, int value, size_t size);

// Start and end of each allocation, as offsets, if they have changed since the last call; otherwise nothing.
std::vector<int64_t> changed_allocations();

// Print Python's error, if there is one, and this one, and end the program.
[[noreturn]] void fail(const char * what);

}  // namespace emulator

// Device memory of the emulated libamdhip64: allocations in one span, with gaps between them, and checked copies.

#include "hip_emulator.h"

#include <sys/mman.h>

#include <cstring>
#include <map>
#include <mutex>

namespace emulator {

namespace {

constexpr size_t ALIGNMENT = 256;
constexpr size_t GAP       = 4096;  // between allocations, so that running over the end hits nothing
constexpr int    POISON    = 0xFF;  // NaN in every float type, as in memory.py

std::mutex                            mutex;
std::map<size_t, size_t>              allocations;   // offset -> size
std::map<size_t, std::vector<size_t>> free_by_room;  // room -> offsets
size_t                                top                 = GAP;
bool                                  allocations_changed = true;

size_t room_of(size_t size) {
    return (size + GAP + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

// Whether a span is outside of device memory, or within one allocation.
bool is_valid(const void * pointer, size_t size) {
    std::lock_guard<std::mutex> lock(mutex);
    const size_t                offset = static_cast<const char *>(pointer) - base();
    if (offset >= SPAN) {
        return true;
    }
    auto next = allocations.upper_bound(offset);
    if (next == allocations.begin()) {
        return false;
    }
    --next;
    return offset + size <= next->first + next->second;
}

}  // namespace

char * base() {
    static char * memory = static_cast<char *>(
        mmap(nullptr, SPAN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    return memory;
}

void * allocate(size_t size) {
    std::lock_guard<std::mutex> lock(mutex);
    const size_t                room     = room_of(size);
    std::vector<size_t> &       reusable = free_by_room[room];
    size_t                      offset   = top;
    if (!reusable.empty()) {
        offset = reusable.back();
        reusable.pop_back();
    } else if (top + room > SPAN) {
        return nullptr;
    } else {
        top += room;
    }
    allocations[offset] = size;
    allocations_changed = true;
    memset(base() + offset, POISON, size);
    return base() + offset;
}

void release(void * pointer) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto                  found = allocations.find(static_cast<char *>(pointer) - base());
    if (found == allocations.end()) {
        return;
    }
    free_by_room[room_of(found->second)].push_back(found->first);
    allocations.erase(found);
    allocations_changed = true;
}

size_t room() {
    std::lock_guard<std::mutex> lock(mutex);
    return SPAN - top;
}

void copy(void * to, const void * from, size_t size) {
    if (!is_valid(to, size) || !is_valid(from, size)) {
        fail("memory copy beyond an allocation");
    }
    memmove(to, from, size);
}

void fill(void * to, int value, size_t size) {
    if (!is_valid(to, size)) {
        fail("memory set beyond an allocation");
    }
    memset(to, value, size);
}

std::vector<int64_t> changed_allocations() {
    std::lock_guard<std::mutex> lock(mutex);
    std::vector<int64_t>        spans;
    if (allocations_changed) {
        allocations_changed = false;
        for (const auto & [offset, size] : allocations) {
            spans.insert(spans.end(), { int64_t(offset), int64_t(offset + size) });
        }
    }
    return spans;
}

}  // namespace emulator

// Runs kernels written for CUDA and HIP on the CPU: one fiber per thread, one block after the other. See ../README.md.
//
// Threads run one at a time, each until it meets others: at __syncthreads (its block), at a shuffle or __syncwarp (its 32 lanes), at a
// vote (its wave, LANES_WAVE lanes). What a GPU would leave undefined ends the launch with lanes::Misuse: threads that meet at
// different places of the source, or that wait for one which never comes.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#    include <ucontext.h>
#endif

// lanes that run in lockstep, and that a vote covers: 32 (NVIDIA, RDNA) or 64 (GCN, CDNA)
#if !defined(LANES_WAVE)
#    define LANES_WAVE 32
#endif

struct uint3 {
    unsigned x, y, z;
};

struct dim3 {
    unsigned x, y, z;

    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// of the thread that runs now
inline uint3 threadIdx, blockIdx;
inline dim3  blockDim, gridDim;

namespace lanes {

constexpr int warp = 32;  // threads of a shuffle
constexpr int wave = LANES_WAVE;
static_assert(wave == 32 || wave == 64, "LANES_WAVE");

struct Misuse : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Which thread goes first after each meeting. A kernel that lacks a barrier fails in one of the two at least.
enum class Order { ascending, descending };
inline Order order = Order::ascending;

// Where in the source a thread meets others.
struct Site {
    const char * what;
    const char * file;
    int          line;

    bool operator==(const Site & o) const { return line == o.line && !strcmp(what, o.what) && !strcmp(file, o.file); }

    bool operator!=(const Site & o) const { return !(*this == o); }

    std::string text() const { return std::string(what) + " at " + file + ":" + std::to_string(line); }
};

// The values that the members of a group hand to each other at a meeting. Two sets, used in turn: the next meeting may begin
// while a member has not yet read from the last one.
struct Group {
    int      first   = 0;
    int      members = 0;
    int      arrived = 0;
    unsigned meeting = 0;
    Site     site    = {};
    alignas(16) unsigned char values[2][64][16];
};

//
// fibers
//

constexpr size_t stack_bytes = 256 * 1024;

#if defined(__x86_64__)
extern "C" void lanes_switch(void ** save, void * resume);

asm(R"(
    .pushsection .text.lanes_switch, "axG", @progbits, lanes_switch, comdat
    .weak lanes_switch
    .type lanes_switch, @function
lanes_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size lanes_switch, . - lanes_switch
    .popsection
)");

struct Context {
    void * sp = nullptr;

    void prepare(char * stack, void (*entry)()) {
        void ** top = reinterpret_cast<void **>(stack + stack_bytes);
        *--top      = nullptr;  // entry never returns
        *--top      = reinterpret_cast<void *>(entry);
        for (int i = 0; i < 6; ++i) {
            *--top = nullptr;
        }
        sp = top;
    }

    void switch_to(Context & other) { lanes_switch(&sp, other.sp); }
};
#else
struct Context {
    ucontext_t uc;

    void prepare(char * stack, void (*entry)()) {
        getcontext(&uc);
        uc.uc_stack.ss_sp   = stack;
        uc.uc_stack.ss_size = stack_bytes;
        uc.uc_link          = nullptr;
        makecontext(&uc, entry, 0);
    }

    void switch_to(Context & other) { swapcontext(&uc, &other.uc); }
};
#endif

// Stacks are kept for the next launch; the lowest page of each is a guard. A visible function has one static vector for all libraries of a
// process: with one for each, a run of all tests would need more mappings than Linux grants (65,530).
__attribute__((visibility("default"))) inline char * stack(size_t index) {
    static std::vector<char *> stacks;
    while (stacks.size() <= index) {
        void * memory =
            mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE) != 0) {
            throw std::bad_alloc();
        }
        stacks.push_back(static_cast<char *>(memory));
    }
    return stacks[index];
}

struct Fiber {
    // An asynchronous copy into shared memory (mma.h).
    struct Copy {
        void *       dst;
        const void * src;
        int          bytes;
    };

    using Copies = std::vector<Copy>;

    Context context;
    uint3   thread  = {};
    Group * waiting = nullptr;
    Site    site    = {};
    bool    done    = false;

    Copies              started;    // of no group yet
    std::vector<Copies> committed;  // groups that may be under way, the oldest first
};

//
// one block
//

struct Block {
    std::vector<Fiber>            fibers;
    std::vector<Group>            warps, waves;
    Group                         all;
    Context                       scheduler;
    const std::function<void()> * body    = nullptr;
    int                           current = 0;
    std::string                   failure;
};

inline Block * block = nullptr;

inline std::string name_of(const Fiber & fiber) {
    const uint3 & t = fiber.thread;
    return "thread (" + std::to_string(t.x) + "," + std::to_string(t.y) + "," + std::to_string(t.z) + ")";
}

inline void leave() {
    block->fibers[block->current].context.switch_to(block->scheduler);
}

// Ends the launch: this thread is not resumed.
[[noreturn]] inline void fail(const std::string & message) {
    block->failure = name_of(block->fibers[block->current]) + ": " + message;
    leave();
    abort();
}

inline void entry() {
    (*block->body)();
    block->fibers[block->current].done = true;
    leave();
    abort();
}

// Waits until all members of the group are here.
inline void meet(Group & group, Site site) {
    Fiber & me = block->fibers[block->current];
    if (group.arrived == 0) {
        group.site = site;
    } else if (group.site != site) {
        fail("is at " + site.text() + " while others of its group are at " + group.site.text());
    }
    me.site = site;
    if (++group.arrived < group.members) {
        me.waiting = &group;
        leave();
        return;
    }
    group.arrived = 0;
    group.meeting++;
    for (int i = group.first; i < group.first + group.members; ++i) {
        block->fibers[i].waiting = nullptr;
    }
}

inline int rank() {
    return block->current;
}

inline Group & my_warp() {
    return block->warps[rank() / warp];
}

inline Group & my_wave() {
    return block->waves[rank() / wave];
}

// Hands out a value and, after the meeting, gives access to those of all members, by their position in the group.
template <typename T> class Exchange {
    static_assert(sizeof(T) <= 16, "too large for a shuffle");
    Group & group_;
    int     set_;

  public:
    Exchange(Group & group, Site site, T value) : group_(group), set_(group.meeting & 1) {
        memcpy(group_.values[set_][rank() - group_.first], &value, sizeof(T));
        meet(group_, site);
    }

    T of(int position) const {
        if (position < 0 || position >= group_.members) {
            fail("reads from lane " + std::to_string(position) + ", which does not exist");
        }
        T value;
        memcpy(&value, group_.values[set_][position], sizeof(T));
        return value;
    }
};

//
// launches
//

inline void make_groups(std::vector<Group> & groups, int threads, int size) {
    groups.assign((threads + size - 1) / size, Group());
    for (size_t i = 0; i < groups.size(); ++i) {
        groups[i].first   = static_cast<int>(i) * size;
        groups[i].members = std::min(size, threads - groups[i].first);
    }
}

inline void resume(int index) {
    Fiber & fiber  = block->fibers[index];
    block->current = index;
    threadIdx      = fiber.thread;
    block->scheduler.switch_to(fiber.context);
}

inline std::string describe_stall() {
    const Fiber * waiting = nullptr;
    const Fiber * other   = nullptr;
    int           n_wait  = 0;
    for (const Fiber & fiber : block->fibers) {
        n_wait += !fiber.done;
        waiting = !waiting && !fiber.done ? &fiber : waiting;
    }
    const Group & group = *waiting->waiting;
    for (int i = group.first; i < group.first + group.members; ++i) {
        const Fiber & fiber = block->fibers[i];
        if (fiber.done || fiber.waiting != &group) {
            other = &fiber;
        }
    }
    std::string text = name_of(*waiting) + " waits for ever, " + waiting->site.text() + " (" + std::to_string(n_wait) +
                       " threads wait)";
    if (other) {
        text += ": " + name_of(*other) + (other->done ? " has ended" : " is at " + other->site.text());
    }
    return text;
}

// Runs the fibers of a block that can go on, until all have ended.
inline void run_block() {
    const int n = static_cast<int>(block->fibers.size());
    for (int left = n; left > 0;) {
        bool moved = false;
        for (int k = 0; k < n; ++k) {
            const int i = order == Order::ascending ? k : n - 1 - k;
            if (block->fibers[i].done || block->fibers[i].waiting) {
                continue;
            }
            resume(i);
            moved = true;
            left -= block->fibers[i].done;
            if (!block->failure.empty()) {
                throw Misuse(block->failure);
            }
        }
        if (!moved) {
            throw Misuse(describe_stall());
        }
    }
}

inline void start_block(const dim3 & size) {
    const int n = static_cast<int>(size.x * size.y * size.z);
    block->fibers.assign(n, Fiber());
    make_groups(block->warps, n, warp);
    make_groups(block->waves, n, wave);
    block->all         = Group();
    block->all.members = n;
    for (int i = 0; i < n; ++i) {
        const unsigned u        = static_cast<unsigned>(i);
        block->fibers[i].thread = { u % size.x, u / size.x % size.y, u / (size.x * size.y) };
        block->fibers[i].context.prepare(stack(i), entry);
    }
}

inline void run_grid(const dim3 & grid, const dim3 & size, const std::function<void()> & body) {
    if (size.x * size.y * size.z > 1024 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffff) {
        throw Misuse("grid or block too large for a GPU");
    }
    if (!grid.x || !grid.y || !grid.z || !size.x || !size.y || !size.z) {
        throw Misuse("empty grid or block");
    }
    Block state;
    state.body = &body;
    block      = &state;
    gridDim    = grid;
    blockDim   = size;
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = { x, y, z };
                start_block(size);
                run_block();
            }
        }
    }
    block = nullptr;
}

// kernel<<<grid, block>>>(args...). Throws Misuse.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const dim3 & grid, const dim3 & size, Args... args) {
    run_grid(grid, size, [&] { kernel(args...); });
}

}  // namespace lanes

#pragma once

// What the test programs share.

#include "ggml.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <string>

[[noreturn]] inline void fail(const std::string & message) {
    fprintf(stderr, "error: %s\n", message.c_str());
    exit(2);
}

// Exactly `size` bytes: before them a pattern, behind them a page without access. Contents are NaN.
class guarded {
  public:
    explicit guarded(size_t size) : size_(size) {
        const size_t page = sysconf(_SC_PAGESIZE);
        front_            = GGML_PAD(size, page) + page;
        start_ =
            (unsigned char *) mmap(nullptr, front_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (start_ == MAP_FAILED || mprotect(start_ + front_, page, PROT_NONE) != 0) {
            fail("no memory");
        }
        length_ = front_ + page;
        front_ -= size;
        memset(start_, PATTERN, front_);
        memset(data(), 0xff, size);
    }

    guarded(const guarded &) = delete;

    ~guarded() { munmap(start_, length_); }

    void * data() const { return start_ + front_; }

    bool intact() const {
        return std::all_of(start_, start_ + front_, [](unsigned char c) { return c == PATTERN; });
    }

    void read() const {
        if (!std::cin.read((char *) data(), size_)) {
            fail("the request ended early");
        }
    }

    void write() const { std::cout.write((const char *) data(), size_); }

  private:
    static constexpr unsigned char PATTERN = 0xa5;

    unsigned char * start_;
    size_t          size_, front_, length_;
};

using memory = std::unique_ptr<guarded>;

inline ggml_type type_of(const std::string & name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const char * known = ggml_type_name((ggml_type) i);
        if (known && name == known) {
            return (ggml_type) i;
        }
    }
    fail("no type " + name);
}

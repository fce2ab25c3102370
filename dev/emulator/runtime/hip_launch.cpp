// Kernels of the emulated libamdhip64: code objects and kernels as clang's generated host code registers them, and launches, which go to
// emulator/bridge.py in the Python of this process.
//
// Environment: TURBO_EMULATOR_PATH, folders for Python's sys.path, separated by colons.

#include <Python.h>

#define __HIP_PLATFORM_AMD__ 1
#include "hip_emulator.h"

#include <hip/hip_runtime_api.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace emulator {

[[noreturn]] void fail(const char * what) {
    fflush(stdout);
    if (PyErr_Occurred()) {
        PyErr_Print();
    }
    fprintf(stderr, "emulator: %s\n", what);
    fflush(stderr);
    _exit(3);
}

}  // namespace emulator

namespace {

using namespace emulator;

struct KernelName {
    int         image;
    std::string name;
};

std::vector<std::string>           images;
std::map<const void *, KernelName> kernels;

// The code object for our architecture in a bundle of clang's ("__CLANG_OFFLOAD_BUNDLE__", count, then offset, size, length, name).
std::string unbundle(const char * bundle) {
    constexpr char magic[] = "__CLANG_OFFLOAD_BUNDLE__";
    if (memcmp(bundle, magic, sizeof(magic) - 1) != 0) {
        return "";
    }
    const char * at = bundle + sizeof(magic) - 1;
    uint64_t     count;
    memcpy(&count, at, 8);
    at += 8;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t fields[3];
        memcpy(fields, at, sizeof(fields));
        const std::string name(at + sizeof(fields), fields[2]);
        at += sizeof(fields) + fields[2];
        if (name.find(ARCHITECTURE) != std::string::npos) {
            return std::string(bundle + fields[0], fields[1]);
        }
    }
    return "";
}

class PythonLock {
  public:
    PythonLock() : state(PyGILState_Ensure()) {}

    ~PythonLock() { PyGILState_Release(state); }

  private:
    PyGILState_STATE state;
};

PyObject * bridge() {
    static PyObject * module = nullptr;
    if (module == nullptr) {
        PyRun_SimpleString("import os, sys; sys.path[:0] = os.environ['TURBO_EMULATOR_PATH'].split(':')");
        module = PyImport_ImportModule("emulator.bridge");
        if (module == nullptr) {
            fail("emulator.bridge cannot be imported; see TURBO_EMULATOR_PATH");
        }
        PyObject * done = PyObject_CallMethod(module, "start", "KK", (unsigned long long) (uintptr_t) base(),
                                              (unsigned long long) SPAN);
        if (done == nullptr) {
            fail("start");
        }
        Py_DECREF(done);
    }
    return module;
}

void send_allocations() {
    const std::vector<int64_t> spans = changed_allocations();
    if (spans.empty()) {
        return;
    }
    PyObject * done = PyObject_CallMethod(bridge(), "allocations", "y#", (const char *) spans.data(),
                                          Py_ssize_t(spans.size() * sizeof(int64_t)));
    if (done == nullptr) {
        fail("allocations");
    }
    Py_DECREF(done);
}

// Code objects are loaded when a kernel of theirs is launched, into memory of their own.
void send_image(int index) {
    static std::map<int, bool> sent;
    if (sent[index]) {
        return;
    }
    sent[index]               = true;
    const std::string & image = images[index];
    PyObject * size = PyObject_CallMethod(bridge(), "image_bytes", "y#", image.data(), Py_ssize_t(image.size()));
    if (size == nullptr) {
        fail("image_bytes");
    }
    void * memory = allocate(PyLong_AsUnsignedLongLong(size));
    Py_DECREF(size);
    if (memory == nullptr) {
        fail("no memory for a code object");
    }
    PyObject * done = PyObject_CallMethod(bridge(), "image", "iy#K", index, image.data(), Py_ssize_t(image.size()),
                                          (unsigned long long) (uintptr_t) memory);
    if (done == nullptr) {
        fail("image");
    }
    Py_DECREF(done);
}

void launch(const KernelName & kernel, dim3 grid, dim3 block, void ** arguments, size_t shared) {
    static std::once_flag started;
    std::call_once(started, [] {
        if (!Py_IsInitialized()) {
            Py_InitializeEx(0);
            PyEval_SaveThread();
        }
    });
    PythonLock lock;
    send_image(kernel.image);
    send_allocations();
    PyObject * done = PyObject_CallMethod(bridge(), "launch", "is(III)(III)Kn", kernel.image, kernel.name.c_str(),
                                          grid.x, grid.y, grid.z, block.x, block.y, block.z,
                                          (unsigned long long) (uintptr_t) arguments, Py_ssize_t(shared));
    if (done == nullptr) {
        fail(kernel.name.c_str());
    }
    Py_DECREF(done);
}

struct Configuration {
    dim3        grid, block;
    size_t      shared;
    hipStream_t stream;
};

thread_local std::vector<Configuration> configurations;

}  // namespace

extern "C" {

// What clang's generated host code calls.

struct FatBinary {
    uint32_t     magic, version;
    const char * bundle;
    void *       unused;
};

void ** __hipRegisterFatBinary(const void * data) {
    images.push_back(unbundle(static_cast<const FatBinary *>(data)->bundle));
    return new void *(reinterpret_cast<void *>(images.size() - 1));
}

void __hipRegisterFunction(void **      module,
                           const void * host,
                           char *,
                           const char * name,
                           unsigned,
                           void *,
                           void *,
                           void *,
                           void *,
                           int *) {
    kernels[host] = { int(reinterpret_cast<intptr_t>(*module)), name };
}

void __hipUnregisterFatBinary(void **) {}

hipError_t __hipPushCallConfiguration(dim3 grid, dim3 block, size_t shared, hipStream_t stream) {
    configurations.push_back({ grid, block, shared, stream });
    return hipSuccess;
}

hipError_t __hipPopCallConfiguration(dim3 * grid, dim3 * block, size_t * shared, hipStream_t * stream) {
    const Configuration last = configurations.back();
    configurations.pop_back();
    *grid   = last.grid;
    *block  = last.block;
    *shared = last.shared;
    *stream = last.stream;
    return hipSuccess;
}

// Launches

hipError_t hipLaunchKernel(const void * function,
                           dim3         grid,
                           dim3         block,
                           void **      arguments,
                           size_t       shared,
                           hipStream_t) {
    const auto found = kernels.find(function);
    if (found == kernels.end()) {
        return hipErrorInvalidDeviceFunction;
    }
    launch(found->second, grid, block, arguments, shared);
    return hipSuccess;
}

hipError_t hipLaunchCooperativeKernel(const void * function,
                                      dim3         grid,
                                      dim3         block,
                                      void **      arguments,
                                      unsigned     shared,
                                      hipStream_t  stream) {
    return hipLaunchKernel(function, grid, block, arguments, shared, stream);
}

}  // extern "C"

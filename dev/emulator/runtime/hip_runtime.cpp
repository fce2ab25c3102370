// A libamdhip64 for programs that run on the emulator: device memory is a span of host memory, streams are in order with everything, and a
// kernel launch goes to emulator/bridge.py. Has the functions that ggml's HIP backend imports; graphs are "not supported", so run with
// GGML_CUDA_DISABLE_GRAPHS=1.
//
// Environment: TURBO_EMULATOR_PATH, folders for Python's sys.path, separated by colons; TURBO_EMULATOR_CUS, number of compute units to report.

#include <Python.h>

#define __HIP_PLATFORM_AMD__ 1
#include <hip/hip_runtime_api.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

constexpr size_t       SPAN         = size_t(1) << 33;  // reserved, not taken: pages come with their first use
constexpr size_t       ALIGNMENT    = 256;
constexpr size_t       GAP          = 4096;  // between allocations, so that running over the end hits nothing
constexpr int          POISON       = 0xFF;  // NaN in every float type, as in memory.py
constexpr const char * ARCHITECTURE = "gfx1100";

char * base() {
    static char * memory = static_cast<char *>(
        mmap(nullptr, SPAN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    return memory;
}

std::mutex                            mutex;
std::map<size_t, size_t>              allocations;   // offset -> size
std::map<size_t, std::vector<size_t>> free_by_room;  // room -> offsets
size_t                                top                 = GAP;
bool                                  allocations_changed = true;

size_t room_of(size_t size) {
    return (size + GAP + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
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

[[noreturn]] void fail(const char * what) {
    fflush(stdout);
    if (PyErr_Occurred()) {
        PyErr_Print();
    }
    fprintf(stderr, "emulator: %s\n", what);
    fflush(stderr);
    _exit(3);
}

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
    std::vector<int64_t> spans;
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (!allocations_changed) {
            return;
        }
        allocations_changed = false;
        for (const auto & [offset, size] : allocations) {
            spans.insert(spans.end(), { int64_t(offset), int64_t(offset + size) });
        }
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

hipError_t hipFuncSetAttribute(const void *, hipFuncAttribute, int) {
    return hipSuccess;
}

hipError_t hipOccupancyMaxActiveBlocksPerMultiprocessor(int * blocks, const void *, int, size_t) {
    *blocks = 2;
    return hipSuccess;
}

// What two blocks at once take, as above.
hipError_t hipFuncGetAttributes(hipFuncAttributes * attributes, const void *) {
    *attributes                 = {};
    attributes->numRegs         = 256;
    attributes->sharedSizeBytes = 48 * 1024;
    return hipSuccess;
}

// Memory

hipError_t hipMalloc(void ** pointer, size_t size) {
    *pointer = allocate(size);
    return *pointer ? hipSuccess : hipErrorOutOfMemory;
}

hipError_t hipMallocManaged(void ** pointer, size_t size, unsigned) {
    return hipMalloc(pointer, size);
}

hipError_t hipHostMalloc(void ** pointer, size_t size, unsigned) {
    return hipMalloc(pointer, size);
}

hipError_t hipFree(void * pointer) {
    release(pointer);
    return hipSuccess;
}

hipError_t hipHostFree(void * pointer) {
    return hipFree(pointer);
}

hipError_t hipHostRegister(void *, size_t, unsigned) {
    return hipErrorNotSupported;
}

hipError_t hipHostUnregister(void *) {
    return hipSuccess;
}

hipError_t hipHostGetDevicePointer(void ** device, void * host, unsigned) {
    *device = host;
    return hipSuccess;
}

hipError_t hipMemcpyAsync(void * to, const void * from, size_t size, hipMemcpyKind, hipStream_t) {
    copy(to, from, size);
    return hipSuccess;
}

hipError_t hipMemcpyPeerAsync(void * to, int, const void * from, int, size_t size, hipStream_t) {
    copy(to, from, size);
    return hipSuccess;
}

hipError_t hipMemcpy2DAsync(void *       to,
                            size_t       to_pitch,
                            const void * from,
                            size_t       from_pitch,
                            size_t       width,
                            size_t       height,
                            hipMemcpyKind,
                            hipStream_t) {
    for (size_t row = 0; row < height; row++) {
        copy(static_cast<char *>(to) + row * to_pitch, static_cast<const char *>(from) + row * from_pitch, width);
    }
    return hipSuccess;
}

hipError_t hipMemset(void * to, int value, size_t size) {
    fill(to, value, size);
    return hipSuccess;
}

hipError_t hipMemsetAsync(void * to, int value, size_t size, hipStream_t) {
    fill(to, value, size);
    return hipSuccess;
}

hipError_t hipMemGetInfo(size_t * available, size_t * total) {
    *available = SPAN - top;
    *total     = SPAN;
    return hipSuccess;
}

hipError_t hipMemAdvise(const void *, size_t, hipMemoryAdvise, int) {
    return hipSuccess;
}

// One device

hipError_t hipGetDeviceCount(int * count) {
    *count = 1;
    return hipSuccess;
}

hipError_t hipGetDevice(int * device) {
    *device = 0;
    return hipSuccess;
}

hipError_t hipSetDevice(int) {
    return hipSuccess;
}

hipError_t hipDeviceSynchronize() {
    return hipSuccess;
}

#undef hipGetDeviceProperties

hipError_t hipGetDevicePropertiesR0600(hipDeviceProp_tR0600 * properties, int) {
    const char * units = getenv("TURBO_EMULATOR_CUS");
    memset(properties, 0, sizeof(*properties));
    snprintf(properties->name, sizeof(properties->name), "emulated %s", ARCHITECTURE);
    snprintf(properties->gcnArchName, sizeof(properties->gcnArchName), "%s", ARCHITECTURE);
    properties->major                  = 11;
    properties->warpSize               = 32;
    properties->multiProcessorCount    = units ? atoi(units) : 4;
    properties->maxThreadsPerBlock     = 1024;
    properties->sharedMemPerBlock      = 65536;
    properties->sharedMemPerBlockOptin = 65536;
    properties->totalGlobalMem         = SPAN;
    return hipSuccess;
}

hipError_t hipDeviceGetAttribute(int * value, hipDeviceAttribute_t, int) {
    *value = 0;
    return hipSuccess;
}

hipError_t hipDeviceGetPCIBusId(char * id, int size, int) {
    snprintf(id, size, "0000:00:00.0");
    return hipSuccess;
}

hipError_t hipDeviceCanAccessPeer(int * can, int, int) {
    *can = 0;
    return hipSuccess;
}

hipError_t hipDeviceEnablePeerAccess(int, unsigned) {
    return hipSuccess;
}

const char * hipGetErrorString(hipError_t error) {
    return error == hipErrorNotSupported ? "not supported by the emulator" : "emulator error";
}

hipError_t hipGetLastError() {
    return hipSuccess;
}

// Streams and events: everything has happened when its call returns.

hipError_t hipStreamCreateWithFlags(hipStream_t * stream, unsigned) {
    *stream = reinterpret_cast<hipStream_t>(new char);
    return hipSuccess;
}

hipError_t hipStreamDestroy(hipStream_t stream) {
    delete reinterpret_cast<char *>(stream);
    return hipSuccess;
}

hipError_t hipStreamSynchronize(hipStream_t) {
    return hipSuccess;
}

hipError_t hipStreamWaitEvent(hipStream_t, hipEvent_t, unsigned) {
    return hipSuccess;
}

hipError_t hipEventCreateWithFlags(hipEvent_t * event, unsigned) {
    *event = reinterpret_cast<hipEvent_t>(new char);
    return hipSuccess;
}

hipError_t hipEventDestroy(hipEvent_t event) {
    delete reinterpret_cast<char *>(event);
    return hipSuccess;
}

hipError_t hipEventRecord(hipEvent_t, hipStream_t) {
    return hipSuccess;
}

hipError_t hipEventSynchronize(hipEvent_t) {
    return hipSuccess;
}

// Graphs

hipError_t hipStreamBeginCapture(hipStream_t, hipStreamCaptureMode) {
    return hipErrorNotSupported;
}

hipError_t hipStreamEndCapture(hipStream_t, hipGraph_t *) {
    return hipErrorNotSupported;
}

hipError_t hipGraphInstantiate(hipGraphExec_t *, hipGraph_t, hipGraphNode_t *, char *, size_t) {
    return hipErrorNotSupported;
}

hipError_t hipGraphLaunch(hipGraphExec_t, hipStream_t) {
    return hipErrorNotSupported;
}

hipError_t hipGraphDestroy(hipGraph_t) {
    return hipErrorNotSupported;
}

hipError_t hipGraphExecDestroy(hipGraphExec_t) {
    return hipErrorNotSupported;
}

hipError_t hipGraphExecUpdate(hipGraphExec_t, hipGraph_t, hipGraphNode_t *, hipGraphExecUpdateResult *) {
    return hipErrorNotSupported;
}

}  // extern "C"

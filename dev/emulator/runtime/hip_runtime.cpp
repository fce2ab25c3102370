// A libamdhip64 for programs that run on the emulator: device memory is a span of host memory (hip_memory.cpp), streams are in order with
// everything, and a kernel launch goes to emulator/bridge.py (hip_launch.cpp). Has the functions that ggml's HIP backend imports; graphs are
// "not supported", so run with GGML_CUDA_DISABLE_GRAPHS=1.
//
// Environment: TURBO_EMULATOR_CUS, number of compute units to report.

#define __HIP_PLATFORM_AMD__ 1
#include "hip_emulator.h"

#include <hip/hip_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

using namespace emulator;

extern "C" {

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
    *available = room();
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

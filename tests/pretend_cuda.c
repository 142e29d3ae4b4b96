/* An NVIDIA driver without a GPU, for tests: the machine's memory stands for the GPU's, and the
   GPU's clock moves by 2 ms with every launched graph and by nothing else. */
#include <stdlib.h>
#include <string.h>

typedef unsigned long long pointer;
static float now_ms = 0;
static int launches = 0, capturing = 0, allocated = 0;

int pretend_launches(void) { return launches; }
int pretend_allocated(void) { return allocated; }
int pretend_capturing(void) { return capturing; }

int cuInit(unsigned flags) { return flags != 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetErrorString(int code, const char **text) { *text = code == 2 ? "out of memory" : 0; return 0; }
int cuDeviceGetCount(int *count) {
    const char *said = getenv("PRETEND_GPUS");
    *count = said ? atoi(said) : 1;
    return 0;
}
int cuDeviceGet(int *device, int at) { *device = at; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Pretend GPU", size); return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) { *value = which == 75 ? 8 : 7; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = malloc(1); return 0; }
int cuCtxSetCurrent(void *context) { return context == 0; }
int cuMemAlloc_v2(pointer *at, size_t size) {
    if (size > 1u << 30) return 2;
    *at = (pointer)malloc(size);
    allocated++;
    return 0;
}
int cuMemFree_v2(pointer at) { free((void *)at); allocated--; return 0; }
int cuMemcpyHtoDAsync_v2(pointer to, const void *from, size_t size, void *stream) {
    memcpy((void *)to, from, size);
    return stream == 0;
}
int cuMemcpyDtoHAsync_v2(void *to, pointer from, size_t size, void *stream) {
    memcpy(to, (void *)from, size);
    return stream == 0;
}
int cuStreamCreate(void **stream, unsigned flags) { *stream = malloc(1); return flags != 1; }
int cuStreamSynchronize(void *stream) { return stream == 0 || capturing; }
int cuStreamBeginCapture_v2(void *stream, int mode) { capturing = 1; return stream == 0; }
int cuStreamEndCapture(void *stream, void **graph) { capturing = 0; *graph = malloc(1); return 0; }
int cuGraphInstantiateWithFlags(void **ready, void *graph, pointer flags) { *ready = malloc(1); return flags != 0; }
int cuGraphLaunch(void *ready, void *stream) { launches++; now_ms += 2; return ready == 0; }
int cuGraphDestroy(void *graph) { free(graph); return 0; }
int cuGraphExecDestroy(void *ready) { free(ready); return 0; }
int cuEventCreate(void **event, unsigned flags) { *event = malloc(sizeof(float)); return flags != 0; }
int cuEventRecord(void *event, void *stream) { *(float *)event = now_ms; return stream == 0; }
int cuEventSynchronize(void *event) { return event == 0; }
int cuEventElapsedTime(float *ms, void *start, void *end) { *ms = *(float *)end - *(float *)start; return 0; }

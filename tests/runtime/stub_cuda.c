/* A libcuda.so.1 that launches nothing and writes down what it was asked to launch, for tests without a GPU. */
#include <cuda.h>
#include <string.h>

#define MAX_PARAMS 64

static struct {
  unsigned grid[3], block[3], shared;
  unsigned long long stream, function;
  int attributes, cluster, params;
  unsigned long long values[MAX_PARAMS];
} last;
static int sizes[MAX_PARAMS], expected;
static long launches, unloaded;
static CUresult refusing = CUDA_SUCCESS;
static unsigned long long next_function = 0x1000;

/* The tests say how many bytes each parameter of the next kernels has: the driver knows it from the cubin. */
void stub_expect(int count, const int *bytes) {
  expected = count;
  memcpy(sizes, bytes, count * sizeof(int));
}
long stub_launches(void) { return launches; }
long stub_unloaded(void) { return unloaded; }
void stub_refuse(int error) { refusing = (CUresult)error; } /* every launch from now on, until 0 */
void stub_last(unsigned long long *out) {
  for (int i = 0; i < 3; i++) out[i] = last.grid[i], out[3 + i] = last.block[i];
  out[6] = last.shared, out[7] = last.stream, out[8] = last.function, out[9] = last.attributes, out[10] = last.cluster;
  out[11] = last.params;
  memcpy(out + 12, last.values, sizeof last.values);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **params, void **extra) {
  if (refusing != CUDA_SUCCESS) return refusing;
  launches++;
  last.grid[0] = config->gridDimX, last.grid[1] = config->gridDimY, last.grid[2] = config->gridDimZ;
  last.block[0] = config->blockDimX, last.block[1] = config->blockDimY, last.block[2] = config->blockDimZ;
  last.shared = config->sharedMemBytes, last.stream = (unsigned long long)config->hStream;
  last.function = (unsigned long long)f, last.attributes = config->numAttrs, last.params = expected;
  last.cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) last.cluster = config->attrs[i].value.clusterDim.x;
  for (int i = 0; i < expected; i++) last.values[i] = 0, memcpy(&last.values[i], params[i], sizes[i]);
  return CUDA_SUCCESS;
}
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 2, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
  default: *value = 49152;
  }
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) {
  return *text = error == CUDA_ERROR_ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "stub", CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)1, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return unloaded++, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule module, const char *name) {
  return *f = (CUfunction)(next_function += 0x10), CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)data = pointer, CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

// SPDX-License-Identifier: Apache-2.0
#include "fake_driver.h"

#include <cstdlib>
#include <cstring>

extern "C" {

FakeCuda fake_cuda;

static CUresult result_of(const char *call) { return fake_cuda.failing_call == call ? 700 : CUDA_SUCCESS; }

CUresult cuInit(unsigned) {
  const char *result = std::getenv("FAKE_CUDA_INIT");
  return result != nullptr ? std::atoi(result) : CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = fake_cuda.context;
  return result_of("cuCtxGetCurrent");
}

CUresult cuModuleLoadData(CUmodule *module, const void *cubin) {
  std::memcpy(fake_cuda.cubin, cubin, sizeof fake_cuda.cubin);
  *module = reinterpret_cast<CUmodule>(static_cast<size_t>(++fake_cuda.modules_loaded));
  return result_of("cuModuleLoadData");
}

CUresult cuModuleUnload(CUmodule) {
  ++fake_cuda.modules_unloaded;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  fake_cuda.functions.push_back(name);
  *function = reinterpret_cast<CUfunction>(module);
  return result_of("cuModuleGetFunction");
}

CUresult cuFuncSetAttribute(CUfunction, int attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) fake_cuda.shared_requested = value;
  return result_of("cuFuncSetAttribute");
}

CUresult cuLaunchKernel(CUfunction, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared, CUstream stream, void **, void **) {
  const unsigned grid[3] = {gx, gy, gz};
  const unsigned block[3] = {bx, by, bz};
  std::memcpy(fake_cuda.grid, grid, sizeof grid);
  std::memcpy(fake_cuda.block, block, sizeof block);
  fake_cuda.shared = shared;
  fake_cuda.stream = stream;
  return result_of("cuLaunchKernel");
}

CUresult cuGetErrorString(CUresult, const char **text) {
  *text = "a fake error";
  return CUDA_SUCCESS;
}
}

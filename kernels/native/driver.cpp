// SPDX-License-Identifier: Apache-2.0
#include "driver.h"

#include <dlfcn.h>

namespace {

template <typename Function>
void find(void *library, const char *name, Function &function, const char *&missing) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr && missing == nullptr) missing = name;
}

Driver open() {
  Driver result{};
  // Never closed: kernels stay loaded until the process ends.
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    result.missing = "libcuda.so.1 is not on this machine";
    return result;
  }
  find(library, "cuInit", result.cuInit, result.missing);
  find(library, "cuCtxGetCurrent", result.cuCtxGetCurrent, result.missing);
  find(library, "cuModuleLoadData", result.cuModuleLoadData, result.missing);
  find(library, "cuModuleUnload", result.cuModuleUnload, result.missing);
  find(library, "cuModuleGetFunction", result.cuModuleGetFunction, result.missing);
  find(library, "cuFuncSetAttribute", result.cuFuncSetAttribute, result.missing);
  find(library, "cuLaunchKernel", result.cuLaunchKernel, result.missing);
  find(library, "cuGetErrorString", result.cuGetErrorString, result.missing);
  if (result.missing == nullptr && result.cuInit(0) != CUDA_SUCCESS)
    result.missing = "libcuda.so.1 finds no GPU (cuInit failed)";
  return result;
}

}  // namespace

const Driver &driver() {
  static const Driver instance = open();
  return instance;
}

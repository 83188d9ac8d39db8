// SPDX-License-Identifier: Apache-2.0
#include "driver.h"

#include <dlfcn.h>

namespace {

template <typename Function>
void find(void *library, const char *name, Function &place, const char *&missing) {
  place = reinterpret_cast<Function>(dlsym(library, name));
  if (place == nullptr && missing == nullptr) missing = name;
}

Driver open() {
  Driver found{};
  // Not closed again: kernels stay loaded until the process ends.
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    found.missing = "libcuda.so.1 is not on this machine";
    return found;
  }
  find(library, "cuInit", found.cuInit, found.missing);
  find(library, "cuCtxGetCurrent", found.cuCtxGetCurrent, found.missing);
  find(library, "cuModuleLoadData", found.cuModuleLoadData, found.missing);
  find(library, "cuModuleUnload", found.cuModuleUnload, found.missing);
  find(library, "cuModuleGetFunction", found.cuModuleGetFunction, found.missing);
  find(library, "cuFuncSetAttribute", found.cuFuncSetAttribute, found.missing);
  find(library, "cuLaunchKernel", found.cuLaunchKernel, found.missing);
  find(library, "cuGetErrorString", found.cuGetErrorString, found.missing);
  if (found.missing == nullptr && found.cuInit(0) != CUDA_SUCCESS)
    found.missing = "libcuda.so.1 is there but finds no GPU (cuInit failed)";
  return found;
}

}  // namespace

const Driver &driver() {
  static const Driver found = open();
  return found;
}

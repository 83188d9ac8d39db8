// SPDX-License-Identifier: Apache-2.0
#include "pw_kernels.h"

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "driver.h"

// The concatenated cubins, and the manifest, included from the build directory.
__asm__(
    ".section .rodata\n"
    ".balign 64\n"
    "pw_cubins: .incbin \"" PW_GENERATED "/cubins.bin\"\n"
    "pw_manifest: .incbin \"" PW_GENERATED "/manifest.json\"\n"
    ".byte 0\n"
    ".previous\n");
extern "C" {
__attribute__((visibility("hidden"))) extern const char pw_cubins[];
__attribute__((visibility("hidden"))) extern const char pw_manifest[];
}

namespace {

struct Embedded {
  pw_kernel kernel;
  size_t offset;  // of the cubin in pw_cubins
};

const Embedded kKernels[] = {
#include "table.inc"
};
const int kCount = static_cast<int>(sizeof(kKernels) / sizeof(kKernels[0]));
const int kDefaultSharedBytes = 48 * 1024;  // a function needs an attribute for more

std::mutex mutex;
std::map<std::pair<CUcontext, int>, CUfunction> loaded;

pw_status fail(pw_status status, char *message, size_t size, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (message != nullptr && size > 0) vsnprintf(message, size, format, arguments);
  va_end(arguments);
  return status;
}

pw_status driver_error(CUresult result, const char *call, const char *key, char *message, size_t size) {
  const char *text = nullptr;
  driver().cuGetErrorString(result, &text);
  return fail(PW_DRIVER_ERROR, message, size, "%s of %s: %s (CUDA error %d)", call, key,
              text != nullptr ? text : "unknown", static_cast<int>(result));
}

// Return the function of a kernel in the current context, loaded at its first use.
pw_status function(int index, CUfunction *out, char *message, size_t size) {
  if (index < 0 || index >= kCount)
    return fail(PW_BAD_ARGUMENT, message, size, "no kernel %d among %d", index, kCount);
  const pw_status status = pw_kernels_driver(message, size);
  if (status != PW_OK) return status;
  const pw_kernel &kernel = kKernels[index].kernel;
  CUcontext context = nullptr;
  CUresult result = driver().cuCtxGetCurrent(&context);
  if (result != CUDA_SUCCESS) return driver_error(result, "cuCtxGetCurrent", kernel.key, message, size);
  if (context == nullptr)
    return fail(PW_BAD_ARGUMENT, message, size, "no current CUDA context to load %s into",
                kernel.key);

  const std::lock_guard<std::mutex> lock(mutex);
  const auto entry = loaded.find({context, index});
  if (entry != loaded.end()) {
    *out = entry->second;
    return PW_OK;
  }
  CUmodule module = nullptr;
  result = driver().cuModuleLoadData(&module, pw_cubins + kKernels[index].offset);
  if (result != CUDA_SUCCESS) return driver_error(result, "cuModuleLoadData", kernel.key, message, size);
  CUfunction handle = nullptr;
  result = driver().cuModuleGetFunction(&handle, module, kernel.entry);
  if (result == CUDA_SUCCESS && kernel.shared_bytes > kDefaultSharedBytes)
    result = driver().cuFuncSetAttribute(handle, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                         kernel.shared_bytes);
  if (result != CUDA_SUCCESS) {
    driver().cuModuleUnload(module);
    return driver_error(result, "loading", kernel.key, message, size);
  }
  loaded[{context, index}] = handle;
  *out = handle;
  return PW_OK;
}

}  // namespace

extern "C" {

int pw_kernels_count(void) { return kCount; }

const pw_kernel *pw_kernels_get(int index) {
  return index < 0 || index >= kCount ? nullptr : &kKernels[index].kernel;
}

int pw_kernels_find(const char *key, int arch) {
  for (int index = 0; index < kCount; ++index) {
    const pw_kernel &kernel = kKernels[index].kernel;
    if (kernel.arch == arch && std::strcmp(kernel.key, key) == 0) return index;
  }
  return -1;
}

const char *pw_kernels_manifest(void) { return pw_manifest; }

pw_status pw_kernels_driver(char *message, size_t size) {
  if (driver().missing == nullptr) return PW_OK;
  return fail(PW_NO_DRIVER, message, size, "no usable CUDA driver: %s", driver().missing);
}

pw_status pw_kernels_load(int index, char *message, size_t size) {
  CUfunction handle = nullptr;
  return function(index, &handle, message, size);
}

pw_status pw_kernels_launch(int index, void *stream, const unsigned grid[3], void *const *arguments,
                            unsigned long long scratch, char *message, size_t size) {
  CUfunction handle = nullptr;
  const pw_status status = function(index, &handle, message, size);
  if (status != PW_OK) return status;
  const pw_kernel &kernel = kKernels[index].kernel;
  if (kernel.scratch_bytes > 0 && scratch == 0)
    return fail(PW_BAD_ARGUMENT, message, size, "%s needs %d bytes of scratch per block",
                kernel.key, kernel.scratch_bytes);
  // The last parameters of every Triton kernel are scratch memory and its profiler's.
  std::uint64_t last[2] = {scratch, 0};
  std::vector<void *> all(arguments, arguments + std::strlen(kernel.parameters));
  all.push_back(&last[0]);
  all.push_back(&last[1]);
  const CUresult result = driver().cuLaunchKernel(
      handle, grid[0], grid[1], grid[2], 32u * static_cast<unsigned>(kernel.num_warps), 1, 1,
      static_cast<unsigned>(kernel.shared_bytes), static_cast<CUstream>(stream), all.data(),
      nullptr);
  if (result != CUDA_SUCCESS) return driver_error(result, "cuLaunchKernel", kernel.key, message, size);
  return PW_OK;
}

}  // extern "C"

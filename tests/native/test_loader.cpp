// SPDX-License-Identifier: Apache-2.0
// One process per case, as the library opens the driver once: test_loader CASE.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "fake_driver.h"
#include "pw_kernels.h"

#define EXPECT(condition)                                             \
  do {                                                                \
    if (!(condition)) {                                               \
      std::fprintf(stderr, "line %d: %s\n", __LINE__, #condition);    \
      std::exit(1);                                                   \
    }                                                                 \
  } while (false)

namespace {

char message[256];
const unsigned kGrid[3] = {7, 2, 1};

bool message_has(const char *text) { return std::strstr(message, text) != nullptr; }

FakeCuda &fake() {
  void *driver = dlopen("libcuda.so.1", RTLD_NOW);
  EXPECT(driver != nullptr);
  return *static_cast<FakeCuda *>(dlsym(driver, "fake_cuda"));
}

// Index of the first kernel that satisfies `predicate`.
int first(const std::function<bool(const pw_kernel &)> &predicate) {
  for (int index = 0; index < pw_kernels_count(); ++index)
    if (predicate(*pw_kernels_get(index))) return index;
  EXPECT(!"such a kernel");
  return -1;
}

pw_status launch(int index, unsigned long long scratch = 4096) {
  static std::uint64_t value = 42;
  std::vector<void *> arguments(64, &value);
  return pw_kernels_launch(index, reinterpret_cast<void *>(0x5), kGrid, arguments.data(), scratch,
                           message, sizeof message);
}

void without_a_driver() {
  if (dlopen("libcuda.so.1", RTLD_NOW) != nullptr) std::exit(77);  // skip: this machine has one
  EXPECT(pw_kernels_count() > 0);
  EXPECT(pw_kernels_driver(message, sizeof message) == PW_NO_DRIVER);
  EXPECT(message_has("libcuda.so.1 is not on this machine"));
  EXPECT(launch(0) == PW_NO_DRIVER);
  EXPECT(pw_kernels_driver(nullptr, 0) == PW_NO_DRIVER);
  const pw_kernel &kernel = *pw_kernels_get(0);
  EXPECT(pw_kernels_find(kernel.key, kernel.arch) == 0);
  EXPECT(pw_kernels_find(kernel.key, 35) == -1);
  EXPECT(pw_kernels_find("nothing", kernel.arch) == -1);
  EXPECT(pw_kernels_get(-1) == nullptr && pw_kernels_get(pw_kernels_count()) == nullptr);
  EXPECT(std::strstr(pw_kernels_manifest(), kernel.key) != nullptr);
}

void no_gpu() {
  EXPECT(pw_kernels_driver(message, sizeof message) == PW_NO_DRIVER);
  EXPECT(message_has("finds no GPU"));
}

void launches() {
  const int index = first([](const pw_kernel &kernel) { return kernel.shared_bytes > 48 * 1024; });
  const pw_kernel &kernel = *pw_kernels_get(index);
  EXPECT(launch(index) == PW_OK);
  EXPECT(std::memcmp(fake().cubin, "\177ELF", 4) == 0);
  EXPECT(fake().functions.back() == kernel.entry);
  EXPECT(std::memcmp(fake().grid, kGrid, sizeof kGrid) == 0);
  EXPECT(fake().block[0] == 32u * static_cast<unsigned>(kernel.num_warps));
  EXPECT(fake().block[1] == 1 && fake().block[2] == 1);
  EXPECT(fake().shared == static_cast<unsigned>(kernel.shared_bytes));
  EXPECT(fake().shared_requested == kernel.shared_bytes);
  EXPECT(fake().stream == reinterpret_cast<CUstream>(0x5));
}

void loads_once() {
  EXPECT(pw_kernels_load(0, message, sizeof message) == PW_OK);
  EXPECT(launch(0) == PW_OK && launch(0) == PW_OK);
  EXPECT(fake().modules_loaded == 1);
}

void per_context() {
  EXPECT(launch(0) == PW_OK);
  fake().context = reinterpret_cast<CUcontext>(0x2);
  EXPECT(launch(0) == PW_OK);
  EXPECT(fake().modules_loaded == 2);
  fake().context = nullptr;
  EXPECT(launch(0) == PW_BAD_ARGUMENT);
  EXPECT(message_has("no current CUDA context"));
}

void scratch() {
  const int index = first([](const pw_kernel &kernel) { return kernel.scratch_bytes > 0; });
  EXPECT(launch(index, 0) == PW_BAD_ARGUMENT);
  EXPECT(message_has("bytes of scratch per block"));
  EXPECT(launch(index, 8192) == PW_OK);
}

void driver_errors() {
  EXPECT(launch(-1) == PW_BAD_ARGUMENT && launch(pw_kernels_count()) == PW_BAD_ARGUMENT);
  for (const char *call : {"cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"}) {
    fake().failing_call = call;
    EXPECT(launch(0) == PW_DRIVER_ERROR);
    EXPECT(message_has("a fake error") && message_has("700") && message_has(pw_kernels_get(0)->key));
  }
  EXPECT(fake().modules_unloaded == 1);  // the module whose function was not found
  fake().failing_call.clear();
  EXPECT(launch(0) == PW_OK);
}

}  // namespace

int main(int count, char **arguments) {
  const std::map<std::string, std::function<void()>> cases = {
      {"without_a_driver", without_a_driver}, {"no_gpu", no_gpu},
      {"launch", launches},                   {"loads_once", loads_once},
      {"per_context", per_context},           {"scratch", scratch},
      {"driver_errors", driver_errors},
  };
  EXPECT(count == 2 && cases.count(arguments[1]) == 1);
  cases.at(arguments[1])();
  return 0;
}

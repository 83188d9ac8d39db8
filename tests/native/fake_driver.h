// SPDX-License-Identifier: Apache-2.0
// State of the fake driver, which tests reach through dlsym("fake_cuda").
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "driver.h"

struct FakeCuda {
  // what a test sets
  CUcontext context = reinterpret_cast<CUcontext>(0x1);
  std::string failing_call;
  // what it reads
  int modules_loaded = 0;
  int modules_unloaded = 0;
  std::vector<std::string> functions;
  int shared_requested = 0;
  unsigned grid[3] = {};
  unsigned block[3] = {};
  unsigned shared = 0;
  CUstream stream = nullptr;
  unsigned char cubin[4] = {};
};

// SPDX-License-Identifier: Apache-2.0
// What the fake driver notes, for the tests to read through dlsym("fake_cuda").
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "driver.h"

struct FakeCuda {
  // what a test sets
  CUcontext context = reinterpret_cast<CUcontext>(0x1);
  std::string refuse;  // the call that fails
  // what it reads
  int modules_loaded = 0;
  int modules_unloaded = 0;
  std::vector<std::string> functions;
  int shared_asked = 0;
  unsigned grid[3] = {};
  unsigned block[3] = {};
  unsigned shared = 0;
  CUstream stream = nullptr;
  unsigned char cubin[4] = {};
};

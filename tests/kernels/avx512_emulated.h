// SPDX-License-Identifier: Apache-2.0
//
// Included before everything else, this lets a CPU without AVX-512 run the code that is compiled for
// it: the one instruction that is called by name is put together from two of AVX2.

#pragma once

#include <immintrin.h>

#include <cstring>

#define __AVX512F__ 1

static inline __m512 pw_fmadd(__m512 a, __m512 b, __m512 c) {
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  std::memcpy(z, &c, sizeof c);
  for (int half = 0; half < 2; ++half) z[half] = _mm256_fmadd_ps(x[half], y[half], z[half]);
  std::memcpy(&c, z, sizeof c);
  return c;
}
#define _mm512_fmadd_ps pw_fmadd

// SPDX-License-Identifier: Apache-2.0
//
// Vectors of the width that the file is compiled for, and work on several threads.
//
// Every rounding is written down: fused multiplications are calls of fma(), and the compiler may fuse
// no others (-ffp-contract=off). So the bits depend on neither the compiler nor the vector width.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace pw {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

inline Vector load(const float* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline void store(float* to, Vector x) { std::memcpy(to, &x, sizeof x); }
inline Vector all(float x) { return x - Vector{}; }
inline Vector fma(Vector a, Vector b, Vector c) {
#ifdef __AVX512F__
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}
inline Vector fma(float a, Vector b, Vector c) { return fma(all(a), b, c); }

inline int64_t whole(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// GOMP_parallel of the OpenMP library that PyTorch loaded: run f(data) on so many threads.
typedef void (*Parallel)(void (*f)(void*), void* data, unsigned threads, unsigned flags);

inline void on_threads(Parallel parallel, int64_t threads, void (*f)(void*), void* data) {
  if (threads == 1)
    f(data);
  else
    parallel(f, data, static_cast<unsigned>(threads), 0);
}

}  // namespace pw

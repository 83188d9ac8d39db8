// SPDX-License-Identifier: Apache-2.0
//
// The VAE's norm over channels and SiLU, in one pass over memory (pw_kernels/channel_norm.py).

#include <algorithm>
#include <atomic>
#include <cmath>

#include "vectors.h"

namespace {

using namespace pw;

constexpr int kSums = 16;   // partial sums of squares, whatever the width of a vector
constexpr int kBlock = 16;  // positions between the two passes over them

}  // namespace

extern "C" {

// Mirrored by _Norm of pw_kernels/cpu_library.py. Strides are in elements, those of channels are 1.
struct pw_norm {
  const float *x, *gamma;
  float* out;
  int64_t x_frame, x_row, x_column, out_frame, out_row, out_column;
  int64_t channels, frames, rows, columns;  // channels: a multiple of 16
  int64_t silu, threads;
};

void pw_channel_norm(const pw_norm* n, pw::Parallel parallel);
}

namespace {

struct NormRun {
  const pw_norm& n;
  std::atomic<int64_t> next{0};
};

// e^x, within 2 ulp for x from -87 to 88; limited to that range.
inline Vector exponential(Vector x) {
  x = x > all(88.f) ? all(88.f) : x;
  x = x < all(-87.f) ? all(-87.f) : x;
  const Vector shift = all(12582912.f);  // adding 3 * 2^22 rounds to a whole number
  const Vector shifted = fma(1.44269504f, x, shift), power = shifted - shift;
  Vector r = fma(-0.693359375f, power, x);
  r = fma(2.12194440e-4f, power, r);  // x - power * ln 2
  Vector p = fma(1.9875691500e-4f, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p * r, r, r) + all(1.f);
  const Integers exponent = ((Integers)shifted - (Integers)shift) << 23;
  return (Vector)((Integers)p + exponent);
}

// The sum of squares, added in the same order for every width of a vector.
inline float squares_of(const float* x, int64_t channels) {
  Vector squares[kSums / kLanes] = {};
  for (int64_t c = 0; c < channels; c += kSums)
    for (int i = 0; i < kSums / kLanes; ++i) {
      const Vector v = load(x + c + i * kLanes);
      squares[i] = fma(v, v, squares[i]);
    }
  __m256 halves[2];
  std::memcpy(halves, squares, sizeof halves);
  const __m256 eight = halves[0] + halves[1];
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return two[0] + two[1];
}

void norm_row(const pw_norm& n, const float* x, float* out) {
  const Vector root = all(std::sqrt(static_cast<float>(n.channels)));
  for (int64_t first = 0; first < n.columns; first += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, n.columns - first));
    float scales[kBlock];
    for (int i = 0; i < count; ++i) scales[i] = squares_of(x + i * n.x_column, n.channels);
    for (int i = 0; i < count; ++i) {
      const float norm = std::sqrt(scales[i]);
      scales[i] = 1 / (norm < 1e-12f ? 1e-12f : norm);
    }
    for (int i = 0; i < count; ++i, x += n.x_column, out += n.out_column)
      for (int64_t c = 0; c < n.channels; c += kLanes) {
        Vector y = load(x + c) * all(scales[i]) * (load(n.gamma + c) * root);
        if (n.silu) y /= all(1.f) + exponential(-y);
        store(out + c, y);
      }
  }
}

void norm_rows(void* data) {
  NormRun& run = *static_cast<NormRun*>(data);
  const pw_norm& n = run.n;
  for (int64_t i; (i = run.next++) < n.frames * n.rows;) {
    const int64_t frame = i / n.rows, row = i % n.rows;
    norm_row(n, n.x + frame * n.x_frame + row * n.x_row, n.out + frame * n.out_frame + row * n.out_row);
  }
}

}  // namespace

void pw_channel_norm(const pw_norm* n, pw::Parallel parallel) {
  NormRun run{*n};
  pw::on_threads(parallel, n->threads, norm_rows, &run);
}

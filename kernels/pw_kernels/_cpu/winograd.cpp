// SPDX-License-Identifier: Apache-2.0
//
// 3x3 convolutions over rows and columns, summed over taps in time, by Winograd's F(4x4, 3x3).
//
// A tile of 6x6 inputs becomes 36 "frequencies", a filter of 3x3 likewise; their products, summed over
// channels and taps, become 4x4 results: 36 multiplications instead of 144. The sums are a matrix
// product for each frequency, over taps and channels in order: the bits depend on neither the number of
// threads nor how the work is divided. pw_kernels/cpu_library.py calls it.

#include <algorithm>
#include <atomic>

#include "vectors.h"

namespace {

using namespace pw;

// Inputs that the matrix product has in registers, beside two vectors of filters: AVX2 has 16 of them.
constexpr int kRows = kLanes == 16 ? 12 : 6;
constexpr int kPanel = 2;
constexpr int kTile = 4, kPatch = 6, kFrequencies = kPatch * kPatch;

// The polynomials are evaluated at 0, 1/r, -1/r, r, -r and infinity, r the root of 2: less than half
// the error of the usual 1, -1, 2, -2 (docs/numerics.md).
constexpr float kRoot = 1.41421356237309505f, kHalf = 0.70710678118654752f;  // r, 1/r

inline void forward(const Vector d[kPatch], Vector v[kPatch]) {
  const Vector even_half = fma(-2.f, d[2], d[4]), odd_half = fma(-2.f, d[1], d[3]);
  const Vector even_root = fma(-.5f, d[2], d[4]), odd_root = fma(-.5f, d[1], d[3]);
  v[0] = fma(-2.5f, d[2], d[0] + d[4]);
  v[1] = fma(kHalf, odd_half, even_half);
  v[2] = fma(-kHalf, odd_half, even_half);
  v[3] = fma(kRoot, odd_root, even_root);
  v[4] = fma(-kRoot, odd_root, even_root);
  v[5] = fma(-2.5f, d[3], d[1] + d[5]);
}

inline void filter(const Vector g[3], Vector u[kPatch]) {
  const Vector even_half = fma(.5f, g[2], g[0]), even_root = fma(2.f, g[2], g[0]);
  u[0] = g[0];
  u[1] = all(-2.f / 3) * fma(kHalf, g[1], even_half);
  u[2] = all(-2.f / 3) * fma(-kHalf, g[1], even_half);
  u[3] = all(1.f / 6) * fma(kRoot, g[1], even_root);
  u[4] = all(1.f / 6) * fma(-kRoot, g[1], even_root);
  u[5] = g[2];
}

inline void inverse(const Vector m[kPatch], Vector y[kTile]) {
  const Vector sum_half = m[1] + m[2], sum_root = m[3] + m[4];
  const Vector difference_half = m[1] - m[2], difference_root = m[3] - m[4];
  y[0] = m[0] + sum_half + sum_root;
  y[1] = fma(kHalf, difference_half, all(kRoot) * difference_root);
  y[2] = fma(.5f, sum_half, all(2.f) * sum_root);
  y[3] = fma(.5f * kHalf, difference_half, fma(2.f * kRoot, difference_root, m[5]));
}

}  // namespace

extern "C" {

// Mirrored by _Convolution of pw_kernels/winograd.py. Strides are in elements, those of channels are 1
// in x and out. Row r of out reads the rows r - pad to r - pad + 2 of x; what is not there is zero.
struct pw_convolution {
  const float *x, *weight, *bias;  // bias may be null
  float *out, *workspace;
  int64_t x_frame, x_row, x_column;
  int64_t out_frame, out_row, out_column;
  int64_t weight_filter, weight_channel, weight_tap, weight_row, weight_column;
  int64_t channels, filters, taps, frames, rows, columns, x_rows, pad;
  int64_t block_tiles, block_filters, threads;
};

int64_t pw_winograd_workspace(const pw_convolution* c);  // floats
void pw_winograd(const pw_convolution* c, pw::Parallel parallel);
}

namespace {

typedef pw_convolution Convolution;

// Sizes that follow from a convolution: how its tiles, filters and workspace are laid out.
struct Layout {
  int64_t tile_columns, tiles;     // of the picture
  int64_t width, m_width;          // floats of a row of V and of M
  int64_t v_frequency, m_frequency;  // floats of a frequency
  int64_t u_frequency, u, patch, thread;  // floats of all filters, a patch, and one thread's part

  explicit Layout(const Convolution& c) {
    tile_columns = (c.columns + kTile - 1) / kTile;
    tiles = tile_columns * ((c.rows + kTile - 1) / kTile);
    const int64_t line = 16;  // floats: keeps equal elements of frequencies out of one cache set
    width = whole(c.channels, kLanes);
    if (width % 256 == 0) width += line;
    m_width = whole(std::min(c.filters, c.block_filters), kLanes);
    v_frequency = (c.frames + c.taps - 1) * c.block_tiles * width + line;
    m_frequency = c.frames * c.block_tiles * m_width + line;
    u_frequency = m_width * c.taps * c.channels + line;
    u = whole(kFrequencies * u_frequency, line);
    patch = kFrequencies * width;
    thread = whole(patch + kFrequencies * (v_frequency + m_frequency), line);
  }
};

// One filter block of a convolution, on several threads.
struct Run {
  const Convolution& c;
  const Layout layout;
  int64_t first, count;  // filters of this block
  std::atomic<int64_t> next{0}, thread{0};

  Run(const Convolution& c_, int64_t first_)
      : c(c_), layout(c_), first(first_), count(std::min(c_.block_filters, c_.filters - first_)) {}
};

// U[frequency][vectors of filters, two at a time][tap, channel][filter] of one tap and one vector.
void transform_filters(Run& run, int64_t item) {
  const Convolution& c = run.c;
  const int64_t tap = item % c.taps, vector = item / c.taps, depth = c.taps * c.channels;
  const int64_t vectors = whole(run.count, kLanes) / kLanes, pair = vector / kPanel * kPanel;
  const int64_t panel = std::min<int64_t>(kPanel, vectors - pair) * kLanes;
  const int64_t lanes = std::min<int64_t>(kLanes, run.count - vector * kLanes);
  float* u = c.workspace + pair * kLanes * depth + tap * c.channels * panel + (vector - pair) * kLanes;
  const float* weight = c.weight + (run.first + vector * kLanes) * c.weight_filter + tap * c.weight_tap;
  for (int64_t channel = 0; channel < c.channels; ++channel) {
    Vector rows[kPatch][3];
    for (int column = 0; column < 3; ++column) {
      Vector taps[3], u_column[kPatch];
      for (int row = 0; row < 3; ++row) {
        const float* from = weight + channel * c.weight_channel + row * c.weight_row + column * c.weight_column;
        Vector x{};
        if (lanes == kLanes) {
          for (int lane = 0; lane < kLanes; ++lane) x[lane] = from[lane * c.weight_filter];
        } else {
          for (int lane = 0; lane < lanes; ++lane) x[lane] = from[lane * c.weight_filter];
        }
        taps[row] = x;
      }
      filter(taps, u_column);
      for (int row = 0; row < kPatch; ++row) rows[row][column] = u_column[row];
    }
    for (int row = 0; row < kPatch; ++row) {
      Vector frequencies[kPatch];
      filter(rows[row], frequencies);
      for (int i = 0; i < kPatch; ++i)
        store(u + (row * kPatch + i) * run.layout.u_frequency + channel * panel, frequencies[i]);
    }
  }
}

// The part of x under one tile, with zeros around the picture and behind the last channel.
void copy_patch(const Convolution& c, const float* frame, int64_t row, int64_t column, int64_t width, float* patch) {
  for (int64_t i = row; i < row + kPatch; ++i)
    for (int64_t j = column; j < column + kPatch; ++j, patch += width) {
      const bool inside = i >= 0 && i < c.x_rows && j >= 0 && j < c.columns;
      const int64_t filled = inside ? c.channels : 0;
      if (inside) std::memcpy(patch, frame + i * c.x_row + j * c.x_column, filled * sizeof(float));
      std::memset(patch + filled, 0, (width - filled) * sizeof(float));
    }
}

void transform_patch(const float* patch, int64_t row_stride, int64_t column_stride, int64_t channels, float* v,
                     int64_t v_frequency) {
  for (int64_t channel = 0; channel < channels; channel += kLanes) {
    Vector rows[kPatch][kPatch];
    const float* from = patch + channel;
#pragma GCC unroll 1  // otherwise 36 addresses are computed first, more work than the transform
    for (int column = 0; column < kPatch; ++column, from += column_stride) {
      Vector d[kPatch], v_column[kPatch];
      for (int row = 0; row < kPatch; ++row) d[row] = load(from + row * row_stride);
      forward(d, v_column);
      for (int row = 0; row < kPatch; ++row) rows[row][column] = v_column[row];
    }
    float* to = v + channel;
#pragma GCC unroll 1
    for (int row = 0; row < kPatch; ++row) {
      Vector frequencies[kPatch];
      forward(rows[row], frequencies);
      for (int i = 0; i < kPatch; ++i, to += v_frequency) store(to, frequencies[i]);
    }
  }
}

// V[frequency][frame, tile][channel] of some tiles, of all frames of x.
void transform_inputs(const Run& run, int64_t first, int64_t count, float* patch, float* v) {
  const Convolution& c = run.c;
  const Layout& layout = run.layout;
  for (int64_t frame = 0; frame < c.frames + c.taps - 1; ++frame) {
    const float* x = c.x + frame * c.x_frame;
    for (int64_t tile = first; tile < first + count; ++tile, v += layout.width) {
      const int64_t row = tile / layout.tile_columns * kTile - c.pad, column = tile % layout.tile_columns * kTile - 1;
      const bool inside = row >= 0 && row + kPatch <= c.x_rows && column >= 0 && column + kPatch <= c.columns;
      if (inside && c.channels % kLanes == 0) {
        transform_patch(x + row * c.x_row + column * c.x_column, c.x_row, c.x_column, c.channels, v,
                        layout.v_frequency);
      } else {
        copy_patch(c, x, row, column, layout.width, patch);
        transform_patch(patch, kPatch * layout.width, layout.width, c.channels, v, layout.v_frequency);
      }
    }
  }
}

// Some rows of the matrix product, in registers: m[rows][vectors] = v[rows, shifted by tap][channels] u.
template <int kCount, int kVectors>
void multiply_rows(const float* v, int64_t width, int64_t tap_stride, const float* u, int64_t taps, int64_t channels,
                   float* m, int64_t m_width) {
  Vector sums[kCount][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sums[i][j] = Vector{};
  for (int64_t tap = 0; tap < taps; ++tap, v += tap_stride) {
    for (int64_t channel = 0; channel < channels; ++channel, u += kVectors * kLanes) {
      Vector filters[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) filters[j] = load(u + j * kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < kCount; ++i) {
        const Vector x = all(v[channel + i * width]);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) sums[i][j] = fma(x, filters[j], sums[i][j]);
      }
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) store(m + i * m_width + j * kLanes, sums[i][j]);
}

template <int kCount, int kVectors>
void multiply_rest(int64_t rows, const float* v, int64_t width, int64_t tap_stride, const float* u, int64_t taps,
                   int64_t channels, float* m, int64_t m_width) {
  if constexpr (kCount > 0) {
    if (rows == kCount)
      multiply_rows<kCount, kVectors>(v, width, tap_stride, u, taps, channels, m, m_width);
    else
      multiply_rest<kCount - 1, kVectors>(rows, v, width, tap_stride, u, taps, channels, m, m_width);
  }
}

template <int kVectors>
void multiply_panel(int64_t rows, const float* v, int64_t width, int64_t tap_stride, const float* u, int64_t taps,
                    int64_t channels, float* m, int64_t m_width) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows)
    multiply_rows<kRows, kVectors>(v + row * width, width, tap_stride, u, taps, channels, m + row * m_width, m_width);
  multiply_rest<kRows - 1, kVectors>(rows - row, v + row * width, width, tap_stride, u, taps, channels,
                                     m + row * m_width, m_width);
}

// M[frequency][frame, tile][filter] of some tiles.
void multiply(const Run& run, int64_t count, const float* v, float* m) {
  const Convolution& c = run.c;
  const Layout& layout = run.layout;
  const int64_t vectors = whole(run.count, kLanes) / kLanes, depth = c.taps * c.channels;
  const int64_t rows = c.frames * count, tap_stride = count * layout.width;
  for (int frequency = 0; frequency < kFrequencies; ++frequency, v += layout.v_frequency, m += layout.m_frequency) {
    const float* u = c.workspace + frequency * layout.u_frequency;
    int64_t vector = 0;
    for (; vector + kPanel <= vectors; vector += kPanel)
      multiply_panel<kPanel>(rows, v, layout.width, tap_stride, u + vector * kLanes * depth, c.taps, c.channels,
                             m + vector * kLanes, layout.m_width);
    if (vector < vectors)
      multiply_panel<1>(rows, v, layout.width, tap_stride, u + vector * kLanes * depth, c.taps, c.channels,
                        m + vector * kLanes, layout.m_width);
  }
}

// Results of one tile, for one vector of filters.
void transform_result(const float* m, int64_t m_frequency, Vector bias, Vector y[kTile][kTile]) {
  Vector rows[kTile][kPatch];
#pragma GCC unroll 1
  for (int column = 0; column < kPatch; ++column, m += m_frequency) {
    Vector m_column[kPatch], y_column[kTile];
    for (int row = 0; row < kPatch; ++row) m_column[row] = load(m + row * kPatch * m_frequency);
    inverse(m_column, y_column);
    for (int row = 0; row < kTile; ++row) rows[row][column] = y_column[row];
  }
#pragma GCC unroll 1
  for (int row = 0; row < kTile; ++row) {
    inverse(rows[row], y[row]);
    for (int column = 0; column < kTile; ++column) y[row][column] += bias;
  }
}

void write_results(const Run& run, int64_t first, int64_t count, const float* m) {
  const Convolution& c = run.c;
  const Layout& layout = run.layout;
  for (int64_t frame = 0; frame < c.frames; ++frame) {
    for (int64_t tile = first; tile < first + count; ++tile, m += layout.m_width) {
      const int64_t row = tile / layout.tile_columns * kTile, column = tile % layout.tile_columns * kTile;
      const int64_t rows = std::min<int64_t>(kTile, c.rows - row);
      const int64_t columns = std::min<int64_t>(kTile, c.columns - column);
      float* corner = c.out + frame * c.out_frame + row * c.out_row + column * c.out_column + run.first;
      for (int64_t filter = 0; filter < run.count; filter += kLanes) {
        const int64_t bytes = std::min<int64_t>(kLanes, run.count - filter) * sizeof(float);
        Vector bias{}, y[kTile][kTile];
        if (c.bias) std::memcpy(&bias, c.bias + run.first + filter, bytes);
        transform_result(m + filter, layout.m_frequency, bias, y);
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < columns; ++j) {
            float* to = corner + i * c.out_row + j * c.out_column + filter;
            if (bytes == sizeof(Vector))
              store(to, y[i][j]);
            else
              std::memcpy(to, &y[i][j], bytes);
          }
      }
    }
  }
}

void filters_of(void* data) {
  Run& run = *static_cast<Run*>(data);
  const int64_t items = whole(run.count, kLanes) / kLanes * run.c.taps;
  for (int64_t item; (item = run.next++) < items;) transform_filters(run, item);
}

void tiles_of(void* data) {
  Run& run = *static_cast<Run*>(data);
  float* patch = run.c.workspace + run.layout.u + run.thread++ * run.layout.thread;
  float *v = patch + run.layout.patch, *m = v + kFrequencies * run.layout.v_frequency;
  for (int64_t first; (first = run.next++ * run.c.block_tiles) < run.layout.tiles;) {
    const int64_t count = std::min(run.c.block_tiles, run.layout.tiles - first);
    transform_inputs(run, first, count, patch, v);
    multiply(run, count, v, m);
    write_results(run, first, count, m);
  }
}

}  // namespace

int64_t pw_winograd_workspace(const pw_convolution* c) {
  const Layout layout(*c);
  return layout.u + c->threads * layout.thread;
}

void pw_winograd(const pw_convolution* c, pw::Parallel parallel) {
  for (int64_t first = 0; first < c->filters; first += c->block_filters) {
    Run run(*c, first);
    for (auto part : {filters_of, tiles_of}) {
      run.next = 0;
      pw::on_threads(parallel, c->threads, part, &run);
    }
  }
}

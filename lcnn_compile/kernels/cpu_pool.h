// Pooling of [planes, height, width]: rows of a window first, with vectors, then its columns.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu_vector.h"

namespace lcnn {

// Sizes of a pooling; what lies outside of the image counts for nothing in a maximum, as zero in a mean.
struct Pool {
  int64_t planes, height, width, out_height, out_width;
  int64_t kernel[2], stride[2];
  int64_t top, left;
  // Of a row of maxima or sums with margins on both sides, read up to two vectors past the last window.
  int64_t row_floats() const { return left + std::max(width, out_width * stride[1]) + kernel[1] + 3 * LANES; }
};

// The larger, and NaN if either is, as torch has it.
struct Larger {
  static constexpr float START = -std::numeric_limits<float>::infinity();
  template <class T>
  static T join(T a, T b) {
    return (a < b) | (b != b) ? b : a;
  }
};

struct Sum {
  static constexpr float START = 0.0f;
  template <class T>
  static T join(T a, T b) {
    return a + b;
  }
};

// One output row from the joined rows of its windows.
template <class Join>
static void pool_columns(const Pool& p, const float* row, float scale, float* y) {
  int64_t x = 0;
  if (p.stride[1] <= 2)
    for (; x < p.out_width; x += LANES) {
      const float* from = row + x * p.stride[1];
      const auto next = [&](int64_t c) {
        return p.stride[1] == 1 ? load(from + c) : even_lanes(load(from + c), load(from + c + LANES));
      };
      Vec found = next(0);
      for (int64_t c = 1; c < p.kernel[1]; ++c) found = Join::join(found, next(c));
      store_first(y + x, found * scale, int(std::min<int64_t>(LANES, p.out_width - x)));
    }
  for (; x < p.out_width; ++x) {
    float found = row[x * p.stride[1]];
    for (int64_t c = 1; c < p.kernel[1]; ++c) found = Join::join(found, row[x * p.stride[1] + c]);
    y[x] = found * scale;
  }
}

// One plane; `row` is a buffer of `row_floats()`.
template <class Join>
static void pool_plane(const Pool& p, const float* x, float scale, float* row, float* y) {
  std::fill_n(row, p.row_floats(), Join::START);
  float* const inside = row + p.left;
  for (int64_t h = 0; h < p.out_height; ++h, y += p.out_width) {
    const int64_t first = std::max<int64_t>(0, h * p.stride[0] - p.top);
    const int64_t end = std::min(p.height, h * p.stride[0] - p.top + p.kernel[0]);
    for (int64_t c = 0; c < p.width; c += LANES) {
      const int count = int(std::min<int64_t>(LANES, p.width - c));
      Vec found = splat(Join::START);
      for (int64_t r = first; r < end; ++r) found = Join::join(found, load_first(x + r * p.width + c, count));
      store_first(inside + c, found, count);
    }
    pool_columns<Join>(p, row, scale, y);
  }
}

inline void pool_plane(const Pool& p, bool mean, const float* x, float* row, float* y) {
  if (mean)
    pool_plane<Sum>(p, x, 1.0f / float(p.kernel[0] * p.kernel[1]), row, y);
  else
    pool_plane<Larger>(p, x, 1.0f, row, y);
}

}  // namespace lcnn

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
  int64_t mean;  // or the maximum
  int64_t first_row(int64_t h) const { return std::max<int64_t>(0, h * stride[0] - top); }
  int64_t end_row(int64_t h) const { return std::min(height, h * stride[0] - top + kernel[0]); }
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

// Pooled rows [first, end) of one plane, of which x holds the rows from `above` on; `row` is a buffer of `row_floats()`.
template <class Join>
static void pool_rows(const Pool& p, int64_t first, int64_t end, const float* x, int64_t above, float scale, float* row, float* y) {
  std::fill_n(row, p.row_floats(), Join::START);
  float* const inside = row + p.left;
  for (int64_t h = first; h < end; ++h, y += p.out_width) {
    const int64_t top = p.first_row(h), bottom = p.end_row(h);
    for (int64_t c = 0; c < p.width; c += LANES) {
      const int count = int(std::min<int64_t>(LANES, p.width - c));
      Vec found = splat(Join::START);
      for (int64_t r = top; r < bottom; ++r) found = Join::join(found, load_first(x + (r - above) * p.width + c, count));
      store_first(inside + c, found, count);
    }
    pool_columns<Join>(p, row, scale, y);
  }
}

inline void pool_rows(const Pool& p, int64_t first, int64_t end, const float* x, int64_t above, float* row, float* y) {
  if (p.mean)
    pool_rows<Sum>(p, first, end, x, above, 1.0f / float(p.kernel[0] * p.kernel[1]), row, y);
  else
    pool_rows<Larger>(p, first, end, x, above, 1.0f, row, y);
}

}  // namespace lcnn

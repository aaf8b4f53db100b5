// Pooling of [planes, height, width]: rows of a window first, with vectors, then its columns.
#pragma once

#include <algorithm>
#include <limits>

#include "vector.h"

namespace lcnn {

// Sizes of a pooling; what lies outside of the image counts for nothing in a maximum, as zero in a mean.
struct Pool {
  int64_t planes, height, width, out_height, out_width;
  int64_t kernel[2], stride[2];
  int64_t top, left;
  int64_t mean;   // 1: the mean, 2: the sum; 0: the maximum
  int64_t lanes;  // images side by side in each pixel: widths and `left` count floats, windows pixels; else 1
  int64_t dilation[2];
  int64_t first_row(int64_t h) const { return std::max<int64_t>(0, h * stride[0] - top); }
  int64_t end_row(int64_t h) const { return std::min(height, h * stride[0] - top + (kernel[0] - 1) * dilation[0] + 1); }
  bool pairs() const {
    const bool two = kernel[0] == 2 && kernel[1] == 2 && stride[0] == 2 && stride[1] == 2;
    return two && dilation[0] == 1 && dilation[1] == 1 && !top && !left && 2 * out_width == width && 2 * out_height <= height;
  }
  // Of a row of maxima or sums with margins on both sides, read up to two vectors past the last window.
  int64_t row_floats() const { return left + std::max(width, out_width * stride[1]) + kernel[1] * dilation[1] + 3 * LANES; }
};

// Means over windows of planes of bytes, or of floats. A window's sum times the factors of its row and its column.
struct ByteMean {
  Pool pool;
  int64_t images, x_image, y_image;
  const float *rows, *columns;
  int64_t reads_bytes, x_zero, writes_bytes, y_zero;
};

// The larger, and NaN if either is, as torch has it.
struct Larger {
  static constexpr float START = -std::numeric_limits<float>::infinity();
  template <class T>
  static T join(T a, T b) {
    return (a < b) | (b != b) ? b : a;
  }
#if defined(__AVX2__) && !defined(__AVX512F__)
  static Vec join(Vec a, Vec b) {  // the maximum is b where either is NaN
    const __m256 from = (__m256)a;
    return (Vec)_mm256_blendv_ps(_mm256_max_ps(from, (__m256)b), from, _mm256_cmp_ps(from, from, _CMP_UNORD_Q));
  }
#endif
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
      for (int64_t c = 1; c < p.kernel[1]; ++c) found = Join::join(found, next(c * p.dilation[1]));
      store_first(y + x, found * scale, int(std::min<int64_t>(LANES, p.out_width - x)));
    }
  for (; x < p.out_width; ++x) {
    float found = row[x * p.stride[1]];
    for (int64_t c = 1; c < p.kernel[1]; ++c) found = Join::join(found, row[x * p.stride[1] + c * p.dilation[1]]);
    y[x] = found * scale;
  }
}

// The same from the rows themselves, where vectors of images lie side by side; `above` as below.
template <class Join>
static void pool_side_by_side(const Pool& p, int64_t first, int64_t end, const float* x, int64_t above, float scale, float* y) {
  for (int64_t h = first; h < end; ++h) {
    const float* const from = x + (p.first_row(h) - above) * p.width;
    const int64_t rows = p.end_row(h) - p.first_row(h);
    for (int64_t left = -p.left; left + p.left < p.out_width * p.stride[1]; left += p.lanes * p.stride[1]) {
      const int64_t begin = std::max<int64_t>(0, left), stop = std::min(p.width, left + p.kernel[1] * p.lanes);
      for (int64_t lane = 0; lane < p.lanes; lane += LANES, y += LANES) {
        Vec found = splat(Join::START);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = begin; c < stop; c += p.lanes) found = Join::join(found, load(from + r * p.width + c + lane));
        store(y, found * scale);
      }
    }
  }
}

// The same where windows of 2 x 2 tile the plane. Whole vectors are read and written wherever memory goes on.
template <class Join>
static void pool_pairs(const Pool& p, int64_t first, int64_t end, const float* x, int64_t above, float scale, float* y) {
  const float* from = x + (2 * first - above) * p.width;
  const float* const stop = x + (2 * end - above) * p.width;
  float* const y_end = y + (end - first) * p.out_width;
  for (int64_t h = first; h < end; ++h, from += 2 * p.width, y += p.out_width)
    for (int64_t column = 0; column < p.out_width; column += LANES) {
      const float *upper = from + 2 * column, *below = upper + p.width;
      const int left = int(std::min<int64_t>(2 * LANES, stop - below));
      const int low = std::min(left, LANES), high = left - low;
      const Vec a = Join::join(load_first(upper, low), load_first(below, low));
      const Vec b = Join::join(load_first(upper + LANES, high), load_first(below + LANES, high));
      const int64_t room = y_end - y - column;
      store_first(y + column, Join::join(even_lanes(a, b), odd_lanes(a, b)) * scale, int(std::min<int64_t>(LANES, room)));
    }
}

// The same where a vector holds several rows: their columns are joined side by side, then each upper row with the one below.
template <class Join>
static void pool_narrow_pairs(const Pool& p, int64_t rows, const float* x, float scale, float* y) {
  const int half = int(p.width / 2);
  uint32_t upper = 0;
  for (int lane = 0; lane < LANES; ++lane) upper |= uint32_t(lane / half % 2 == 0) << lane;
  float moved[2 * LANES] = {};
  const int64_t total = 2 * rows * p.width;
  for (int64_t i = 0; i < total; i += 2 * LANES, y += LANES / 2) {
    const int left = int(std::min<int64_t>(2 * LANES, total - i)), low = std::min(left, LANES);
    const Vec a = load_first(x + i, low), b = load_first(x + i + LANES, left - low);
    const Vec across = Join::join(even_lanes(a, b), odd_lanes(a, b));
    store(moved, across);
    store_first(y, compress(Join::join(across, load(moved + half)), upper) * scale, left / 4);
  }
}

// Pooled rows [first, end) of one plane, of which x holds the rows from `above` on; `row` is a buffer of `row_floats()`.
template <class Join>
static void pool_rows(const Pool& p, int64_t first, int64_t end, const float* x, int64_t above, float scale, float* row, float* y) {
  if (p.lanes > 1) return pool_side_by_side<Join>(p, first, end, x, above, scale, y);
  if (p.pairs() && p.width <= LANES && LANES % p.width == 0)
    return pool_narrow_pairs<Join>(p, end - first, x + (2 * first - above) * p.width, scale, y);
  if (p.pairs()) return pool_pairs<Join>(p, first, end, x, above, scale, y);
  std::fill_n(row, p.row_floats(), Join::START);
  float* const inside = row + p.left;
  for (int64_t h = first; h < end; ++h, y += p.out_width) {
    int64_t top = h * p.stride[0] - p.top;
    const int64_t bottom = p.end_row(h);
    if (top < 0) top += ceil_div(-top, p.dilation[0]) * p.dilation[0];
    for (int64_t c = 0; c < p.width; c += LANES) {
      const int count = int(std::min<int64_t>(LANES, p.width - c));
      Vec found = splat(Join::START);
      for (int64_t r = top; r < bottom; r += p.dilation[0]) found = Join::join(found, load_first(x + (r - above) * p.width + c, count));
      store_first(inside + c, found, count);
    }
    pool_columns<Join>(p, row, scale, y);
  }
}

inline void pool_rows(const Pool& p, int64_t first, int64_t end, const float* x, int64_t above, float* row, float* y) {
  if (p.mean)
    pool_rows<Sum>(p, first, end, x, above, p.mean == 1 ? 1.0f / float(p.kernel[0] * p.kernel[1]) : 1.0f, row, y);
  else
    pool_rows<Larger>(p, first, end, x, above, 1.0f, row, y);
}

}  // namespace lcnn

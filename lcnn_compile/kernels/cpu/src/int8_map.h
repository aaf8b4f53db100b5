// Element-wise steps of programs of bytes, and means: compiled without fused multiply-adds, in an order that no vector's length changes.
#pragma once

#include "int8_values.h"
#include "map.h"

namespace lcnn {

// Operands that may be bytes, and a result that may.
struct ByteEnds {
  static constexpr bool BYTES_TOO = true;
  const ByteMap& of;

  bool reads_bytes(int64_t operand) const { return of.scales[operand] != 0; }
  bool writes_bytes() const { return of.scale != 0; }
  // Rows of bytes from element `start` on, as floats side by side.
  void widen(int64_t operand, const float* base, int64_t start, int64_t row, int64_t step, int64_t rows, int64_t width, float* to) const {
    const uint8_t* const from = reinterpret_cast<const uint8_t*>(base) + start;
    const float scale = float(of.scales[operand]);
    const int32_t zero = int32_t(of.zeros[operand]);
    if (step == 1 && (rows == 1 || row == width)) return widen_part(from, rows * width, scale, zero, to);
    uint8_t bytes[MAP_BLOCK];
    expand_rows(from, row, step, rows, width, bytes);
    widen_part(bytes, rows * width, scale, zero, to);
  }
  void round(const float* from, int64_t count, float* y, int64_t place) const {
    round_part(from, count, float(of.scale), int32_t(of.zero), reinterpret_cast<uint8_t*>(y) + place);
  }
};

// Of floats: sixteen sums in turn, joined two by two.
static inline float sum_of(const float* x, int64_t rows, int64_t pitch, int64_t width) {
  float sums[16] = {};
  if (pitch == width) width *= rows, rows = 1;
  int64_t turn = 0;
  for (int64_t r = 0; r < rows; ++r, x += pitch) {
    int64_t i = 0;
    for (; turn == 0 && i + 16 <= width; i += 16) UNROLL for (int lane = 0; lane < 16; ++lane) sums[lane] += x[i + lane];
    for (; i < width; ++i, turn = (turn + 1) % 16) sums[turn] += x[i];
  }
  for (int half = 8; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

static inline int32_t sum_of(const uint8_t* x, int64_t count) {
  int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  return sum;
}

// Rows and columns of x that a window has.
struct Inside {
  int64_t top, bottom, first, end;
  Inside(const Pool& p, int64_t h, int64_t w) : top(p.first_row(h)), bottom(std::max(top, p.end_row(h))) {
    const int64_t left = w * p.stride[1] - p.left;
    first = std::max<int64_t>(0, left);
    end = std::max(first, std::min(p.width, left + p.kernel[1]));
  }
};

// Means of one row of windows from their sums.
static void put_means(const ByteMean& m, int64_t h, float* sums, float* floats, uint8_t* bytes) {
  const int64_t wide = m.pool.out_width;
  for (int64_t w = 0; w < wide; ++w) {
    sums[w] = sums[w] * m.rows[h];
    sums[w] = sums[w] * m.columns[w];
  }
  if (bytes)
    round_part(sums, wide, 1.0f, int32_t(m.y_zero), bytes + h * wide);
  else
    std::copy_n(sums, wide, floats + h * wide);
}

static void mean_plane(const ByteMean& m, const float* x, float* floats, uint8_t* bytes, float* sums, int32_t*) {
  const Pool& p = m.pool;
  for (int64_t h = 0; h < p.out_height; ++h) {
    for (int64_t w = 0; w < p.out_width; ++w) {
      const Inside in(p, h, w);
      sums[w] = sum_of(x + in.top * p.width + in.first, in.bottom - in.top, p.width, in.end - in.first);
    }
    put_means(m, h, sums, floats, bytes);
  }
}

// `columns`: room for the sums of each column.
static void mean_plane(const ByteMean& m, const uint8_t* x, float* floats, uint8_t* bytes, float* sums, int32_t* columns) {
  const Pool& p = m.pool;
  for (int64_t h = 0; h < p.out_height; ++h) {
    const Inside all(p, h, 0);
    const int64_t rows = all.bottom - all.top;
    if (p.out_width == 1) {
      int64_t sum = -rows * (all.end - all.first) * m.x_zero;
      if (all.end - all.first == p.width)
        sum += sum_of(x + all.top * p.width, rows * p.width);
      else
        for (int64_t r = all.top; r < all.bottom; ++r) sum += sum_of(x + r * p.width + all.first, all.end - all.first);
      sums[0] = float(sum);
    } else {
      const int32_t zero = int32_t(rows * m.x_zero);
      for (int64_t c = 0; c < p.width; ++c) columns[c] = -zero;
      for (int64_t r = all.top; r < all.bottom; ++r) {
#pragma omp simd
        for (int64_t c = 0; c < p.width; ++c) columns[c] += x[r * p.width + c];
      }
      for (int64_t w = 0; w < p.out_width; ++w) {
        const Inside in(p, h, w);
        int64_t sum = 0;
        for (int64_t c = in.first; c < in.end; ++c) sum += columns[c];
        sums[w] = float(sum);
      }
    }
    put_means(m, h, sums, floats, bytes);
  }
}

static inline void mean(const ByteMean& m, int64_t threads, const float* x, float* y) {
  const Pool& p = m.pool;
  const int64_t area = p.height * p.width, out_area = p.out_height * p.out_width;
  in_parts(m.images * p.planes, area, threads, [&](int64_t first, int64_t end) {
    std::vector<float> sums(p.out_width);
    std::vector<int32_t> columns(p.width);
    for (int64_t i = first; i < end; ++i) {
      const int64_t from = i / p.planes * m.x_image + i % p.planes * area, to = i / p.planes * m.y_image + i % p.planes * out_area;
      uint8_t* const bytes = m.writes_bytes ? reinterpret_cast<uint8_t*>(y) + to : nullptr;
      if (m.reads_bytes)
        mean_plane(m, reinterpret_cast<const uint8_t*>(x) + from, y + to, bytes, sums.data(), columns.data());
      else
        mean_plane(m, x + from, y + to, bytes, sums.data(), columns.data());
    }
  });
}

}  // namespace lcnn

// Elements moved from one place to another: strided copies, and rows and columns picked by tables.
#pragma once

#include <algorithm>
#include <cstring>

#include "run.h"

namespace lcnn {

constexpr int MOVE_DIMENSIONS = 6;
constexpr int64_t MOVE_ALONE = 1 << 15;  // elements that one thread moves faster than several

// Strides and offsets are in elements of `bytes` each.
struct Move {
  int64_t sizes[MOVE_DIMENSIONS], from[MOVE_DIMENSIONS], to[MOVE_DIMENSIONS];
  int64_t from_offset, to_offset, bytes;
};

// A plane of rows x columns.
template <class T>
static void move_plane(const Move& m, const T* x, T* y) {
  constexpr int64_t SIDE = 16;
  const int64_t rows = m.sizes[4], columns = m.sizes[5];
  const int64_t fr = m.from[4], fc = m.from[5], tr = m.to[4], tc = m.to[5];
  if (fc == 1 && tc == 1) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(y + r * tr, x + r * fr, sizeof(T) * columns);
  } else if (fc == 0 && tc == 1) {
    for (int64_t r = 0; r < rows; ++r) std::fill_n(y + r * tr, columns, x[r * fr]);
  } else if (rows >= SIDE && columns >= SIDE) {  // a transposition: by tiles, whose lines stay in the first cache
    for (int64_t row = 0; row < rows; row += SIDE)
      for (int64_t column = 0; column < columns; column += SIDE)
        for (int64_t r = row, bottom = std::min(rows, row + SIDE); r < bottom; ++r)
          for (int64_t c = column, end = std::min(columns, column + SIDE); c < end; ++c) y[r * tr + c * tc] = x[r * fr + c * fc];
  } else {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) y[r * tr + c * tc] = x[r * fr + c * fc];
  }
}

template <class T>
static void move_of(const Move& m, int64_t threads, const T* x, T* y) {
  int64_t planes = 1;
  for (int d = 0; d < 4; ++d) planes *= m.sizes[d];
  const int64_t team = planes * m.sizes[4] * m.sizes[5] > MOVE_ALONE ? std::min(threads, planes) : 1;
#pragma omp parallel for num_threads(int(team)) schedule(static)
  for (int64_t plane = 0; plane < planes; ++plane) {
    int64_t rest = plane, source = m.from_offset, target = m.to_offset;
    for (int d = 3; d >= 0; --d) {
      source += rest % m.sizes[d] * m.from[d];
      target += rest % m.sizes[d] * m.to[d];
      rest /= m.sizes[d];
    }
    move_plane(m, x + source, y + target);
  }
}

inline void move(const Move& m, int64_t threads, const void* x, void* y) {
  switch (m.bytes) {
    case 1: return move_of(m, threads, static_cast<const uint8_t*>(x), static_cast<uint8_t*>(y));
    case 2: return move_of(m, threads, static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y));
    default: return move_of(m, threads, static_cast<const uint32_t*>(x), static_cast<uint32_t*>(y));
  }
}

// y[i][j] = x[rows[i]][columns[j]] in every plane, `fill` where either is negative. Columns [inner, inner_end) lie side by side in x.
struct Pick {
  int64_t images, planes, x_image, y_image, x_plane, x_width, height, width;
  const int32_t *rows, *columns;
  int64_t inner, inner_end;
  double fill;
};

inline void pick(const Pick& p, int64_t threads, const float* x, float* y) {
  const int64_t planes = p.images * p.planes, team = planes * p.height * p.width > MOVE_ALONE ? std::min(threads, planes) : 1;
  const float fill = float(p.fill);
#pragma omp parallel for num_threads(int(team)) schedule(static)
  for (int64_t plane = 0; plane < planes; ++plane) {
    const float* const source = x + plane / p.planes * p.x_image + plane % p.planes * p.x_plane;
    float* to = y + plane / p.planes * p.y_image + plane % p.planes * p.height * p.width;
    for (int64_t h = 0; h < p.height; ++h, to += p.width) {
      if (p.rows[h] < 0) {
        std::fill_n(to, p.width, fill);
        continue;
      }
      if (h && p.rows[h] == p.rows[h - 1]) {  // as rows of what is enlarged are
        std::memcpy(to, to - p.width, sizeof(float) * p.width);
        continue;
      }
      const float* const from = source + p.rows[h] * p.x_width;
      const auto one = [&](int64_t w) { to[w] = p.columns[w] < 0 ? fill : from[p.columns[w]]; };
      for (int64_t w = 0; w < p.inner; ++w) one(w);
      if (p.inner_end > p.inner) std::memcpy(to + p.inner, from + p.columns[p.inner], sizeof(float) * (p.inner_end - p.inner));
      for (int64_t w = p.inner_end; w < p.width; ++w) one(w);
    }
  }
}

}  // namespace lcnn

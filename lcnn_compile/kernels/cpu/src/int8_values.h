// What lies between lookup convolutions of bytes: floats to bytes and back, and maxima over windows.
#pragma once

#include <vector>

#include "int8_vector.h"
#include "pool.h"

namespace lcnn {

constexpr int64_t ALONE_BYTES = 1 << 16;  // that one thread converts or pools faster than several

// Calls `part(begin, end)` for parts of [0, count), by several threads where each has enough.
template <class Part>
static void in_parts(int64_t count, int64_t size, int64_t threads, Part part) {
  const int64_t team = count * size > ALONE_BYTES ? std::min(threads, count) : 1;
#pragma omp parallel for num_threads(int(team)) schedule(static)
  for (int64_t i = 0; i < team; ++i) part(count * i / team, count * (i + 1) / team);
}

static void round_part(const float* x, int64_t count, float factor, int32_t zero, uint8_t* y) {
  typedef uint8_t Few __attribute__((vector_size(LANES)));
  for (int64_t i = 0; i < count; i += LANES) {
    const int length = int(std::min<int64_t>(LANES, count - i));
    Vec v = load_first(x + i, length) * factor;
    v = v == v ? v : splat(0.0f);
    IntVec steps = nearest(at_most(at_least(v, -256.0f), 256.0f)) + zero;
    steps = steps < 0 ? IntVec{} : steps;
    steps = steps > 255 ? IntVec{} + 255 : steps;
    const Few bytes = __builtin_convertvector(steps, Few);
    std::memcpy(y + i, &bytes, length);
  }
}

static void widen_part(const uint8_t* x, int64_t count, float scale, int32_t zero, float* y) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) y[i] = float(int32_t(x[i]) - zero) * scale;
}

// One output row from the joined rows of its windows, `row` with margins of zeros.
static void join_columns(const Pool& p, const uint8_t* row, uint8_t* y) {
  if (p.stride[1] == 2) {
    for (int64_t c = 0; c < p.kernel[1]; ++c) {
      const uint8_t* const from = row + c;
      if (c == 0) {
#pragma omp simd
        for (int64_t x = 0; x < p.out_width; ++x) y[x] = from[2 * x];
      } else {
#pragma omp simd
        for (int64_t x = 0; x < p.out_width; ++x) y[x] = std::max(y[x], from[2 * x]);
      }
    }
    return;
  }
  for (int64_t x = 0; x < p.out_width; ++x) {
    uint8_t found = 0;
    for (int64_t c = 0; c < p.kernel[1]; ++c) found = std::max(found, row[x * p.stride[1] + c]);
    y[x] = found;
  }
}

// Maxima of planes [first, end).
static void pool_planes(const Pool& p, int64_t first, int64_t end, const uint8_t* x, uint8_t* y) {
  std::vector<uint8_t> row(p.left + std::max(p.width, p.out_width * p.stride[1]) + p.kernel[1]);
  for (int64_t plane = first; plane < end; ++plane) {
    const uint8_t* const from = x + plane * p.height * p.width;
    uint8_t* to = y + plane * p.out_height * p.out_width;
    for (int64_t h = 0; h < p.out_height; ++h, to += p.out_width) {
      uint8_t* const inside = row.data() + p.left;
      const int64_t top = p.first_row(h), bottom = p.end_row(h);
      if (bottom > top)
        std::memcpy(inside, from + top * p.width, p.width);
      else
        std::memset(inside, 0, p.width);
      for (int64_t r = top + 1; r < bottom; ++r) {
        const uint8_t* const more = from + r * p.width;
#pragma omp simd
        for (int64_t c = 0; c < p.width; ++c) inside[c] = std::max(inside[c], more[c]);
      }
      join_columns(p, row.data(), to);
    }
  }
}

}  // namespace lcnn

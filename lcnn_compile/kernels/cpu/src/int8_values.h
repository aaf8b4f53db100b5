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

static inline Pairs16 larger(Pairs16 a, Pairs16 b) { return a > b ? a : b; }

static inline void store_halves(uint8_t* to, Pairs16 v, int64_t count) {
  const Half bytes = __builtin_convertvector(v, Half);
  std::memcpy(to, &bytes, size_t(std::min<int64_t>(HALF_BYTES, count)));
}

// One output row from the joined rows of its windows, `row` with margins of zeros, and two vectors behind them that may be read.
static void join_columns(const Pool& p, const uint8_t* row, uint8_t* y) {
  if (p.stride[1] == 2) {
    for (int64_t x = 0; x < p.out_width; x += HALF_BYTES) {
      Pairs16 found = even_bytes(row + 2 * x);
      for (int64_t c = 1; c < p.kernel[1]; ++c) found = larger(found, even_bytes(row + 2 * x + c));
      store_halves(y + x, found, p.out_width - x);
    }
    return;
  }
  for (int64_t x = 0; x < p.out_width; ++x) {
    uint8_t found = 0;
    for (int64_t c = 0; c < p.kernel[1]; ++c) found = std::max(found, row[x * p.stride[1] + c]);
    y[x] = found;
  }
}

// The larger ones of `SIZE` bytes.
template <int SIZE>
static inline void join_some(const uint8_t* a, const uint8_t* b, uint8_t* to) {
  typedef uint8_t Some __attribute__((vector_size(SIZE)));
  Some left, right;
  std::memcpy(&left, a, SIZE);
  std::memcpy(&right, b, SIZE);
  left = left > right ? left : right;
  std::memcpy(to, &left, SIZE);
}

// to[i] = max(a[i], b[i])
static inline void join_rows(const uint8_t* a, const uint8_t* b, int64_t count, uint8_t* to) {
  int64_t i = 0;
  for (; i + BYTES <= count; i += BYTES) store_bytes(to + i, largest_bytes(load_bytes(a + i), load_bytes(b + i)));
  for (; i + 16 <= count; i += 16) join_some<16>(a + i, b + i, to + i);
  for (; i + 8 <= count; i += 8) join_some<8>(a + i, b + i, to + i);
  for (; i < count; ++i) to[i] = std::max(a[i], b[i]);
}

constexpr int64_t JOINED = 1 << 13;  // bytes of rows whose pairs of columns are joined at a time

// Windows of 2 x 2 that tile planes of [rows, 2 * half]: planes follow one another, and so are one.
static void pool_tiles(const uint8_t* x, int64_t rows, int64_t half, uint8_t* y) {
  uint8_t joined[JOINED + BYTES];
  const int64_t most = JOINED / half / 2 * 2;
  for (int64_t row = 0; row < rows; row += most, x += 2 * half * most) {
    const int64_t some = std::min(most, rows - row), count = some * half;
    int64_t i = 0;
    for (; i + HALF_BYTES <= count; i += HALF_BYTES) {
      const Pairs16 both = *reinterpret_cast<const UnalignedPairs*>(x + 2 * i);
      store_halves(joined + i, larger(both & uint16_t(255), both >> 8), HALF_BYTES);
    }
    for (; i < count; ++i) joined[i] = std::max(x[2 * i], x[2 * i + 1]);
    for (int64_t r = 0; r < some; r += 2, y += half) join_rows(joined + r * half, joined + (r + 1) * half, half, y);
  }
}

#if defined(__AVX512BW__)
// One output row at stride 2 from `count` rows of windows of up to three columns. Lanes outside of the image are zeros, the least bytes.
static inline void pool_row_by_twos(const Pool& p, const uint8_t* rows, int64_t count, uint8_t* y) {
  const auto joined = [&](int64_t column) __attribute__((always_inline)) {
    const int64_t before = std::clamp<int64_t>(-column, 0, 64), valid = std::clamp<int64_t>(p.width - column, 0, 64);
    const __mmask64 mask = before >= valid ? 0 : (~uint64_t(0) << before) & (~uint64_t(0) >> (64 - valid));
    Bytes found = no_bytes();
    for (int64_t r = 0; r < count; ++r) found = largest_bytes(found, _mm512_maskz_loadu_epi8(mask, rows + r * p.width + column));
    return (Pairs16)found;
  };
  for (int64_t x = 0; x < p.out_width; x += HALF_BYTES) {
    const int64_t column = 2 * x - p.left;
    const Pairs16 here = joined(column);
    Pairs16 found = here & uint16_t(255);
    if (p.kernel[1] > 1) found = larger(found, here >> 8);
    if (p.kernel[1] > 2) found = larger(found, joined(column + 2) & uint16_t(255));
    const __mmask64 mask = ~uint64_t(0) >> (64 - std::min<int64_t>(HALF_BYTES, p.out_width - x));
    _mm512_mask_storeu_epi8(y + x, mask, _mm512_castsi256_si512(_mm512_cvtepi16_epi8((__m512i)found)));
  }
}
#endif

// Maxima of planes [first, end).
static void pool_planes(const Pool& p, int64_t first, int64_t end, const uint8_t* x, uint8_t* y) {
  if (p.pairs() && p.height == 2 * p.out_height && p.out_width <= JOINED / 2)
    return pool_tiles(x + first * p.height * p.width, (end - first) * p.height, p.out_width, y + first * p.out_height * p.out_width);
  std::vector<uint8_t> row(p.left + std::max(p.width, p.out_width * p.stride[1]) + p.kernel[1] + 2 * BYTES);
  for (int64_t plane = first; plane < end; ++plane) {
    const uint8_t* const from = x + plane * p.height * p.width;
    uint8_t* to = y + plane * p.out_height * p.out_width;
    for (int64_t h = 0; h < p.out_height; ++h, to += p.out_width) {
#if defined(__AVX512BW__)
      if (p.stride[1] == 2 && p.kernel[1] <= 3) {
        pool_row_by_twos(p, from + p.first_row(h) * p.width, std::max<int64_t>(0, p.end_row(h) - p.first_row(h)), to);
        continue;
      }
#endif
      uint8_t* const inside = row.data() + p.left;
      const int64_t top = p.first_row(h), bottom = p.end_row(h);
      if (bottom > top)
        std::memcpy(inside, from + top * p.width, p.width);
      else
        std::memset(inside, 0, p.width);
      for (int64_t r = top + 1; r < bottom; ++r) join_rows(inside, from + r * p.width, p.width, inside);
      join_columns(p, row.data(), to);
    }
  }
}

}  // namespace lcnn

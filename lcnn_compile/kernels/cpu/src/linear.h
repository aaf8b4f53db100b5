// A dense linear layer, such as a network's last: y = W·x + bias.
#pragma once

#include <algorithm>

#include "vector.h"

namespace lcnn {

// Sizes, and what is fixed: the weight [outputs, inputs] and the bias, or null. An image has `rows`, side by side.
struct Linear {
  const float *weight, *bias;
  int64_t images, rows, inputs, outputs;
  int64_t x_image, y_image;  // from one image to the next
  const float* from(const float* x, int64_t i) const { return x + i / rows * x_image + i % rows * inputs; }
  float* to(float* y, int64_t i) const { return y + i / rows * y_image + i % rows * outputs; }
};

// The sum of all lanes, in an order that depends on nothing.
static inline float sum_of(Vec v) {
  float lanes[LANES];
  std::memcpy(lanes, &v, sizeof v);
  UNROLL for (int half = LANES / 2; half; half /= 2) UNROLL for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// Outputs [row, row + ROWS) of images [first, first + IMAGES); each is summed in the same order whatever the block is.
template <int ROWS, int IMAGES>
static void linear_block(const Linear& l, int64_t row, int64_t first, const float* x, float* y) {
  const float *const weight = l.weight + row * l.inputs, *const bias = l.bias ? l.bias + row : nullptr;
  const float* image[IMAGES];
  UNROLL for (int i = 0; i < IMAGES; ++i) image[i] = l.from(x, first + i);
  Vec sums[ROWS][IMAGES] = {};
  for (int64_t c = 0; c < l.inputs; c += LANES) {
    const int count = int(std::min<int64_t>(LANES, l.inputs - c));
    Vec from[IMAGES];
    UNROLL for (int i = 0; i < IMAGES; ++i) from[i] = load_first(image[i] + c, count);
    UNROLL for (int r = 0; r < ROWS; ++r) {
      const Vec w = load_first(weight + r * l.inputs + c, count);
      UNROLL for (int i = 0; i < IMAGES; ++i) sums[r][i] += w * from[i];
    }
  }
  UNROLL for (int i = 0; i < IMAGES; ++i) {
    float* const target = l.to(y, first + i) + row;
    UNROLL for (int r = 0; r < ROWS; ++r) target[r] = sum_of(sums[r][i]) + (bias ? bias[r] : 0.0f);
  }
}

template <int ROWS>
static void linear_rows(const Linear& l, int64_t row, const float* x, float* y) {
  constexpr int IMAGES = LANES == 16 ? 4 : 2;
  const int64_t count = l.images * l.rows;
  int64_t i = 0;
  for (; i + IMAGES <= count; i += IMAGES) linear_block<ROWS, IMAGES>(l, row, i, x, y);
  for (; i < count; ++i) linear_block<ROWS, 1>(l, row, i, x, y);
}

// x [images, rows, inputs] to y [images, rows, outputs], by up to `threads` threads.
inline void linear(const Linear& l, int64_t threads, const float* x, float* y) {
  constexpr int ROWS = 4;
  constexpr int64_t ALONE = 1 << 17;  // multiply-adds that one thread does faster than several
  const int64_t team = l.images * l.rows * l.inputs * l.outputs > ALONE ? threads : 1;
#pragma omp parallel for num_threads(int(team)) schedule(static)
  for (int64_t row = 0; row < l.outputs; row += ROWS) {
    if (row + ROWS <= l.outputs)
      linear_rows<ROWS>(l, row, x, y);
    else
      for (int64_t one = row; one < l.outputs; ++one) linear_rows<1>(l, one, x, y);
  }
}

}  // namespace lcnn

// A dense linear layer, such as a network's last: y = W·x + bias.
#pragma once

#include <algorithm>

#include "vector.h"

namespace lcnn {

// Sizes, and what is fixed: the weight [outputs, inputs] and the bias, or null.
struct Linear {
  const float *weight, *bias;
  int64_t images, inputs, outputs;
};

// The sum of all lanes, in an order that depends on nothing.
static inline float sum_of(Vec v) {
  float lanes[LANES];
  std::memcpy(lanes, &v, sizeof v);
  UNROLL for (int half = LANES / 2; half; half /= 2) UNROLL for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// Outputs [0, ROWS) of images [0, IMAGES); each is summed in the same order whatever the block is.
template <int ROWS, int IMAGES>
static void linear_block(const Linear& l, const float* weight, const float* bias, const float* x, float* y) {
  Vec sums[ROWS][IMAGES] = {};
  for (int64_t c = 0; c < l.inputs; c += LANES) {
    const int count = int(std::min<int64_t>(LANES, l.inputs - c));
    Vec from[IMAGES];
    UNROLL for (int i = 0; i < IMAGES; ++i) from[i] = load_first(x + i * l.inputs + c, count);
    UNROLL for (int r = 0; r < ROWS; ++r) {
      const Vec w = load_first(weight + r * l.inputs + c, count);
      UNROLL for (int i = 0; i < IMAGES; ++i) sums[r][i] += w * from[i];
    }
  }
  UNROLL for (int r = 0; r < ROWS; ++r) UNROLL for (int i = 0; i < IMAGES; ++i)
      y[i * l.outputs + r] = sum_of(sums[r][i]) + (bias ? bias[r] : 0.0f);
}

template <int ROWS>
static void linear_rows(const Linear& l, int64_t row, const float* x, float* y) {
  constexpr int IMAGES = LANES == 16 ? 4 : 2;
  const float *const weight = l.weight + row * l.inputs, *const bias = l.bias ? l.bias + row : nullptr;
  int64_t i = 0;
  for (; i + IMAGES <= l.images; i += IMAGES) linear_block<ROWS, IMAGES>(l, weight, bias, x + i * l.inputs, y + i * l.outputs + row);
  for (; i < l.images; ++i) linear_block<ROWS, 1>(l, weight, bias, x + i * l.inputs, y + i * l.outputs + row);
}

// x [images, inputs] to y [images, outputs], by up to `threads` threads.
inline void linear(const Linear& l, int64_t threads, const float* x, float* y) {
  constexpr int ROWS = 4;
  constexpr int64_t ALONE = 1 << 17;  // multiply-adds that one thread does faster than several
  const int64_t team = l.images * l.inputs * l.outputs > ALONE ? threads : 1;
#pragma omp parallel for num_threads(int(team)) schedule(static)
  for (int64_t row = 0; row < l.outputs; row += ROWS) {
    if (row + ROWS <= l.outputs)
      linear_rows<ROWS>(l, row, x, y);
    else
      for (int64_t one = row; one < l.outputs; ++one) linear_rows<1>(l, one, x, y);
  }
}

}  // namespace lcnn

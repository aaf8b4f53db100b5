// Depthwise convolution: every output channel is the sum of the taps of one input channel.
//
// A plane of x is copied once with its padding, its columns split by the stride, so that a tap is a contiguous vector.
#pragma once

#include <vector>

#include "form.h"
#include "run.h"

namespace lcnn {

struct Depthwise {
  const float *weight, *bias;  // [channels][kernel rows][kernel columns], and [channels] or null
  int64_t images, channels, multiplier;  // of the output; so many in a row share a channel of x
  int64_t height, width, out_height, out_width;
  int64_t kernel[2], stride[2], dilation[2];
  int64_t top, left;
  int64_t activation, residual_last;
  int64_t x_image, y_image, residual_image;
};

// How the copy of a plane is laid out.
struct DepthwisePlane {
  int64_t rows, pitch, phase;  // floats from one remainder of columns by the stride to the next

  explicit DepthwisePlane(const Depthwise& d)
      : rows((d.out_height - 1) * d.stride[0] + (d.kernel[0] - 1) * d.dilation[0] + 1),
        pitch(d.out_width + (d.kernel[1] - 1) * d.dilation[1] / d.stride[1]),
        phase(round_up(rows * pitch + 4 * LANES, LANES)) {}
  int64_t size(const Depthwise& d) const { return phase * d.stride[1]; }
};

static void copy_depthwise(const Depthwise& d, const DepthwisePlane& at, const float* x, float* to) {
  std::fill_n(to, at.size(d), 0.0f);
  const int64_t first = std::max<int64_t>(0, d.top), end = std::min(at.rows, d.height + d.top);
  for (int64_t row = first; row < end; ++row) {
    const float* const from = x + (row - d.top) * d.width;
    for (int64_t p = 0; p < d.stride[1]; ++p) {
      // Columns p, p + stride, … of the padded row.
      const int64_t begin = std::max<int64_t>(0, ceil_div(d.left - p, d.stride[1]));
      const int64_t stop = std::min(at.pitch, ceil_div(d.width + d.left - p, d.stride[1]));
      // Zeros that are written too much stand where the next row, or the padding, has its own.
      if (stop > begin)
        copy_spread(to + p * at.phase + row * at.pitch + begin, from + begin * d.stride[1] + p - d.left, stop - begin, d.stride[1]);
    }
  }
}

// A vector of output: where it begins in the copy and in y, and its valid lanes; rows of a narrow image lie in one.
struct DepthwiseVector {
  int64_t from, at;
  int count;
  uint32_t mask;
};

// All vectors of a plane. Where each pixel of a row and each row follows the last in the copy, vectors go from row to row.
static std::vector<DepthwiseVector> depthwise_vectors(const Depthwise& d, const DepthwisePlane& plane) {
  std::vector<DepthwiseVector> found;
  const int64_t wide = d.out_width, flat = (d.out_height - 1) * plane.pitch + wide;
  if (d.stride[0] == 1 && ceil_div(flat, LANES) < d.out_height * ceil_div(wide, LANES)) {
    for (int64_t first = 0; first < flat; first += LANES) {
      DepthwiseVector v{first, -1, 0, 0};
      for (int64_t lane = 0; lane < LANES && first + lane < flat; ++lane) {
        const int64_t row = (first + lane) / plane.pitch, column = (first + lane) % plane.pitch;
        if (column >= wide) continue;
        if (v.at < 0) v.at = row * wide + column;
        v.mask |= 1u << lane, ++v.count;
      }
      if (v.count) found.push_back(v);
    }
    return found;
  }
  for (int64_t row = 0; row < d.out_height; ++row)
    for (int64_t column = 0; column < wide; column += LANES) {
      const int count = int(std::min<int64_t>(LANES, wide - column));
      found.push_back({row * d.stride[0] * plane.pitch + column, row * wide + column, count, count == LANES ? FULL : (1u << count) - 1});
    }
  return found;
}

// V vectors of one output channel.
template <int V>
static inline void depthwise_block(const Depthwise& d, const DepthwiseVector* vectors, const float* copy, const float* weight,
                                   const int64_t* taps, int64_t count, float bias, const Epilogue& epilogue, const float* residual,
                                   float* y) {
  Vec acc[V];
  const float* from[V];
  UNROLL for (int v = 0; v < V; ++v) acc[v] = splat(bias), from[v] = copy + vectors[v].from;
  for (int64_t t = 0; t < count; ++t) {
    const Vec w = splat(weight[t]);
    UNROLL for (int v = 0; v < V; ++v) acc[v] += w * load(from[v] + taps[t]);
  }
  UNROLL for (int v = 0; v < V; ++v) {
    const DepthwiseVector& to = vectors[v];
    Vec value = to.mask == FULL ? acc[v] : compress(acc[v], to.mask);
    if (residual && !d.residual_last) value += load_first(residual + to.at, to.count);
    value = epilogue(value);
    if (residual && d.residual_last) value += load_first(residual + to.at, to.count);
    if (to.count == LANES)
      store(y + to.at, value);
    else
      store_first(y + to.at, value, to.count);
  }
}

inline void depthwise(const Depthwise& d, int64_t threads, const float* x, const float* residual, float* y) {
  constexpr int V = LANES == 16 ? 8 : 4;
  constexpr int64_t ALONE = 1 << 15;  // multiply-adds that one thread does faster than several
  const DepthwisePlane plane(d);
  const int64_t area = d.height * d.width, out_area = d.out_height * d.out_width, count = d.kernel[0] * d.kernel[1];
  const int64_t units = d.images * (d.channels / d.multiplier), size = plane.size(d);
  const int64_t team = units * d.multiplier * out_area * count > ALONE ? std::min(threads, units) : 1;
  std::vector<int64_t> taps;
  for (int64_t r = 0; r < d.kernel[0]; ++r)
    for (int64_t c = 0; c < d.kernel[1]; ++c) {
      const int64_t column = c * d.dilation[1];
      taps.push_back(column % d.stride[1] * plane.phase + r * d.dilation[0] * plane.pitch + column / d.stride[1]);
    }
  const std::vector<DepthwiseVector> vectors = depthwise_vectors(d, plane);
  const int64_t last = int64_t(vectors.size());
  const Epilogue epilogue(int(d.activation), d.residual_last != 0);
  float* const scratch = run_scratch(team * size);
#pragma omp parallel for num_threads(int(std::max<int64_t>(1, team))) schedule(static)
  for (int64_t part = 0; part < team; ++part) {
    float* const copy = scratch + part * size;
    for (int64_t unit = units * part / team; unit < units * (part + 1) / team; ++unit) {
      const int64_t image = unit / (d.channels / d.multiplier), channel = unit % (d.channels / d.multiplier);
      copy_depthwise(d, plane, x + image * d.x_image + channel * area, copy);
      for (int64_t n = channel * d.multiplier; n < (channel + 1) * d.multiplier; ++n) {
        const float bias = d.bias ? d.bias[n] : 0.0f;
        float* const to = y + image * d.y_image + n * out_area;
        const float* const added = residual ? residual + image * d.residual_image + n * out_area : nullptr;
        const float* const weight = d.weight + n * count;
        int64_t v = 0;
        for (; v + V <= last; v += V) depthwise_block<V>(d, &vectors[v], copy, weight, taps.data(), count, bias, epilogue, added, to);
        for (; v < last; ++v) depthwise_block<1>(d, &vectors[v], copy, weight, taps.data(), count, bias, epilogue, added, to);
      }
    }
  }
}

}  // namespace lcnn

// What goes over all of a dimension: sums, means and extremes, normalisation, softmax.
//
// A value is images x outer x size x inner; the reduction is over `size`. Where inner is 1, vectors run along it; else they run
// along inner, so that nothing is added across lanes. Sums are carried in float64 from block to block.
#pragma once

#include <algorithm>
#include <cmath>

#include "functions.h"
#include "linear.h"
#include "run.h"

namespace lcnn {

// The order of kernels/cpu/reductions.py.
enum Reduction : int64_t { REDUCE_MEAN, REDUCE_SUM, REDUCE_MAX, REDUCE_MIN, REDUCE_SQUARES, REDUCE_VARIANCE, NORMALIZE, SOFTMAX, LOG_SOFTMAX };

struct Reduce {
  int64_t kind, images, outer, size, inner, x_image, y_image;
  const float *weight, *bias;  // of a normalisation, or null: entry outer * per_outer + i / per_entry
  int64_t per_outer, per_entry;
  double number;  // added to a variance, or how many fewer than `size` its squares are divided by
};

constexpr int64_t REDUCE_BLOCK = 512;  // elements summed in float32
constexpr int COLUMNS = 4;             // vectors along inner at a time

// The lanes before `count`, and `other` behind them.
static inline Vec first_or(Vec v, Vec other, int count) {
  if (count == LANES) return v;
  float lanes[2][LANES];
  store(lanes[0], v), store(lanes[1], other);
  std::copy_n(lanes[0], count, lanes[1]);
  return load(lanes[1]);
}

// The sum of f(x) over a row.
template <class F>
static double row_sum(const float* x, int64_t n, F f) {
  double total = 0;
  for (int64_t i = 0; i < n; i += REDUCE_BLOCK) {
    Vec sums[4] = {};
    const int64_t end = std::min(n, i + REDUCE_BLOCK);
    int64_t j = i;
    for (; j + 4 * LANES <= end; j += 4 * LANES) UNROLL for (int k = 0; k < 4; ++k) sums[k] += f(load(x + j + k * LANES));
    for (; j < end; j += LANES) {
      const int count = int(std::min<int64_t>(LANES, end - j));
      sums[0] += first_or(f(load_first(x + j, count)), Vec{}, count);
    }
    total += double(sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])));
  }
  return total;
}

static inline Vec larger(Vec a, Vec b) { return choose((a > b) | (a != a), a, b); }
static inline Vec smaller(Vec a, Vec b) { return choose((a < b) | (a != a), a, b); }

template <class Join>
static float row_extreme(const float* x, int64_t n, float start, Join join) {
  Vec found = splat(start);
  for (int64_t i = 0; i < n; i += LANES) {
    const int count = int(std::min<int64_t>(LANES, n - i));
    found = join(found, first_or(load_first(x + i, count), splat(start), count));
  }
  float lanes[LANES];
  store(lanes, found);
  for (int lane = 1; lane < LANES; ++lane) store(lanes, join(load(lanes), splat(lanes[lane])));
  return lanes[0];
}

static void reduce_row(const Reduce& r, int64_t outer, const float* x, float* y) {
  const int64_t n = r.size;
  const float inf = std::numeric_limits<float>::infinity();
  const auto each = [&](auto f) {
    for (int64_t i = 0; i < n; i += LANES) {
      const int count = int(std::min<int64_t>(LANES, n - i));
      store_first(y + i, f(load_first(x + i, count), i, count), count);
    }
  };
  const auto plain = [](Vec v) { return v; };
  switch (r.kind) {
    case REDUCE_SUM: *y = float(row_sum(x, n, plain)); return;
    case REDUCE_MEAN: *y = float(row_sum(x, n, plain) / double(n)); return;
    case REDUCE_SQUARES: *y = float(row_sum(x, n, [](Vec v) { return v * v; })); return;
    case REDUCE_MAX: *y = row_extreme(x, n, -inf, larger); return;
    case REDUCE_MIN: *y = row_extreme(x, n, inf, smaller); return;
    case SOFTMAX:
    case LOG_SOFTMAX: {
      const float most = row_extreme(x, n, -inf, larger);
      const double sum = row_sum(x, n, [&](Vec v) { return full_exponential(v - most); });
      if (r.kind == SOFTMAX) {
        const float scale = float(1.0 / sum);
        return each([&](Vec v, int64_t, int) { return full_exponential(v - most) * scale; });
      }
      const float shift = float(std::log(sum));
      return each([&](Vec v, int64_t, int) { return (v - most) - shift; });
    }
  }
  const float mean = float(row_sum(x, n, plain) / double(n));
  const double squares = row_sum(x, n, [&](Vec v) { return (v - mean) * (v - mean); });
  if (r.kind == REDUCE_VARIANCE) {
    *y = float(squares / std::max(0.0, double(n) - r.number));
    return;
  }
  const float scale = float(1.0 / std::sqrt(squares / double(n) + r.number));
  if (r.per_entry == 1 && r.weight && r.bias)
    return each([&](Vec v, int64_t i, int count) {
      return (v - mean) * scale * load_first(r.weight + outer * r.per_outer + i, count) + load_first(r.bias + outer * r.per_outer + i, count);
    });
  if (!r.weight && !r.bias) return each([&](Vec v, int64_t, int) { return (v - mean) * scale; });
  for (int64_t i = 0; i < n; i += r.per_entry) {
    const int64_t entry = outer * r.per_outer + i / r.per_entry, end = std::min(n, i + r.per_entry);
    const float a = (r.weight ? r.weight[entry] : 1.0f) * scale, b = r.bias ? r.bias[entry] : 0.0f;
    for (int64_t j = i; j < end; j += LANES) {
      const int count = int(std::min<int64_t>(LANES, end - j));
      store_first(y + j, (load_first(x + j, count) - mean) * a + b, count);
    }
  }
}

// The same for up to COLUMNS vectors, `count` columns of inner.
static void reduce_columns(const Reduce& r, int64_t outer, int64_t count, const float* x, float* y) {
  const int vectors = int(ceil_div(count, LANES));
  const float inf = std::numeric_limits<float>::infinity();
  const auto lanes = [&](int v) { return int(std::min<int64_t>(LANES, count - v * LANES)); };
  Vec found[COLUMNS], mean[COLUMNS] = {};
  const auto over = [&](Vec start, auto join) {
    for (Vec& v : found) v = start;
    for (int64_t i = 0; i < r.size; ++i)
      for (int v = 0; v < vectors; ++v) found[v] = join(found[v], load_first(x + i * r.inner + v * LANES, lanes(v)), v);
  };
  const auto result = [&](auto f) {
    for (int v = 0; v < vectors; ++v) store_first(y + v * LANES, f(found[v]), lanes(v));
  };
  const auto each = [&](auto f) {
    for (int64_t i = 0; i < r.size; ++i)
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = i * r.inner + v * LANES;
        store_first(y + at, f(load_first(x + at, lanes(v)), i, v), lanes(v));
      }
  };
  const auto sum = [](Vec a, Vec b, int) { return a + b; };
  const float n = float(r.size);
  switch (r.kind) {
    case REDUCE_SUM: over(Vec{}, sum); return result([](Vec v) { return v; });
    case REDUCE_MEAN: over(Vec{}, sum); return result([&](Vec v) { return v / n; });
    case REDUCE_SQUARES: over(Vec{}, [](Vec a, Vec b, int) { return a + b * b; }); return result([](Vec v) { return v; });
    case REDUCE_MAX: over(splat(-inf), [](Vec a, Vec b, int) { return larger(a, b); }); return result([](Vec v) { return v; });
    case REDUCE_MIN: over(splat(inf), [](Vec a, Vec b, int) { return smaller(a, b); }); return result([](Vec v) { return v; });
    case SOFTMAX:
    case LOG_SOFTMAX: {
      over(splat(-inf), [](Vec a, Vec b, int) { return larger(a, b); });
      std::copy_n(found, COLUMNS, mean);
      over(Vec{}, [&](Vec a, Vec b, int v) { return a + full_exponential(b - mean[v]); });
      if (r.kind == SOFTMAX)
        return each([&](Vec b, int64_t, int v) { return full_exponential(b - mean[v]) / found[v]; });
      for (int v = 0; v < vectors; ++v) found[v] = logarithm(found[v]);
      return each([&](Vec b, int64_t, int v) { return (b - mean[v]) - found[v]; });
    }
  }
  over(Vec{}, sum);
  for (int v = 0; v < vectors; ++v) mean[v] = found[v] / n;
  over(Vec{}, [&](Vec a, Vec b, int v) { return a + (b - mean[v]) * (b - mean[v]); });
  if (r.kind == REDUCE_VARIANCE) return result([&](Vec v) { return v / float(std::max(0.0, double(n) - r.number)); });
  for (int v = 0; v < vectors; ++v) found[v] = 1.0f / square_root(found[v] / n + float(r.number));
  each([&](Vec b, int64_t i, int v) {
    const int64_t entry = outer * r.per_outer + i / r.per_entry;
    return (b - mean[v]) * found[v] * (r.weight ? r.weight[entry] : 1.0f) + (r.bias ? r.bias[entry] : 0.0f);
  });
}

inline void reduce(const Reduce& r, int64_t threads, const float* x, float* y) {
  constexpr int64_t ALONE = 1 << 14;  // elements that one thread does faster than several
  const int64_t width = r.inner == 1 ? 1 : COLUMNS * LANES, pieces = ceil_div(r.inner, width), units = r.images * r.outer * pieces;
  const int64_t made = r.kind >= NORMALIZE ? r.size : 1;  // entries of y for each column
  const int64_t team = units * std::min(width, r.inner) * r.size > ALONE ? std::min(threads, units) : 1;
#pragma omp parallel for num_threads(int(std::max<int64_t>(1, team))) schedule(static)
  for (int64_t unit = 0; unit < units; ++unit) {
    const int64_t piece = unit % pieces, outer = unit / pieces % r.outer, image = unit / pieces / r.outer;
    const float* const from = x + image * r.x_image + outer * r.size * r.inner + piece * width;
    float* const to = y + image * r.y_image + outer * made * r.inner + piece * width;
    if (r.inner == 1)
      reduce_row(r, outer, from, to);
    else
      reduce_columns(r, outer, std::min(width, r.inner - piece * width), from, to);
  }
}

}  // namespace lcnn

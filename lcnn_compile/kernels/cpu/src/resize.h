// Rows and columns as weighted sums of others: bilinear and bicubic resizing, mean pooling over uneven windows.
#pragma once

#include "move.h"
#include "vector.h"

namespace lcnn {

// Tables [height][row_taps] and [width][column_taps]: what is read of x, and its weights.
struct Resize {
  int64_t images, planes, x_image, y_image;
  int64_t x_height, x_width, height, width, row_taps, column_taps;
  const int32_t *rows, *columns;
  const float *row_weights, *column_weights;
};

// Columns first, of every row of x; then rows, by vectors.
static void resize_plane(const Resize& r, const float* x, float* wide, float* y) {
  for (int64_t h = 0; h < r.x_height; ++h, x += r.x_width) {
    float* const to = wide + h * r.width;
    const int32_t* from = r.columns;
    const float* weight = r.column_weights;
    if (r.column_taps == 1) {
      for (int64_t w = 0; w < r.width; ++w) to[w] = weight[w] * x[from[w]];
    } else if (r.column_taps == 2) {
      for (int64_t w = 0; w < r.width; ++w, from += 2, weight += 2) to[w] = weight[0] * x[from[0]] + weight[1] * x[from[1]];
    } else {
      for (int64_t w = 0; w < r.width; ++w, from += r.column_taps, weight += r.column_taps) {
        float sum = 0;
        for (int64_t t = 0; t < r.column_taps; ++t) sum += weight[t] * x[from[t]];
        to[w] = sum;
      }
    }
  }
  for (int64_t h = 0; h < r.height; ++h, y += r.width) {
    const int32_t* const from = r.rows + h * r.row_taps;
    const float* const weight = r.row_weights + h * r.row_taps;
    for (int64_t w = 0; w < r.width; w += LANES) {
      const int count = int(std::min<int64_t>(LANES, r.width - w));
      Vec sum = weight[0] * load_first(wide + from[0] * r.width + w, count);
      for (int64_t t = 1; t < r.row_taps; ++t) sum += weight[t] * load_first(wide + from[t] * r.width + w, count);
      store_first(y + w, sum, count);
    }
  }
}

inline void resize(const Resize& r, int64_t threads, const float* x, float* y) {
  const int64_t planes = r.images * r.planes, size = round_up(r.x_height * r.width, LANES);
  const int64_t team = planes * std::max(size, r.height * r.width) > MOVE_ALONE ? std::min(threads, planes) : 1;
  float* const scratch = run_scratch(team * size);
#pragma omp parallel for num_threads(int(std::max<int64_t>(1, team))) schedule(static)
  for (int64_t part = 0; part < team; ++part)
    for (int64_t plane = planes * part / team; plane < planes * (part + 1) / team; ++plane)
      resize_plane(r, x + plane / r.planes * r.x_image + plane % r.planes * r.x_height * r.x_width, scratch + part * size,
                   y + plane / r.planes * r.y_image + plane % r.planes * r.height * r.width);
}

}  // namespace lcnn

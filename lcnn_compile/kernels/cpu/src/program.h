// Several operations in one call: their values stay in one arena of memory.
#pragma once

#include <chrono>

#include "depthwise.h"
#include "int8.h"
#include "linear.h"
#include "map.h"
#include "move.h"
#include "pool.h"
#include "reduce.h"
#include "resize.h"
#include "run.h"

namespace lcnn {

enum Kind : int64_t { LOOK_UP, POOL, TURN, LINEAR, MAP, MOVE, PICK, REDUCE, RESIZE, LOOK_UP_BYTES, POOL_BYTES, CAST, DEPTHWISE, MAP_BYTES, MEAN_BYTES };

constexpr int MOST_READ = 8;

// Values are numbered. `of` is what the kind needs to know; it belongs to the caller and outlives the program.
struct Step {
  int64_t kind;
  const void* of;
  int64_t y, count;
  int64_t x[MOST_READ];
};

// Where a value begins: bytes from the start of the caller's tensor of that number, or of the arena (-1).
struct Place {
  int64_t tensor, offset;
};

struct LookUpStep {  // reads x, and a residual
  const Plan* plan;
  const float* bias;  // or null
};

// Planes that follow each other in an image, and the distances between images. Sums that are divided by other numbers from place
// to place have a factor for each row and column; else these are null.
struct PoolStep {
  Pool pool;
  int64_t images, x_image, y_image;
  const float *rows, *columns;
};

struct ByteLookUpStep {  // reads x, and a residual
  const BytePlan* plan;
};

// Images of `count` values that are rounded to bytes, or widened from them.
struct CastStep {
  double scale;  // of bytes; its inverse where floats become bytes
  int64_t zero, to_bytes, images, count, x_image, y_image;
};

struct Turn {
  int64_t rows, columns;  // of x, which become columns and rows
};

struct Program {
  std::vector<Step> steps;
  std::vector<Place> places;
  int64_t arena;  // bytes
  int64_t threads;

  // Where `seconds` is given, each step's time is added to it.
  void run(void* const* tensors, double* seconds) const {
    thread_local Memory memory;
    char* const base = reinterpret_cast<char*>(memory.at_least(ceil_div(arena, int64_t(sizeof(float)))));
    const auto value = [&](int64_t v) {
      const Place& at = places[v];
      return reinterpret_cast<float*>((at.tensor < 0 ? base : static_cast<char*>(tensors[at.tensor])) + at.offset);
    };
    for (size_t i = 0; i < steps.size(); ++i) {
      const Step& step = steps[i];
      const auto start = seconds ? Clock::now() : Clock::time_point{};
      const float* x[MOST_READ] = {};
      for (int64_t j = 0; j < step.count; ++j) x[j] = value(step.x[j]);
      run(step, x, value(step.y));
      if (seconds) seconds[i] += std::chrono::duration<double>(Clock::now() - start).count();
    }
    memory.give_back_above(KEPT_FLOATS);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int64_t KEPT_FLOATS = 64 << 20;  // kept for the next call
  static constexpr int64_t ALONE = 1 << 15;         // floats of x that one thread pools faster than several

  void run(const Step& step, const float* const* x, float* y) const {
    switch (step.kind) {
      case LOOK_UP: {
        const LookUpStep& s = *static_cast<const LookUpStep*>(step.of);
        return lcnn::run({*s.plan, x[0], s.bias, x[1], y}, int(s.plan->g.threads));
      }
      case POOL: return pool(*static_cast<const PoolStep*>(step.of), x[0], y);
      case LOOK_UP_BYTES: return run_bytes(*static_cast<const ByteLookUpStep*>(step.of)->plan, bytes(x[0]), x[1], y);
      case POOL_BYTES: {
        const PoolStep& s = *static_cast<const PoolStep*>(step.of);
        for (int64_t i = 0; i < s.images; ++i) pool_bytes(s.pool, threads, bytes(x[0]) + i * s.x_image, bytes(y) + i * s.y_image);
        return;
      }
      case MAP_BYTES: return map_bytes(*static_cast<const ByteMap*>(step.of), threads, x, y);
      case MEAN_BYTES: return mean_bytes(*static_cast<const ByteMean*>(step.of), threads, x[0], y);
      case CAST: return cast(*static_cast<const CastStep*>(step.of), x[0], y);
      case LINEAR: return linear(*static_cast<const Linear*>(step.of), threads, x[0], y);
      case MAP: return map(*static_cast<const Map*>(step.of), threads, x, y);
      case MOVE: return move(*static_cast<const Move*>(step.of), threads, x[0], y);
      case PICK: return pick(*static_cast<const Pick*>(step.of), threads, x[0], y);
      case REDUCE: return reduce(*static_cast<const Reduce*>(step.of), threads, x[0], y);
      case RESIZE: return resize(*static_cast<const Resize*>(step.of), threads, x[0], y);
      case DEPTHWISE: return depthwise(*static_cast<const Depthwise*>(step.of), threads, x[0], x[1], y);
      case TURN: return turn(*static_cast<const Turn*>(step.of), x[0], y);
    }
  }

  static const uint8_t* bytes(const float* at) { return reinterpret_cast<const uint8_t*>(at); }
  static uint8_t* bytes(float* at) { return reinterpret_cast<uint8_t*>(at); }

  void cast(const CastStep& c, const float* x, float* y) const {
    for (int64_t i = 0; i < c.images; ++i)
      if (c.to_bytes)
        round_to_bytes(x + i * c.x_image, c.count, float(c.scale), int32_t(c.zero), threads, bytes(y) + i * c.y_image);
      else
        widen_bytes(bytes(x) + i * c.x_image, c.count, float(c.scale), int32_t(c.zero), threads, y + i * c.y_image);
  }

  static void turn(const Turn& t, const float* x, float* y) {
    for (int64_t column = 0; column < t.columns; ++column)
      for (int64_t row = 0; row < t.rows; ++row) *y++ = x[row * t.columns + column];
  }

  void pool(const PoolStep& step, const float* x, float* y) const {
    const Pool& p = step.pool;
    // Windows that tile their planes tile a plane made of them all; small planes are then not begun one by one.
    const bool tiled = !p.top && p.kernel[0] == p.stride[0] && p.height == p.out_height * p.stride[0] && p.dilation[0] == 1 && !step.rows;
    const int64_t area = p.height * p.width, out_area = p.out_height * p.out_width, planes = p.planes * step.images;
    const int64_t team = planes * area > ALONE ? std::min(threads, planes) : 1, row = round_up(p.row_floats(), LANES);
    float* const rows = run_scratch(team * row);
#pragma omp parallel for num_threads(int(team)) schedule(static)
    for (int64_t part = 0; part < team; ++part)
      for (int64_t i = planes * part / team, end = planes * (part + 1) / team; i < end;) {
        const int64_t image = i / p.planes, plane = i % p.planes, some = tiled ? std::min(end - i, p.planes - plane) : 1;
        Pool q = p;
        q.height *= some, q.out_height *= some;
        float* const to = y + image * step.y_image + plane * out_area;
        pool_rows(q, 0, q.out_height, x + image * step.x_image + plane * area, 0, rows + part * row, to);
        for (int64_t h = 0; step.rows && h < p.out_height; ++h)
          for (int64_t w = 0; w < p.out_width; ++w) to[h * p.out_width + w] *= step.rows[h] * step.columns[w];
        i += some;
      }
  }
};

}  // namespace lcnn

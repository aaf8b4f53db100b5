// Several operations in one call: lookup convolutions, poolings and linear layers whose values stay in one arena of memory.
#pragma once

#include <chrono>

#include "linear.h"
#include "pool.h"
#include "run.h"

namespace lcnn {

enum Kind : int64_t { LOOK_UP, POOL, TURN, LINEAR };

// Values are numbered; no residual is -1.
struct Step {
  int64_t kind;
  const Plan* plan;   // of a lookup convolution
  const float* bias;  // of a lookup convolution, or null
  int64_t x, residual, y;
  Pool pool;  // of what is turned: `planes` rows of `width` become columns
  Linear linear;
};

// Where a value lies: at an offset in the arena, or in the caller's tensor -1 - place.
struct Program {
  std::vector<Step> steps;
  std::vector<int64_t> places;
  int64_t arena;  // floats
  int64_t threads;

  // Where `seconds` is given, each step's time is added to it.
  void run(float* const* tensors, double* seconds) const {
    thread_local Memory memory;
    float* const base = memory.at_least(arena);
    const auto value = [&](int64_t v) { return places[v] >= 0 ? base + places[v] : tensors[-1 - places[v]]; };
    for (size_t i = 0; i < steps.size(); ++i) {
      const Step& step = steps[i];
      const auto start = seconds ? Clock::now() : Clock::time_point{};
      if (step.kind == LOOK_UP)
        lcnn::run({*step.plan, value(step.x), step.bias, step.residual < 0 ? nullptr : value(step.residual), value(step.y)},
                  int(step.plan->g.threads));
      else if (step.kind == POOL)
        pool(step, value(step.x), value(step.y));
      else if (step.kind == LINEAR)
        linear(step.linear, threads, value(step.x), value(step.y));
      else
        turn(step.pool.planes, step.pool.width, value(step.x), value(step.y));
      if (seconds) seconds[i] += std::chrono::duration<double>(Clock::now() - start).count();
    }
    memory.give_back_above(KEPT_FLOATS);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int64_t KEPT_FLOATS = 64 << 20;  // kept for the next call
  static constexpr int64_t ALONE = 1 << 15;         // floats of x that one thread pools faster than several

  static void turn(int64_t rows, int64_t columns, const float* x, float* y) {
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t row = 0; row < rows; ++row) *y++ = x[row * columns + column];
  }

  void pool(const Step& step, const float* x, float* y) const {
    const Pool& p = step.pool;
    // Windows that tile their planes tile a plane made of them all; small planes are then not begun one by one.
    const bool tiled = !p.top && p.kernel[0] == p.stride[0] && p.height == p.out_height * p.stride[0];
    const int64_t area = p.height * p.width, out_area = p.out_height * p.out_width;
    const int64_t team = p.planes * area > ALONE ? std::min(threads, p.planes) : 1, row = round_up(p.row_floats(), LANES);
    float* const rows = run_scratch(team * row);
#pragma omp parallel for num_threads(int(team)) schedule(static)
    for (int64_t part = 0; part < team; ++part)
      for (int64_t i = p.planes * part / team, end = p.planes * (part + 1) / team; i < end; ++i) {
        Pool q = p;
        if (tiled) q.height *= end - i, q.out_height *= end - i;
        pool_rows(q, 0, q.out_height, x + i * area, 0, rows + part * row, y + i * out_area);
        if (tiled) break;
      }
  }
};

}  // namespace lcnn

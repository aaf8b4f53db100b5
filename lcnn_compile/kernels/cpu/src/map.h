// An element-wise step: a chain of operations in one pass through memory, block by block in buffers that stay in the first cache.
#pragma once

#include <algorithm>

#include "functions.h"
#include "run.h"

namespace lcnn {

constexpr int MAP_DIMENSIONS = 6, MAP_OPERANDS = 8, MAP_OPERATIONS = 32;
constexpr int64_t MAP_BLOCK = 512;  // elements

// The order of kernels/cpu/elementwise.py.
enum Function : int64_t {
  ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM,
  NEG, ABS, SQUARE, SQRT, RSQRT, RECIPROCAL, EXP, LOG, SIGMOID, TANH, ERF,
  MAP_RELU, LEAKY_RELU, ELU, MAP_SILU, GELU, GELU_TANH, MAP_HARDSWISH, HARDSIGMOID, CLAMP, MISH, SOFTPLUS,
  PRELU, LOGSIGMOID, SOFTSIGN, FUNCTIONS
};

// `a`, `b`: registers; operands come first, buffers behind them. What the last one makes is the result.
struct Operation {
  int64_t function, a, b, to;
  double u, v;
};

struct Map {
  int64_t sizes[MAP_DIMENSIONS], to[MAP_DIMENSIONS];  // of the result, and its strides
  int64_t operands;
  int64_t strides[MAP_OPERANDS][MAP_DIMENSIONS];
  const float* constants[MAP_OPERANDS];  // or null: the next of the step's values
  int64_t count, buffers;
  Operation operations[MAP_OPERATIONS];
};

// How a step of a program of bytes reads its operands and writes its result: bytes stand for scale * (byte - zero); 0: floats.
// Where bytes are written `scale` is the inverse.
struct ByteMap {
  Map map;
  double scales[MAP_OPERANDS];
  int64_t zeros[MAP_OPERANDS];
  double scale;
  int64_t zero;
};

// Calls `each(i, count)` for the vectors of a block; only the last may be less than full.
template <class Each>
static inline __attribute__((always_inline)) void by_vectors(int64_t n, Each each) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) each(i, LANES);
  if (i < n) each(i, int(n - i));
}

// What an operation reads: elements side by side, or (step 0) one vector of the same number.
struct Source {
  const float* at;
  int64_t step;
  Vec operator()(int64_t i, int count) const { return load_first(at + i * step, count); }
};

template <class F>
static inline void one(float* to, Source a, int64_t n, F f) {
  by_vectors(n, [&](int64_t i, int count) { store_first(to + i, f(a(i, count)), count); });
}

template <class F>
static inline void two(float* to, Source a, Source b, int64_t n, F f) {
  by_vectors(n, [&](int64_t i, int count) { store_first(to + i, f(a(i, count), b(i, count)), count); });
}

static inline void apply(const Operation& o, float* to, Source a, Source b, int64_t n) {
  const float u = float(o.u), v = float(o.v), inf = std::numeric_limits<float>::infinity();
  switch (o.function) {
    case ADD: return two(to, a, b, n, [&](Vec x, Vec y) { return x + u * y; });
    case SUB: return two(to, a, b, n, [&](Vec x, Vec y) { return x - u * y; });
    case MUL: return two(to, a, b, n, [](Vec x, Vec y) { return x * y; });
    case DIV: return two(to, a, b, n, [](Vec x, Vec y) { return x / y; });
    case MAXIMUM: return two(to, a, b, n, [](Vec x, Vec y) { return choose((x > y) | (x != x), x, y); });
    case MINIMUM: return two(to, a, b, n, [](Vec x, Vec y) { return choose((x < y) | (x != x), x, y); });
    case NEG: return one(to, a, n, [](Vec x) { return -x; });
    case ABS: return one(to, a, n, [](Vec x) { return absolute(x); });
    case SQUARE: return one(to, a, n, [](Vec x) { return x * x; });
    case SQRT: return one(to, a, n, [](Vec x) { return square_root(x); });
    case RSQRT: return one(to, a, n, [](Vec x) { return 1.0f / square_root(x); });
    case RECIPROCAL: return one(to, a, n, [](Vec x) { return 1.0f / x; });
    case EXP: return one(to, a, n, [](Vec x) { return full_exponential(x); });
    case LOG: return one(to, a, n, [](Vec x) { return logarithm(x); });
    case SIGMOID: return one(to, a, n, [](Vec x) { return sigmoid(x); });
    case TANH: return one(to, a, n, [](Vec x) { return hyperbolic_tangent(x); });
    case ERF: return one(to, a, n, [](Vec x) { return error_function(x); });
    case MAP_RELU: return one(to, a, n, [](Vec x) { return at_least(x, 0.0f); });
    case LEAKY_RELU: return one(to, a, n, [&](Vec x) { return choose(x > 0.0f, x, x * u); });
    case PRELU: return two(to, a, b, n, [](Vec x, Vec y) { return choose(x > 0.0f, x, x * y); });
    case ELU:  // u: the slope on the left, v: of all
      return one(to, a, n, [&](Vec x) { return choose(x > 0.0f, x * v, u * v * exponential_less_one(x)); });
    case MAP_SILU: return one(to, a, n, [](Vec x) { return x / (exponential(-x) + 1.0f); });
    case GELU: return one(to, a, n, [](Vec x) { return 0.5f * x * (1.0f + error_function(x * 0.70710678f)); });
    case GELU_TANH:
      return one(to, a, n, [](Vec x) {
        return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
      });
    case MAP_HARDSWISH:
      return one(to, a, n, [](Vec x) { return x * at_most(at_least(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f); });
    case HARDSIGMOID: return one(to, a, n, [](Vec x) { return at_most(at_least(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f); });
    case CLAMP: return one(to, a, n, [&](Vec x) { return at_most(at_least(x, u), v); });
    case MISH:  // x·tanh(log(1 + e)) with e = exp(x)
      return one(to, a, n, [](Vec x) {
        const Vec e = full_exponential(at_most(x, 20.0f)), p = e * e + 2.0f * e;
        return choose(x > 20.0f, x, x * (p / (p + 2.0f)));
      });
    case SOFTPLUS:  // u: beta, v: from where on it is a line
      return one(to, a, n, [&](Vec x) {
        const Vec scaled = x * u;
        return choose(scaled > v, x, logarithm_of_one_more(full_exponential(at_most(scaled, 80.0f))) / u);
      });
    case LOGSIGMOID:
      return one(to, a, n, [](Vec x) { return at_most(x, 0.0f) - logarithm_of_one_more(full_exponential(-absolute(x))); });
    default: return one(to, a, n, [&](Vec x) { return x / (1.0f + choose(x == inf, x, absolute(x))); });
  }
}

// An operand's elements of `rows` rows of `width`, side by side.
template <class T>
static inline void expand_rows(const T* from, int64_t row, int64_t step, int64_t rows, int64_t width, T* to) {
  for (int64_t r = 0; r < rows; ++r, from += row, to += width) {
    if (step == 1)
      std::copy_n(from, width, to);
    else
      for (int64_t i = 0; i < width; ++i) to[i] = from[i * step];
  }
}

// Ends that are floats, all of them.
struct FloatEnds {
  static constexpr bool BYTES_TOO = false;
};

// `x`: the values that operands without constants read, in order.
template <class Ends>
static inline void map_with(const Map& m, const Ends& ends, int64_t threads, const float* const* x, float* y) {
  constexpr int LAST = MAP_DIMENSIONS - 1, ROW = MAP_DIMENSIONS - 2;
  constexpr int64_t ALONE = 1 << 15;  // elements that one thread does faster than several
  const int64_t width = std::min(m.sizes[LAST], MAP_BLOCK), pieces = ceil_div(m.sizes[LAST], std::max<int64_t>(1, width));
  const int64_t rows = width ? std::max<int64_t>(1, std::min(m.sizes[ROW], MAP_BLOCK / width)) : 1;
  const int64_t bands = ceil_div(m.sizes[ROW], rows);
  int64_t units = pieces * bands;
  for (int d = 0; d < ROW; ++d) units *= m.sizes[d];
  const int64_t team = units * rows * width > ALONE ? std::min(threads, units) : 1;
  const int64_t buffers = m.operands + m.buffers + 1;  // also one for a result that is not contiguous
  float* const scratch = run_scratch(team * buffers * MAP_BLOCK);
#pragma omp parallel for num_threads(int(team)) schedule(static)
  for (int64_t part = 0; part < team; ++part) {
    float* const own = scratch + part * buffers * MAP_BLOCK;
    const float* base[MAP_OPERANDS];
    bool uniform[MAP_OPERANDS], row_by_row = false;
    Source registers[MAP_OPERANDS + MAP_OPERATIONS];
    for (int64_t i = 0, next = 0; i < m.operands; ++i) {
      base[i] = m.constants[i] ? m.constants[i] : x[next++];
      uniform[i] = std::all_of(m.strides[i], m.strides[i] + MAP_DIMENSIONS, [](int64_t s) { return s == 0; });
      if constexpr (Ends::BYTES_TOO)
        if (ends.reads_bytes(i)) {
          uniform[i] = false;
          continue;
        }
      if (uniform[i]) store(own + i * MAP_BLOCK, splat(units ? *base[i] : 0.0f));
      // One number for each row, such as a channel's factor, is no vector of its own: it is not written out.
      row_by_row |= m.strides[i][LAST] == 0 && !uniform[i] && width >= LANES;
    }
    for (int64_t b = 0; b < m.buffers; ++b) registers[m.operands + b] = {own + (m.operands + b) * MAP_BLOCK, 1};
    for (int64_t unit = units * part / team, end = units * (part + 1) / team; unit < end; ++unit) {
      int64_t at[MAP_DIMENSIONS], rest = unit;
      const int64_t piece = rest % pieces;
      rest /= pieces;
      at[LAST] = piece * width;
      const int64_t columns = std::min(width, m.sizes[LAST] - at[LAST]);
      at[ROW] = rest % bands * rows;
      rest /= bands;
      const int64_t height = std::min(rows, m.sizes[ROW] - at[ROW]), n = height * columns;
      for (int d = ROW - 1; d >= 0; --d) at[d] = rest % m.sizes[d], rest /= m.sizes[d];
      int64_t first[MAP_OPERANDS] = {}, place = 0;
      for (int d = 0; d < MAP_DIMENSIONS; ++d) {
        for (int64_t i = 0; i < m.operands; ++i) first[i] += at[d] * m.strides[i][d];
        place += at[d] * m.to[d];
      }
      const int64_t passes = row_by_row ? height : 1, together = height / passes, count = n / passes;
      const bool gapless = together == 1 || m.to[ROW] == columns;
      bool whole = gapless;
      if constexpr (Ends::BYTES_TOO) whole = whole && !ends.writes_bytes();
      for (int64_t r = 0; r < passes; ++r, place += m.to[ROW]) {
        for (int64_t i = 0; i < m.operands; ++i) {
          const int64_t* const s = m.strides[i];
          float* const buffer = own + i * MAP_BLOCK;
          registers[i] = {buffer, 1};
          if constexpr (Ends::BYTES_TOO)
            if (ends.reads_bytes(i)) {
              ends.widen(i, base[i], first[i] + r * s[ROW], s[ROW], s[LAST], together, columns, buffer);
              continue;
            }
          const float* const from = base[i] + first[i] + r * s[ROW];
          if (uniform[i])
            registers[i].step = 0;
          else if (s[LAST] == 1 && (together == 1 || s[ROW] == columns))
            registers[i].at = from;
          else if (s[LAST] == 0 && row_by_row)
            store(buffer, splat(*from)), registers[i].step = 0;
          else
            expand_rows(from, s[ROW], s[LAST], together, columns, buffer);
        }
        float* const result = whole ? y + place : own + (buffers - 1) * MAP_BLOCK;
        for (int64_t i = 0; i < m.count; ++i) {
          const Operation& o = m.operations[i];
          apply(o, i + 1 == m.count ? result : own + o.to * MAP_BLOCK, registers[o.a], registers[o.b], count);
        }
        if constexpr (Ends::BYTES_TOO)
          if (ends.writes_bytes()) {
            for (int64_t row = 0; row < (gapless ? 1 : together); ++row)
              ends.round(result + row * columns, gapless ? count : columns, y, place + row * m.to[ROW]);
            continue;
          }
        if (!whole)
          for (int64_t row = 0; row < together; ++row) std::copy_n(result + row * columns, columns, y + place + row * m.to[ROW]);
      }
    }
  }
}

inline void map(const Map& m, int64_t threads, const float* const* x, float* y) { map_with(m, FloatEnds(), threads, x, y); }

}  // namespace lcnn

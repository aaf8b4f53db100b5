// The micro-kernel of both stages: some filters that share their taps, at some vectors of pixels.
#pragma once

#include "cpu_vector.h"

namespace lcnn {

constexpr int TILE = 6;  // vectors of pixels in a tile, at most

enum Activation { NONE, RELU, RELU6, SILU, HARDSWISH };

// What happens to a sum before it is written.
struct Epilogue {
  Activation activation;
  float low, high;      // none, relu and relu6 are clamps
  bool residual_last;

  explicit Epilogue(int code, bool last)
      : activation(Activation(code)),
        low(code == RELU || code == RELU6 ? 0.0f : -__builtin_inff()),
        high(code == RELU6 ? 6.0f : __builtin_inff()),
        residual_last(last) {}

  Vec operator()(Vec v) const {
    if (activation == SILU) return v / (exponential(-v) + 1.0f);
    if (activation == HARDSWISH) return v * at_most(at_least(v + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
    return at_most(at_least(v, low), high);
  }
};

// A vector of pixels: where its taps start, and where its valid lanes go, which are contiguous there.
struct Pixels {
  int64_t source, target;
  uint32_t mask;
  int count;
};

// Tap t of the dictionary stage: channel t of a packed tile.
struct Channels {
  int64_t pitch;
  int64_t operator[](int64_t t) const { return t * pitch; }
};

// acc[f][v] += sum over t of coefficients[t][f] * base[offsets[t] + starts[v]]
template <int F, int V, class Offsets>
static inline __attribute__((always_inline)) void accumulate(Vec (&acc)[F][V], const float* const (&base)[V], Offsets offsets,
                                                             const float* coefficients, int64_t width, int64_t taps) {
  for (int64_t t = 0; t < taps; ++t, coefficients += width) {
    const int64_t offset = offsets[t];
    Vec s[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) s[v] = load(base[v] + offset);
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[f][v] += coefficients[f] * s[v];
  }
}

// Dictionary stage: F rows of D at V vectors of a packed tile, into F planes of S.
template <int F, int V>
static void form(const float* tile, int64_t pitch, const float* rows, int64_t width, int64_t channels, float* s, int64_t plane) {
  const float* base[V];
  for (int v = 0; v < V; ++v) base[v] = tile + v * LANES;
  Vec acc[F][V] = {};
  accumulate<F, V>(acc, base, Channels{pitch}, rows, width, channels);
  for (int f = 0; f < F; ++f)
    for (int v = 0; v < V; ++v) store(s + f * plane + v * LANES, acc[f][v]);
}

// Where the lookup stage reads and writes.
struct Lookup {
  const float* s;
  const float* bias;      // or null
  const float* residual;  // or null; laid out as y
  float* y;
  int64_t plane;  // of y
  Epilogue epilogue;
};

// Lookup stage: F filters at V vectors of pixels.
template <int F, int V>
static void look_up(const Lookup& to, const Pixels* pixels, const int32_t* offsets, const float* coefficients, int64_t width,
                    int64_t taps, const int32_t* filters) {
  const float* base[V];
  for (int v = 0; v < V; ++v) base[v] = to.s + pixels[v].source;
  Vec acc[F][V];
  for (int f = 0; f < F; ++f)
    for (int v = 0; v < V; ++v) acc[f][v] = splat(to.bias ? to.bias[filters[f]] : 0.0f);
  accumulate<F, V>(acc, base, offsets, coefficients, width, taps);
  for (int f = 0; f < F; ++f)
    for (int v = 0; v < V; ++v) {
      const Pixels& p = pixels[v];
      const int64_t target = filters[f] * to.plane + p.target;
      Vec y = p.mask == FULL ? acc[f][v] : compress(acc[f][v], p.mask);
      if (to.residual && !to.epilogue.residual_last) y += load_first(to.residual + target, p.count);
      y = to.epilogue(y);
      if (to.residual && to.epilogue.residual_last) y += load_first(to.residual + target, p.count);
      store_first(to.y + target, y, p.count);
    }
}

using Form = decltype(&form<1, 1>);
using LookUp = decltype(&look_up<1, 1>);

// The kernels for every number of filters and vectors that fits the registers.
struct Kernels {
  Form form[FILTERS + 1][TILE + 1] = {};
  LookUp look_up[FILTERS + 1][TILE + 1] = {};

  Kernels() { fill<FILTERS, vectors_for(FILTERS)>(); }

 private:
  template <int F, int V>
  void fill() {
    if constexpr (F > 0) {
      form[F][V] = lcnn::form<F, V>;
      look_up[F][V] = lcnn::look_up<F, V>;
      if constexpr (V > 1)
        fill<F, V - 1>();
      else
        fill<F - 1, vectors_for(F - 1)>();
    }
  }
};

}  // namespace lcnn

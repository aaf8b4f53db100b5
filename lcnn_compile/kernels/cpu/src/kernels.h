// The micro-kernels of both stages: some filters that share their taps, at some pixels. The dictionary stage is such a
// lookup too: rows of D share all input channels as taps.
#pragma once

#include "vector.h"

namespace lcnn {

constexpr int TILE = 6;   // vectors of pixels in a tile, at most
constexpr int BLOCK = 8;  // filters of a group that are packed together, at most

// Filters that share their taps, few enough for one call of the micro-kernel (or two, where registers are few).
struct Block {
  int64_t first_tap, taps, coefficients;
  int size, first_filter;
  int64_t pairs = 0;  // where its coefficients begin as pairs of bfloat16
};

enum Activation { NONE, RELU, RELU6, SILU, HARDSWISH };

// What happens to a sum before it is written.
struct Epilogue {
  Activation activation;
  bool residual_last;

  Epilogue(int code, bool last)
      : activation(Activation(code)), residual_last(last) {}

  bool is_clamp() const { return activation != SILU && activation != HARDSWISH; }
  Vec operator()(Vec v) const {
    if (activation == SILU) return v / (exponential(-v) + 1.0f);
    if (activation == HARDSWISH) return v * at_most(at_least(v + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
    if (activation == NONE) return v;
    return activation == RELU ? at_least(v, 0.0f) : at_most(at_least(v, 0.0f), 6.0f);
  }
};

// A vector of pixels: where its taps start, and the lanes that are valid, `count` of them. Valid lanes lie contiguously
// on the side where there are no gaps between rows: in x for the dictionary stage, in y for the lookup stage.
struct Pixels {
  int64_t source, target;
  uint32_t mask;
  int count;
  bool spills;  // a whole vector may be read and written in y: what lies behind the valid lanes is written later
};

// Tap t of the dictionary stage is channel t.
struct Channels {
  int64_t pitch;
  int64_t operator[](int64_t t) const { return t * pitch; }
};

// Lines that will be wanted soon, two for each tap.
struct Ahead {
  const char* at = nullptr;
  int64_t pitch = 0;
  void operator()(int64_t t) const {
    __builtin_prefetch(at + t * pitch);
    __builtin_prefetch(at + t * pitch + 64);
  }
};

struct Nothing {
  void operator()(int64_t) const {}
};

// acc[f][v] += sum over t of coefficients[t][f] * base[v][offsets[t]]
template <int F, int V, class Offsets, class Hint>
static inline __attribute__((always_inline)) void accumulate(Vec (&acc)[F][V], const float* const (&base)[V], Offsets offsets,
                                                             const float* coefficients, int64_t width, int64_t taps,
                                                             Hint hint) {
  for (int64_t t = 0; t < taps; ++t, coefficients += width) {
    const int64_t offset = offsets[t];
    hint(t);
    Vec s[V];
    UNROLL for (int v = 0; v < V; ++v) s[v] = load(base[v] + offset);
    UNROLL for (int f = 0; f < F; ++f) {
      UNROLL for (int v = 0; v < V; ++v) acc[f][v] += coefficients[f] * s[v];
    }
  }
}

// Where the dictionary stage reads and writes: channels of x, or of a packed tile of it, and planes of S.
struct Former {
  const float* x;
  int64_t pitch, channels;
  int64_t plane;  // of S
  Ahead ahead;
};

// F rows of D at V vectors of pixels, into F planes of S.
template <int F, int V>
static void form(const Former& from, const Pixels* pixels, const float* rows, int64_t width, float* s, bool look_ahead) {
  const float* base[V];
  UNROLL for (int v = 0; v < V; ++v) base[v] = from.x + pixels[v].source;
  Vec acc[F][V] = {};
  if (look_ahead)
    accumulate<F, V>(acc, base, Channels{from.pitch}, rows, width, from.channels, from.ahead);
  else
    accumulate<F, V>(acc, base, Channels{from.pitch}, rows, width, from.channels, Nothing{});
  UNROLL for (int v = 0; v < V; ++v) {
    float* target = s + pixels[v].target;
    if (pixels[v].mask == FULL) {
      UNROLL for (int f = 0; f < F; ++f) store(target + f * from.plane, acc[f][v]);
    } else {
      UNROLL for (int f = 0; f < F; ++f) store(target + f * from.plane, expand(acc[f][v], pixels[v].mask));
    }
  }
}

// Where the lookup stage reads and writes.
struct Lookup {
  const float* s;
  const float* bias;      // or null
  const float* residual;  // or null; laid out as y
  float* y;
  int64_t plane;  // of y
  Epilogue epilogue;
  bool fetch;   // ask for the lines of y before the sums are done
  bool stream;  // write past the caches: every vector is full and aligned
};

// The way out for epilogues that are more than a clamp. Not a part of the kernels, each of which would take its time to compile.
static __attribute__((noinline)) void finish(const Lookup& to, const Pixels* pixels, int vectors, const int32_t* filters, int size,
                                             const Vec* sums) {
  for (int f = 0; f < size; ++f)
    for (int v = 0; v < vectors; ++v, ++sums) {
      const Pixels& p = pixels[v];
      const int64_t target = filters[f] * to.plane + p.target;
      Vec y = to.epilogue(p.mask == FULL ? *sums : compress(*sums, p.mask));
      if (to.residual && to.epilogue.residual_last) y += load_first(to.residual + target, p.count);
      if (to.stream)
        store_past_caches(to.y + target, y);
      else
        store_first(to.y + target, y, p.spills ? LANES : p.count);
    }
}

// F filters at V vectors of pixels; `regular`: all of them are full.
template <int F, int V>
static inline __attribute__((always_inline)) void look_up(const Lookup& to, const Pixels* pixels, bool regular, const int32_t* offsets, const float* coefficients, int64_t width,
                    int64_t taps, const int32_t* filters) {
  const float* base[V];
  UNROLL for (int v = 0; v < V; ++v) base[v] = to.s + pixels[v].source;
  Vec acc[F][V];
  UNROLL for (int f = 0; f < F; ++f) {
    const Vec start = splat(to.bias ? to.bias[filters[f]] : 0.0f);
    UNROLL for (int v = 0; v < V; ++v) acc[f][v] = start;
  }
  if (to.fetch && !to.stream)
    for (int f = 0; f < F; ++f)
      for (int v = 0; v < V; ++v) __builtin_prefetch(to.y + filters[f] * to.plane + pixels[v].target, 1);
  accumulate<F, V>(acc, base, offsets, coefficients, width, taps, Nothing{});
  // Last, as PyTorch does: among the sums a large residual would cost every one of them its low bits.
  if (to.residual && !to.epilogue.residual_last)
    UNROLL for (int v = 0; v < V; ++v) {
      const float* from = to.residual + pixels[v].target;
      if (pixels[v].mask == FULL) {
        UNROLL for (int f = 0; f < F; ++f) acc[f][v] += load(from + filters[f] * to.plane);
      } else {
        UNROLL for (int f = 0; f < F; ++f)
          acc[f][v] += expand(load_first(from + filters[f] * to.plane, pixels[v].spills ? LANES : pixels[v].count), pixels[v].mask);
      }
    }
  if (to.epilogue.is_clamp() && !(to.residual && to.epilogue.residual_last)) {
    if (to.epilogue.activation != NONE)
      UNROLL for (int f = 0; f < F; ++f) {
        UNROLL for (int v = 0; v < V; ++v) acc[f][v] = at_least(acc[f][v], 0.0f);
      }
    if (to.epilogue.activation == RELU6)
      UNROLL for (int f = 0; f < F; ++f) {
        UNROLL for (int v = 0; v < V; ++v) acc[f][v] = at_most(acc[f][v], 6.0f);
      }
    UNROLL for (int f = 0; f < F; ++f) {
      float* y = to.y + filters[f] * to.plane;
      UNROLL for (int v = 0; v < V; ++v) {
        const Vec value = acc[f][v];
        if (to.stream)
          store_past_caches(y + pixels[v].target, value);
        else if (regular || pixels[v].mask == FULL)
          store(y + pixels[v].target, value);
        else
          store_first(y + pixels[v].target, compress(value, pixels[v].mask), pixels[v].spills ? LANES : pixels[v].count);
      }
    }
    return;
  }
  Vec sums[F][V];  // a copy, so that acc stays in registers on the path above
  UNROLL for (int f = 0; f < F; ++f) {
    UNROLL for (int v = 0; v < V; ++v) sums[f][v] = acc[f][v];
  }
  finish(to, pixels, V, filters, F, sums[0]);
}

// Filters that share their taps.
template <int F, int V>
static void look_up_together(const Lookup& to, const Pixels* pixels, bool regular, const int32_t* offsets,
                             const float* coefficients, int64_t width, int64_t taps, const int32_t* filters) {
  look_up<F, V>(to, pixels, regular, offsets, coefficients, width, taps, filters);
}

// Filters with taps of their own, one after the other.
template <int V>
static void look_up_alone(const Lookup& given, const Pixels* at, bool regular, const Block* blocks, int64_t count,
                          const int32_t* offsets, const float* coefficients, const int32_t* filters) {
  const Lookup to = given;  // copies, which no store can change
  Pixels pixels[V];
  UNROLL for (int v = 0; v < V; ++v) pixels[v] = at[v];
  for (const Block* block = blocks; block < blocks + count; ++block)
    look_up<1, V>(to, pixels, regular, offsets + block->first_tap, coefficients + block->coefficients, 1, block->taps,
                  filters + block->first_filter);
}

using Form = decltype(&form<1, 1>);
using LookUp = decltype(&look_up_together<1, 1>);
using LookUpAlone = decltype(&look_up_alone<1>);

// The kernels for every number of filters and vectors that fits the registers. Filled in a source file of its own, and so
// are the other tables of kernels: they take longest to compile, and can be compiled at the same time. All are constants: where a
// library holds several instruction sets, code that ran as it is loaded would be of sets that the processor may not have.
struct Kernels {
  Form form[FILTERS + 1][TILE + 1] = {};
  LookUp look_up[FILTERS + 1][TILE + 1] = {};
  LookUpAlone look_up_alone[TILE + 1] = {};

  constexpr Kernels();

 private:
  template <int F, int V>
  constexpr void fill() {
    if constexpr (F > 0) {
      form[F][V] = lcnn::form<F, V>;
      look_up[F][V] = look_up_together<F, V>;
      if constexpr (F == 1) look_up_alone[V] = lcnn::look_up_alone<V>;
      if constexpr (V > 1)
        fill<F, V - 1>();
      else
        fill<F - 1, vectors_for(F - 1)>();
    }
  }
};

extern const Kernels kernels;

}  // namespace lcnn

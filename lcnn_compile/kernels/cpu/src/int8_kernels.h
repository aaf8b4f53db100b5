// The micro-kernels of bytes: some filters that share their taps, at one vector of pixels, which is four vectors of sums.
#pragma once

#include "int8_weight.h"

namespace lcnn {

#if defined(__AVX512F__) || !defined(__AVX2__)
constexpr int BYTE_FILTERS = 8;
#else
constexpr int BYTE_FILTERS = 4;
#endif
constexpr int BOTH_HALVES = BYTE_FILTERS / 2;  // up to so many filters have room for all four vectors of sums

// Where quads of pixels come from: planes of S at the offsets of four taps, or channels that are packed so already.
struct TapPlanes {
  const uint8_t* s;
  const int32_t* offsets;
  template <int HALF>
  void operator()(int64_t q, Quad& first, Quad& second) const {
    const int32_t* const at = offsets + 4 * q;
    interleave_bytes<HALF>(load_bytes(s + at[0]), load_bytes(s + at[1]), load_bytes(s + at[2]), load_bytes(s + at[3]), first, second);
  }
};

struct PackedChannels {
  const Quad* quads;  // [quads][4]
  template <int HALF>
  void operator()(int64_t q, Quad& first, Quad& second) const {
    first = quads[4 * q + 2 * HALF];
    second = quads[4 * q + 2 * HALF + 1];
  }
};

// acc[f][2 * h + i] += sum over quads of coefficients[q][f] * pixels of half FIRST + h
template <int F, int FIRST, int COUNT, class Source>
static inline __attribute__((always_inline)) void accumulate_bytes(IntVec (&acc)[F][2 * COUNT], const Source& source, const Four* coefficients,
                                                                   int64_t width, int64_t quads) {
  for (int64_t q = 0; q < quads; ++q, coefficients += width) {
    Quad pixels[2 * COUNT];
    source.template operator()<FIRST>(q, pixels[0], pixels[1]);
    if constexpr (COUNT == 2) source.template operator()<1>(q, pixels[2], pixels[3]);
    UNROLL for (int f = 0; f < F; ++f) {
      UNROLL for (int v = 0; v < 2 * COUNT; ++v) acc[f][v] = add_products(acc[f][v], pixels[v], coefficients[f]);
    }
  }
}

static inline Vec to_floats(IntVec v) { return __builtin_convertvector(v, Vec); }
static inline IntVec splat_integer(int32_t value) { return value - IntVec{}; }

// Steps of one half of the pixels from their sums.
static inline Shorts steps_of(IntVec first, IntVec second, float factor) { return to_shorts(nearest(to_floats(first) * factor), nearest(to_floats(second) * factor)); }

// Calls `put(f, half, sums)` with pairs of vectors of sums of F filters at one vector of pixels: all of the lower half before those of
// the upper one, where registers are few.
template <int F, class Source, class Put>
static inline __attribute__((always_inline)) void sum_bytes(const int32_t (&starts)[F], const Source& source, const Four* coefficients, int64_t width,
                                                            int64_t quads, Put put) {
  if constexpr (F <= BOTH_HALVES) {
    IntVec acc[F][4];
    UNROLL for (int f = 0; f < F; ++f) UNROLL for (int v = 0; v < 4; ++v) acc[f][v] = splat_integer(starts[f]);
    accumulate_bytes<F, 0, 2>(acc, source, coefficients, width, quads);
    UNROLL for (int f = 0; f < F; ++f) {
      put(f, std::integral_constant<int, 0>(), acc[f][0], acc[f][1]);
      put(f, std::integral_constant<int, 1>(), acc[f][2], acc[f][3]);
    }
  } else {
    IntVec acc[F][2];
    UNROLL for (int f = 0; f < F; ++f) acc[f][0] = acc[f][1] = splat_integer(starts[f]);
    accumulate_bytes<F, 0, 1>(acc, source, coefficients, width, quads);
    UNROLL for (int f = 0; f < F; ++f) put(f, std::integral_constant<int, 0>(), acc[f][0], acc[f][1]);
    UNROLL for (int f = 0; f < F; ++f) acc[f][0] = acc[f][1] = splat_integer(starts[f]);
    accumulate_bytes<F, 1, 1>(acc, source, coefficients, width, quads);
    UNROLL for (int f = 0; f < F; ++f) put(f, std::integral_constant<int, 1>(), acc[f][0], acc[f][1]);
  }
}

// F rows of D at packed pixels, into F planes of S.
template <int F>
static void form_bytes(const Quad* packed, int64_t quads, const Four* rows, int64_t width, const int32_t* starts, const float* factors, uint8_t* s,
                       int64_t plane) {
  int32_t from[F];
  for (int f = 0; f < F; ++f) from[f] = starts[f];
  Shorts low[F];
  sum_bytes<F>(from, PackedChannels{packed}, rows, width, quads, [&](int f, auto half, IntVec first, IntVec second) {
    const Shorts steps = steps_of(first, second, factors[f]);
    if constexpr (half.value == 0)
      low[f] = steps;
    else
      store_bytes(s + f * plane, to_centred_bytes(low[f], steps));
  });
}

// Where the lookup stage reads and writes.
struct ByteLookup {
  const uint8_t* s;
  const void* residual;  // or null; laid out as y; bytes, or floats
  void* y;               // bytes, or floats
  int64_t plane;         // of y
  const ByteWeight& weight;
  int low, high;  // what clamps leave of the bytes
  bool plain;     // nothing but clamps, and perhaps a residual before or behind them, into bytes
  bool late;      // the residual comes behind a clamp, which ends at `six`
  float six;
};

// What becomes of sums that are not plain, one vector of pixels in their order after the other. Operations follow one another as in Python;
// none may be fused.
struct AnyFinish {
  const ByteFinish of;
  const Epilogue activate;

  explicit AnyFinish(const ByteFinish& finish) : of(finish), activate(finish.activation == RELU6 ? NONE : int(finish.activation), false) {}

  // `more`: of the residual, before its factor.
  Vec value(IntVec sums, float factor, Vec more) const {
    Vec v = to_floats(sums) * factor;
    if (of.has_residual) more = more * float(of.residual_factor);
    if (of.has_residual && !of.residual_last) v = v + more;
    if (of.activation != NONE) v = of.activation == RELU6 ? at_most(at_least(v, 0.0f), float(of.six)) : activate(v);
    return of.has_residual && of.residual_last ? v + more : v;
  }
  // 0 to 255
  IntVec steps(Vec v) const {
    v = v * float(of.step);
    v = v == v ? v : splat(0.0f);
    IntVec found = nearest(at_most(at_least(v, -1024.0f), 1024.0f)) + int32_t(of.zero);
    found = found < 0 ? IntVec{} : found;
    return found > 255 ? IntVec{} + 255 : found;
  }
};
typedef uint8_t FewBytes __attribute__((vector_size(LANES)));

// Sums in the order in which they come out become pixels in their order.
static inline void in_order(IntVec (&sums)[4]) {
#if defined(__AVX512F__)
  // Four by four of 128 bits, turned.
  const auto shuffled = [](IntVec a, IntVec b, auto order) { return _mm512_shuffle_i32x4((__m512i)a, (__m512i)b, order.value); };
  constexpr std::integral_constant<int, 0x44> low;
  constexpr std::integral_constant<int, 0xEE> high;
  constexpr std::integral_constant<int, 0x88> even;
  constexpr std::integral_constant<int, 0xDD> odd;
  const IntVec a = (IntVec)shuffled(sums[0], sums[1], low), b = (IntVec)shuffled(sums[2], sums[3], low);
  const IntVec c = (IntVec)shuffled(sums[0], sums[1], high), d = (IntVec)shuffled(sums[2], sums[3], high);
  sums[0] = (IntVec)shuffled(a, b, even), sums[1] = (IntVec)shuffled(a, b, odd);
  sums[2] = (IntVec)shuffled(c, d, even), sums[3] = (IntVec)shuffled(c, d, odd);
#else
  int32_t lanes[4][LANES], ordered[BYTES];
  std::memcpy(lanes, sums, sizeof lanes);
  for (int v = 0; v < 4; ++v)
    for (int i = 0; i < LANES / 4; ++i) std::memcpy(ordered + 16 * i + 4 * v, lanes[v] + 4 * i, 16);
  std::memcpy(sums, ordered, sizeof ordered);
#endif
}

// The way out for all that is not plain: sums as they come out, of which the pixels in `lanes` are written from `first` on.
static __attribute__((noinline)) void finish_any(const ByteLookup& to, int64_t first, const Lanes& lanes, int32_t filter, float factor, const IntVec* in) {
  const AnyFinish finish(to.weight.finish);
  const int64_t target = filter * to.plane + first;
  IntVec sums[4];
  std::memcpy(sums, in, sizeof sums);
  in_order(sums);
  Vec values[4], more[4] = {};
  if (finish.of.has_residual == 2) load_floats(static_cast<const float*>(to.residual) + target, more, lanes);
  if (finish.of.has_residual == 1) {
    alignas(64) uint8_t bytes[BYTES];
    store_bytes(bytes, load_valid(static_cast<const uint8_t*>(to.residual) + target, lanes, no_bytes()));
    UNROLL for (int v = 0; v < 4; ++v) {
      FewBytes few;
      std::memcpy(&few, bytes + v * LANES, sizeof few);
      more[v] = to_floats(__builtin_convertvector(few, IntVec) - int32_t(finish.of.residual_zero));
    }
  }
  UNROLL for (int v = 0; v < 4; ++v) values[v] = finish.value(sums[v], factor, more[v]);
  if (!finish.of.to_bytes) return store_floats(static_cast<float*>(to.y) + target, values, lanes);
  alignas(64) uint8_t bytes[BYTES];
  UNROLL for (int v = 0; v < 4; ++v) {
    const FewBytes few = __builtin_convertvector(finish.steps(values[v]), FewBytes);
    std::memcpy(bytes + v * LANES, &few, sizeof few);
  }
  store_valid(static_cast<uint8_t*>(to.y) + target, load_bytes(bytes), lanes);
}

// F filters that share their taps, and what belongs to them.
struct ByteFilters {
  const int32_t *offsets, *numbers, *bias;
  const float* factors;
  const Four* coefficients;
  int64_t width, quads;
};

// F filters at one vector of pixels.
template <int F, bool RESIDUAL, bool LATE>
static inline __attribute__((always_inline)) void look_up_plain(const ByteLookup& to, const BytePixels& p, const ByteFilters& of) {
  // Copies, which no store can change.
  const Lanes lanes = p.lanes;
  const int64_t plane = to.plane;
  const uint8_t* const residual = RESIDUAL ? static_cast<const uint8_t*>(to.residual) + p.target : nullptr;
  const int32_t residual_zero = int32_t(to.weight.finish.residual_zero);
  const float residual_factor = float(to.weight.finish.residual_factor);
  const int zero = int(to.weight.finish.zero), least = to.low, most = to.high;
  const float six = to.six;
  Shorts steps[2][F];
  int32_t starts[F];
  UNROLL for (int f = 0; f < F; ++f) starts[f] = of.bias[f];
  sum_bytes<F>(starts, TapPlanes{to.s + p.source, of.offsets}, of.coefficients, of.width, of.quads, [&](int f, auto half, IntVec first, IntVec second) {
    Vec a = to_floats(first) * of.factors[f], b = to_floats(second) * of.factors[f];
    if constexpr (LATE) {
      a = at_most(at_least(a, 0.0f), six);
      b = at_most(at_least(b, 0.0f), six);
    }
    if constexpr (RESIDUAL) {
      IntVec more, further;
      to_integers<half.value>(load_valid(residual + of.numbers[f] * plane, lanes, no_bytes()), more, further);
      a = a + to_floats(more - residual_zero) * residual_factor;
      b = b + to_floats(further - residual_zero) * residual_factor;
    }
    steps[half.value][f] = to_shorts(nearest(a), nearest(b));
  });
  if (zero) UNROLL for (int f = 0; f < F; ++f) {
      steps[0][f] = add_shorts(steps[0][f], zero);
      steps[1][f] = add_shorts(steps[1][f], zero);
    }
  Bytes y[F];
  UNROLL for (int f = 0; f < F; ++f) y[f] = to_bytes(steps[0][f], steps[1][f]);
  if (least > 0 || most < 255)
    UNROLL for (int f = 0; f < F; ++f) y[f] = smallest_bytes(largest_bytes(y[f], splat_byte(least)), splat_byte(most));
  uint8_t* const target = static_cast<uint8_t*>(to.y) + p.target;
  UNROLL for (int f = 0; f < F; ++f) store_valid(target + of.numbers[f] * plane, y[f], lanes);
}

template <int F>
static void look_up_bytes(const ByteLookup& to, const BytePixels& p, const ByteFilters& of) {
  if (to.plain && to.late) return look_up_plain<F, true, true>(to, p, of);
  if (to.plain && to.residual) return look_up_plain<F, true, false>(to, p, of);
  if (to.plain) return look_up_plain<F, false, false>(to, p, of);
  int32_t starts[F];
  for (int f = 0; f < F; ++f) starts[f] = of.bias[f];
  IntVec sums[F][4];
  sum_bytes<F>(starts, TapPlanes{to.s + p.source, of.offsets}, of.coefficients, of.width, of.quads, [&](int f, auto half, IntVec first, IntVec second) {
    sums[f][2 * half.value] = first;
    sums[f][2 * half.value + 1] = second;
  });
  for (int f = 0; f < F; ++f) {
    finish_any(to, p.target, p.lanes, of.numbers[f], of.factors[f], sums[f]);
  }
}

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
template <int F>
static void look_up_sixteen(const ByteLookup& to, const Sixteen& p, const ByteFilters& of) {
  const uint8_t* const s = to.s + p.source;
  const __m512i order = _mm512_load_si512(p.order);
  const auto two = [&](int32_t a, int32_t b) __attribute__((always_inline)) {
    const auto load = [&](int32_t at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s + at)); };
    return _mm512_inserti64x4(_mm512_castsi256_si512(load(a)), load(b), 1);
  };
  IntVec acc[F];
  UNROLL for (int f = 0; f < F; ++f) acc[f] = splat_integer(of.bias[f]);
  const Four* coefficients = of.coefficients;
  const int32_t* at = of.offsets;
  for (int64_t q = 0; q < of.quads; ++q, at += 4, coefficients += of.width) {
    const IntVec quad = (IntVec)_mm512_permutex2var_epi8(two(at[0], at[1]), order, two(at[2], at[3]));
    UNROLL for (int f = 0; f < F; ++f) acc[f] = add_products(acc[f], quad, coefficients[f]);
  }
  const __mmask16 lanes = __mmask16((1u << p.count) - 1);
  const ByteFinish finish = to.weight.finish;
  const int64_t plane = to.plane;
  if (!to.plain) {
    const AnyFinish any(finish);
    for (int f = 0; f < F; ++f) {
      const int64_t target = of.numbers[f] * plane + p.target;
      Vec more{};
      if (finish.has_residual == 2) more = (Vec)_mm512_maskz_loadu_ps(lanes, static_cast<const float*>(to.residual) + target);
      if (finish.has_residual == 1)
        more = to_floats((IntVec)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, static_cast<const uint8_t*>(to.residual) + target)) -
                         int32_t(finish.residual_zero));
      const Vec v = any.value(acc[f], of.factors[f], more);
      if (finish.to_bytes)
        _mm_mask_storeu_epi8(static_cast<uint8_t*>(to.y) + target, lanes, _mm512_cvtepi32_epi8((__m512i)any.steps(v)));
      else
        _mm512_mask_storeu_ps(static_cast<float*>(to.y) + target, lanes, (__m512)v);
    }
    return;
  }
  const IntVec least = splat_integer(to.low), most = splat_integer(to.high);
  const uint8_t* const residual = to.residual ? static_cast<const uint8_t*>(to.residual) + p.target : nullptr;
  uint8_t* const y = static_cast<uint8_t*>(to.y) + p.target;
  UNROLL for (int f = 0; f < F; ++f) {
    Vec v = to_floats(acc[f]) * of.factors[f];
    if (to.late) v = at_most(at_least(v, 0.0f), to.six);
    if (residual) {
      const IntVec more = (IntVec)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, residual + of.numbers[f] * plane));
      v = v + to_floats(more - int32_t(finish.residual_zero)) * float(finish.residual_factor);
    }
    const __m512i steps = _mm512_max_epi32((__m512i)(nearest(v) + int32_t(finish.zero)), (__m512i)least);
    _mm_mask_storeu_epi8(y + of.numbers[f] * plane, lanes, _mm512_cvtepi32_epi8(_mm512_min_epi32(steps, (__m512i)most)));
  }
}
#else
template <int F>
static void look_up_sixteen(const ByteLookup&, const Sixteen&, const ByteFilters&) {}
#endif

using FormBytes = decltype(&form_bytes<1>);
using LookUpBytes = decltype(&look_up_bytes<1>);
using LookUpSixteen = decltype(&look_up_sixteen<1>);

// The kernels for every number of filters that fits the registers.
struct ByteKernels {
  FormBytes form[BYTE_FILTERS + 1] = {};
  LookUpBytes look_up[BYTE_FILTERS + 1] = {};
  LookUpSixteen look_up_sixteen[BYTE_FILTERS + 1] = {};

  constexpr ByteKernels() { fill<BYTE_FILTERS>(); }

 private:
  template <int F>
  constexpr void fill() {
    if constexpr (F > 0) {
      form[F] = form_bytes<F>;
      look_up[F] = look_up_bytes<F>;
      look_up_sixteen[F] = lcnn::look_up_sixteen<F>;
      fill<F - 1>();
    }
  }
};

}  // namespace lcnn

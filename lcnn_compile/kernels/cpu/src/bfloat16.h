// The micro-kernels with bfloat16 operands and float32 sums. Operands come in pairs, two taps or two channels in a word,
// which AVX-512 BF16 multiplies and adds in one instruction. Elsewhere two multiply-adds take its place: right, not fast.
// They stand beside a matrix unit, for what it does not take, and are its measure in tests.
#pragma once

#include "narrow.h"

namespace lcnn {

typedef uint32_t Words __attribute__((vector_size(LANES * 4), may_alias));
typedef uint32_t UnalignedWords __attribute__((vector_size(LANES * 4), aligned(2), may_alias));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), may_alias));
typedef uint16_t UnalignedHalves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

static inline Words load_words(const void* from) { return *static_cast<const UnalignedWords*>(from); }
static inline void store_words(void* to, Words v) { *static_cast<UnalignedWords*>(to) = v; }
static inline void store_halves(uint16_t* to, Halves v) { *reinterpret_cast<UnalignedHalves*>(to) = v; }

// A float whose upper half is the nearest bfloat16, ties to even, NaN and infinity kept; the lower half is noise.
inline uint32_t rounded_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return value != value ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
}
inline uint32_t pair_of(float low, float high) { return rounded_bits(low) >> 16 | (rounded_bits(high) & 0xffff0000u); }
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float low_of(uint32_t pair) { return float_of(pair << 16); }
inline float high_of(uint32_t pair) { return float_of(pair & 0xffff0000u); }

static inline Words rounded_bits(Vec v) {
  const Words bits = (Words)v, is_nan = (Words)(v != v);
  return (is_nan & (bits | 0x400000)) | (~is_nan & (bits + 0x7fff + (bits >> 16 & 1)));
}

#if defined(__AVX512BF16__)
// acc + the products of both halves of s and of c
static inline Vec multiply_pairs(Vec acc, Words s, uint32_t c) {
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)s, (__m512bh)_mm512_set1_epi32(int(c)));
}
static inline Halves to_halves(Vec v) { return (Halves)_mm512_cvtneps_pbh((__m512)v); }
// Lane by lane, `low` in the lower halves and `high` in the upper ones.
static inline Words to_pairs(Vec low, Vec high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Words)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
#else
static inline Vec multiply_pairs(Vec acc, Words s, uint32_t c) {
  acc += (Vec)(s << 16) * low_of(c);
  acc += (Vec)(s & 0xffff0000u) * high_of(c);
  return acc;
}
static inline Halves to_halves(Vec v) { return __builtin_convertvector(rounded_bits(v) >> 16, Halves); }
static inline Words to_pairs(Vec low, Vec high) { return rounded_bits(low) >> 16 | (rounded_bits(high) & 0xffff0000u); }
#endif

// Two vectors of pixels of tap a and of tap b as pairs (a, b). Each 128 bits of them are taken apart by themselves: `low`
// and `high` hold the first and the second four pixels of every eight.
static inline void interleave(Words a, Words b, Words& low, Words& high) {
#if defined(__AVX512F__)
  low = (Words)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
  high = (Words)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  low = (Words)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b);
  high = (Words)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b);
#else
  typedef uint16_t Wide __attribute__((vector_size(LANES * 4)));
  low = (Words)__builtin_shufflevector((Wide)a, (Wide)b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = (Words)__builtin_shufflevector((Wide)a, (Wide)b, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
}

// Sums of `low` and `high` in the order of the pixels.
static inline void in_order(Vec low, Vec high, Vec& first, Vec& second) {
#if defined(__AVX512F__)
  first = __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  second = __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#elif defined(__AVX2__)
  first = __builtin_shufflevector(low, high, 0, 1, 2, 3, 8, 9, 10, 11);
  second = __builtin_shufflevector(low, high, 4, 5, 6, 7, 12, 13, 14, 15);
#else
  first = low;
  second = high;
#endif
}

// F rows of D at V vectors of pixels, into F planes of S. `pixels` [pairs of channels][pitch], `rows` [pairs][width].
template <int F, int V>
static void form_halves(const uint32_t* pixels, int64_t pitch, const uint32_t* rows, int64_t width, int64_t pairs,
                        const Pixels* at, uint16_t* s, int64_t plane) {
  Vec acc[F][V] = {};
  for (int64_t t = 0; t < pairs; ++t, pixels += pitch, rows += width) {
    Words x[V];
    UNROLL for (int v = 0; v < V; ++v) x[v] = load_words(pixels + v * LANES);
    UNROLL for (int f = 0; f < F; ++f) {
      UNROLL for (int v = 0; v < V; ++v) acc[f][v] = multiply_pairs(acc[f][v], x[v], rows[f]);
    }
  }
  UNROLL for (int f = 0; f < F; ++f) {
    UNROLL for (int v = 0; v < V; ++v) store_halves(s + f * plane + at[v].target, to_halves(acc[f][v]));
  }
}

// The way out of the lookup stage: as `finish` of float32, with residuals that come before the activation too.
static __attribute__((noinline)) void finish_halves(const Lookup& to, const Pixels* pixels, int vectors, const int32_t* filters,
                                                    int size, const Vec* sums) {
  for (int f = 0; f < size; ++f)
    for (int v = 0; v < vectors; ++v, ++sums) {
      const Pixels& p = pixels[v];
      if (!p.count) continue;
      const int64_t target = filters[f] * to.plane + p.target;
      Vec y = p.mask == FULL ? *sums : compress(*sums, p.mask);
      if (to.residual && !to.epilogue.residual_last) y += load_first(to.residual + target, p.count);
      y = to.epilogue(y);
      if (to.residual && to.epilogue.residual_last) y += load_first(to.residual + target, p.count);
      if (to.stream)
        store_past_caches(to.y + target, y);
      else
        store_first(to.y + target, y, p.count);
    }
}

// F filters at V times two vectors of pixels. `coefficients` [pairs of taps][width]; an odd last tap is paired with zeros.
template <int F, int V>
static void look_up_halves(const Lookup& to, const uint16_t* s, const Pixels* pixels, const int32_t* offsets,
                           const uint32_t* coefficients, int64_t width, int64_t taps, const int32_t* filters) {
  const uint16_t* base[V];
  UNROLL for (int v = 0; v < V; ++v) base[v] = s + pixels[2 * v].source;
  Vec acc[F][2 * V];
  UNROLL for (int f = 0; f < F; ++f) {
    const Vec start = splat(to.bias ? to.bias[filters[f]] : 0.0f);
    UNROLL for (int v = 0; v < 2 * V; ++v) acc[f][v] = start;
  }
  int64_t t = 0;
  for (; t + 2 <= taps; t += 2, coefficients += width) {
    const int64_t a = offsets[t], b = offsets[t + 1];
    Words pair[2 * V];
    UNROLL for (int v = 0; v < V; ++v)
        interleave(load_words(base[v] + a), load_words(base[v] + b), pair[2 * v], pair[2 * v + 1]);
    UNROLL for (int f = 0; f < F; ++f) {
      UNROLL for (int v = 0; v < 2 * V; ++v) acc[f][v] = multiply_pairs(acc[f][v], pair[v], coefficients[f]);
    }
  }
  if (t < taps) {
    Words pair[2 * V];
    UNROLL for (int v = 0; v < V; ++v) interleave(load_words(base[v] + offsets[t]), Words{}, pair[2 * v], pair[2 * v + 1]);
    UNROLL for (int f = 0; f < F; ++f) {
      UNROLL for (int v = 0; v < 2 * V; ++v) acc[f][v] = multiply_pairs(acc[f][v], pair[v], coefficients[f]);
    }
  }
  Vec sums[F][2 * V];  // a copy, so that acc stays in registers
  UNROLL for (int f = 0; f < F; ++f) {
    UNROLL for (int v = 0; v < V; ++v) in_order(acc[f][2 * v], acc[f][2 * v + 1], sums[f][2 * v], sums[f][2 * v + 1]);
  }
  finish_halves(to, pixels, 2 * V, filters, F, sums[0]);
}

// Vectors of pixels, in twos, that fit the registers beside the operands.
constexpr int twos_for(int filters) { return vectors_for(filters) > 3 ? vectors_for(filters) / 2 : 1; }

using FormHalves = decltype(&form_halves<1, 1>);
using LookUpHalves = decltype(&look_up_halves<1, 1>);

// The kernels for every number of filters and vectors that fits the registers.
struct HalfKernels {
  FormHalves form[FILTERS + 1][TILE + 1] = {};
  LookUpHalves look_up[FILTERS + 1][TILE / 2 + 1] = {};

  constexpr HalfKernels();

 private:
  template <int F, int V>
  constexpr void fill() {
    if constexpr (F > 0) {
      form[F][V] = form_halves<F, V>;
      if constexpr (V <= twos_for(F)) look_up[F][V] = look_up_halves<F, V>;
      if constexpr (V > 1)
        fill<F, V - 1>();
      else
        fill<F - 1, vectors_for(F - 1)>();
    }
  }
};

// Pairs of bfloat16 coefficients [pairs of taps][F]; values stay in float32: memory is what bounds it.
struct Pairs {
  using Coefficient = uint32_t;

  // Products of a pair of coefficients for each of F filters with two values; lanes that are too many are read and left alone.
  template <int F>
  static inline void add(Sums<F>& low, Sums<F>& high, const uint32_t* pairs, float a, float b) {
    using Type = typename Sums<F>::Width::Type;
    typedef uint32_t Words __attribute__((vector_size(sizeof(Type)), may_alias));
    typedef uint32_t Unaligned __attribute__((vector_size(sizeof(Type)), aligned(4), may_alias));
    const Words words = *reinterpret_cast<const Unaligned*>(pairs);
    low.at += (Type)(words << 16) * a;
    high.at += (Type)(words & 0xffff0000u) * b;
  }

  template <int F, int P, int TURNS, class Offsets>
  static inline __attribute__((always_inline)) void accumulate(Sums<F> (&acc)[TURNS][P], const float* const (&base)[P],
                                                               Offsets offsets, const uint32_t* pairs, int64_t taps) {
    int64_t t = 0;
    for (; t + TURNS <= taps; t += TURNS)
      UNROLL for (int turn = 0; turn < TURNS; turn += 2, pairs += F) {
        const int64_t a = offsets[t + turn], b = offsets[t + turn + 1];
        UNROLL for (int p = 0; p < P; ++p) add<F>(acc[turn][p], acc[turn + 1][p], pairs, base[p][a], base[p][b]);
      }
    for (; t < taps; t += 2, pairs += F) {
      const bool both = t + 1 < taps;
      UNROLL for (int p = 0; p < P; ++p)
          add<F>(acc[0][p], acc[1][p], pairs, base[p][offsets[t]], both ? base[p][offsets[t + 1]] : 0.0f);
    }
  }
};

extern const HalfKernels half_kernels;
extern const NarrowKernels<Pairs, Channels> narrow_form_pairs;
extern const NarrowKernels<Pairs, const int32_t*> narrow_look_up_pairs;

}  // namespace lcnn

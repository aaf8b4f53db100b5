// Vectors of the instruction set this is compiled for, written with GCC's vector types so that one source serves
// AVX-512, AVX2, NEON and whatever else the compiler can lower them to.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lcnn {

inline int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// LANES floats per vector; FILTERS x VECTORS(FILTERS) accumulators must fit the registers beside the operands; so
// many filters take part where there are `vectors` of pixels.
#if defined(__AVX512F__)
constexpr int LANES = 16, FILTERS = 8;
constexpr int vectors_for(int filters) { return filters > 6 ? 3 : filters > 4 ? 4 : 6; }
constexpr int filters_for(int64_t) { return FILTERS; }
#elif defined(__AVX2__)
constexpr int LANES = 8, FILTERS = 8;
constexpr int vectors_for(int filters) { return filters > 4 ? 1 : filters > 2 ? 3 : filters > 1 ? 4 : 6; }
constexpr int filters_for(int64_t vectors) { return vectors > 1 ? 4 : FILTERS; }
#elif defined(__aarch64__)
constexpr int LANES = 4, FILTERS = 8;
constexpr int vectors_for(int filters) { return filters > 6 ? 3 : filters > 4 ? 4 : 6; }
constexpr int filters_for(int64_t) { return FILTERS; }
#else
constexpr int LANES = 4, FILTERS = 4;
constexpr int vectors_for(int filters) { return filters > 2 ? 2 : filters > 1 ? 4 : 6; }
constexpr int filters_for(int64_t) { return FILTERS; }
#endif

constexpr int BYTES = 4 * LANES;  // of a vector

// Words per pixel in which four bytes lie that are multiplied at once: themselves, or wider where nothing multiplies bytes.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int QUAD_WORDS = 1;
#elif defined(__AVX2__)
constexpr int QUAD_WORDS = 2;
#else
constexpr int QUAD_WORDS = 4;
#endif

#define UNROLL _Pragma("GCC unroll 16")

constexpr uint32_t FULL = (1u << LANES) - 1;

typedef float Vec __attribute__((vector_size(LANES * 4), may_alias));
typedef float UnalignedVec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4), may_alias));

static inline Vec load(const float* from) { return *reinterpret_cast<const UnalignedVec*>(from); }
static inline void store(float* to, Vec v) { *reinterpret_cast<UnalignedVec*>(to) = v; }
static inline Vec splat(float value) { return value - Vec{}; }

// A full aligned vector to memory that nobody reads soon.
static inline void store_past_caches(float* to, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, (__m256)v);
#else
  store(to, v);
#endif
}

// Makes stores past the caches visible to other threads.
static inline void fence() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each mask, the lane that every lane of the result comes from, a byte each; negative for none.
struct LaneTables {
  int8_t packed[256][8] = {}, spread[256][8] = {};

  constexpr LaneTables() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int lane = 0; lane < 8; ++lane) packed[mask][lane] = -1;
      for (int lane = 0; lane < 8; ++lane) {
        const bool valid = mask >> lane & 1;
        spread[mask][lane] = valid ? int8_t(next) : int8_t(-1);
        if (valid) packed[mask][next++] = int8_t(lane);
      }
    }
  }
};
inline constexpr LaneTables lane_tables;

static inline Vec permute(Vec v, const int8_t (&lanes)[8]) {
  const __m256i from = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(lanes)));
  return (Vec)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)v, from), _mm256_setzero_ps(), (__m256)from);
}
#endif

// The first `count` lanes from memory, zeros behind them; never reads past them.
static inline Vec load_first(const float* from, int count) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps((1u << count) - 1, from);
#elif defined(__AVX2__)
  if (count == LANES) return load(from);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return (Vec)_mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
#else
  if (count == LANES) return load(from);
  Vec v{};
  std::memcpy(&v, from, sizeof(float) * count);
  return v;
#endif
}

static inline void store_first(float* to, Vec v, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)v);
#elif defined(__AVX2__)
  // Masked stores are microcode on some processors.
  if (count == LANES) return store(to, v);
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (count & 4) {
    _mm_storeu_ps(to, part);
    part = _mm256_extractf128_ps((__m256)v, 1);
    to += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(to), part);
    part = _mm_movehl_ps(part, part);
    to += 2;
  }
  if (count & 1) _mm_store_ss(to, part);
#else
  if (count == LANES) return store(to, v);
  std::memcpy(to, &v, sizeof(float) * count);
#endif
}

// The lanes of `mask` moved together to the front.
static inline Vec compress(Vec v, uint32_t mask) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_compress_ps(mask, (__m512)v);
#elif defined(__AVX2__)
  return permute(v, lane_tables.packed[mask]);
#else
  Vec packed{};
  for (int lane = 0, next = 0; lane < LANES; ++lane)
    if (mask >> lane & 1) packed[next++] = v[lane];
  return packed;
#endif
}

// The inverse: the front lanes moved to the lanes of `mask`, zeros elsewhere.
static inline Vec expand(Vec v, uint32_t mask) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_expand_ps(mask, (__m512)v);
#elif defined(__AVX2__)
  return permute(v, lane_tables.spread[mask]);
#else
  Vec spread{};
  for (int lane = 0, next = 0; lane < LANES; ++lane)
    if (mask >> lane & 1) spread[lane] = v[next++];
  return spread;
#endif
}

// Lanes 0, 2, 4, ... of both, in order.
static inline Vec even_lanes(Vec low, Vec high) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif defined(__AVX2__)
  return __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return __builtin_shufflevector(low, high, 0, 2, 4, 6);
#endif
}

// Lanes 1, 3, 5, ... of both, in order.
static inline Vec odd_lanes(Vec low, Vec high) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(low, high, 1, 3, 5, 7);
#endif
}

// Both keep NaN, as torch does.
static inline Vec at_least(Vec v, float low) { return v < low ? splat(low) : v; }
static inline Vec at_most(Vec v, float high) { return v > high ? splat(high) : v; }

// exp within 2 ulp on [-87, 88], constant outside.
static inline Vec exponential(Vec x) {
  x = at_most(at_least(x, -87.0f), 88.0f);
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  Vec n = (x * 1.44269504f + shift) - shift;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  IntVec scale = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return p * (Vec)scale;
}

}  // namespace lcnn

// Vectors of bytes: four taps of a pixel side by side, multiplied by four coefficients at once, and back to bytes.
//
// A vector holds BYTES pixels of one plane. Four planes make four vectors of quads, each with LANES pixels: of every 16 pixels the
// first four in the first vector, and so on. Sums come out in that order, and packing them undoes it.
#pragma once

#include <algorithm>

#include "vector.h"

namespace lcnn {

constexpr uint64_t ALL_BYTES = BYTES == 64 ? ~uint64_t(0) : (uint64_t(1) << (BYTES % 64)) - 1;


// Four signed coefficients as they are multiplied: bytes, or 16 bits each.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
using Four = uint32_t;
inline Four four_of(const int8_t (&c)[4]) {
  return uint32_t(uint8_t(c[0])) | uint32_t(uint8_t(c[1])) << 8 | uint32_t(uint8_t(c[2])) << 16 | uint32_t(uint8_t(c[3])) << 24;
}
#else
struct Four {
  int16_t at[4];
};
inline Four four_of(const int8_t (&c)[4]) { return {{c[0], c[1], c[2], c[3]}}; }
#endif

#if defined(__AVX512BW__)
typedef __m512i Bytes;
#define BYTES_OF(name) _mm512_##name
static inline Bytes no_bytes() { return _mm512_setzero_si512(); }
static inline Bytes load_bytes(const uint8_t* from) { return _mm512_loadu_si512(from); }
static inline void store_bytes(uint8_t* to, Bytes v) { _mm512_storeu_si512(to, v); }
static inline IntVec nearest(Vec v) { return (IntVec)_mm512_cvtps_epi32((__m512)v); }
#elif defined(__AVX2__)
typedef __m256i Bytes;
#define BYTES_OF(name) _mm256_##name
static inline Bytes no_bytes() { return _mm256_setzero_si256(); }
static inline Bytes load_bytes(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
static inline void store_bytes(uint8_t* to, Bytes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }
static inline IntVec nearest(Vec v) { return (IntVec)_mm256_cvtps_epi32((__m256)v); }
#endif

#if defined(BYTES_OF)
static inline Bytes splat_byte(int value) { return BYTES_OF(set1_epi8)(char(value)); }
static inline Bytes largest_bytes(Bytes a, Bytes b) { return BYTES_OF(max_epu8)(a, b); }
static inline Bytes smallest_bytes(Bytes a, Bytes b) { return BYTES_OF(min_epu8)(a, b); }

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
typedef IntVec Quad;
// Half of the quads of four planes: those of eight pixels of every 16.
template <int HALF>
static inline void interleave_bytes(Bytes a, Bytes b, Bytes c, Bytes d, Quad& first, Quad& second) {
  const Bytes ab = HALF ? BYTES_OF(unpackhi_epi8)(a, b) : BYTES_OF(unpacklo_epi8)(a, b);
  const Bytes cd = HALF ? BYTES_OF(unpackhi_epi8)(c, d) : BYTES_OF(unpacklo_epi8)(c, d);
  first = (IntVec)BYTES_OF(unpacklo_epi16)(ab, cd);
  second = (IntVec)BYTES_OF(unpackhi_epi16)(ab, cd);
}
static inline IntVec add_products(IntVec sums, const Quad& quad, Four c) {
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)quad, _mm512_set1_epi32(int(c)));
#else
  return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)quad, _mm256_set1_epi32(int(c)));
#endif
}
#else
// Products of bytes overflow 16 bits in pairs: both are widened first.
struct Quad {
  Bytes ab, cd;
};
template <int HALF>
static inline void interleave_bytes(Bytes a, Bytes b, Bytes c, Bytes d, Quad& first, Quad& second) {
  const Bytes ab = HALF ? BYTES_OF(unpackhi_epi8)(a, b) : BYTES_OF(unpacklo_epi8)(a, b);
  const Bytes cd = HALF ? BYTES_OF(unpackhi_epi8)(c, d) : BYTES_OF(unpacklo_epi8)(c, d);
  first = {BYTES_OF(unpacklo_epi8)(ab, no_bytes()), BYTES_OF(unpacklo_epi8)(cd, no_bytes())};
  second = {BYTES_OF(unpackhi_epi8)(ab, no_bytes()), BYTES_OF(unpackhi_epi8)(cd, no_bytes())};
}
static inline IntVec add_products(IntVec sums, const Quad& quad, const Four& c) {
  int32_t low, high;
  std::memcpy(&low, c.at, 4);
  std::memcpy(&high, c.at + 2, 4);
  return sums + (IntVec)BYTES_OF(madd_epi16)(quad.ab, BYTES_OF(set1_epi32)(low)) + (IntVec)BYTES_OF(madd_epi16)(quad.cd, BYTES_OF(set1_epi32)(high));
}
#endif

typedef Bytes Shorts;
static inline Shorts to_shorts(IntVec first, IntVec second) { return BYTES_OF(packs_epi32)((Bytes)first, (Bytes)second); }
static inline Shorts add_shorts(Shorts v, int value) { return BYTES_OF(adds_epi16)(v, BYTES_OF(set1_epi16)(short(value))); }
static inline Bytes to_bytes(Shorts low, Shorts high) { return BYTES_OF(packus_epi16)(low, high); }
// Bytes about 128.
static inline Bytes to_centred_bytes(Shorts low, Shorts high) { return BYTES_OF(packs_epi16)(low, high) ^ splat_byte(128); }
template <int HALF>
static inline void to_integers(Bytes v, IntVec& first, IntVec& second) {
  const Bytes wide = HALF ? BYTES_OF(unpackhi_epi8)(v, no_bytes()) : BYTES_OF(unpacklo_epi8)(v, no_bytes());
  first = (IntVec)BYTES_OF(unpacklo_epi16)(wide, no_bytes());
  second = (IntVec)BYTES_OF(unpackhi_epi16)(wide, no_bytes());
}

#else  // whatever the compiler makes of 16 bytes

typedef uint8_t Bytes __attribute__((vector_size(BYTES), may_alias));
typedef uint8_t UnalignedBytes __attribute__((vector_size(BYTES), aligned(1), may_alias));
typedef int16_t Shorts __attribute__((vector_size(16)));
static inline Bytes load_bytes(const uint8_t* from) { return *reinterpret_cast<const UnalignedBytes*>(from); }
static inline void store_bytes(uint8_t* to, Bytes v) { *reinterpret_cast<UnalignedBytes*>(to) = v; }
static inline Bytes splat_byte(int value) { return uint8_t(value) - Bytes{}; }
static inline Bytes largest_bytes(Bytes a, Bytes b) { return a > b ? a : b; }
static inline Bytes smallest_bytes(Bytes a, Bytes b) { return a < b ? a : b; }
static inline Bytes no_bytes() { return Bytes{}; }

// Saturates: what is out of its reach is out of the reach of bytes.
static inline IntVec nearest(Vec v) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  v = (at_most(at_least(v, -32768.0f), 32767.0f) + shift) - shift;
  return __builtin_convertvector(v, IntVec);
}

template <int FIRST>
static inline IntVec integers_of(Bytes v) {
  const uint8_t four[4] = {v[FIRST], v[FIRST + 1], v[FIRST + 2], v[FIRST + 3]};
  return IntVec{four[0], four[1], four[2], four[3]};
}
template <int HALF>
static inline void to_integers(Bytes v, IntVec& first, IntVec& second) {
  first = integers_of<8 * HALF>(v);
  second = integers_of<8 * HALF + 4>(v);
}

struct Quad {
  IntVec a, b, c, d;
};
template <int HALF>
static inline void interleave_bytes(Bytes a, Bytes b, Bytes c, Bytes d, Quad& first, Quad& second) {
  to_integers<HALF>(a, first.a, second.a);
  to_integers<HALF>(b, first.b, second.b);
  to_integers<HALF>(c, first.c, second.c);
  to_integers<HALF>(d, first.d, second.d);
}
static inline IntVec add_products(IntVec sums, const Quad& quad, const Four& c) {
  return sums + quad.a * int32_t(c.at[0]) + quad.b * int32_t(c.at[1]) + quad.c * int32_t(c.at[2]) + quad.d * int32_t(c.at[3]);
}

// Both of integers within 16 bits, which `nearest` gives.
static inline Shorts to_shorts(IntVec first, IntVec second) {
  return Shorts{int16_t(first[0]),  int16_t(first[1]),  int16_t(first[2]),  int16_t(first[3]),
                int16_t(second[0]), int16_t(second[1]), int16_t(second[2]), int16_t(second[3])};
}
static inline Shorts add_shorts(Shorts v, int value) {
  for (int i = 0; i < 8; ++i) v[i] = int16_t(v[i] + value > 32767 ? 32767 : v[i] + value);
  return v;
}
static inline Bytes to_bytes(Shorts low, Shorts high) {
  Bytes v{};
  for (int i = 0; i < 16; ++i) {
    const int value = i < 8 ? low[i] : high[i - 8];
    v[i] = uint8_t(value < 0 ? 0 : value > 255 ? 255 : value);
  }
  return v;
}
static inline Bytes to_centred_bytes(Shorts low, Shorts high) { return to_bytes(add_shorts(low, 128), add_shorts(high, 128)); }
#endif

// The valid lanes of a vector, which lie one after the other in memory, and the runs of them.
struct Lanes {
  uint64_t mask = 0;
  int count = 0, runs = 0;
  uint64_t run[2] = {};   // the first two
  int64_t shift[2] = {};  // from lane to place

  // Lanes [begin, end), behind all others.
  void add(int64_t begin, int64_t end) {
    if (end <= begin) return;
    const uint64_t lanes = (~uint64_t(0) >> (64 - (end - begin))) << begin;
    const bool goes_on = runs && mask >> (begin - 1) & 1;
    if (!goes_on) ++runs;
    if (runs <= 2) run[runs - 1] |= lanes;
    if (runs <= 2 && !goes_on) shift[runs - 1] = count - begin;
    mask |= lanes;
    count += int(end - begin);
  }
};

// Calls `each(lane, place, length)` for all runs.
template <class Each>
static inline void for_runs(uint64_t mask, Each each) {
  for (int place = 0; mask;) {
    const int lane = __builtin_ctzll(mask);
    const uint64_t left = ~(mask >> lane);
    const int length = left ? __builtin_ctzll(left) : 64;
    each(lane, place, length);
    place += length;
    mask &= ~((~uint64_t(0) >> (64 - length)) << lane);
  }
}

// The valid lanes to memory.
static inline void store_valid(uint8_t* to, Bytes v, const Lanes& lanes) {
  if (lanes.mask == ALL_BYTES) return store_bytes(to, v);
#if defined(__AVX512BW__)
  if (lanes.runs <= 2) {
    _mm512_mask_storeu_epi8(to + lanes.shift[0], lanes.run[0], v);
    if (lanes.runs == 2) _mm512_mask_storeu_epi8(to + lanes.shift[1], lanes.run[1], v);
    return;
  }
#endif
#if defined(__AVX512VBMI2__)
  _mm512_mask_storeu_epi8(to, ~uint64_t(0) >> (64 - lanes.count), _mm512_maskz_compress_epi8(lanes.mask, v));
#elif defined(__AVX512BW__)
  for_runs(lanes.mask, [&](int lane, int place, int length) {
    _mm512_mask_storeu_epi8(to + place - lane, (~uint64_t(0) >> (64 - length)) << lane, v);
  });
#else
  alignas(BYTES) uint8_t bytes[BYTES];
  store_bytes(bytes, v);
  for_runs(lanes.mask, [&](int lane, int place, int length) { std::memcpy(to + place, bytes + lane, length); });
#endif
}

// The inverse: from memory to the valid lanes, `fill` elsewhere.
static inline Bytes load_valid(const uint8_t* from, const Lanes& lanes, Bytes fill) {
  if (lanes.mask == ALL_BYTES) return load_bytes(from);
#if defined(__AVX512BW__)
  if (lanes.runs <= 2) {
    if (lanes.runs) fill = _mm512_mask_loadu_epi8(fill, lanes.run[0], from + lanes.shift[0]);
    return lanes.runs == 2 ? _mm512_mask_loadu_epi8(fill, lanes.run[1], from + lanes.shift[1]) : fill;
  }
#endif
#if defined(__AVX512VBMI2__)
  return _mm512_mask_expand_epi8(fill, lanes.mask, _mm512_maskz_loadu_epi8(~uint64_t(0) >> (64 - lanes.count), from));
#elif defined(__AVX512BW__)
  for_runs(lanes.mask, [&](int lane, int place, int length) {
    fill = _mm512_mask_loadu_epi8(fill, (~uint64_t(0) >> (64 - length)) << lane, from + place - lane);
  });
  return fill;
#else
  alignas(BYTES) uint8_t bytes[BYTES];
  store_bytes(bytes, fill);
  for_runs(lanes.mask, [&](int lane, int place, int length) { std::memcpy(bytes + lane, from + place, length); });
  return load_bytes(bytes);
#endif
}

constexpr int HALF_BYTES = BYTES / 2;
typedef uint8_t Half __attribute__((vector_size(HALF_BYTES), may_alias));
typedef uint16_t Pairs16 __attribute__((vector_size(BYTES), may_alias));
typedef uint16_t UnalignedPairs __attribute__((vector_size(BYTES), aligned(1), may_alias));

// Bytes 0, 2, 4, ... from `from` on, one to a word of 16 bits.
static inline Pairs16 even_bytes(const uint8_t* from) { return *reinterpret_cast<const UnalignedPairs*>(from) & uint16_t(255); }

// `length` bytes that lie `step` apart.
static inline void copy_spread_bytes(uint8_t* to, const uint8_t* from, int64_t length, int64_t step) {
  int64_t i = 0;
  if (step == 1) {
#if defined(__AVX512BW__)
    for (; i < length; i += BYTES) {
      const __mmask64 mask = ~uint64_t(0) >> (64 - std::min<int64_t>(BYTES, length - i));
      _mm512_mask_storeu_epi8(to + i, mask, _mm512_maskz_loadu_epi8(mask, from + i));
    }
#else
    std::memcpy(to, from, size_t(length));
#endif
    return;
  }
  if (step == 2) {
#if defined(__AVX512BW__)
    for (; i < length; i += HALF_BYTES) {
      const int64_t left = std::min<int64_t>(HALF_BYTES, length - i);
      const __m512i both = _mm512_maskz_loadu_epi8(~uint64_t(0) >> (65 - 2 * left), from + 2 * i);
      _mm512_mask_storeu_epi8(to + i, ~uint64_t(0) >> (64 - left), _mm512_castsi256_si512(_mm512_cvtepi16_epi8(both)));
    }
#else
    // The last byte of a vector lies behind the last one that is wanted.
    for (; i + HALF_BYTES < length; i += HALF_BYTES) {
      const Half bytes = __builtin_convertvector(even_bytes(from + 2 * i), Half);
      std::memcpy(to + i, &bytes, HALF_BYTES);
    }
#endif
  }
  for (; i < length; ++i) to[i] = from[i * step];
}

// The valid lanes of a vector's floats to memory, where they lie one after the other.
static inline void store_floats(float* to, const Vec (&v)[4], const Lanes& lanes) {
#if defined(__AVX512F__)
  uint64_t mask = lanes.mask;
  UNROLL for (int i = 0; i < 4; ++i, mask >>= LANES) {
    const __mmask16 own = __mmask16(mask);
    const int count = __builtin_popcount(own);
    _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), _mm512_maskz_compress_ps(own, (__m512)v[i]));
    to += count;
  }
#else
  alignas(64) float floats[BYTES];
  std::memcpy(floats, v, sizeof floats);
  for_runs(lanes.mask, [&](int lane, int place, int length) { std::memcpy(to + place, floats + lane, sizeof(float) * length); });
#endif
}

// The inverse; zeros elsewhere.
static inline void load_floats(const float* from, Vec (&v)[4], const Lanes& lanes) {
#if defined(__AVX512F__)
  uint64_t mask = lanes.mask;
  UNROLL for (int i = 0; i < 4; ++i, mask >>= LANES) {
    const __mmask16 own = __mmask16(mask);
    const int count = __builtin_popcount(own);
    v[i] = (Vec)_mm512_maskz_expand_ps(own, _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from));
    from += count;
  }
#else
  alignas(64) float floats[BYTES] = {};
  for_runs(lanes.mask, [&](int lane, int place, int length) { std::memcpy(floats + lane, from + place, sizeof(float) * length); });
  std::memcpy(v, floats, sizeof floats);
#endif
}

}  // namespace lcnn

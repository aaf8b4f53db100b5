// Functions of vectors of floats, within a few units in the last place of the exact ones over the whole range; NaN stays NaN.
//
// Polynomials were fitted to the functions in float64 (least squares, reweighted towards the least largest error).
#pragma once

#include <cmath>
#include <limits>

#include "vector.h"

namespace lcnn {

template <int N>
static inline Vec polynomial(const float (&c)[N], Vec x) {
  Vec p = splat(c[N - 1]);
  UNROLL for (int i = N - 2; i >= 0; --i) p = p * x + c[i];
  return p;
}

static inline Vec choose(IntVec mask, Vec yes, Vec no) { return mask ? yes : no; }
static inline Vec absolute(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }
static inline Vec with_sign_of(Vec magnitude, Vec sign) { return (Vec)((IntVec)magnitude | ((IntVec)sign & int32_t(0x80000000))); }

static inline Vec square_root(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  for (int lane = 0; lane < LANES; ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
#endif
}

// x = n·log 2 + r; exp(r) - 1 and n.
struct Exponent {
  Vec rest;
  IntVec n;
};

static inline Exponent exponent_of(Vec x) {
  x = at_most(at_least(x, -105.0f), 89.0f);
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Vec n = (x * 1.44269504f + shift) - shift;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  static const float c[] = {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f, 8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
  return {polynomial(c, r) * (r * r) + r, __builtin_convertvector(n, IntVec)};
}

static inline Vec power_of_two(IntVec n) { return (Vec)((n + 127) << 23); }

// Infinite above 88.7, denormal and zero below -87.3.
static inline Vec full_exponential(Vec x) {
  const Exponent e = exponent_of(x);
  const IntVec half = e.n >> 1;  // in two steps: the scale itself may be out of range
  return (e.rest + 1.0f) * power_of_two(half) * power_of_two(e.n - half);
}

// exp(x) - 1 for x up to 88.
static inline Vec exponential_less_one(Vec x) {
  const Exponent e = exponent_of(at_most(at_least(x, -87.0f), 88.0f));
  const Vec scale = power_of_two(e.n);
  return scale * e.rest + (scale - 1.0f);
}

static inline Vec logarithm(Vec x) {
  const IntVec tiny = x < 1.17549435e-38f;
  const Vec scaled = choose(x > 0.0f, choose(tiny, x * 8388608.0f, x), splat(1.0f));
  IntVec bits = (IntVec)scaled;
  // The mantissa between sqrt(1/2) and sqrt(2).
  const IntVec up = (bits - 0x3f3504f3) >> 23;
  bits -= up << 23;
  const Vec n = __builtin_convertvector(up, Vec) - choose(tiny, splat(23.0f), splat(0.0f));
  const Vec r = (Vec)bits - 1.0f;
  static const float c[] = {3.333331679e-01f, -2.500079666e-01f, 2.000228169e-01f, -1.662496607e-01f,
                            1.418143844e-01f, -1.312535017e-01f, 1.287908992e-01f, -7.865165157e-02f};
  const Vec low = polynomial(c, r) * (r * r * r) - 0.5f * (r * r) - n * 2.12194440e-4f;
  Vec y = (r + low) + n * 0.693359375f;
  const float inf = std::numeric_limits<float>::infinity();
  y = choose(x == inf, x, y);
  y = choose(x == 0.0f, splat(-inf), y);
  return choose((x < 0.0f) | (x != x), splat(std::numeric_limits<float>::quiet_NaN()), y);
}

// log(1 + x) for finite x of at least 0.
static inline Vec logarithm_of_one_more(Vec x) {
  const Vec v = x + 1.0f, less = v - 1.0f;
  return choose(less == 0.0f, x, logarithm(v) * (x / choose(less == 0.0f, splat(1.0f), less)));
}

static inline Vec sigmoid(Vec x) { return 1.0f / (full_exponential(-x) + 1.0f); }

static inline Vec hyperbolic_tangent(Vec x) {
  const Vec z = x * x, a = absolute(x);
  static const float c[] = {-3.333325545e-01f, 1.333099678e-01f, -5.370983194e-02f, 2.055280346e-02f, -5.615586768e-03f};
  const Vec small = x + x * z * polynomial(c, z);
  const Vec large = 1.0f - 2.0f / (full_exponential(a + a) + 1.0f);
  return choose(a < 0.625f, small, with_sign_of(large, x));
}

static inline Vec error_function(Vec x) {
  const Vec z = x * x, a = absolute(x);
  static const float near[] = {1.128379167e+00f, -3.761263848e-01f, 1.128378275e-01f, -2.686544581e-02f,
                               5.221074847e-03f, -8.484710998e-04f, 1.127054120e-04f, -9.680127002e-06f};
  // erfc(a)·exp(a²) in 1 / (1 + a / 2)
  static const float far[] = {-1.480232003e-04f, 2.848227380e-01f, 2.602439812e-01f, 3.459031937e-01f,
                              -9.975091550e-02f, 5.585987454e-01f, -4.680874984e-01f, 1.184671377e-01f};
  const Vec bounded = at_most(a, 4.2f), t = 1.0f / (1.0f + 0.5f * bounded);
  const Vec large = 1.0f - polynomial(far, t) * full_exponential(-(bounded * bounded));
  return choose(a < 1.0f, x * polynomial(near, z), with_sign_of(large, x));
}

}  // namespace lcnn

// Where pixels are too few to fill vectors (a fully connected layer has one per image): the same sums with vectors that
// run over the filters of a block instead, which is how their coefficients lie in memory.
#pragma once

#include "kernels.h"

namespace lcnn {

constexpr int FEW = 4;  // pixels in flight, at most

template <bool WIDE>
struct Row {
  typedef float Type __attribute__((vector_size(16)));
  typedef float Unaligned __attribute__((vector_size(16), aligned(4), may_alias));
};

template <>
struct Row<true> {
  typedef float Type __attribute__((vector_size(32)));
  typedef float Unaligned __attribute__((vector_size(32), aligned(4), may_alias));
};

// One sum for each of F filters, in a vector of 4 or 8: lanes that are too many are read and left alone.
template <int F>
struct Sums {
  using Width = Row<(F > 4)>;
  typename Width::Type at = {};
  void add(const float* coefficients, float s) { at += *reinterpret_cast<const typename Width::Unaligned*>(coefficients) * s; }
  void add(const Sums& other) { at += other.at; }
  float operator[](int f) const { return at[f]; }
};

// Float32 coefficients.
struct Singles {
  using Coefficient = float;

  // Adds the products of all taps, which take turns among the partial sums.
  template <int F, int P, int TURNS, class Offsets>
  static inline __attribute__((always_inline)) void accumulate(Sums<F> (&acc)[TURNS][P], const float* const (&base)[P],
                                                               Offsets offsets, const float* coefficients, int64_t taps) {
    int64_t t = 0;
    for (; t + TURNS <= taps; t += TURNS)
      UNROLL for (int turn = 0; turn < TURNS; ++turn) {
        const int64_t offset = offsets[t + turn];
        UNROLL for (int p = 0; p < P; ++p) acc[turn][p].add(coefficients + (t + turn) * F, base[p][offset]);
      }
    for (; t < taps; ++t)
      UNROLL for (int p = 0; p < P; ++p) acc[0][p].add(coefficients + t * F, base[p][offsets[t]]);
  }
};

// sums[p * F + f] = sum over t of coefficients[t][f] * base[p][offsets[t]], in a few partial sums, so that one addition need
// not wait for the last.
template <class Kind, int F, int P, class Offsets>
static void narrow(const float* const* bases, Offsets offsets, const typename Kind::Coefficient* coefficients, int64_t taps,
                   float* sums) {
  constexpr int TURNS = 8 / P;
  const float* base[P];
  UNROLL for (int p = 0; p < P; ++p) base[p] = bases[p];
  Sums<F> acc[TURNS][P];
  Kind::accumulate(acc, base, offsets, coefficients, taps);
  UNROLL for (int p = 0; p < P; ++p) {
    UNROLL for (int turn = 1; turn < TURNS; ++turn) acc[0][p].add(acc[turn][p]);
    for (int f = 0; f < F; ++f) sums[p * F + f] = acc[0][p][f];
  }
}

// The kernels for 1 to BLOCK filters, at 1, 2 or FEW pixels, of one kind of coefficients.
template <class Kind, class Offsets>
struct NarrowKernels {
  using Kernel = void (*)(const float* const*, Offsets, const typename Kind::Coefficient*, int64_t, float*);
  Kernel at[BLOCK + 1][FEW + 1] = {};

  constexpr NarrowKernels();

 private:
  template <int F>
  constexpr void fill() {
    if constexpr (F > 0) {
      at[F][1] = narrow<Kind, F, 1, Offsets>;
      at[F][2] = narrow<Kind, F, 2, Offsets>;
      at[F][FEW] = narrow<Kind, F, FEW, Offsets>;
      fill<F - 1>();
    }
  }
};

extern const NarrowKernels<Singles, Channels> narrow_form;
extern const NarrowKernels<Singles, const int32_t*> narrow_look_up;

}  // namespace lcnn

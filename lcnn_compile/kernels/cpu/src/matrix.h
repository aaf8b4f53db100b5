// The micro-kernels of bfloat16 on a matrix unit (AMX). A tile register has up to 16 rows of 64 bytes: filters by pairs of
// taps, pairs of taps by pixels, or sums of filters at pixels; one instruction multiplies tiles of the first two kinds and adds
// the result to the third. In pairs of taps, pixels lie as `form_halves` and `look_up_halves` read them.
#pragma once

#include "bfloat16.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lcnn {

constexpr int SIDE = 16;                // rows of a tile, and words of a row
constexpr int64_t CELLS = SIDE * SIDE;  // words of a whole tile
constexpr int SHORT = 8;                // rows of the tiles of the lookup stage: filters that share their taps
constexpr int SHARED = 3;               // fewer filters that share their taps are as fast with vectors
constexpr int64_t MOST_CHUNKS = 12;     // of 32 taps at two vectors, if all of them are gathered at once: they stay in L1
constexpr int64_t FEW_CHANNELS = 8;     // fewer are as fast with vectors

#if defined(__AMX_BF16__) && defined(__linux__)

// Written here, since the compiler's own do not say that they read and write memory.
#define TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile ::)
#define TILE_LOAD(tile, at, step) asm volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(at), "r"(int64_t(step) * 4) : "memory")
#define TILE_STORE(tile, at, step) asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(at), "r"(int64_t(step) * 4) : "memory")
#define TILE_MULTIPLY(sum, filters, pixels) asm volatile("tdpbf16ps %%tmm" #pixels ", %%tmm" #filters ", %%tmm" #sum ::)

// Whether this process may use the registers: Linux wants to be asked once.
inline bool has_matrix_unit() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return granted;
}

// The shapes of this thread's tile registers while it lives: those of one stage. All are zero at first.
class TileShapes {
 public:
  // `rows` of the first seven tiles; the last has all.
  explicit TileShapes(int rows) {
    alignas(64) uint8_t shapes[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      shapes[16 + 2 * tile] = 64;
      shapes[48 + tile] = uint8_t(tile < 7 ? rows : SIDE);
    }
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~TileShapes() { asm volatile("tilerelease" ::); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;
};

// 32 rows of D (or the 16 of the first tile) at two vectors of pixels (or the first), into `sums` [2][16][2][LANES].
// `rows`: tiles of D, `row_step` words from those of 16 rows to the next; `pixels` [pairs][pitch].
static inline void form_tiles(const uint32_t* rows, int64_t row_step, bool two_rows, const uint32_t* pixels, int64_t pitch,
                              bool two_vectors, int64_t chunks, float* sums) {
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t c = 0; c < chunks; ++c, rows += CELLS, pixels += SIDE * pitch) {
    TILE_LOAD(4, rows, SIDE);
    TILE_LOAD(6, pixels, pitch);
    TILE_MULTIPLY(0, 4, 6);
    if (two_vectors) {
      TILE_LOAD(7, pixels + LANES, pitch);
      TILE_MULTIPLY(1, 4, 7);
    }
    if (two_rows) {
      TILE_LOAD(5, rows + row_step, SIDE);
      TILE_MULTIPLY(2, 5, 6);
      if (two_vectors) TILE_MULTIPLY(3, 5, 7);
    }
  }
  TILE_STORE(0, sums, 2 * LANES);
  TILE_STORE(1, sums + LANES, 2 * LANES);
  if (!two_rows) return;
  TILE_STORE(2, sums + 2 * CELLS, 2 * LANES);
  TILE_STORE(3, sums + 2 * CELLS + LANES, 2 * LANES);
}

// Pairs of taps at two vectors of pixels, [pairs][low, high][SIDE], two tiles side by side for every 16 pairs; whole tiles,
// with zeros behind the last pair up to the row before `used`. Returns where the last pair ends.
static inline uint32_t* gather(const uint16_t* s, const int32_t* offsets, int64_t taps, uint32_t* row, const uint32_t* used) {
  Words low, high;
  int64_t t = 0;
  for (; t + 2 <= taps; t += 2, row += 2 * SIDE) {
    interleave(load_words(s + offsets[t]), load_words(s + offsets[t + 1]), low, high);
    store_words(row, low);
    store_words(row + SIDE, high);
  }
  if (t < taps) {
    interleave(load_words(s + offsets[t]), Words{}, low, high);
    store_words(row, low);
    store_words(row + SIDE, high);
    row += 2 * SIDE;
  }
  uint32_t* const end = row;
  for (; row < used; row += SIDE) store_words(row, Words{});
  return end;
}

// Memory for the pairs of one chunk of taps after the other.
class Gathered {
 public:
  const uint32_t* operator()(const uint16_t* s, const int32_t* offsets, int64_t taps) {
    // Tiles that are full and those that are not lie apart, so that the zeros of these are seldom written.
    Tiles& found = taps > 2 * SIDE - 2 ? full_[turn_++ % 2] : part_[turn_++ % 2];
    found.used = gather(s, offsets, taps, found.rows, found.used);
    return found.rows;
  }

 private:
  struct Tiles {
    alignas(64) uint32_t rows[2 * CELLS] = {};
    uint32_t* used = rows;  // where the words begin that are zero
  };
  Tiles full_[2], part_[2];
  unsigned turn_ = 0;
};

// Sums of filters that share their taps at up to three times two vectors of pixels, [twos][SHORT][2][LANES].
// `coefficients`: tiles of 16 pairs of taps.
static inline void look_up_tiles(const uint16_t* s, const Pixels* pixels, int64_t twos, const int32_t* offsets,
                                 const uint32_t* coefficients, int64_t taps, Gathered& gathered, float* sums) {
  constexpr int STEP = 2 * SIDE, PART = SHORT * STEP;
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  TILE_ZERO(4);
  TILE_ZERO(5);
  // What is multiplied was written a turn before: tiles are read from the cache, not from stores on their way there.
  const auto next_of = [&](int64_t tap, int64_t i) {
    return gathered(s + pixels[2 * i].source, offsets + tap, std::min<int64_t>(taps - tap, 2 * SIDE));
  };
  const uint32_t* tiles = next_of(0, 0);
  for (int64_t tap = 0; tap < taps; tap += 2 * SIDE, coefficients += SHORT * SIDE) {
    TILE_LOAD(6, coefficients, SIDE);
    for (int64_t i = 0; i < twos; ++i) {
      const uint32_t* next = tiles;
      if (i + 1 < twos)
        next = next_of(tap, i + 1);
      else if (tap + 2 * SIDE < taps)
        next = next_of(tap + 2 * SIDE, 0);
      TILE_LOAD(7, tiles, STEP);
      if (i == 0) {
        TILE_MULTIPLY(0, 6, 7);
        TILE_LOAD(7, tiles + SIDE, STEP);
        TILE_MULTIPLY(1, 6, 7);
      } else if (i == 1) {
        TILE_MULTIPLY(2, 6, 7);
        TILE_LOAD(7, tiles + SIDE, STEP);
        TILE_MULTIPLY(3, 6, 7);
      } else {
        TILE_MULTIPLY(4, 6, 7);
        TILE_LOAD(7, tiles + SIDE, STEP);
        TILE_MULTIPLY(5, 6, 7);
      }
      tiles = next;
    }
  }
  TILE_STORE(0, sums, STEP);
  TILE_STORE(1, sums + SIDE, STEP);
  if (twos < 2) return;
  TILE_STORE(2, sums + PART, STEP);
  TILE_STORE(3, sums + PART + SIDE, STEP);
  if (twos < 3) return;
  TILE_STORE(4, sums + 2 * PART, STEP);
  TILE_STORE(5, sums + 2 * PART + SIDE, STEP);
}

#undef TILE_ZERO
#undef TILE_LOAD
#undef TILE_STORE
#undef TILE_MULTIPLY

#else

inline bool has_matrix_unit() { return false; }

struct TileShapes {
  explicit TileShapes(int) {}
};

static inline void form_tiles(const uint32_t*, int64_t, bool, const uint32_t*, int64_t, bool, int64_t, float*) {}
struct Gathered {};

static inline uint32_t* gather(const uint16_t*, const int32_t*, int64_t, uint32_t* row, const uint32_t*) { return row; }
static inline void look_up_tiles(const uint16_t*, const Pixels*, int64_t, const int32_t*, const uint32_t*, int64_t, Gathered&,
                                 float*) {}

#endif

// The way out for sums of filters at two vectors of pixels, [size][2][LANES] in the order of `interleave`, and a clamp at most.
template <bool WHOLE, bool RESIDUAL>
static inline void finish_two(const Lookup& to, const Pixels* pixels, const int32_t* filters, int64_t size, const float* sums) {
  const int64_t first = pixels[0].target, second = pixels[1].target;
  for (int64_t f = 0; f < size; ++f, sums += 2 * LANES) {
    const Vec start = splat(to.bias ? to.bias[filters[f]] : 0.0f);
    float* const y = to.y + filters[f] * to.plane;
    Vec low, high;
    in_order(load(sums) + start, load(sums + LANES) + start, low, high);
    if (!WHOLE) low = compress(low, pixels[0].mask), high = compress(high, pixels[1].mask);
    if (RESIDUAL) {
      const float* const from = to.residual + filters[f] * to.plane;
      low += WHOLE ? load(from + first) : load_first(from + first, pixels[0].count);
      high += WHOLE ? load(from + second) : load_first(from + second, pixels[1].count);
    }
    if (to.epilogue.activation != NONE) low = at_least(low, 0.0f), high = at_least(high, 0.0f);
    if (to.epilogue.activation == RELU6) low = at_most(low, 6.0f), high = at_most(high, 6.0f);
    if (to.stream) {
      store_past_caches(y + first, low);
      store_past_caches(y + second, high);
    } else if (WHOLE) {
      store(y + first, low);
      store(y + second, high);
    } else {
      store_first(y + first, low, pixels[0].count);
      store_first(y + second, high, pixels[1].count);
    }
  }
}

// The same for any epilogue.
static inline void finish_sums(const Lookup& to, const Pixels* pixels, const int32_t* filters, int64_t size, const float* sums) {
  if (!to.epilogue.is_clamp() || (to.residual && to.epilogue.residual_last)) {
    for (int64_t f = 0; f < size; ++f, sums += 2 * LANES) {
      const Vec start = splat(to.bias ? to.bias[filters[f]] : 0.0f);
      Vec two[2];
      in_order(load(sums) + start, load(sums + LANES) + start, two[0], two[1]);
      finish_halves(to, pixels, 2, filters + f, 1, two);
    }
    return;
  }
  const bool whole = pixels[0].mask == FULL && pixels[1].mask == FULL;
  if (to.residual)
    whole ? finish_two<true, true>(to, pixels, filters, size, sums) : finish_two<false, true>(to, pixels, filters, size, sums);
  else
    whole ? finish_two<true, false>(to, pixels, filters, size, sums) : finish_two<false, false>(to, pixels, filters, size, sums);
}

}  // namespace lcnn

// A lookup weight of bytes as the kernels read it, and what is worked out once for all calls of the same geometry.
#pragma once

#include "int8_vector.h"
#include "plan.h"

namespace lcnn {

// What comes after the sums, as Python has it.
struct ByteFinish {
  int64_t activation, residual_last;
  int64_t has_residual, residual_zero;  // 1: of bytes, 2: of floats
  int64_t to_bytes, zero;  // or to float32
  double residual_factor, six, step;
};

// Filters or rows of D that share their taps, four to a quad.
struct ByteBlock {
  int64_t quads, coefficients;  // how many, and where [quads][size] begin
  int64_t first_offset;         // of 4 * quads
  int size, first_filter;
};

struct ByteWeight {
  Weight w;
  bool identity;  // D is: S is x
  int middle, x_zero;  // the bytes that stand for zero in S and in x
  std::vector<ByteBlock> rows, blocks;
  std::vector<Four, Lines<Four>> dictionary, coefficients;  // dictionary: [groups][rows]
  int64_t dictionary_step = 0;                              // of a group
  std::vector<int32_t> starts, bias;                        // [groups * k], [n] in the order of w.filters
  std::vector<float> row_factors, filter_factors;           // the same
  ByteFinish finish;

  // From what `w` was packed with: integers as floats.
  void pack_quads();
  int64_t channel_quads() const { return ceil_div(w.m, 4); }
  // Every filter reads one channel alone.
  bool depthwise() const { return identity && w.m == 1; }
};

inline void ByteWeight::pack_quads() {
  const auto pack = [](auto& to, const float* values, int64_t taps, int size) {
    for (int64_t t = 0; t < taps; t += 4)
      for (int f = 0; f < size; ++f) {
        int8_t four[4] = {};
        for (int64_t i = 0; i < std::min<int64_t>(4, taps - t); ++i) four[i] = int8_t(values[(t + i) * size + f]);
        to.push_back(four_of(four));
      }
  };
  if (!identity) {
    for (int64_t g = 0; g < w.groups; ++g) {
      dictionary_step = int64_t(dictionary.size()) / std::max<int64_t>(1, g);
      for (const Block& row : w.rows) {
        if (!g) rows.push_back({channel_quads(), int64_t(dictionary.size()), 0, row.size, row.first_filter});
        pack(dictionary, w.dictionary.data() + g * w.k * w.m + row.coefficients, w.m, row.size);
      }
    }
  }
  int64_t offset = 0;
  for (const Block& block : w.blocks) {
    const int64_t quads = ceil_div(block.taps, 4);
    blocks.push_back({quads, int64_t(coefficients.size()), offset, block.size, block.first_filter});
    offset += 4 * quads;
    pack(coefficients, w.coefficients.data() + block.coefficients, block.taps, block.size);
  }
  for (auto* values : {&w.dictionary, &w.coefficients}) std::vector<float, Lines<float>>().swap(*values);
  w.bytes = true;
}

// A vector of pixels: where its taps start, and the lanes that are valid, which lie side by side where there are no gaps between
// rows: in x, from `source` on, for the dictionary stage; in y, from `target` on, for the lookup stage.
struct BytePixels {
  int64_t source, target;
  Lanes lanes;
};

// Sixteen pixels of the output that follow one another, where images are so small that vectors of whole planes would be mostly gaps: the bytes
// of four taps are picked from 32 lanes each.
struct Sixteen {
  int64_t source, target;
  int count;
  alignas(64) uint8_t order[64];  // where the bytes of each pixel's quad come from, in the 32 bytes of each tap
};
constexpr int64_t PICKED = 32;

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
constexpr bool PICKS = true;
#else
constexpr bool PICKS = false;
#endif

// The pixels of a band's output, by whole vectors or, where `picked`, sixteen at a time.
struct BandPixels {
  bool picked = false;
  std::vector<BytePixels> vectors;
  std::vector<Sixteen> sixteens;
  int64_t tiles() const { return int64_t(picked ? sixteens.size() : vectors.size()); }
};

struct BytePlan {
  const ByteWeight& weight;
  Plan plan;
  std::vector<int32_t> offsets;  // of the taps in S, in whole quads
  BandPixels whole, last;        // of whole bands, and of the last one

  BytePlan(const ByteWeight& of, const Geometry& geometry) : weight(of), plan(of.w, geometry) {
    for (const Block& block : of.w.blocks)
      for (int64_t t = 0; t < round_up(block.taps, 4); ++t)  // what is too much is multiplied by zero
        offsets.push_back(plan.offsets[block.first_tap + std::min(t, block.taps - 1)]);
    whole = pixels_of(plan.band_rows);
    last = pixels_of(plan.rows - (plan.bands - 1) * plan.band_rows);
  }

  const BandPixels& pixels(int64_t rows) const { return rows == plan.band_rows ? whole : last; }

 private:
  BandPixels pixels_of(int64_t rows) const;
  BytePixels vector_of(int64_t v, int64_t per_row, int64_t rows) const;
  Sixteen sixteen(int64_t number, int64_t rows) const;
  bool picks(int64_t rows, int64_t vectors) const;
};

// Vector number `v` of output pixels.
inline BytePixels BytePlan::vector_of(int64_t v, int64_t per_row, int64_t rows) const {
  const Plan& p = plan;
  const int64_t wide = p.g.out_width, source = p.by_rows ? v / per_row * p.read_pitch + v % per_row * BYTES : v * BYTES;
  int64_t row = p.by_rows ? v / per_row : source / p.read_pitch, column = source - row * p.read_pitch;
  BytePixels found{source, row * wide + std::min(column, wide), {}};
  for (int64_t lane = 0; lane < BYTES && row < rows; ++row, column = 0) {
    const int64_t valid = std::clamp<int64_t>(wide - column, 0, BYTES - lane);
    found.lanes.add(lane, lane + valid);
    lane += p.read_pitch - column;
    if (p.by_rows) break;
  }
  return found;
}

// Sixteen pixels of the output from 16 * `number` on.
inline Sixteen BytePlan::sixteen(int64_t number, int64_t rows) const {
  const int64_t wide = plan.g.out_width, first = 16 * number, count = std::min<int64_t>(16, rows * wide - first);
  const auto place = [&](int64_t pixel) { return pixel / wide * plan.read_pitch + pixel % wide; };
  Sixteen found{place(first), first, int(count), {}};
  for (int64_t i = 0; i < 16; ++i)
    for (int64_t tap = 0; tap < 4; ++tap)
      found.order[4 * i + tap] = uint8_t(PICKED * tap + place(first + std::min(i, count - 1)) - found.source);
  return found;
}

// Whether the pixels of a band are picked sixteen at a time: that costs a third of a vector of planes for each of them.
inline bool BytePlan::picks(int64_t rows, int64_t vectors) const {
  const int64_t wide = plan.g.out_width, count = ceil_div(rows * wide, 16);
  if (!PICKS || 13 * count >= 40 * vectors) return false;
  // From the first of sixteen pixels to the last, gaps between rows included.
  return 16 + (15 / wide + 1) * (plan.read_pitch - wide) <= PICKED;
}

inline BandPixels BytePlan::pixels_of(int64_t rows) const {
  const int64_t per_row = ceil_div(plan.g.out_width, BYTES), vectors = plan.by_rows ? per_row * rows : plan.vectors(rows, plan.read_pitch);
  BandPixels found;
  found.picked = picks(rows, vectors);
  if (found.picked)
    for (int64_t i = 0; i < ceil_div(rows * plan.g.out_width, 16); ++i) found.sixteens.push_back(sixteen(i, rows));
  else
    for (int64_t v = 0; v < vectors; ++v) {
      const BytePixels pixels = vector_of(v, per_row, rows);
      if (pixels.lanes.count) found.vectors.push_back(pixels);
    }
  return found;
}

}  // namespace lcnn

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

struct BytePlan {
  const ByteWeight& weight;
  Plan plan;
  std::vector<int32_t> offsets;  // of the taps in S, in whole quads

  BytePlan(const ByteWeight& of, const Geometry& geometry) : weight(of), plan(of.w, geometry) {
    for (const Block& block : of.w.blocks)
      for (int64_t t = 0; t < round_up(block.taps, 4); ++t)  // what is too much is multiplied by zero
        offsets.push_back(plan.offsets[block.first_tap + std::min(t, block.taps - 1)]);
  }
};

}  // namespace lcnn

// The lookup stage: taps of S, bias, residual and activation into the output.
#pragma once

#include "call.h"

namespace lcnn {

// The taps of a block that lie in the image for an output row.
inline Taps Call::taps_of_row(int64_t block, int64_t row) const {
  if (p.first_of_row.empty()) return {0, p.w.blocks[block].taps};
  const int64_t top = row * p.g.stride[0] - p.g.top;
  const int64_t first = std::clamp<int64_t>(ceil_div(-top, p.g.dilation[0]), 0, p.w.kh);
  const int64_t end = std::clamp<int64_t>(ceil_div(p.g.height - top, p.g.dilation[0]), first, p.w.kh);
  const int32_t* const of_row = p.first_of_row.data() + block * (p.w.kh + 1);
  return {of_row[first], of_row[end]};
}

inline void Call::look_up_few(const Lookup& to, int64_t group, int64_t first_row, int64_t rows, Team team) const {
  const Weight& w = p.w;
  const int64_t first_block = w.first_block[group], blocks = w.first_block[group + 1] - first_block, wide = p.g.out_width;
  for (int64_t b = blocks * team.rank / team.size; b < blocks * (team.rank + 1) / team.size; ++b) {
    const Block& block = w.blocks[first_block + b];
    const int32_t* const filters = w.filters.data() + block.first_filter;
    float biases[BLOCK] = {};
    for (int f = 0; f < block.size && bias; ++f) biases[f] = bias[filters[f]];
    for (int64_t row = 0, end = 0; row < rows; row = end) {
      // Rows with the same taps together.
      const Taps taps = taps_of_row(first_block + b, first_row + row);
      for (end = row + 1; end < rows && taps_of_row(first_block + b, first_row + end) == taps;) ++end;
      int64_t column = 0;
      const float* source = to.s + row * p.pitch;
      in_few((end - row) * wide, [&](int64_t begin, int size) {
        begin += row * wide;
        const float* base[FEW] = {};
        for (int i = 0; i < size; ++i) {
          base[i] = source + column;
          if (++column == wide) column = 0, source += p.pitch;
        }
        float sums[FEW * BLOCK];
        const int32_t* const offsets = p.offsets.data() + block.first_tap + taps.first;
        if (w.rounded)  // all of its taps: they come in pairs
          narrow_look_up_pairs.at[block.size][size](base, offsets, w.coefficient_pairs.data() + block.pairs, taps.end, sums);
        else
          narrow_look_up.at[block.size][size](base, offsets,
                                              w.coefficients_at() + block.coefficients + taps.first * block.size,
                                              taps.end - taps.first, sums);
        for (int i = 0; i < size; ++i) {
          const int64_t to_filter = p.connected ? 1 : to.plane, target = p.connected ? (begin + i) * p.g.out_image : begin + i;
          const int64_t added = p.connected ? (begin + i) * p.g.residual_image : begin + i;
          float values[BLOCK + LANES] = {};
          for (int f = 0; f < block.size; ++f) values[f] = sums[i * block.size + f] + biases[f];
          if (to.residual && !to.epilogue.residual_last)
            for (int f = 0; f < block.size; ++f) values[f] += to.residual[added + filters[f] * to_filter];
          for (int f = 0; f < block.size; f += LANES) store(values + f, to.epilogue(load(values + f)));
          if (to.residual && to.epilogue.residual_last)
            for (int f = 0; f < block.size; ++f) values[f] += to.residual[added + filters[f] * to_filter];
          for (int f = 0; f < block.size; ++f) to.y[target + filters[f] * to_filter] = values[f];
        }
      });
    }
  }
}

// Vector number `v` of output pixels.
inline Pixels Call::out_pixels(int64_t v, int64_t per_row, int64_t rows) const {
  const int64_t wide = p.g.out_width, source = p.by_rows ? v / per_row * p.read_pitch + v % per_row * LANES : v * LANES;
  int64_t row = p.by_rows ? v / per_row : source / p.read_pitch, column = source - row * p.read_pitch;
  Pixels found{source, row * wide + std::min(column, wide), 0, 0, false};
  for (int64_t lane = 0; lane < LANES && row < rows; ++row, column = 0) {
    const int64_t valid = std::clamp<int64_t>(wide - column, 0, LANES - lane);
    found.mask |= ((1u << valid) - 1) << lane;
    found.count += int(valid);
    lane += p.read_pitch - column;
    if (p.by_rows) break;
  }
  return found;
}

inline void Call::lookup_stage(int64_t group, int64_t first_row, int64_t rows, const float* s, float* to_y, const float* to_residual, int64_t plane,
                               Team team) const {
  const Weight& w = p.w;
  const Geometry& g = p.g;
  const int64_t per_row = ceil_div(g.out_width, LANES);
  const int64_t vectors = p.by_rows ? per_row * rows : p.vectors(rows, p.read_pitch);
  const int64_t tiles = tiles_of(vectors, TILE, team);
  const int64_t first_block = w.first_block[group], blocks = w.first_block[group + 1] - first_block;
  const Lookup to{s, bias, to_residual, to_y, plane,
                  Epilogue(int(g.activation), g.residual_last != 0), p.fetch, p.stream && reinterpret_cast<uintptr_t>(y) % 64 == 0};
  if (p.few) return look_up_few(to, group, first_row, rows, team);
  if (p.halves) return look_up_halves(to, reinterpret_cast<const uint16_t*>(s), group, rows, team);
  Pixels pixels[TILE];
  int64_t count = 0, units = 1;
  bool regular = false;
  for (Share share(tiles, blocks, team); share.more(); share.advance(units)) {
    if (share.new_tile) {
      const int64_t first = vectors * share.tile / tiles;
      count = vectors * (share.tile + 1) / tiles - first;
      for (int64_t i = 0; i < count; ++i) pixels[i] = out_pixels(first + i, per_row, rows);
      regular = std::all_of(pixels, pixels + count, [](const Pixels& v) { return v.mask == FULL; });
      const int64_t end = pixels[count - 1].target + pixels[count - 1].count;
      for (int64_t i = 0; i < count; ++i) pixels[i].spills = pixels[i].target + LANES <= end;
    }
    const Block& block = w.blocks[first_block + share.block];
    units = 1;
    if (block.size == 1 && count <= vectors_for(1)) {
      while (units < share.run() && (&block)[units].size == 1) ++units;
      kernels.look_up_alone[count](to, pixels, regular, &block, units, p.offsets.data(), w.coefficients_at(), w.filters.data());
      continue;
    }
    in_passes(block.size, count, [&](int f, int filters, int64_t v, int64_t width) {
      kernels.look_up[filters][width](to, pixels + v, regular, p.offsets.data() + block.first_tap,
                                      w.coefficients_at() + block.coefficients + f, block.size, block.taps,
                                      w.filters.data() + block.first_filter + f);
    });
  }
}

}  // namespace lcnn

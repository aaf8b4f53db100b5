// The two stages of a band with S in bfloat16.
#pragma once

#include "cpu_stages.h"

namespace lcnn {

// One tile of x, rounded, channels in pairs [pairs][count * LANES]; lanes that are not valid become zeros.
inline void Call::pack_halves(const float* origin, const Pixels* pixels, int64_t count, const Phase& at, const Grid& grid,
                              int64_t first, uint32_t* packed) const {
  const bool contiguous = grid.column_source == 1 && grid.row_source == at.end_valid - at.first_valid;
  const int64_t lanes = count * LANES;
  alignas(64) float two[(2 * TILE + 1) * LANES];  // zeros may follow a row
  for (int64_t c = 0; c < p.w.m; c += 2) {
    const Former from{nullptr, p.g.stride_c, std::min<int64_t>(2, p.w.m - c), 0, {}};
    if (from.channels == 1) std::fill_n(two + lanes, lanes, 0.0f);
    pack(origin + c * p.g.stride_c, from, pixels, count, at, grid, p.pitch, first, contiguous, two);
    for (int64_t i = 0; i < lanes; i += LANES, packed += LANES)
      store_words(packed, to_pairs(load(two + i), load(two + lanes + i)));
  }
}

inline void Call::form_halves(const float* origin, int64_t group, const Phase& at, const Grid& grid, uint16_t* plane,
                              uint32_t* packed, Team team) const {
  const Weight& w = p.w;
  const uint32_t* dictionary = w.dictionary_pairs.data() + group * w.k * w.row_pairs();
  for (int64_t i = w.k * team.rank / team.size; i < w.k * (team.rank + 1) / team.size; ++i) {
    std::fill(plane + i * p.plane, plane + i * p.plane + grid.begin, uint16_t(0));
    std::fill(plane + i * p.plane + grid.stop, plane + i * p.plane + p.phase_plane, uint16_t(0));
  }
  const int64_t vectors = ceil_div(grid.stop - grid.begin, LANES), tiles = tiles_of(vectors, p.tile, team);
  Pixels pixels[TILE];
  int64_t count = 0;
  for (Share share(tiles, int64_t(w.rows.size()), team); share.more(); share.advance()) {
    if (share.new_tile) {
      const int64_t first = vectors * share.tile / tiles;
      count = vectors * (share.tile + 1) / tiles - first;
      for (int64_t v = 0; v < count; ++v) pixels[v] = pixels_in(grid, at, grid.begin + (first + v) * LANES);
      pack_halves(origin, pixels, count, at, grid, grid.begin + first * LANES, packed);
    }
    const Block& block = w.rows[share.block];
    in_passes(block.size, count, [&](int f, int filters, int64_t v, int64_t width) {
      half_kernels.form[filters][width](packed + v * LANES, count * LANES, dictionary + block.pairs + f, block.size,
                                        w.row_pairs(), pixels + v, plane + (block.first_filter + f) * p.plane, p.plane);
    });
  }
}

inline void Call::look_up_halves(const Lookup& to, const uint16_t* s, int64_t group, int64_t rows, Team team) const {
  const Weight& w = p.w;
  const int64_t per_row = p.whole(p.g.out_width), twos = (p.by_rows ? per_row * rows : p.vectors(rows, p.read_pitch)) / 2;
  const int64_t tiles = tiles_of(twos, TILE / 2, team);
  const int64_t first_block = w.first_block[group], blocks = w.first_block[group + 1] - first_block;
  Pixels pixels[TILE];
  int64_t count = 0;
  for (Share share(tiles, blocks, team); share.more(); share.advance()) {
    if (share.new_tile) {
      const int64_t first = twos * share.tile / tiles;
      count = twos * (share.tile + 1) / tiles - first;
      for (int64_t i = 0; i < 2 * count; ++i) pixels[i] = out_pixels(2 * first + i, per_row, rows);
    }
    const Block& block = w.blocks[first_block + share.block];
    for (int f = 0; f < block.size; f += FILTERS) {
      const int filters = std::min(FILTERS, block.size - f);
      const int64_t passes = ceil_div(count, twos_for(filters));
      for (int64_t i = 0, v = 0; i < passes; ++i) {
        const int64_t next = count * (i + 1) / passes;
        half_kernels.look_up[filters][next - v](to, s, pixels + 2 * v, p.offsets.data() + block.first_tap,
                                                w.coefficient_pairs.data() + block.pairs + f, block.size, block.taps,
                                                w.filters.data() + block.first_filter + f);
        v = next;
      }
    }
  }
}

}  // namespace lcnn

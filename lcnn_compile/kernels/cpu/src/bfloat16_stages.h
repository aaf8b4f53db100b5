// The two stages of a band with operands in bfloat16. S is kept so too, or in float32 where a matrix unit has formed it.
#pragma once

#include <optional>

#include "matrix_stages.h"

namespace lcnn {

// One tile of x, rounded, channels in pairs [pairs][count * LANES]; lanes that are not valid become zeros, and so do pairs
// that a matrix unit multiplies beyond the last.
inline void Call::pack_halves(const float* origin, const Pixels* pixels, int64_t count, const Phase& at, const Grid& grid,
                              int64_t first, uint32_t* packed) const {
  const bool contiguous = grid.column_source == 1 && grid.row_source == at.end_valid - at.first_valid;
  const int64_t lanes = count * LANES, more = p.matrix_forms ? (p.w.row_chunks() * SIDE - p.w.row_pairs()) * lanes : 0;
  std::fill_n(packed + p.w.row_pairs() * lanes, more, 0);
  if (contiguous) {
    const auto read = [&](const float* from, const Pixels& v) {
      return v.mask == FULL ? load(from + v.source) : expand(load_first(from + v.source, v.count), v.mask);
    };
    const float* ahead = origin + pixels[count - 1].source + LANES;
    for (int64_t c = 0; c < p.w.m; c += 2, origin += 2 * p.g.stride_c, ahead += 2 * p.g.stride_c)
      for (int64_t v = 0; v < count; ++v, packed += LANES) {
        const Vec low = read(origin, pixels[v]);
        store_words(packed, to_pairs(low, c + 1 < p.w.m ? read(origin + p.g.stride_c, pixels[v]) : Vec{}));
        __builtin_prefetch(ahead + v * LANES, 0, 2);
        __builtin_prefetch(ahead + p.g.stride_c + v * LANES, 0, 2);
      }
    return;
  }
  alignas(64) float two[(2 * TILE + 1) * LANES];  // zeros may follow a row
  for (int64_t c = 0; c < p.w.m; c += 2) {
    const Former from{nullptr, p.g.stride_c, std::min<int64_t>(2, p.w.m - c), 0, {}};
    if (from.channels == 1) std::fill_n(two + lanes, lanes, 0.0f);
    pack(origin + c * p.g.stride_c, from, pixels, count, at, grid, p.pitch, first, contiguous, two);
    for (int64_t i = 0; i < lanes; i += LANES, packed += LANES)
      store_words(packed, to_pairs(load(two + i), load(two + lanes + i)));
  }
}

template <class S>
void Call::form_rounded(const float* origin, int64_t group, const Phase& at, const Grid& grid, S* plane, uint32_t* packed,
                        Team team) const {
  const Weight& w = p.w;
  const uint32_t* dictionary = w.dictionary_pairs.data() + group * w.k * w.row_pairs();
  for (int64_t i = w.k * team.rank / team.size; i < w.k * (team.rank + 1) / team.size; ++i) {
    std::fill(plane + i * p.plane, plane + i * p.plane + grid.begin, S(0));
    std::fill(plane + i * p.plane + grid.stop, plane + i * p.plane + p.phase_plane, S(0));
  }
  const int64_t vectors = ceil_div(grid.stop - grid.begin, LANES), tiles = tiles_of(vectors, p.tile, team);
  const std::optional<TileShapes> shapes = p.matrix_forms ? std::optional<TileShapes>(std::in_place, SIDE) : std::nullopt;
  Pixels pixels[TILE];
  int64_t count = 0;
  for (Share share(tiles, p.matrix_forms ? ceil_div(w.row_tiles(), 2) : int64_t(w.rows.size()), team); share.more(); share.advance()) {
    if (share.new_tile) {
      const int64_t first = vectors * share.tile / tiles;
      count = vectors * (share.tile + 1) / tiles - first;
      for (int64_t v = 0; v < count; ++v) pixels[v] = pixels_in(grid, at, grid.begin + (first + v) * LANES);
      pack_halves(origin, pixels, count, at, grid, grid.begin + first * LANES, packed);
    }
    if (p.matrix_forms) {
      form_rows(group, share.block, pixels, count, packed, plane);
      continue;
    }
    if constexpr (!std::is_same_v<S, float>) {
      const Block& block = w.rows[share.block];
      in_passes(block.size, count, [&](int f, int filters, int64_t v, int64_t width) {
        half_kernels.form[filters][width](packed + v * LANES, count * LANES, dictionary + block.pairs + f, block.size,
                                          w.row_pairs(), pixels + v, plane + (block.first_filter + f) * p.plane, p.plane);
      });
    }
  }
}

inline void Call::look_up_halves(const Lookup& to, const uint16_t* s, int64_t group, int64_t rows, Team team) const {
  const Weight& w = p.w;
  const int64_t per_row = p.whole(p.g.out_width), twos = (p.by_rows ? per_row * rows : p.vectors(rows, p.read_pitch)) / 2;
  const int64_t tiles = tiles_of(twos, TILE / 2, team);
  const int64_t first_block = w.first_block[group], blocks = w.first_block[group + 1] - first_block;
  if (p.joint) return look_up_joint(to, s, group, per_row, twos, rows, team);
  const std::optional<TileShapes> shapes = p.matrix ? std::optional<TileShapes>(std::in_place, SHORT) : std::nullopt;
  MatrixLookups lookups(p, to, s);
  Pixels pixels[TILE];
  int64_t count = 0;
  for (Share share(tiles, blocks, team); share.more(); share.advance()) {
    if (share.new_tile) {
      lookups.end();
      const int64_t first = twos * share.tile / tiles;
      count = twos * (share.tile + 1) / tiles - first;
      for (int64_t i = 0; i < 2 * count; ++i) pixels[i] = out_pixels(2 * first + i, per_row, rows);
      lookups.begin(pixels, count);
    }
    const Block& block = w.blocks[first_block + share.block];
    if (p.matrix && block.size >= SHARED) {
      lookups.add(first_block + share.block);
      continue;
    }
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
  lookups.end();
}

}  // namespace lcnn

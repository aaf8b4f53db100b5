// The two stages of a band, by one thread or by a team of them.
#pragma once

#include <cstring>

#include "cpu_narrow.h"
#include "cpu_plan.h"

namespace lcnn {

const Kernels kernels;
const NarrowKernels<Channels> narrow_form;
const NarrowKernels<const int32_t*> narrow_look_up;
const HalfKernels half_kernels;
const NarrowPairKernels<Channels> narrow_form_pairs;
const NarrowPairKernels<const int32_t*> narrow_look_up_pairs;

// The threads that work on one band, and the place of this one among them.
struct Team {
  int64_t rank, size;
  void wait() const {
#if defined(_OPENMP)
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }
};

struct Grid;

// Taps of a block, from the first on.
struct Taps {
  int64_t first, end;
  bool operator==(const Taps& other) const { return first == other.first && end == other.end; }
};

struct Call {
  const Plan& p;
  const float* x;
  const float* bias;
  const float* residual;
  float* y;

  Grid grid(const Phase& at, int64_t first_row, int64_t rows) const;
  void form_few(const float* origin, int64_t group, const Phase& at, const Grid& grid, float* plane, Team team) const;
  Pixels out_pixels(int64_t v, int64_t per_row, int64_t rows) const;
  Taps taps_of_row(int64_t block, int64_t row) const;
  void look_up_few(const Lookup& to, int64_t group, int64_t first_row, int64_t rows, Team team) const;
  Pixels pixels_in(const Grid& grid, const Phase& at, int64_t first) const;
  void band(int64_t image, int64_t index, float* s, float* packed, Team team) const;
  void dictionary_stage(int64_t image, int64_t group, int64_t first_row, int64_t rows, float* s, float* packed, Team team) const;
  void copy_shifts(int64_t rows, const float* s, float* copies, Team team) const;
  void lookup_stage(int64_t group, int64_t first_row, int64_t rows, const float* s, float* to_y, const float* to_residual, int64_t plane, Team team) const;
  void pack_halves(const float* origin, const Pixels* pixels, int64_t count, const Phase& at, const Grid& grid, int64_t first,
                   uint32_t* packed) const;
  void form_halves(const float* origin, int64_t group, const Phase& at, const Grid& grid, uint16_t* plane, uint32_t* packed,
                   Team team) const;
  void look_up_halves(const Lookup& to, const uint16_t* s, int64_t group, int64_t rows, Team team) const;
  void pool_band(int64_t image, int64_t first, int64_t end, const float* from, float* row, Team team) const;
};

// Where the dictionary stage stands in the grid of a phase.
struct Grid {
  int64_t begin, stop;  // the pixels to form; zeros around them
  int64_t first_source, row_source, column_source;  // in a channel of x: of pixel (0, 0), and per row and column
};

inline Grid Call::grid(const Phase& at, int64_t first_row, int64_t rows) const {
  const Geometry& g = p.g;
  const auto row_of = [&](int64_t h) {
    return std::clamp<int64_t>(ceil_div(h + g.top - at.row - first_row * g.stride[0], p.step[0]), 0, p.formed_rows(rows));
  };
  const int64_t first = row_of(0), end = row_of(g.height);
  const bool empty = first >= end || at.first_valid >= at.end_valid;
  return {empty ? 0 : first * p.pitch + at.first_valid,
          empty ? 0 : (end - 1) * p.pitch + at.end_valid,
          (first_row * g.stride[0] + at.row - g.top) * g.stride_h + (at.column - g.left) * g.stride_w,
          p.step[0] * g.stride_h,
          p.step[1] * g.stride_w};
}

// The vector of grid pixels from `first` on.
inline Pixels Call::pixels_in(const Grid& grid, const Phase& at, int64_t first) const {
  Pixels found{0, first, 0, 0, false};
  for (int64_t lane = 0, row = first / p.pitch; lane < LANES && first + lane < grid.stop; ++row) {
    const int64_t from = std::max(first + lane, row * p.pitch + at.first_valid);
    const int64_t end = std::min({first + LANES, row * p.pitch + at.end_valid, grid.stop});
    if (end > from) {
      if (!found.count)
        found.source = grid.first_source + row * grid.row_source + (from - row * p.pitch) * grid.column_source;
      found.mask |= ((1u << (end - from)) - 1) << (from - first);
      found.count += int(end - from);
    }
    lane = (row + 1) * p.pitch - first;
  }
  return found;
}

// `length` floats that lie `step` apart; up to a vector of zeros may follow them.
inline void copy_spread(float* to, const float* from, int64_t length, int64_t step) {
  const auto part = [](int64_t count) { return int(std::clamp<int64_t>(count, 0, LANES)); };
  if (step == 1) {
    for (int64_t i = 0; i < length; i += LANES) store(to + i, load_first(from + i, part(length - i)));
  } else if (step == 2) {
    for (int64_t i = 0; i < length; i += LANES) {
      const int64_t left = 2 * (length - i) - 1;
      const Vec low = load_first(from + 2 * i, part(left)), high = load_first(from + 2 * i + LANES, part(left - LANES));
      store(to + i, even_lanes(low, high));
    }
  } else {
    for (int64_t i = 0; i < length; ++i) to[i] = from[i * step];
  }
}

// The same by whole vectors: what lies behind `length` may be read, and overwritten in `to`.
inline void copy_row(float* to, const float* from, int64_t length, int64_t step) {
  if (step == 1) {
    for (int64_t i = 0; i < length; i += LANES) store(to + i, load(from + i));
  } else if (step == 2) {
    for (int64_t i = 0; i < length; i += LANES) store(to + i, even_lanes(load(from + 2 * i), load(from + 2 * i + LANES)));
  } else if (step == 4) {
    for (int64_t i = 0; i < length; i += LANES, from += 4 * LANES)
      store(to + i, even_lanes(even_lanes(load(from), load(from + LANES)),
                               even_lanes(load(from + 2 * LANES), load(from + 3 * LANES))));
  } else {
    for (int64_t i = 0; i < length; ++i) to[i] = from[i * step];
  }
}

// Copy one tile of every channel, vectors side by side; lanes that are not valid become zeros.
inline void pack(const float* x, const Former& from, const Pixels* pixels, int64_t count, const Phase& at, const Grid& grid,
                 int64_t pitch, int64_t first_pixel, bool contiguous, float* packed) {
  if (contiguous) {
    for (int64_t c = 0; c < from.channels; ++c, x += from.pitch)
      for (int64_t v = 0; v < count; ++v, packed += LANES)
        store(packed, pixels[v].mask == FULL ? load(x + pixels[v].source)
                                             : expand(load_first(x + pixels[v].source, pixels[v].count), pixels[v].mask));
    return;
  }
  const int64_t lanes = count * LANES, last_pixel = std::min(first_pixel + lanes, grid.stop);
  for (int64_t c = 0; c < from.channels; ++c, x += from.pitch, packed += lanes) {
    std::memset(packed, 0, sizeof(float) * lanes);
    for (int64_t row = first_pixel / pitch; row * pitch < last_pixel; ++row) {
      const int64_t pixel = std::max(first_pixel, row * pitch + at.first_valid);
      const int64_t length = std::min(last_pixel, row * pitch + at.end_valid) - pixel;
      const float* source = x + grid.first_source + row * grid.row_source + (pixel - row * pitch) * grid.column_source;
      copy_spread(packed + (pixel - first_pixel), source, length, grid.column_source);
    }
  }
}

// Tiles of at most `most` vectors, as many for each member of the team where there are several.
inline int64_t tiles_of(int64_t vectors, int64_t most, Team team) {
  const int64_t tiles = ceil_div(vectors, most);
  return tiles > 1 ? std::min(vectors, round_up(tiles, team.size)) : tiles;
}

// A member's share of the units of a stage: every block at one tile of pixels, then at the next.
struct Share {
  int64_t unit, end, blocks, tile, block;
  bool new_tile = true;

  Share(int64_t tiles, int64_t count, Team team)
      : unit(tiles * count * team.rank / team.size),
        end(tiles * count * (team.rank + 1) / team.size),
        blocks(count),
        tile(count ? unit / count : 0),
        block(count ? unit % count : 0) {}
  bool more() const { return unit < end; }
  // Units left of this tile.
  int64_t run() const { return std::min(end - unit, blocks - block); }
  void advance(int64_t units = 1) {
    unit += units;
    block += units;
    new_tile = block == blocks;
    if (new_tile) block = 0, ++tile;
  }
};

// Calls `pass(f, filters, v, vectors)` for pieces of `size` filters x `count` vectors that fit the registers.
template <class Pass>
inline void in_passes(int size, int64_t count, Pass pass) {
  const int most = filters_for(count);
  for (int f = 0; f < size; f += most) {
    const int filters = std::min(most, size - f), fit = vectors_for(filters);
    if (count <= fit) {
      pass(f, filters, 0, count);
      continue;
    }
    const int64_t passes = (count + fit - 1) / fit;
    for (int64_t i = 0, v = 0; i < passes; ++i) {
      const int64_t next = count * (i + 1) / passes;
      pass(f, filters, v, next - v);
      v = next;
    }
  }
}

// Calls `at_pixels(index, pixels)` for every pixel, in steps of FEW, 2 and 1.
template <class Each>
void in_few(int64_t count, Each at_pixels) {
  for (int64_t i = 0; i < count;) {
    const int size = count - i >= FEW ? FEW : count - i >= 2 ? 2 : 1;
    at_pixels(i, size);
    i += size;
  }
}

inline void Call::form_few(const float* origin, int64_t group, const Phase& at, const Grid& grid, float* plane,
                           Team team) const {
  const float* dictionary = p.w.dictionary.data() + group * p.w.k * p.w.m;
  const uint32_t* pairs = p.w.dictionary_pairs.data() + group * p.w.k * p.w.row_pairs();
  const int64_t blocks = int64_t(p.w.rows.size()), width = at.end_valid - at.first_valid;
  const int64_t first = grid.begin / p.pitch, pixels = grid.stop ? width * ((grid.stop - 1) / p.pitch + 1 - first) : 0;
  for (int64_t b = blocks * team.rank / team.size; b < blocks * (team.rank + 1) / team.size; ++b) {
    const Block& block = p.w.rows[b];
    for (int f = 0; f < block.size; ++f) std::fill_n(plane + (block.first_filter + f) * p.plane, p.phase_plane, 0.0f);
    int64_t row = first, column = at.first_valid;
    in_few(pixels, [&](int64_t, int size) {
      const float* base[FEW] = {};
      int64_t target[FEW];
      for (int i = 0; i < size; ++i) {
        base[i] = origin + grid.first_source + row * grid.row_source + column * grid.column_source;
        target[i] = row * p.pitch + column;
        if (++column == at.end_valid) column = at.first_valid, ++row;
      }
      float sums[FEW * BLOCK];
      if (p.w.rounded)
        narrow_form_pairs.at[block.size][size](base, {p.g.stride_c}, pairs + block.pairs, p.w.m, sums);
      else
        narrow_form.at[block.size][size](base, {p.g.stride_c}, dictionary + block.coefficients, p.w.m, sums);
      for (int i = 0; i < size; ++i)
        for (int f = 0; f < block.size; ++f) plane[(block.first_filter + f) * p.plane + target[i]] = sums[i * block.size + f];
    });
  }
}

inline void Call::dictionary_stage(int64_t image, int64_t group, int64_t first_row, int64_t rows, float* s, float* packed,
                                   Team team) const {
  const Weight& w = p.w;
  const int64_t offset = image * p.g.stride_n + group * w.m * p.g.stride_c, blocks = int64_t(w.rows.size());
  const float* origin = x + offset;
  const float* dictionary = w.dictionary.data() + group * w.k * w.m;
  for (size_t phase = 0; phase < p.phases.size(); ++phase) {
    const Phase& at = p.phases[phase];
    const Grid grid = this->grid(at, first_row, rows);
    float* const plane = s + phase * p.phase_plane;
    if (p.few) {
      form_few(origin, group, at, grid, plane, team);
      continue;
    }
    if (p.halves) {
      form_halves(origin, group, at, grid, reinterpret_cast<uint16_t*>(s) + phase * p.phase_plane,
                  reinterpret_cast<uint32_t*>(packed), team);
      continue;
    }
    for (int64_t i = w.k * team.rank / team.size; i < w.k * (team.rank + 1) / team.size; ++i) {
      std::fill(plane + i * p.plane, plane + i * p.plane + grid.begin, 0.0f);
      std::fill(plane + i * p.plane + grid.stop, plane + i * p.plane + p.phase_plane, 0.0f);
    }
    // Valid lanes lie side by side in x, even where a vector goes from one row to the next.
    const bool contiguous = grid.column_source == 1 && grid.row_source == at.end_valid - at.first_valid;
    const int64_t vectors = ceil_div(grid.stop - grid.begin, LANES), tiles = tiles_of(vectors, p.tile, team);
    Pixels pixels[TILE];
    Former from{};
    int64_t count = 0, calls = 0;
    for (Share share(tiles, blocks, team); share.more(); share.advance()) {
      if (share.new_tile) {
        const int64_t first = vectors * share.tile / tiles;
        count = vectors * (share.tile + 1) / tiles - first;
        for (int64_t v = 0; v < count; ++v) pixels[v] = pixels_in(grid, at, grid.begin + (first + v) * LANES);
        from = {origin, p.g.stride_c, w.m, p.plane, {}};
        const int64_t last = pixels[count - 1].source + LANES + (w.m - 1) * p.g.stride_c + offset;
        from.ahead = {reinterpret_cast<const char*>(origin + pixels[count - 1].source), p.g.stride_c * 4};
        if (!contiguous || blocks > DIRECT_BLOCKS || last > p.extent) {
          pack(origin, from, pixels, count, at, grid, p.pitch, grid.begin + first * LANES, contiguous, packed);
          from.x = packed;
          from.pitch = count * LANES;
          for (int64_t v = 0; v < count; ++v) pixels[v].source = v * LANES, pixels[v].mask = FULL;
        }
        calls = 0;
      }
      const Block& block = w.rows[share.block];
      in_passes(block.size, count, [&](int f, int filters, int64_t v, int64_t width) {
        const bool look_ahead = contiguous && calls++ < LINES_AHEAD / 2;
        kernels.form[filters][width](from, pixels + v, dictionary + block.coefficients + f, block.size,
                                     plane + (block.first_filter + f) * p.plane, look_ahead);
        from.ahead.at += 128;
      });
    }
  }
}

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
                                              w.coefficients.data() + block.coefficients + taps.first * block.size,
                                              taps.end - taps.first, sums);
        for (int i = 0; i < size; ++i) {
          const int64_t to_filter = p.connected ? 1 : to.plane, target = p.connected ? (begin + i) * w.n : begin + i;
          float values[BLOCK + LANES] = {};
          for (int f = 0; f < block.size; ++f) values[f] = sums[i * block.size + f] + biases[f];
          if (to.residual && !to.epilogue.residual_last)
            for (int f = 0; f < block.size; ++f) values[f] += to.residual[target + filters[f] * to_filter];
          for (int f = 0; f < block.size; f += LANES) store(values + f, to.epilogue(load(values + f)));
          if (to.residual && to.epilogue.residual_last)
            for (int f = 0; f < block.size; ++f) values[f] += to.residual[target + filters[f] * to_filter];
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
      kernels.look_up_alone[count](to, pixels, regular, &block, units, p.offsets.data(), w.coefficients.data(), w.filters.data());
      continue;
    }
    in_passes(block.size, count, [&](int f, int filters, int64_t v, int64_t width) {
      kernels.look_up[filters][width](to, pixels + v, regular, p.offsets.data() + block.first_tap,
                                      w.coefficients.data() + block.coefficients + f, block.size, block.taps,
                                      w.filters.data() + block.first_filter + f);
    });
  }
}

// S moved to where each shift finds it. What a row writes too much, the next one overwrites.
inline void Call::copy_shifts(int64_t rows, const float* s, float* copies, Team team) const {
  const int64_t width = p.g.out_width + (p.aligned ? 0 : p.read_reach_w);
  for (int64_t i = p.w.k * team.rank / team.size; i < p.w.k * (team.rank + 1) / team.size; ++i)
    for (size_t shift = 0; shift < p.shifts.size(); ++shift) {
      const Shift& at = p.shifts[shift];
      const float* from = s + i * p.plane + at.phase * p.phase_plane + at.row * p.pitch + at.column;
      float* to = copies + i * p.read_plane + int64_t(shift) * p.shift_plane;
      // The last rows may lie beyond what is formed, where this shift has no tap.
      const int64_t end = std::min(rows + p.read_reach_h, ceil_div(p.formed_rows(rows) - at.row, p.skip[0]));
      for (int64_t row = 0; row < end; ++row, from += p.skip[0] * p.pitch, to += p.read_pitch)
        copy_row(to, from, width, p.skip[1]);
    }
}

// The output of a band in `from`, pooled into rows [first, end).
inline void Call::pool_band(int64_t image, int64_t first, int64_t end, const float* from, float* row, Team team) const {
  const Pool& pool = *p.pool;
  for (int64_t f = p.w.n * team.rank / team.size; f < p.w.n * (team.rank + 1) / team.size; ++f)
    pool_rows(pool, first, end, from + f * p.pool_plane, p.first_row(first), row,
              y + ((image * p.w.n + f) * pool.out_height + first) * pool.out_width);
}

inline void Call::band(int64_t image, int64_t index, float* s, float* packed, Team team) const {
  const int64_t first = index * p.band_rows, end = std::min(first + p.band_rows, p.rows);
  const int64_t first_row = p.first_row(first), rows = p.end_row(end) - first_row, area = p.g.out_height * p.g.out_width;
  float* const unpooled = s + p.scratch() - p.pooled();
  const int64_t start = image * p.w.n * area + first_row * p.g.out_width;
  for (int64_t group = 0; group < p.w.groups; ++group) {
    if (group > 0) team.wait();
    dictionary_stage(image, group, first_row, rows, s, packed, team);
    team.wait();
    float* read = s;
    if (p.copied) {
      read = s + p.formed();
      copy_shifts(rows, s, read, team);
      team.wait();
    }
    if (p.pool)
      lookup_stage(group, first_row, rows, read, unpooled, nullptr, p.pool_plane, team);
    else
      lookup_stage(group, first_row, rows, read, y + start, residual ? residual + start : nullptr, area, team);
    if (p.stream) fence();
  }
  if (p.pool) {
    team.wait();
    pool_band(image, first, end, unpooled, packed, team);
  }
}

}  // namespace lcnn

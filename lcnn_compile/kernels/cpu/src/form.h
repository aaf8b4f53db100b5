// The dictionary stage: S = D * x for a band, where the taps will look for it.
#pragma once

#include <cstring>

#include "call.h"

namespace lcnn {

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

// S where D is the identity: the channels of x, with their padding.
inline void Call::copy_channels(const float* origin, const Phase& at, const Grid& grid, float* plane, Team team) const {
  const bool gaps = at.first_valid > 0 || at.end_valid < p.pitch;
  const int64_t first = grid.begin / p.pitch, width = at.end_valid - at.first_valid;
  for (int64_t i = p.w.k * team.rank / team.size; i < p.w.k * (team.rank + 1) / team.size; ++i) {
    float* const to = plane + i * p.plane;
    std::fill(to, to + (gaps ? p.phase_plane : grid.begin), 0.0f);
    std::fill(to + grid.stop, to + p.phase_plane, 0.0f);
    const float* const from = origin + i * p.g.stride_c + grid.first_source + at.first_valid * grid.column_source;
    // What a row writes too much, the next one overwrites; behind the last one are zeros.
    for (int64_t row = first; row * p.pitch < grid.stop; ++row)
      copy_spread(to + row * p.pitch + at.first_valid, from + row * grid.row_source, width, grid.column_source);
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
      if (p.w.identity) {
        for (int i = 0; i < size; ++i)
          for (int f = block.first_filter; f < block.first_filter + block.size; ++f)
            plane[f * p.plane + target[i]] = base[i][f * p.g.stride_c];
        return;
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
      form_rounded(origin, group, at, grid, reinterpret_cast<uint16_t*>(s) + phase * p.phase_plane,
                   reinterpret_cast<uint32_t*>(packed), team);
      continue;
    }
    if (p.matrix_forms) {
      form_rounded(origin, group, at, grid, plane, reinterpret_cast<uint32_t*>(packed), team);
      continue;
    }
    if (w.identity) {
      copy_channels(origin, at, grid, plane, team);
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

}  // namespace lcnn

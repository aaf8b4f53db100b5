// A band: both stages, and what lies between and behind them.
#pragma once

#include "form.h"
#include "look_up.h"

namespace lcnn {

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
              y + image * p.g.out_image + (f * pool.out_height + first) * pool.out_width);
}

inline void Call::band(int64_t image, int64_t index, float* s, float* packed, Team team) const {
  const int64_t first = index * p.band_rows, end = std::min(first + p.band_rows, p.rows);
  const int64_t first_row = p.first_row(first), rows = p.end_row(end) - first_row, area = p.g.out_height * p.g.out_width;
  float* const unpooled = s + p.scratch() - p.pooled();
  const int64_t start = image * p.g.out_image + first_row * p.g.out_width;
  const int64_t residual_start = image * p.g.residual_image + first_row * p.g.out_width;
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
      lookup_stage(group, first_row, rows, read, y + start, residual ? residual + residual_start : nullptr, area, team);
    if (p.stream) fence();
  }
  if (p.pool) {
    team.wait();
    pool_band(image, first, end, unpooled, packed, team);
  }
}

}  // namespace lcnn

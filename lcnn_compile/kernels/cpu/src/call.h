// One call, the threads that work on it, and how they share the work of a stage.
#pragma once

#include "narrow.h"
#include "plan.h"

namespace lcnn {

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
  void copy_channels(const float* origin, const Phase& at, const Grid& grid, float* plane, Team team) const;
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
  template <class S>
  void form_rows(int64_t group, int64_t unit, const Pixels* pixels, int64_t count, const uint32_t* packed, S* plane) const;
  template <class S>
  void form_rounded(const float* origin, int64_t group, const Phase& at, const Grid& grid, S* plane, uint32_t* packed,
                    Team team) const;
  void look_up_joint(const Lookup& to, const uint16_t* s, int64_t group, int64_t per_row, int64_t twos, int64_t rows,
                     Team team) const;
  void look_up_halves(const Lookup& to, const uint16_t* s, int64_t group, int64_t rows, Team team) const;
  void pool_band(int64_t image, int64_t first, int64_t end, const float* from, float* row, Team team) const;
};

// Where the dictionary stage stands in the grid of a phase.
struct Grid {
  int64_t begin, stop;  // the pixels to form; zeros around them
  int64_t first_source, row_source, column_source;  // in a channel of x: of pixel (0, 0), and per row and column
};

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

}  // namespace lcnn

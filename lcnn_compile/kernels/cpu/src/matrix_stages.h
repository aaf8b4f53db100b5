// The two stages of a band on a matrix unit.
#pragma once

#include <type_traits>

#include "stages.h"

namespace lcnn {

// Two tiles of rows of D, number `unit` and the next, at all pixels of a tile, by a matrix unit.
template <class S>
void Call::form_rows(int64_t group, int64_t unit, const Pixels* pixels, int64_t count, const uint32_t* packed, S* plane) const {
  const auto put = [](S* to, const float* from) {
    if constexpr (std::is_same_v<S, float>)
      store(to, load(from));
    else
      store_halves(to, to_halves(load(from)));
  };
  const Weight& w = p.w;
  const int64_t first = unit * 2 * SIDE, rows = std::min<int64_t>(2 * SIDE, w.k - first), step = w.row_chunks() * CELLS;
  const uint32_t* const tiles = w.dictionary_tiles.data() + (group * w.row_tiles() + 2 * unit) * step;
  alignas(64) float sums[2 * SIDE][2][LANES];
  for (int64_t v = 0; v < count; v += 2) {
    const bool both = v + 1 < count;
    form_tiles(tiles, step, rows > SIDE, packed + v * LANES, count * LANES, both, w.row_chunks(), sums[0][0]);
    S* s = plane + first * p.plane;
    for (int64_t i = 0; i < rows; ++i, s += p.plane) {
      put(s + pixels[v].target, sums[i][0]);
      if (both) put(s + pixels[v + 1].target, sums[i][1]);
    }
  }
}

// Lookups of one tile of pixels, block after block of filters that share their taps. What comes out of one block is written
// once the next is under way: the unit takes its time.
class MatrixLookups {
 public:
  MatrixLookups(const Plan& plan, const Lookup& to, const uint16_t* s) : p_(plan), to_(to), s_(s) {}

  void begin(const Pixels* pixels, int64_t twos) { pixels_ = pixels, twos_ = twos; }

  void add(int64_t index) {
    const Block& block = p_.w.blocks[index];
    const uint32_t* const coefficients = p_.w.coefficient_tiles.data() + p_.w.first_tile[index];
    const int64_t words = ceil_div(block.taps, 2 * SIDE) * SHORT * SIDE;
    for (int64_t i = 0; i < words; i += LANES) __builtin_prefetch(coefficients + words + i);  // of the next block
    if (to_.fetch && !to_.stream) {
      const int32_t* const filters = p_.w.filters.data() + block.first_filter;
      for (int f = 0; f < block.size; ++f)
        for (int64_t v = 0; v < 2 * twos_; ++v) __builtin_prefetch(to_.y + filters[f] * to_.plane + pixels_[v].target, 1);
    }
    look_up_tiles(s_, pixels_, twos_, p_.offsets.data() + block.first_tap, coefficients, block.taps, gathered_, sums_[turn_][0][0][0]);
    finish(&block);
  }

  // Before there are other pixels, or other kernels.
  void end() { finish(nullptr); }

 private:
  void finish(const Block* next) {
    turn_ = !turn_;
    if (waiting_)
      for (int64_t i = 0; i < twos_; ++i)
        finish_sums(to_, pixels_ + 2 * i, p_.w.filters.data() + waiting_->first_filter, waiting_->size, sums_[turn_][i][0][0]);
    waiting_ = next;
  }

  const Plan& p_;
  const Lookup& to_;
  const uint16_t* s_;
  const Pixels* pixels_ = nullptr;
  int64_t twos_ = 0;
  Gathered gathered_;
  const Block* waiting_ = nullptr;
  bool turn_ = false;
  alignas(64) float sums_[2][TILE / 2][SHORT][2][LANES];
};

// Lookups where so many filters use each tap that all taps of a convolution group are gathered once, for all of them.
inline void Call::look_up_joint(const Lookup& to, const uint16_t* s, int64_t group, int64_t per_row, int64_t twos, int64_t rows,
                                Team team) const {
  const Weight& w = p.w;
  const int32_t* const filters = w.filters.data() + w.blocks[w.first_block[group]].first_filter;
  const int32_t* const offsets = p.joint_offsets.data() + w.first_joint[group];
  const int64_t count = w.n / w.groups, taps = w.first_joint[group + 1] - w.first_joint[group], chunks = ceil_div(taps, 2 * SIDE);
  const uint32_t* const tiles = w.joint_tiles.data() + w.first_joint_tile[group];
  const TileShapes shapes(SIDE);
  alignas(64) uint32_t gathered[MOST_CHUNKS * 2 * CELLS];
  alignas(64) float sums[2 * SIDE][2][LANES];
  Pixels pixels[TILE];
  // As many pixels as fit, so that what is written lies together.
  const int64_t most = std::min<int64_t>(TILE / 2, MOST_CHUNKS / std::max<int64_t>(1, chunks)), words = chunks * 2 * CELLS, parts = tiles_of(twos, most, team);
  int64_t some = 0;
  for (Share share(parts, ceil_div(count, 2 * SIDE), team); share.more(); share.advance()) {
    if (share.new_tile) {
      const int64_t start = twos * share.tile / parts;
      some = twos * (share.tile + 1) / parts - start;
      for (int64_t i = 0; i < 2 * some; ++i) pixels[i] = out_pixels(2 * start + i, per_row, rows);
      for (int64_t i = 0; i < some; ++i)
        gather(s + pixels[2 * i].source, offsets, taps, gathered + i * words, gathered + (i + 1) * words);
    }
    const int64_t first = share.block * 2 * SIDE, size = std::min<int64_t>(2 * SIDE, count - first);
    if (to.fetch && !to.stream)
      for (int64_t f = first; f < first + size; ++f)
        for (int64_t i = 0; i < 2 * some; ++i) __builtin_prefetch(to.y + filters[f] * to.plane + pixels[i].target, 1);
    for (int64_t i = 0; i < some; ++i) {
      form_tiles(tiles + 2 * share.block * chunks * CELLS, chunks * CELLS, size > SIDE, gathered + i * words, 2 * LANES, true, chunks,
                 sums[0][0]);
      finish_sums(to, pixels + 2 * i, filters + first, size, sums[0][0]);
    }
  }
}

}  // namespace lcnn

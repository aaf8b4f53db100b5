// A lookup weight as the kernels read it.
#pragma once

#include <algorithm>
#include <mutex>
#include <new>
#include <numeric>
#include <vector>

#include "matrix.h"

namespace lcnn {

// Memory in whole cache lines, so that vectors of coefficients do not cross them.
template <class T>
struct Lines {
  using value_type = T;
  static constexpr std::align_val_t ALIGNMENT{64};
  Lines() = default;
  template <class U>
  Lines(const Lines<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), ALIGNMENT)); }
  void deallocate(T* at, size_t) { ::operator delete(at, ALIGNMENT); }
  bool operator==(const Lines&) const { return true; }
  bool operator!=(const Lines&) const { return false; }
};

// Taps in the order of kernel rows, so that those which lie outside of the image for a row of output can be left out.
constexpr bool BY_POSITION = LANES <= 8;

// A lookup weight, packed by blocks of filters: coefficients [taps][size]; where it is rounded to bfloat16, as pairs
// [taps / 2][size], and in float32 only once a plan wants that.
struct Weight {
  int64_t groups, k, m, kh, kw, n;
  int64_t group_size;  // filters that share their taps, at most
  bool rounded = false;
  bool identity = false;  // D is, of every group: S is x
  bool bytes = false;  // it is packed elsewhere as quads of bytes, and so is S
  mutable std::vector<float, Lines<float>> dictionary, coefficients;
  const float* borrowed = nullptr;  // coefficients that lie packed somewhere else, and stay there
  std::vector<uint32_t, Lines<uint32_t>> dictionary_pairs, coefficient_pairs;
  // For a matrix unit: of D [groups][rows / 16][row_chunks], of blocks that share taps [taps / 32], one after the other.
  mutable std::vector<uint32_t, Lines<uint32_t>> dictionary_tiles, coefficient_tiles;
  mutable std::vector<int64_t> first_tile;  // of each block, in words
  // Where it is faster to look up all taps that a group uses for all of its filters: [groups][filters / 16][taps / 32].
  mutable std::vector<uint32_t, Lines<uint32_t>> joint_tiles;
  mutable std::vector<int32_t> joint_indices, joint_positions;
  mutable std::vector<int64_t> first_joint, first_joint_tile;  // of each group: taps, and words
  std::vector<Block> rows, blocks;
  std::vector<int64_t> first_block;  // of each convolution group
  std::vector<int32_t> indices, positions, filters;

  const float* coefficients_at() const { return borrowed ? borrowed : coefficients.data(); }
  // Multiply-adds per pixel of the taps that serve one filter only: they are bound by loads of S.
  int64_t lone_taps() const {
    int64_t taps = 0;
    for (const Block& block : blocks) taps += block.size == 1 ? block.taps : 0;
    return taps;
  }
  int64_t row_pairs() const { return ceil_div(m, 2); }
  int64_t row_chunks() const { return ceil_div(m, 2 * SIDE); }
  int64_t row_tiles() const { return ceil_div(k, SIDE); }
  void round();
  void widen() const;
  void tile() const;

 private:
  void tile_joint() const;
  mutable std::once_flag widened, tiled;
};

// Rounds dictionary and coefficients, and keeps them as pairs only.
inline void Weight::round() {
  const auto pair_up = [](auto& pairs, const float* values, int64_t taps, int size) {
    for (int64_t t = 0; t < taps; t += 2, values += 2 * size)
      for (int f = 0; f < size; ++f) pairs.push_back(pair_of(values[f], t + 1 < taps ? values[size + f] : 0.0f));
  };
  rounded = true;
  identity = false;
  for (Block& row : rows) row.pairs = row.first_filter * row_pairs();
  for (int64_t g = 0; g < groups; ++g)
    for (const Block& row : rows) pair_up(dictionary_pairs, dictionary.data() + g * k * m + row.coefficients, m, row.size);
  for (Block& block : blocks) {
    block.pairs = int64_t(coefficient_pairs.size());
    pair_up(coefficient_pairs, coefficients.data() + block.coefficients, block.taps, block.size);
  }
  for (auto* pairs : {&dictionary_pairs, &coefficient_pairs}) pairs->resize(pairs->size() + BLOCK);  // read by whole vectors
  for (auto* values : {&dictionary, &coefficients}) std::vector<float, Lines<float>>().swap(*values);
}

// The rounded values in float32, for plans that compute so.
inline void Weight::widen() const {
  const auto take_apart = [](float* values, const uint32_t* pairs, int64_t taps, int size) {
    for (int64_t t = 0; t < taps; ++t)
      for (int f = 0; f < size; ++f) {
        const uint32_t pair = pairs[t / 2 * size + f];
        values[t * size + f] = t % 2 ? high_of(pair) : low_of(pair);
      }
  };
  std::call_once(widened, [&] {
    int64_t count = 0;
    for (const Block& block : blocks) count = std::max(count, block.coefficients + block.taps * block.size);
    dictionary.resize(groups * k * m);
    coefficients.resize(count);
    for (int64_t g = 0; g < groups; ++g)
      for (const Block& row : rows)
        take_apart(dictionary.data() + g * k * m + row.coefficients, dictionary_pairs.data() + g * k * row_pairs() + row.pairs, m, row.size);
    for (const Block& block : blocks)
      take_apart(coefficients.data() + block.coefficients, coefficient_pairs.data() + block.pairs, block.taps, block.size);
  });
}

// The rounded values once more, as tiles.
inline void Weight::tile() const {
  std::call_once(tiled, [&] {
    const int64_t chunks = row_chunks();
    dictionary_tiles.resize(groups * row_tiles() * chunks * CELLS);
    for (int64_t g = 0; g < groups; ++g)
      for (const Block& row : rows)
        for (int64_t t = 0; t < row_pairs(); ++t)
          for (int f = 0; f < row.size; ++f) {
            const int64_t i = row.first_filter + f, tile = (g * row_tiles() + i / SIDE) * chunks + t / SIDE;
            dictionary_tiles[tile * CELLS + i % SIDE * SIDE + t % SIDE] =
                dictionary_pairs[g * k * row_pairs() + row.pairs + t * row.size + f];
          }
    for (const Block& block : blocks) {
      first_tile.push_back(int64_t(coefficient_tiles.size()));
      if (block.size < SHARED) continue;
      coefficient_tiles.resize(coefficient_tiles.size() + ceil_div(block.taps, 2 * SIDE) * SHORT * SIDE);
      for (int64_t t = 0; t < ceil_div(block.taps, 2); ++t)
        for (int f = 0; f < block.size; ++f)
          coefficient_tiles[first_tile.back() + t / SIDE * SHORT * SIDE + f * SIDE + t % SIDE] =
              coefficient_pairs[block.pairs + t * block.size + f];
    }
    tile_joint();
  });
}

// Nanoseconds for two vectors of pixels, measured: to gather 32 taps; to multiply 32 taps for 32 filters, and for up to 8
// that share them, gathered for them; and to read one tap for one filter.
constexpr double GATHER = 16, MULTIPLY = 22.5, GATHER_AND_MULTIPLY = 25, READ = 0.7;

inline void Weight::tile_joint() const {
  std::vector<int32_t> column(k * kh * kw);  // of each tap
  const auto clear = [&] {
    for (auto* taps : {&joint_indices, &joint_positions}) taps->clear();
    joint_tiles.clear();
  };
  first_joint = {0};
  double joint = 0, apart = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = first_block[g], last = first_block[g + 1], filter = blocks[first].first_filter;
    std::fill(column.begin(), column.end(), -1);
    int32_t taps = 0;
    for (int64_t b = first; b < last; ++b) {
      const Block& block = blocks[b];
      apart += double(block.taps) * (block.size < SHARED ? READ * block.size : GATHER_AND_MULTIPLY / (2 * SIDE));
      for (int64_t t = block.first_tap; t < block.first_tap + block.taps; ++t) {
        int32_t& at = column[indices[t] * kh * kw + positions[t]];
        if (at >= 0) continue;
        at = taps++;
        joint_indices.push_back(indices[t]);
        joint_positions.push_back(positions[t]);
      }
    }
    first_joint.push_back(first_joint.back() + taps);
    const int64_t chunks = ceil_div(taps, 2 * SIDE), count = n / groups;
    joint += double(chunks) * (GATHER + MULTIPLY * double(ceil_div(count, 2 * SIDE)));
    if (chunks > MOST_CHUNKS) return clear();
    first_joint_tile.push_back(int64_t(joint_tiles.size()));
    joint_tiles.resize(joint_tiles.size() + round_up(ceil_div(count, SIDE), 2) * chunks * CELLS);
    for (int64_t b = first; b < last; ++b) {
      const Block& block = blocks[b];
      for (int64_t t = 0; t < block.taps; ++t)
        for (int f = 0; f < block.size; ++f) {
          const int64_t row = block.first_filter - filter + f;
          const int64_t at = column[indices[block.first_tap + t] * kh * kw + positions[block.first_tap + t]];
          const uint32_t pair = coefficient_pairs[block.pairs + t / 2 * block.size + f], half = t % 2 ? pair >> 16 : pair & 0xffff;
          uint32_t& word = joint_tiles[first_joint_tile[g] + (row / SIDE * chunks + at / 2 / SIDE) * CELLS + row % SIDE * SIDE + at / 2 % SIDE];
          if (word >> (at % 2 * 16) & 0xffff) return clear();  // the same tap twice
          word |= half << (at % 2 * 16);
        }
    }
  }
  if (joint >= apart) clear();
}

// Sizes as equal as possible, none above BLOCK.
inline int part_size(int64_t total, int64_t parts, int64_t i) { return int((i + 1) * total / parts - i * total / parts); }

inline bool is_identity(const Weight& w, const float* dictionary) {
  if (w.k != w.m) return false;
  for (int64_t g = 0; g < w.groups; ++g)
    for (int64_t i = 0; i < w.k; ++i)
      for (int64_t c = 0; c < w.m; ++c)
        if (*dictionary++ != (i == c ? 1.0f : 0.0f)) return false;
  return true;
}

inline void pack_dictionary(Weight& w, const float* dictionary) {
  w.identity = is_identity(w, dictionary);
  const int64_t parts = ceil_div(w.k, BLOCK);
  w.dictionary.resize(w.groups * w.k * w.m + BLOCK);
  float* to = w.dictionary.data();
  for (int64_t i = 0, row = 0; i < parts; ++i) {
    const int size = part_size(w.k, parts, i);
    w.rows.push_back({0, w.m, row * w.m, size, int(row)});
    row += size;
  }
  for (int64_t g = 0; g < w.groups; ++g)
    for (const Block& block : w.rows)
      for (int64_t c = 0; c < w.m; ++c)
        for (int f = 0; f < block.size; ++f) *to++ = dictionary[((g * w.k) + block.first_filter + f) * w.m + c];
}

// Whether taps `a` and `b` are to be looked up in this order: by address, which is kinder to the TLB.
inline bool tap_before(const int32_t* indices, const int32_t* positions, int32_t a, int32_t b) {
  if (BY_POSITION && positions[a] != positions[b]) return positions[a] < positions[b];
  return indices[a] != indices[b] ? indices[a] < indices[b] : positions[a] < positions[b];
}

// Whether coefficients [taps][size] lie as blocks want them: no filter is missing, and all taps are in order.
inline bool lie_packed(int64_t filter_groups, int64_t size, const int32_t* indices, const int32_t* positions, const int32_t* offsets,
                       const int32_t* table) {
  bool packed = size <= BLOCK && std::all_of(table, table + filter_groups * size, [](int32_t filter) { return filter >= 0; });
  for (int64_t j = 0; packed && j < filter_groups; ++j)
    for (int32_t t = offsets[j]; packed && t + 1 < offsets[j + 1]; ++t) packed = !tap_before(indices, positions, t + 1, t);
  return packed;
}

// `lasting`: the coefficients stay where they are for as long as the weight lives, with a vector's worth of memory behind them.
inline void pack_lookups(Weight& w, int64_t filter_groups, int64_t size, const float* coefficients, const int32_t* indices,
                  const int32_t* positions, const int32_t* offsets, const int32_t* table, bool lasting = false) {
  std::vector<int32_t> order;
  w.group_size = size;
  if (lasting && lie_packed(filter_groups, size, indices, positions, offsets, table)) w.borrowed = coefficients;
  for (int64_t j = 0; j < filter_groups; ++j) {
    if (j % (filter_groups / w.groups) == 0) w.first_block.push_back(int64_t(w.blocks.size()));
    const int64_t first = int64_t(w.indices.size()), taps = offsets[j + 1] - offsets[j];
    order.resize(taps);
    std::iota(order.begin(), order.end(), offsets[j]);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return tap_before(indices, positions, a, b); });
    for (int32_t t : order) {
      w.indices.push_back(indices[t]);
      w.positions.push_back(positions[t]);
    }
    std::vector<int> columns;
    for (int64_t f = 0; f < size; ++f)
      if (table[j * size + f] >= 0) columns.push_back(int(f));
    const int64_t members = int64_t(columns.size()), parts = ceil_div(members, BLOCK);
    for (int64_t i = 0, next = 0; i < parts; ++i) {
      const int part = part_size(members, parts, i);
      w.blocks.push_back({first, taps, w.borrowed ? offsets[j] * size : int64_t(w.coefficients.size()), part, int(w.filters.size())});
      for (int64_t i = 0; i < (w.borrowed ? 0 : taps); ++i)
        for (int32_t t = order[i], f = 0; f < part; ++f) w.coefficients.push_back(coefficients[t * size + columns[next + f]]);
      for (int f = 0; f < part; ++f) w.filters.push_back(table[j * size + columns[next + f]]);
      next += part;
    }
  }
  w.coefficients.resize(w.coefficients.size() + BLOCK);  // the narrow kernels read whole vectors of them
  w.first_block.push_back(int64_t(w.blocks.size()));
  w.n = int64_t(w.filters.size());
}

}  // namespace lcnn

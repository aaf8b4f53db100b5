// A lookup weight as the kernels read it.
#pragma once

#include <algorithm>
#include <mutex>
#include <new>
#include <numeric>
#include <vector>

#include "cpu_bfloat16.h"

namespace lcnn {

inline int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

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
  bool rounded = false;
  mutable std::vector<float, Lines<float>> dictionary, coefficients;
  std::vector<uint32_t, Lines<uint32_t>> dictionary_pairs, coefficient_pairs;
  std::vector<Block> rows, blocks;
  std::vector<int64_t> first_block;  // of each convolution group
  std::vector<int32_t> indices, positions, filters;

  // Multiply-adds per pixel of the taps that serve one filter only: they are bound by loads of S.
  int64_t lone_taps() const {
    int64_t taps = 0;
    for (const Block& block : blocks) taps += block.size == 1 ? block.taps : 0;
    return taps;
  }
  int64_t row_pairs() const { return ceil_div(m, 2); }
  void round();
  void widen() const;

 private:
  mutable std::once_flag widened;
};

// Rounds dictionary and coefficients, and keeps them as pairs only.
inline void Weight::round() {
  const auto pair_up = [](auto& pairs, const float* values, int64_t taps, int size) {
    for (int64_t t = 0; t < taps; t += 2, values += 2 * size)
      for (int f = 0; f < size; ++f) pairs.push_back(pair_of(values[f], t + 1 < taps ? values[size + f] : 0.0f));
  };
  rounded = true;
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

// Sizes as equal as possible, none above BLOCK.
inline int part_size(int64_t total, int64_t parts, int64_t i) { return int((i + 1) * total / parts - i * total / parts); }

inline void pack_dictionary(Weight& w, const float* dictionary) {
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

inline void pack_lookups(Weight& w, int64_t filter_groups, int64_t size, const float* coefficients, const int32_t* indices,
                  const int32_t* positions, const int32_t* offsets, const int32_t* table) {
  std::vector<int32_t> order;
  for (int64_t j = 0; j < filter_groups; ++j) {
    if (j % (filter_groups / w.groups) == 0) w.first_block.push_back(int64_t(w.blocks.size()));
    const int64_t first = int64_t(w.indices.size()), taps = offsets[j + 1] - offsets[j];
    order.resize(taps);
    std::iota(order.begin(), order.end(), offsets[j]);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {  // by address: kinder to the TLB
      if (BY_POSITION && positions[a] != positions[b]) return positions[a] < positions[b];
      return indices[a] != indices[b] ? indices[a] < indices[b] : positions[a] < positions[b];
    });
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
      w.blocks.push_back({first, taps, int64_t(w.coefficients.size()), part, int(w.filters.size())});
      for (int32_t t : order)
        for (int f = 0; f < part; ++f) w.coefficients.push_back(coefficients[t * size + columns[next + f]]);
      for (int f = 0; f < part; ++f) w.filters.push_back(table[j * size + columns[next + f]]);
      next += part;
    }
  }
  w.coefficients.resize(w.coefficients.size() + BLOCK);  // the narrow kernels read whole vectors of them
  w.first_block.push_back(int64_t(w.blocks.size()));
  w.n = int64_t(w.filters.size());
}

}  // namespace lcnn

// Weights of a model file: looked at as Python looks at them, then packed by the kernels.
#pragma once

#include <cmath>
#include <memory>

#include "file.h"
#include "kernel_table.h"
#include "../int8_weight.h"
#include "../program.h"

namespace lcnn {

enum Packing : int64_t { FLOATS, HALVES, QUADS };

// An object of the kernels, and what frees it.
using Held = std::unique_ptr<void, void (*)(void*)>;

// What plans need to know of a packed weight.
struct Packed {
  Packing packing;
  int64_t groups, k, m, kh, kw, n, taps;
  ByteFinish finish;  // of quads
  Held kernels{nullptr, nullptr};
};

inline std::vector<int32_t> widened(const Table& table, int64_t count, int64_t bound, const char* what) {
  require(table.count == count, what);
  std::vector<int32_t> found(size_t(count), 0);
  for (size_t i = 0; i < found.size(); ++i) {
    switch (table.type) {
      case INT32: found[i] = static_cast<const int32_t*>(table.at)[i]; break;
      case UINT16: found[i] = static_cast<const uint16_t*>(table.at)[i]; break;
      case UINT8: found[i] = static_cast<const uint8_t*>(table.at)[i]; break;
      default: throw BadFile(what);
    }
    require(found[i] >= 0 && found[i] < bound, what);
  }
  return found;
}

inline std::vector<float> from_bytes(const Table& table, int64_t count, const char* what) {
  require(table.type == INT8 && table.count == count, what);
  const auto* const values = static_cast<const int8_t*>(table.at);
  for (int64_t i = 0; i < count; ++i) require(values[i] >= -127, what);
  return std::vector<float>(values, values + count);
}

// Every filter once, in its own convolution group, as many in each; returns how many.
inline int64_t check_filters(const int32_t* filters, int64_t count, int64_t width, int64_t groups) {
  int64_t n = 0;
  for (int64_t i = 0; i < count * width; ++i) {
    require(filters[i] >= -1, "a weight names a filter below -1");
    n += filters[i] >= 0;
  }
  require(n > 0 && n % groups == 0, "a weight has filters that its groups cannot share");
  std::vector<bool> seen(size_t(n), false);
  for (int64_t i = 0; i < count * width; ++i) {
    if (filters[i] < 0) continue;
    const int64_t group = i / width / (count / groups);
    require(filters[i] < n && filters[i] / (n / groups) == group && !seen[size_t(filters[i])], "a weight's filters are out of place");
    seen[size_t(filters[i])] = true;
  }
  return n;
}

inline void check_offsets(const int32_t* offsets, int64_t count, int64_t taps) {
  require(offsets[0] == 0 && offsets[count] == taps, "a weight's offsets do not cover its taps");
  for (int64_t i = 0; i < count; ++i) require(offsets[i] <= offsets[i + 1], "a weight's offsets descend");
}

// Sums of products with bytes must fit 32 bits; `rows` of `each`, whose starts are added.
inline void check_sums(const float* values, int64_t rows, int64_t each, const int32_t* starts) {
  for (int64_t row = 0; row < rows; ++row) {
    double sum = std::abs(double(starts ? starts[row] : 0));
    for (int64_t i = 0; i < each; ++i) sum += 255.0 * std::abs(double(values[row * each + i]));
    require(sum < 2147483648.0, "a weight's sums may be larger than 32 bits");
  }
}

inline bool is_scale(double value) { return std::isfinite(value) && value >= 0 && value <= 3.4028234663852886e38; }

inline Packed read_weight(WordReader& words, const File& file, const KernelTable& kernels, Work& work) {
  Packed found{};
  constexpr int64_t BIG = int64_t(1) << 31;
  found.packing = Packing(words.next(FLOATS, QUADS, "a weight is packed in no known way"));
  int64_t sizes[10] = {};
  const char* const what = "a weight has impossible sizes";
  const bool bytes = found.packing == QUADS;
  for (int i = 0; i < 7; ++i) sizes[i] = words.next(1, BIG - 1, what);
  const bool identity = words.next(0, 1, what) != 0;
  const int64_t groups = sizes[0], k = sizes[1], m = sizes[2], area = sizes[3] * sizes[4], count = sizes[5], width = sizes[6];
  require(area <= (1 << 14) && count % groups == 0 && Wide(groups) * k * m < MOST && Wide(count) * width < BIG, what);
  require(!identity || k == m, "a weight without a dictionary has other vectors than channels");
  if (bytes) {
    sizes[7] = identity;
    sizes[8] = words.next(0, 255, what), sizes[9] = words.next(0, 255, what);
    ByteFinish& f = found.finish;
    f.activation = words.next(0, 4, "an activation is unknown"), f.residual_last = words.next(0, 1, what);
    f.has_residual = words.next(0, 2, what), f.residual_zero = words.next(0, 255, what);
    f.to_bytes = words.next(0, 1, what), f.zero = words.next(0, 255, what);
    for (double* number : {&f.residual_factor, &f.six, &f.step}) {
      const int64_t bits = words.next();
      std::memcpy(number, &bits, sizeof bits);
      require(is_scale(*number), "a scale of a weight is no number from 0 on");
    }
  } else {
    sizes[7] = found.packing == HALVES ? 1 : 2;  // the file outlives its weights
  }
  int64_t numbers[10] = {};
  for (int i = 0; i < (bytes ? 10 : 6); ++i) numbers[i] = words.next();
  require((numbers[0] == -1) == identity, "a weight has no dictionary, or one that it does not need");
  const Table &taps = file.table(numbers[1]), &places = file.table(numbers[2]);
  const int64_t total = places.count;
  require(total < BIG && taps.count == total * width, "a weight has other coefficients than taps");
  require(Wide(k) * area < (int64_t(1) << 28), what);
  work.spend(Wide(groups) * k * m + Wide(total) * (width + 2) + Wide(count) * width + Wide(k) * area / 4);  // what packing makes
  const std::vector<int32_t> indices = widened(places, total, k, "an index of a weight is out of range");
  const std::vector<int32_t> positions = widened(file.table(numbers[3]), total, area, "a position of a weight is out of range");
  const int32_t* const offsets = file.table(numbers[4]).integers(count + 1);
  const int32_t* const filters = file.table(numbers[5]).integers(count * width);
  check_offsets(offsets, count, total);
  const int64_t n = check_filters(filters, count, width, groups);
  found.groups = groups, found.k = k, found.m = m, found.kh = sizes[3], found.kw = sizes[4], found.n = n, found.taps = total;
  if (bytes) {
    std::vector<float> dictionary;
    const int32_t* starts = nullptr;
    const float* factors = nullptr;
    if (!identity) {
      dictionary = from_bytes(file.table(numbers[0]), groups * k * m, "a dictionary is no table of bytes");
      starts = file.table(numbers[6]).integers(groups * k);
      factors = file.table(numbers[7]).floats(groups * k);
      check_sums(dictionary.data(), groups * k, m, starts);
      for (int64_t i = 0; i < groups * k; ++i) require(is_scale(double(factors[i])), "a factor of a dictionary is no number from 0 on");
    }
    const std::vector<float> coefficients = from_bytes(taps, total * width, "coefficients are no table of bytes");
    const int32_t* const bias = file.table(numbers[8]).integers(n);
    const float* const scales = file.table(numbers[9]).floats(n);
    for (int64_t i = 0; i < n; ++i) require(is_scale(double(scales[i])), "a factor of a filter is no number from 0 on");
    for (int64_t j = 0; j < count; ++j)
      for (int64_t f = 0; f < width; ++f) {
        const int32_t filter = filters[j * width + f];
        if (filter < 0) continue;
        double sum = std::abs(double(bias[filter]));
        for (int64_t t = offsets[j]; t < offsets[j + 1]; ++t) sum += 255.0 * std::abs(double(coefficients[size_t(t * width + f)]));
        require(sum < 2147483648.0, "a filter's sums may be larger than 32 bits");
      }
    found.kernels = Held(kernels.bytes_new(sizes, &found.finish, dictionary.data(), coefficients.data(), indices.data(), positions.data(),
                                       offsets, filters, starts, factors, bias, scales),
                         kernels.bytes_free);
  } else {
    std::vector<float> made;
    const float* dictionary;
    if (identity) {
      made.assign(size_t(groups * k * m), 0.0f);
      for (int64_t i = 0; i < groups * k; ++i) made[size_t(i * m + i % k)] = 1.0f;
      dictionary = made.data();
    } else {
      dictionary = file.table(numbers[0]).floats(groups * k * m);
    }
    found.kernels = Held(kernels.weight_new(sizes, dictionary, taps.floats(total * width), indices.data(), positions.data(), offsets, filters),
                         kernels.weight_free);
  }
  if (!found.kernels) throw std::bad_alloc();
  return found;
}

}  // namespace lcnn

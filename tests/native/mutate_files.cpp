// Opens and runs damaged model files, for a build with sanitizers: mutate_files MODEL COUNT SEED.
//
// Each file is a good one with a few words or bytes changed and its checksum put right, so that every check behind it is reached.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "lcnn.h"

extern "C" uint64_t lcnn_checksum(const void* data, size_t bytes);

namespace {

constexpr size_t HEADER = 64;
constexpr int64_t MOST = 1 << 22;  // floats of an input or output that is run

std::vector<uint8_t> read_file(const char* path) {
  std::vector<uint8_t> data;
  FILE* const file = std::fopen(path, "rb");
  if (!file) std::exit(2);
  for (int c; (c = std::fgetc(file)) != EOF;) data.push_back(uint8_t(c));
  std::fclose(file);
  return data;
}

using Random = std::mt19937_64;

void change_word(std::vector<uint8_t>& data, size_t begin, size_t end, Random& random) {
  const size_t at = begin + random() % ((end - begin) / 8) * 8;
  uint64_t value, other;  // without a sign, so that it may overflow
  std::memcpy(&value, &data[at], 8);
  std::memcpy(&other, &data[begin + random() % ((end - begin) / 8) * 8], 8);
  const uint64_t chosen[] = {0, 1, uint64_t(-1), 2, value + 1, value - 1, -value, 2 * value, value + 16, INT32_MAX, INT64_MAX, uint64_t(1) << 63,
                             uint64_t(1) << 40, random(), random() % 64, other, 255, 4096};
  value = chosen[random() % (sizeof chosen / sizeof *chosen)];
  std::memcpy(&data[at], &value, 8);
}

void mutate(std::vector<uint8_t>& data, Random& random) {
  int64_t words, tables;
  std::memcpy(&words, &data[32], 8);
  std::memcpy(&tables, &data[40], 8);
  const size_t listed = HEADER + size_t(tables) * 24, end = listed + size_t(words) * 8;
  for (int count = 1 + int(random() % 3); count > 0; --count) switch (random() % 8) {
      case 0: data[random() % data.size()] = uint8_t(random()); break;
      case 1: change_word(data, HEADER, listed, random); break;  // a table
      case 2: if (random() % 8 == 0) change_word(data, 8, HEADER, random); break;
      case 3: {  // a byte of a table's data
        if (data.size() > end) data[end + random() % (data.size() - end)] ^= uint8_t(1 << random() % 8);
        break;
      }
      default: change_word(data, listed, end, random);
    }
  if (random() % 16 == 0) data.resize(random() % data.size());
  if (data.size() >= HEADER && random() % 32 != 0) {
    if (random() % 4 == 0) {
      const int64_t size = int64_t(data.size());
      std::memcpy(&data[16], &size, 8);
    }
    const uint64_t sum = lcnn_checksum(data.data() + HEADER, data.size() - HEADER);
    std::memcpy(&data[24], &sum, 8);
  }
}

// Whether it was run.
bool run(const lcnn_model* model, int64_t batch) {
  std::vector<std::vector<float>> held;
  std::vector<const float*> inputs;
  std::vector<float*> outputs;
  lcnn_tensor tensor;
  for (int i = 0; i < lcnn_input_count(model) + lcnn_output_count(model); ++i) {
    const bool input = i < lcnn_input_count(model);
    if ((input ? lcnn_input(model, i, &tensor) : lcnn_output(model, i - lcnn_input_count(model), &tensor)) != LCNN_OK) std::abort();
    if (tensor.elements > MOST / batch) return false;
    held.emplace_back(size_t(tensor.elements * batch), 0.5f);
    held.back().shrink_to_fit();
  }
  for (int i = 0; i < int(held.size()); ++i)
    if (i < lcnn_input_count(model))
      inputs.push_back(held[size_t(i)].data());
    else
      outputs.push_back(held[size_t(i)].data());
  return lcnn_run(model, batch, inputs.data(), outputs.data()) == LCNN_OK;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const std::vector<uint8_t> good = read_file(argv[1]);
  Random random(std::strtoull(argv[3], nullptr, 10));
  const std::string path = std::string(argv[1]) + ".mutated";
  long opened = 0, ran = 0;
  std::map<std::string, long> reasons;
  for (long i = 0; i < std::atol(argv[2]); ++i) {
    std::vector<uint8_t> data = good;
    mutate(data, random);
    FILE* const file = std::fopen(path.c_str(), "wb");
    if (!file || std::fwrite(data.data(), 1, data.size(), file) != data.size() || std::fclose(file) != 0) return 2;
    lcnn_model* model;
    if (lcnn_open(path.c_str(), 1, &model) != LCNN_OK) {
      const std::string why = lcnn_error();
      ++reasons[why.compare(0, path.size(), path) == 0 ? why.substr(path.size()) : why];
      continue;
    }
    ++opened;
    ran += run(model, 1);
    run(model, 3);
    lcnn_close(model);
  }
  std::remove(path.c_str());
  for (const auto& reason : reasons) std::printf("%6ld %s\n", reason.second, reason.first.c_str());
  std::printf("%ld opened, %ld of them ran\n", opened, ran);
  return 0;
}

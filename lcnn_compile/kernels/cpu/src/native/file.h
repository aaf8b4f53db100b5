// The words and tables of a model file. Nothing in it is trusted: whatever is read is within the file, or refused.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace lcnn {

// What is wrong with a file.
struct BadFile : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void require(bool condition, const char* what) {
  if (!condition) throw BadFile(what);
}

using Wide = __int128;

constexpr int64_t MOST = int64_t(1) << 40;  // of any number of elements, so that products of two fit 128 bits many times over
constexpr int64_t FORMAT = 1;
constexpr size_t ALIGN = 64, HEADER_WORDS = 8;

// What opening a file may cost: as much as its size explains, so that a small one keeps nobody busy. An amount is about a word of memory, or
// as many nanoseconds.
class Work {
 public:
  explicit Work(size_t bytes) : left_((Wide(1) << 28) + 64 * Wide(bytes)) {}
  void spend(Wide amount) {
    require(amount <= left_, "it asks for far more work than its size explains");
    left_ -= amount;
  }

 private:
  Wide left_;
};

// Four sums of words, each multiplied and turned at every step: fast, and no single change of a file leaves it as it was.
inline uint64_t checksum(const uint8_t* data, size_t bytes) {
  constexpr uint64_t PRIME = 0x9E3779B185EBCA87ull;
  uint64_t sums[4] = {1, 2, 3, 4};
  const auto add = [](uint64_t sum, uint64_t word) {
    sum = (sum ^ word) * PRIME;
    return sum << 29 | sum >> 35;
  };
  size_t i = 0;
  uint64_t words[4];
  for (; i + sizeof words <= bytes; i += sizeof words) {
    std::memcpy(words, data + i, sizeof words);
    for (int lane = 0; lane < 4; ++lane) sums[lane] = add(sums[lane], words[lane]);
  }
  std::memset(words, 0, sizeof words);
  std::memcpy(words, data + i, bytes - i);
  uint64_t all = bytes;
  for (int lane = 0; lane < 4; ++lane) all = add(all, add(sums[lane], words[lane]));
  return all;
}

// A file in memory, read-only: processes that open it share its pages.
class Mapping {
 public:
  explicit Mapping(const char* path) {
    const int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe would be waited for
    if (file < 0) throw BadFile(std::string("it cannot be opened: ") + std::strerror(errno));
    struct stat found;
    const bool known = fstat(file, &found) == 0 && S_ISREG(found.st_mode) && found.st_size >= int64_t(8 * HEADER_WORDS);
    if (known) {
      size_ = size_t(found.st_size);
      data_ = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0);
    }
    close(file);
    require(known, "it is no file, or too short");
    require(data_ != MAP_FAILED, "it cannot be mapped to memory");
  }
  ~Mapping() { munmap(data_, size_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  const uint8_t* data() const { return static_cast<const uint8_t*>(data_); }
  size_t size() const { return size_; }

 private:
  void* data_ = MAP_FAILED;
  size_t size_ = 0;
};

// The order of kernels/cpu/serial.py.
enum Type : int64_t { FLOAT32, INT32, INT8, UINT16, UINT8, TYPES };

struct Table {
  Type type;
  int64_t count;
  const void* at;

  const float* floats(int64_t least) const { return of<float>(FLOAT32, least, "a table of floats"); }
  const int32_t* integers(int64_t least) const { return of<int32_t>(INT32, least, "a table of integers"); }

 private:
  template <class T>
  const T* of(Type wanted, int64_t least, const char* what) const {
    require(type == wanted && count >= least, what);
    return static_cast<const T*>(at);
  }
};

// The words of a file, one after the other.
class WordReader {
 public:
  WordReader(const int64_t* first, size_t count) : at_(first), end_(first + count) {}
  int64_t next() {
    require(at_ < end_, "its words end too early");
    return *at_++;
  }
  int64_t next(int64_t least, int64_t most, const char* what) {
    const int64_t value = next();
    require(least <= value && value <= most, what);
    return value;
  }
  // So many words follow at least, for a list whose entries take `each` or more.
  int64_t length(int64_t each, const char* what) {
    const int64_t found = next(0, MOST, what);
    require(found <= (end_ - at_) / each, what);
    return found;
  }
  std::string text() {
    const int64_t bytes = next(0, MOST, "a name is longer than the file");
    require((bytes + 7) / 8 <= end_ - at_, "a name is longer than the file");
    std::string found(reinterpret_cast<const char*>(at_), size_t(bytes));
    at_ += (bytes + 7) / 8;
    require(found.find('\0') == std::string::npos, "a name has a zero in it");
    return found;
  }
  bool ended() const { return at_ == end_; }

 private:
  const int64_t *at_, *end_;
};

struct File {
  Mapping mapping;
  std::vector<Table> tables;
  const int64_t* words;
  size_t count;

  // Header: magic, version, bytes, checksum, number of words, of tables, where their data begins, zero. The tables' entries (type,
  // elements, offset) and the words follow it.
  explicit File(const char* path) : mapping(path) {
    const int64_t* const header = reinterpret_cast<const int64_t*>(mapping.data());
    require(std::memcmp(header, "LCNNPROG", 8) == 0, "it is no model of lcnn_compile");
    if (header[1] != FORMAT)
      throw BadFile("its format is version " + std::to_string(header[1]) + "; this library reads version " + std::to_string(FORMAT));
    require(header[2] == int64_t(mapping.size()), "it is not as long as it says: it was cut off, or more was written to it");
    const int64_t all = (header[2] - 8 * int64_t(HEADER_WORDS)) / 8, listed = header[5], start = header[6];
    require(listed >= 0 && listed <= all / 3 && header[4] >= 0 && header[4] <= all - 3 * listed, "its header states more than it holds");
    require(start >= int64_t(8 * HEADER_WORDS) + 8 * (3 * listed + header[4]) && start <= header[2] && start % int64_t(ALIGN) == 0,
            "its tables begin in a wrong place");
    require(checksum(mapping.data() + 8 * HEADER_WORDS, mapping.size() - 8 * HEADER_WORDS) == uint64_t(header[3]),
            "its checksum is wrong: it is damaged");
    const int64_t* entry = header + HEADER_WORDS;
    constexpr int64_t SIZES[TYPES] = {4, 4, 1, 2, 1};
    for (int64_t i = 0; i < listed; ++i, entry += 3) {
      require(entry[0] >= 0 && entry[0] < TYPES && entry[1] >= 0 && entry[1] <= MOST && entry[2] >= 0, "a table is of no known kind");
      require(entry[2] % int64_t(ALIGN) == 0 && entry[2] <= header[2] - start && entry[1] * SIZES[entry[0]] <= header[2] - start - entry[2] - int64_t(ALIGN),
              "a table reaches past the file");  // kernels read whole vectors
      tables.push_back({Type(entry[0]), entry[1], mapping.data() + start + entry[2]});
    }
    words = entry;
    count = size_t(header[4]);
  }
  const Table& table(int64_t i) const {
    require(i >= 0 && i < int64_t(tables.size()), "it refers to a table that it does not have");
    return tables[size_t(i)];
  }
};

}  // namespace lcnn

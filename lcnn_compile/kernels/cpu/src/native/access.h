// Which bytes calls read and write: nothing may be read that nothing has written before, lest a model shows what lay in memory.
#pragma once

#include <algorithm>

#include "file.h"

namespace lcnn {

// A value for a batch: where it begins, and how much of it there is.
struct Extent {
  int64_t tensor, offset;  // bytes
  int64_t images, image;   // elements from one image to the next
  int64_t elements, bytes; // of an image; of an element
  Wide available() const { return images > 0 ? Wide(images - 1) * image + elements : 0; }
};

// Elements of a value, by strides from `offset` on.
struct Box {
  struct Dimension {
    int64_t size, stride;
  };
  Wide offset;
  std::vector<Dimension> dimensions;
};

// Images of so many elements, `image` apart.
inline Box images_of(int64_t images, int64_t image, Wide elements) { return {0, {{images, image}, {int64_t(elements), 1}}}; }

// What a call reads and writes.
struct Access {
  std::vector<Box> reads;  // of the values that it reads, in order
  Box writes;
};

// Bytes from `begin` to before `end`.
struct Interval {
  Wide begin, end;
};

// A box as intervals that lie apart, in order.
inline std::vector<Interval> intervals_of(const Extent& value, const Box& box, Work& work) {
  std::vector<Box::Dimension> rest;
  Wide first = box.offset, run = 1, count = 1;
  for (Box::Dimension d : box.dimensions) {
    if (d.size < 1) return {};
    if (d.stride < 0) first += Wide(d.size - 1) * d.stride, d.stride = -d.stride;
    if (d.size > 1 && d.stride > 0) rest.push_back(d);
  }
  std::sort(rest.begin(), rest.end(), [](const auto& a, const auto& b) { return a.stride > b.stride; });
  while (!rest.empty() && rest.back().stride <= run) run += Wide(rest.back().size - 1) * rest.back().stride, rest.pop_back();
  for (const Box::Dimension& d : rest) work.spend(count *= d.size);
  std::vector<Interval> found;
  found.reserve(size_t(count));
  for (Wide i = 0; i < count; ++i) {
    Wide at = first, left = i;
    for (size_t d = rest.size(); d-- > 0; left /= rest[d].size) at += left % rest[d].size * rest[d].stride;
    const Wide begin = value.offset + at * value.bytes, end = begin + run * value.bytes;
    if (!found.empty() && found.back().begin <= begin && begin <= found.back().end)
      found.back().end = std::max(found.back().end, end);
    else
      found.push_back({begin, end});
  }
  return found;
}

// The bytes of one memory that have been written so far: intervals that do not touch, in order.
class Written {
 public:
  void add(const Extent& value, const Box& box, Work& work) {
    std::vector<Interval> fresh = intervals_of(value, box, work), all;
    const auto before = [](const Interval& a, const Interval& b) { return a.begin < b.begin; };
    if (!std::is_sorted(fresh.begin(), fresh.end(), before)) std::sort(fresh.begin(), fresh.end(), before);
    work.spend(Wide(fresh.size() + known_.size()));
    all.reserve(fresh.size() + known_.size());
    std::merge(known_.begin(), known_.end(), fresh.begin(), fresh.end(), std::back_inserter(all), before);
    known_.clear();
    for (const Interval& one : all)
      if (!known_.empty() && one.begin <= known_.back().end)
        known_.back().end = std::max(known_.back().end, one.end);
      else
        known_.push_back(one);
  }
  bool covers(const Interval& wanted) const {
    auto after = std::upper_bound(known_.begin(), known_.end(), wanted.begin, [](Wide at, const Interval& one) { return at < one.begin; });
    return wanted.begin >= wanted.end || (after != known_.begin() && wanted.end <= (--after)->end);
  }
  bool covers(const Extent& value, const Box& box, Work& work) const {
    const std::vector<Interval> wanted = intervals_of(value, box, work);
    return std::all_of(wanted.begin(), wanted.end(), [&](const Interval& one) { return covers(one); });
  }

 private:
  std::vector<Interval> known_;
};

}  // namespace lcnn

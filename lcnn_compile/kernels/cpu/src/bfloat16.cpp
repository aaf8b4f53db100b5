// The tables of the bfloat16 kernels.
#include "bfloat16.h"

namespace lcnn {

constexpr HalfKernels::HalfKernels() { fill<FILTERS, vectors_for(FILTERS)>(); }

template <class Kind, class Offsets>
constexpr NarrowKernels<Kind, Offsets>::NarrowKernels() {
  fill<BLOCK>();
}

constexpr HalfKernels half_kernels;
constexpr NarrowKernels<Pairs, Channels> narrow_form_pairs;
constexpr NarrowKernels<Pairs, const int32_t*> narrow_look_up_pairs;

}  // namespace lcnn

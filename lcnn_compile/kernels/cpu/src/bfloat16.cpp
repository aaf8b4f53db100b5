// The tables of the bfloat16 kernels.
#include "bfloat16.h"

namespace lcnn {

HalfKernels::HalfKernels() { fill<FILTERS, vectors_for(FILTERS)>(); }

template <class Kind, class Offsets>
NarrowKernels<Kind, Offsets>::NarrowKernels() {
  fill<BLOCK>();
}

const HalfKernels half_kernels;
const NarrowKernels<Pairs, Channels> narrow_form_pairs;
const NarrowKernels<Pairs, const int32_t*> narrow_look_up_pairs;

}  // namespace lcnn

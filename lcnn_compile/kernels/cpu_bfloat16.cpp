// The tables of the bfloat16 kernels.
#include "cpu_call.h"

namespace lcnn {

HalfKernels::HalfKernels() { fill<FILTERS, vectors_for(FILTERS)>(); }

template <class Offsets>
NarrowPairKernels<Offsets>::NarrowPairKernels() {
  fill<BLOCK>();
}

const HalfKernels half_kernels;
const NarrowPairKernels<Channels> narrow_form_pairs;
const NarrowPairKernels<const int32_t*> narrow_look_up_pairs;

}  // namespace lcnn

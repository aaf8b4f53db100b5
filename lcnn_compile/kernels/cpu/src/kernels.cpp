// The tables of the float32 kernels.
#include "narrow.h"

namespace lcnn {

Kernels::Kernels() { fill<FILTERS, vectors_for(FILTERS)>(); }

template <class Kind, class Offsets>
NarrowKernels<Kind, Offsets>::NarrowKernels() {
  fill<BLOCK>();
}

const Kernels kernels;
const NarrowKernels<Singles, Channels> narrow_form;
const NarrowKernels<Singles, const int32_t*> narrow_look_up;

}  // namespace lcnn

// The tables of the float32 kernels.
#include "narrow.h"

namespace lcnn {

constexpr Kernels::Kernels() { fill<FILTERS, vectors_for(FILTERS)>(); }

template <class Kind, class Offsets>
constexpr NarrowKernels<Kind, Offsets>::NarrowKernels() {
  fill<BLOCK>();
}

constexpr Kernels kernels;
constexpr NarrowKernels<Singles, Channels> narrow_form;
constexpr NarrowKernels<Singles, const int32_t*> narrow_look_up;

}  // namespace lcnn

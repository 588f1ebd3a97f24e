// Where a call of the part `cuda` runs.
#pragma once
#include <tuple>

#include "bindings.h"
#include "otkd_fast/cuda.h"

namespace otkd_fast {

// device, stream
using Place = std::tuple<int, Address>;

inline cuda::Target target_of(const Place& place) { return {std::get<0>(place), pointer<void>(std::get<1>(place))}; }

}  // namespace otkd_fast

#include "otkd_fast/masses.h"

#include <tuple>

#include "bindings.h"

namespace otkd_fast {
namespace {

// Masses as (address, size, elements from problem to problem, elements from atom to atom).
using View = std::tuple<Address, int64_t, int64_t, int64_t>;

bool right(int dtype, const View& a, const View& b, int64_t batch, double tolerance) {
    return with_type(dtype, [&](auto type) {
        using T = decltype(type);
        const auto view = [](const View& v) {
            return MassView<T>{pointer<T>(std::get<0>(v)), std::get<1>(v), std::get<2>(v), std::get<3>(v)};
        };
        return masses_right<T>(view(a), view(b), batch, tolerance);
    });
}

}  // namespace

void bind_masses(pybind11::module_& module) {
    module.def("masses_right", &right, "Whether masses are >= 0 and their totals positive, finite and equal.");
}

}  // namespace otkd_fast

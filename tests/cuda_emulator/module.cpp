// A Python module of emulated kernels: what VATT_BIND names binds the kernels, the rest steers the emulator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "controls.h"

namespace vatt {
void VATT_BIND(pybind11::module_& m);
}

PYBIND11_MODULE(VATT_MODULE, m) {
  vatt::VATT_BIND(m);
  m.def("set_order", &vatt::emulator::set_order);
  m.def("take_counts", &vatt::emulator::take_counts);
}

// The Python module of emulated kernels, compiled once: of the functions below it calls those that are linked with it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "controls.h"

namespace vatt {
__attribute__((weak)) void bind_drop_token(pybind11::module_& m);
__attribute__((weak)) void bind_faults(pybind11::module_& m);
__attribute__((weak)) void bind_nce_device(pybind11::module_& m);
__attribute__((weak)) void bind_tokenize_device(pybind11::module_& m);
__attribute__((weak)) void bind_wgmma_faults(pybind11::module_& m);
}  // namespace vatt

PYBIND11_MODULE(emulated, m) {
  for (const auto bind : {vatt::bind_drop_token, vatt::bind_faults, vatt::bind_nce_device, vatt::bind_tokenize_device,
                          vatt::bind_wgmma_faults}) {
    if (bind) bind(m);
  }
  m.def("set_order", &vatt::emulator::set_order);
  m.def("take_counts", &vatt::emulator::take_counts);
}

// The Python module vatt_engine._C: one bind_<op>(m) line per op.
#include <pybind11/pybind11.h>

#include <string>

#include "clones.h"

namespace vatt {
void bind_attention(pybind11::module_& m);
void bind_color_jitter(pybind11::module_& m);
void bind_crc32c(pybind11::module_& m);
void bind_drop_token(pybind11::module_& m);
void bind_dropout(pybind11::module_& m);
void bind_nce_device(pybind11::module_& m);
void bind_tokenize(pybind11::module_& m);
void bind_tokenize_device(pybind11::module_& m);
}  // namespace vatt

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native implementations of vatt_engine's ops; tensors come in as DLPack capsules.";
  m.attr("__version__") = VATT_VERSION;
  m.attr("has_cuda") = static_cast<bool>(VATT_HAS_CUDA);
  m.attr("cpu_level") = vatt::cpu_level();
  m.attr("cuda_archs") = std::string(VATT_CUDA_ARCHS);
  vatt::bind_attention(m);
  vatt::bind_color_jitter(m);
  vatt::bind_crc32c(m);
  vatt::bind_drop_token(m);
  vatt::bind_dropout(m);
  vatt::bind_nce_device(m);
  vatt::bind_tokenize(m);
  vatt::bind_tokenize_device(m);
}

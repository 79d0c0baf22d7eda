// The Python side of nce's CUDA kernels: vatt_engine/ops/nce_chunked.py allocates and merges the parts,
// here only what would corrupt memory is checked.
#include <pybind11/pybind11.h>

#if VATT_HAS_CUDA
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>

#include "check.h"
#include "nce.h"
#include "tensor_view.h"
#endif

namespace py = pybind11;

namespace vatt {

#if VATT_HAS_CUDA
namespace {

// Implementations that can be asked for by name.
struct Path {
  const char* name;
  void (*stats)(const NceStatsParams&, DType, int, void*);
  int64_t columns;
  bool float32;
};

constexpr Path kPaths[] = {
    {"mma", nce_stats_mma, kNceMmaColumns, true},
    {"wgmma", nce_stats_wgmma, kNceWgmmaColumns, false},
};

// The memory of a contiguous tensor of this dtype and shape on the device of `like`.
void* checked(const char* name, const TensorView& tensor, DType dtype, std::initializer_list<int64_t> shape,
              const TensorView& like) {
  std::string wanted;
  for (const int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  const bool shaped = tensor.dtype == dtype && tensor.ndim == static_cast<int>(shape.size()) &&
                      std::equal(shape.begin(), shape.end(), tensor.shape.begin()) && tensor.is_contiguous();
  VATT_CHECK(shaped, "nce: " << name << " must be contiguous [" << wanted << "] of its dtype, got shape "
                             << tensor.shape_text() << ".");
  VATT_CHECK(same_device(tensor, like), "nce: " << name << " must be on the device of a, got another.");
  return tensor.data;
}

void stats(const std::string& name, const TensorView& a, const TensorView& b, const TensorView& row_scale,
           const TensorView& column_scale, const std::optional<TensorView>& mask, int64_t first_sample,
           std::optional<float> offset, const TensorView& row_part, const TensorView& column_part,
           const TensorView& positive, uintptr_t stream) {
  const auto* path = std::find_if(std::begin(kPaths), std::end(kPaths), [&](const Path& p) { return name == p.name; });
  VATT_CHECK(path != std::end(kPaths), "nce: path must be one of this module's, got " << name << ".");
  VATT_CHECK(a.device.device_type == kKernelDevice,
             "nce: a must be on cuda, got DLPack device type " << a.device.device_type << ".");
  VATT_CHECK(a.is_float() && (path->float32 || a.dtype != DType::kFloat) && a.ndim == 2 && b.ndim == 3 && !a.is_empty(),
             "nce: a must be a matrix of floats that " << name << " multiplies, got shape " << a.shape_text() << ".");
  NceStatsParams p{};
  p.rows = a.shape[0], p.dim = a.shape[1], p.candidates = b.shape[1], p.columns = b.shape[0] * b.shape[1];
  VATT_CHECK(!b.is_empty() && p.dim < (1 << 24), "nce: b must have rows, got shape " << b.shape_text() << ".");
  const auto given = [&](const char* which, const TensorView& tensor, DType dtype,
                         std::initializer_list<int64_t> shape) { return checked(which, tensor, dtype, shape, a); };
  const auto floats = [&](const char* which, const TensorView& tensor, std::initializer_list<int64_t> shape) {
    return static_cast<float*>(given(which, tensor, DType::kFloat, shape));
  };
  p.a = given("a", a, a.dtype, {p.rows, p.dim});
  p.b = given("b", b, a.dtype, {b.shape[0], p.candidates, p.dim});
  p.row_scale = floats("row_scale", row_scale, {p.rows});
  p.column_scale = floats("column_scale", column_scale, {b.shape[0], p.candidates});
  if (mask) p.mask = static_cast<const uint8_t*>(given("mask", *mask, DType::kUInt8, {b.shape[0]}));
  p.first_sample = first_sample;
  p.has_offset = offset.has_value(), p.offset = offset.value_or(0.0f);
  p.row_part = floats("row_part", row_part, {tiles_of(p.columns, path->columns), p.rows});
  p.column_part = floats("column_part", column_part, {tiles_of(p.rows, kNceRows), p.columns});
  p.positive = floats("positive", positive, {p.rows, p.candidates});
  py::gil_scoped_release release;
  path->stats(p, a.dtype, a.device.device_id, reinterpret_cast<void*>(stream));
}

}  // namespace
#endif

void bind_nce_device([[maybe_unused]] py::module_& m) {
#if VATT_HAS_CUDA
  m.def("nce_stats_cuda", &stats, py::arg("path"), py::arg("a"), py::arg("b"), py::arg("row_scale"),
        py::arg("column_scale"), py::arg("mask").none(true), py::arg("first_sample"), py::arg("offset").none(true),
        py::arg("row_part"), py::arg("column_part"), py::arg("positive"), py::arg("stream"),
        "Write each tile's sums of exp(s - offset), or log-sum-exps of s, over its columns and over its rows.");
#endif
}

}  // namespace vatt

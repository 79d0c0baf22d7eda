// The Python side of tokenize's CUDA kernels. Tensors come in as the kernels take them: the launchers in
// vatt_engine/ops/tokenize_native.py convert and allocate, here only what would corrupt memory is checked.
#include <pybind11/pybind11.h>

#if VATT_HAS_CUDA
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>

#include "check.h"
#include "tensor_view.h"
#include "tokenize_device.h"
#include "tokenize_params.h"
#endif

namespace py = pybind11;

namespace vatt {

#if VATT_HAS_CUDA
namespace {

using Optional = std::optional<TensorView>;

// Implementations that can be asked for by name.
struct Path {
  const char* name;
  void (*fwd)(const TokenizeFwdParams&, DType, int, void*);
  void (*bwd_weight)(const TokenizeBwdParams&, DType, int, void*);
  bool float32;
};

constexpr Path kPaths[] = {
    {"mma", tokenize_fwd_mma, tokenize_bwd_weight_mma, true},
    {"wgmma", tokenize_fwd_wgmma, tokenize_bwd_weight_wgmma, false},
};

const Path& path_of(const std::string& name, DType dtype) {
  const auto* found = std::find_if(std::begin(kPaths), std::end(kPaths), [&](const Path& p) { return name == p.name; });
  VATT_CHECK(found != std::end(kPaths), "tokenize: path must be one of this module's, got " << name << ".");
  VATT_CHECK(dtype != DType::kFloat || found->float32, "tokenize: " << name << " must multiply halves, got float32.");
  return *found;
}

std::string text_of(std::initializer_list<int64_t> shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// A contiguous tensor of this shape on the device of `like`.
void check_tensor(const char* name, const TensorView& tensor, bool dtype_fits, const char* dtype,
                  std::initializer_list<int64_t> shape, const TensorView& like) {
  const bool shaped = tensor.ndim == static_cast<int>(shape.size()) &&
                      std::equal(shape.begin(), shape.end(), tensor.shape.begin()) && tensor.is_contiguous();
  VATT_CHECK(dtype_fits && shaped, "tokenize: " << name << " must be contiguous " << dtype << " " << text_of(shape)
                                                << ", got shape " << tensor.shape_text() << ".");
  VATT_CHECK(same_device(tensor, like), "tokenize: " << name << " must be on the device of the others, got another.");
}

float* floats(const char* name, const Optional& tensor, std::initializer_list<int64_t> shape, const TensorView& like) {
  if (!tensor) return nullptr;
  check_tensor(name, *tensor, tensor->dtype == DType::kFloat, "float32", shape, like);
  return tensor->as<float>();
}

TokenizeRows rows_of(const TensorView& video, const Optional& keep, const Optional& crop, const Optional& flip,
                     const std::array<int64_t, 2>& size, const std::array<int64_t, 3>& patch, bool agg) {
  VATT_CHECK(video.device.device_type == kKernelDevice,
             "tokenize: video must be on cuda, got DLPack device type " << video.device.device_type << ".");
  for (const Optional* other : {&keep, &crop, &flip}) {
    VATT_CHECK(!*other || same_device(**other, video),
               "tokenize: keep, crop and flip must be on the device of video, got another.");
  }
  const TokenizeRows rows{patch_params(video, keep, crop, flip, size, patch), video.shape[2] - size[0],
                          video.shape[3] - size[1], agg};
  const PatchParams& p = rows.patches;
  constexpr int64_t kMost = int64_t{1} << 31;
  const int64_t span = (p.patch_t - 1) * p.stride_t + (p.patch_h - 1) * p.stride_y + run_length(p);
  VATT_CHECK(span < kMost && patch_size(p) < kMost - 1024,
             "tokenize: a patch must span fewer than 2^31 elements, got " << std::max(span, patch_size(p)) << ".");
  return rows;
}

void fwd(const std::string& path, const TensorView& video, const TensorView& weight, const Optional& bias,
         const Optional& pos, const Optional& agg, const Optional& keep, const Optional& crop, const Optional& flip,
         const TensorView& out, const std::array<int64_t, 2>& size, const std::array<int64_t, 3>& patch,
         uintptr_t stream) {
  TokenizeFwdParams params{};
  params.rows = rows_of(video, keep, crop, flip, size, patch, agg.has_value());
  const PatchParams& p = params.rows.patches;
  const int64_t dim = params.dim = weight.shape[0];
  check_tensor("weight", weight, weight.is_float(), "float32, bfloat16 or float16", {dim, patch_size(p)}, video);
  check_tensor("out", out, out.is_float(), "float32, bfloat16 or float16", {p.batch, params.rows.per_sample(), dim},
               video);
  params.weight = weight.data;
  params.bias = floats("bias", bias, {dim}, video);
  params.pos = floats("pos", pos, {num_tokens(p), dim}, video);
  params.agg = floats("agg", agg, {dim}, video);
  params.out = out.data;
  params.out_dtype = out.dtype;
  const Path& implementation = path_of(path, weight.dtype);
  py::gil_scoped_release release;
  implementation.fwd(params, weight.dtype, video.device.device_id, reinterpret_cast<void*>(stream));
}

void bwd_weight(const std::string& path, const TensorView& grad, const TensorView& video, const Optional& keep,
                const Optional& crop, const Optional& flip, const TensorView& out, bool agg,
                const std::array<int64_t, 2>& size, const std::array<int64_t, 3>& patch, uintptr_t stream) {
  TokenizeBwdParams params{};
  params.rows = rows_of(video, keep, crop, flip, size, patch, agg);
  const PatchParams& p = params.rows.patches;
  const int64_t dim = params.dim = out.shape[1];
  const int64_t splits = params.splits = out.shape[0];
  check_tensor("grad", grad, grad.is_float(), "float32, bfloat16 or float16", {p.batch, params.rows.per_sample(), dim},
               video);
  check_tensor("out", out, out.is_float(), "float32, bfloat16 or float16", {splits, dim, patch_size(p)}, video);
  VATT_CHECK(splits >= 1 && splits < 1 << 16, "tokenize: out must have 1 to 65535 splits, got " << splits << ".");
  params.grad = grad.data;
  params.out = out.data;
  params.out_dtype = out.dtype;
  const Path& implementation = path_of(path, grad.dtype);
  py::gil_scoped_release release;
  implementation.bwd_weight(params, grad.dtype, video.device.device_id, reinterpret_cast<void*>(stream));
}

}  // namespace
#endif

void bind_tokenize_device([[maybe_unused]] py::module_& m) {
#if VATT_HAS_CUDA
  m.def("tokenize_fwd_cuda", &fwd, py::arg("path"), py::arg("video"), py::arg("weight"), py::arg("bias").none(true),
        py::arg("pos").none(true), py::arg("agg").none(true), py::arg("keep").none(true), py::arg("crop").none(true),
        py::arg("flip").none(true), py::arg("out"), py::arg("size"), py::arg("patch"), py::arg("stream"),
        "Write the tokens of the kept patches to out [B, K + A, D]; the product runs in the dtype of weight.");
  m.def("tokenize_bwd_weight_cuda", &bwd_weight, py::arg("path"), py::arg("grad"), py::arg("video"),
        py::arg("keep").none(true), py::arg("crop").none(true), py::arg("flip").none(true), py::arg("out"),
        py::arg("agg"), py::arg("size"), py::arg("patch"), py::arg("stream"),
        "Write the weight's gradient to out [splits, D, t*h*w*C], whose sum over the splits it is.");
  m.def("tokenize_bwd_splits", &tokenize_bwd_splits, py::arg("rows"), py::arg("dim"), py::arg("patch_size"),
        py::arg("device"), "How many splits of the sum over rows suit the device.");
#endif
}

}  // namespace vatt

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

#ifdef VATT_EMULATE
constexpr int kDevice = kDLCPU;  // tests run the kernels there
#else
constexpr int kDevice = kDLCUDA;
#endif

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
  VATT_CHECK(video.device.device_type == kDevice,
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

void fwd(const std::string& path, const TensorView& video, const TensorView& weight, const TensorView& weight_sum,
         const Optional& bias, const Optional& pos, const Optional& agg, const Optional& keep, const Optional& crop,
         const Optional& flip, const TensorView& out, const std::array<int64_t, 2>& size,
         const std::array<int64_t, 3>& patch, uintptr_t stream) {
  TokenizeFwdParams params{};
  params.rows = rows_of(video, keep, crop, flip, size, patch, agg.has_value());
  const PatchParams& p = params.rows.patches;
  const int64_t dim = params.dim = weight.shape[0];
  check_tensor("weight", weight, weight.is_float(), "float32, bfloat16 or float16", {dim, patch_size(p)}, video);
  check_tensor("out", out, out.is_float(), "float32, bfloat16 or float16", {p.batch, params.rows.per_sample(), dim},
               video);
  params.weight = weight.data;
  params.weight_sum = floats("weight_sum", weight_sum, {dim}, video);
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
                const Optional& crop, const Optional& flip, const TensorView& grad_sum, const Optional& workspace,
                const TensorView& dweight, bool agg, const std::array<int64_t, 2>& size,
                const std::array<int64_t, 3>& patch, uintptr_t stream) {
  TokenizeBwdParams params{};
  params.rows = rows_of(video, keep, crop, flip, size, patch, agg);
  const PatchParams& p = params.rows.patches;
  const int64_t dim = params.dim = dweight.shape[0];
  check_tensor("grad", grad, grad.is_float(), "float32, bfloat16 or float16", {p.batch, params.rows.per_sample(), dim},
               video);
  check_tensor("dweight", dweight, dweight.is_float(), "float32, bfloat16 or float16", {dim, patch_size(p)}, video);
  params.grad = grad.data;
  params.grad_sum = floats("grad_sum", grad_sum, {dim}, video);
  params.splits = workspace ? workspace->shape[0] : 1;
  params.workspace = floats("workspace", workspace, {params.splits, dim, patch_size(p)}, video);
  VATT_CHECK(params.splits >= 1 && params.splits < 1 << 16,
             "tokenize: workspace must have 1 to 65535 splits, got " << params.splits << ".");
  params.dweight = dweight.data;
  params.dweight_dtype = dweight.dtype;
  const Path& implementation = path_of(path, grad.dtype);
  py::gil_scoped_release release;
  implementation.bwd_weight(params, grad.dtype, video.device.device_id, reinterpret_cast<void*>(stream));
}

void bwd_rows(const TensorView& grad, const Optional& keep, const Optional& dbias, const Optional& dpos,
              const Optional& dagg, const TensorView& workspace, bool agg, uintptr_t stream) {
  VATT_CHECK(grad.device.device_type == kDevice && grad.ndim == 3 && grad.is_float() && grad.is_contiguous(),
             "tokenize: grad must be contiguous float32, bfloat16 or float16 [B, K, D] on cuda, got shape "
                 << grad.shape_text() << ".");
  VATT_CHECK(grad.shape[1] >= agg && (agg || !dagg), "tokenize: dagg must be None without AGG rows, got a tensor.");
  TokenizeBwdRowsParams params{};
  params.grad = grad.data;
  params.grad_dtype = grad.dtype;
  params.batch = grad.shape[0];
  params.agg = agg;
  params.kept = grad.shape[1] - agg;
  params.dim = grad.shape[2];
  params.num_tokens = dpos ? dpos->shape[0] : 0;
  if (keep) {
    const int last = keep->ndim - 1;
    const bool shaped = keep->ndim == 1 || (keep->ndim == 2 && keep->shape[0] == params.batch);
    VATT_CHECK(keep->dtype == DType::kInt64 && shaped && keep->shape[last] == params.kept && same_device(*keep, grad),
               "tokenize: keep must be int64 [" << params.kept << "] or [" << params.batch << ", " << params.kept
                                                << "] on the device of grad, got shape " << keep->shape_text() << ".");
    params.keep = keep->as<int64_t>();
    params.keep_stride_b = keep->ndim == 2 ? keep->strides[0] : 0;
    params.keep_stride_k = keep->strides[last];
  }
  VATT_CHECK(keep || !dpos || params.num_tokens == params.kept,
             "tokenize: dpos must have " << params.kept << " rows, got " << params.num_tokens << ".");
  params.dbias = floats("dbias", dbias, {params.dim}, grad);
  params.dpos = floats("dpos", dpos, {params.num_tokens, params.dim}, grad);
  params.dagg = floats("dagg", dagg, {params.dim}, grad);
  params.chunks = workspace.shape[0];
  params.workspace = floats("workspace", workspace, {params.chunks, params.dim}, grad);
  VATT_CHECK(params.chunks >= 1, "tokenize: workspace must have at least one row, got none.");
  py::gil_scoped_release release;
  tokenize_bwd_rows(params, grad.device.device_id, reinterpret_cast<void*>(stream));
}

}  // namespace
#endif

void bind_tokenize_device([[maybe_unused]] py::module_& m) {
#if VATT_HAS_CUDA
  m.def("tokenize_fwd_cuda", &fwd, py::arg("path"), py::arg("video"), py::arg("weight"), py::arg("weight_sum"),
        py::arg("bias").none(true), py::arg("pos").none(true), py::arg("agg").none(true), py::arg("keep").none(true),
        py::arg("crop").none(true), py::arg("flip").none(true), py::arg("out"), py::arg("size"), py::arg("patch"),
        py::arg("stream"),
        "Write the tokens of the kept patches to out [B, K + A, D]; the product runs in the dtype of weight.");
  m.def("tokenize_bwd_weight_cuda", &bwd_weight, py::arg("path"), py::arg("grad"), py::arg("video"),
        py::arg("keep").none(true), py::arg("crop").none(true), py::arg("flip").none(true), py::arg("grad_sum"),
        py::arg("workspace").none(true), py::arg("dweight"), py::arg("agg"), py::arg("size"), py::arg("patch"),
        py::arg("stream"),
        "Write the weight's gradient to dweight [D, t*h*w*C]: at once, or in the splits of workspace [splits, ...].");
  m.def(
      "tokenize_bwd_rows_cuda", &bwd_rows, py::arg("grad"), py::arg("keep").none(true), py::arg("dbias").none(true),
      py::arg("dpos").none(true), py::arg("dagg").none(true), py::arg("workspace"), py::arg("agg"), py::arg("stream"),
      "Sum the rows of grad to dbias [D], dpos [N, D] (zero before) and dagg [D]; workspace [chunks, D] holds partial "
      "sums. The order is fixed, but for dpos where keep is per sample.");
  m.def("tokenize_bwd_splits", &tokenize_bwd_splits, py::arg("rows"), py::arg("dim"), py::arg("patch_size"),
        py::arg("device"), "How many splits of the sum over rows suit the device.");
#endif
}

}  // namespace vatt

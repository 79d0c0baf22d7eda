#include "tokenize.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "check.h"
#include "parallel.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace vatt {
namespace {

template <typename T>
void copy_patch(const PatchParams& p, int64_t b, int64_t k) {
  const uint8_t* corner = p.video + patch_offset(p, b, kept_token(p, b, k));
  const int64_t runs = p.patch_t * p.patch_h;
  T* out = static_cast<T*>(p.out) + (b * p.kept + k) * runs * p.run;
  for (int64_t r = 0; r < runs; ++r, out += p.run) {
    const uint8_t* in = corner + run_offset(p, r);
    for (int64_t i = 0; i < p.run; ++i) out[i] = scale_pixel<T>(in[i]);
  }
}

template <typename T>
void tokenize_patches_cpu(const PatchParams& p, int num_threads) {
  constexpr int64_t kGrain = 32;  // patches; fewer do not pay for a thread
  parallel_for(p.batch * p.kept, num_threads, kGrain, [&p](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) copy_patch<T>(p, i / p.kept, i % p.kept);
  });
}

// A token outside the grid would read outside the video. On a GPU the kernel checks, to spare a synchronisation.
void check_keep(const PatchParams& p, int64_t rows) {
  if (!p.keep) return;
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t k = 0; k < p.kept; ++k) {
      const int64_t token = kept_token(p, b, k);
      VATT_CHECK(token >= 0 && token < num_tokens(p),
                 "tokenize: keep must hold token numbers in [0, " << num_tokens(p) << "), got " << token << ".");
    }
  }
}

PatchParams make_params(const TensorView& video, const std::optional<TensorView>& keep, const TensorView& out,
                        const std::array<int64_t, 3>& patch) {
  VATT_CHECK(video.dtype == DType::kUInt8 && video.ndim == 5,
             "tokenize: video must be uint8 [B, T, H, W, C], got shape " << video.shape_text() << ".");
  VATT_CHECK(video.is_contiguous(3), "tokenize: video must have rows [W, C] without gaps, got strides ["
                                         << video.strides[3] << ", " << video.strides[4] << "].");
  VATT_CHECK(patch[0] > 0 && patch[1] > 0 && patch[2] > 0,
             "tokenize: patch must be positive, got [" << patch[0] << ", " << patch[1] << ", " << patch[2] << "].");
  PatchParams p{};
  p.video = video.as<uint8_t>();
  p.out = out.data;
  p.batch = video.shape[0];
  p.video_stride_b = video.strides[0];
  p.video_stride_t = video.strides[1];
  p.video_stride_y = video.strides[2];
  p.grid_t = video.shape[1] / patch[0];
  p.grid_h = video.shape[2] / patch[1];
  p.grid_w = video.shape[3] / patch[2];
  p.patch_t = patch[0];
  p.patch_h = patch[1];
  p.run = patch[2] * video.shape[4];
  p.kept = num_tokens(p);
  if (keep) {
    VATT_CHECK(keep->dtype == DType::kInt64 && (keep->ndim == 1 || (keep->ndim == 2 && keep->shape[0] == p.batch)),
               "tokenize: keep must be int64 [K] or [" << p.batch << ", K], got shape " << keep->shape_text() << ".");
    const int last = keep->ndim - 1;
    p.keep = keep->as<int64_t>();
    p.kept = keep->shape[last];
    p.keep_stride_b = keep->ndim == 2 ? keep->strides[0] : 0;
    p.keep_stride_k = keep->strides[last];
  }
  const int64_t size = p.patch_t * p.patch_h * p.run;
  VATT_CHECK(out.is_float() && out.is_contiguous() && out.ndim == 3 && out.shape[0] == p.batch &&
                 out.shape[1] == p.kept && out.shape[2] == size,
             "tokenize: out must be contiguous float32, bfloat16 or float16 ["
                 << p.batch << ", " << p.kept << ", " << size << "], got shape " << out.shape_text() << ".");
  return p;
}

void tokenize_patches(const TensorView& video, const std::optional<TensorView>& keep, const TensorView& out,
                      const std::array<int64_t, 3>& patch, int num_threads, uintptr_t stream) {
  const auto same_device = [&video](const TensorView& other) {
    return other.device.device_type == video.device.device_type && other.device.device_id == video.device.device_id;
  };
  VATT_CHECK(same_device(out) && (!keep || same_device(*keep)),
             "tokenize: video, keep and out must be on one device, got several.");
  const PatchParams p = make_params(video, keep, out, patch);
  if (p.batch * p.kept == 0) return;
  py::gil_scoped_release release;
  if (video.is_cuda()) {
#if VATT_HAS_CUDA
    tokenize_patches_cuda(p, out.dtype, video.device.device_id, reinterpret_cast<void*>(stream));
    return;
#else
    (void)stream;
    VATT_CHECK(false, "tokenize: video must be on the cpu, got cuda. The native module was built without CUDA.");
#endif
  }
  VATT_CHECK(video.device.device_type == kDLCPU,
             "tokenize: video must be on cpu or cuda, got DLPack device type " << video.device.device_type << ".");
  check_keep(p, p.keep_stride_b ? p.batch : 1);
  VATT_DISPATCH_FLOAT(out.dtype, T, tokenize_patches_cpu<T>(p, num_threads));
}

}  // namespace

void bind_tokenize(py::module_& m) {
  m.def("tokenize_patches", &tokenize_patches, py::arg("video"), py::arg("keep").none(true), py::arg("out"),
        py::arg("patch"), py::arg("num_threads"), py::arg("stream"),
        "Write the scaled patches of the kept tokens of uint8 video [B, T, H, W, C] to out [B, K, t*h*w*C].");
}

}  // namespace vatt

// PatchParams out of the tensors of a call, checked as far as memory safety asks for.
#pragma once

#include <array>
#include <optional>

#include "check.h"
#include "tensor_view.h"
#include "tokenize.h"

namespace vatt {

inline PatchParams patch_params(const TensorView& video, const std::optional<TensorView>& keep,
                                const std::optional<TensorView>& crop, const std::optional<TensorView>& flip,
                                const std::array<int64_t, 2>& size, const std::array<int64_t, 3>& patch) {
  VATT_CHECK((video.dtype == DType::kUInt8 || video.is_float()) && video.ndim == 5,
             "tokenize: video must be uint8 or float [B, T, H, W, C], got shape " << video.shape_text() << ".");
  VATT_CHECK(video.is_contiguous(3), "tokenize: video must have rows [W, C] without gaps, got strides ["
                                         << video.strides[3] << ", " << video.strides[4] << "].");
  VATT_CHECK(patch[0] > 0 && patch[1] > 0 && patch[2] > 0,
             "tokenize: patch must be positive, got [" << patch[0] << ", " << patch[1] << ", " << patch[2] << "].");
  const bool fits = size[0] > 0 && size[0] <= video.shape[2] && size[1] > 0 && size[1] <= video.shape[3];
  VATT_CHECK(fits || video.is_empty(), "tokenize: size must lie within the frames of video "
                                           << video.shape_text() << ", got [" << size[0] << ", " << size[1] << "].");
  PatchParams p{};
  p.video = video.data;
  p.video_dtype = video.dtype;
  p.batch = video.shape[0];
  p.stride_b = video.strides[0];
  p.stride_t = video.strides[1];
  p.stride_y = video.strides[2];
  p.width = size[1];
  p.channels = video.shape[4];
  p.grid_t = video.shape[1] / patch[0];
  p.grid_h = size[0] / patch[1];
  p.grid_w = size[1] / patch[2];
  p.patch_t = patch[0];
  p.patch_h = patch[1];
  p.patch_w = patch[2];
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
  if (crop) {
    VATT_CHECK(
        crop->dtype == DType::kInt64 && crop->ndim == 2 && crop->shape[0] == p.batch && crop->shape[1] == 2 &&
            crop->is_contiguous(),
        "tokenize: crop must be contiguous int64 [" << p.batch << ", 2], got shape " << crop->shape_text() << ".");
    p.crop = crop->as<int64_t>();
  }
  if (flip) {
    VATT_CHECK(flip->dtype == DType::kUInt8 && flip->ndim == 1 && flip->shape[0] == p.batch && flip->is_contiguous(),
               "tokenize: flip must be contiguous uint8 [" << p.batch << "], got shape " << flip->shape_text() << ".");
    p.flip = flip->as<uint8_t>();
  }
  return p;
}

}  // namespace vatt

// Voxel patches of uint8 video: out[b, k, (t, y, x, c)] = video[b, T + t, Y + y, X + x, c] * 2 / 255 - 1, where
// (T, Y, X) is the corner of kept token k. The index math here serves the CPU code and the CUDA kernel alike.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace vatt {

struct PatchParams {
  const uint8_t* video;  // [batch, T, H, W, C], strides of the first three below, pixels of a row without gaps
  const int64_t* keep;   // [batch or 1, kept] token numbers, or null for all
  void* out;             // [batch, kept, patch_t * patch_h * run], contiguous
  int64_t batch, kept;
  int64_t video_stride_b, video_stride_t, video_stride_y;
  int64_t keep_stride_b, keep_stride_k;
  int64_t grid_t, grid_h, grid_w;  // tokens along each axis; what remains of the video is ignored
  int64_t patch_t, patch_h;
  int64_t run;  // patch_w * C: bytes of one patch that lie in a row
};

VATT_HOST_DEVICE int64_t num_tokens(const PatchParams& p) { return p.grid_t * p.grid_h * p.grid_w; }

// The token number of kept position k.
VATT_HOST_DEVICE int64_t kept_token(const PatchParams& p, int64_t b, int64_t k) {
  return p.keep ? p.keep[b * p.keep_stride_b + k * p.keep_stride_k] : k;
}

// Where the corner of a token's patch lies in the video.
VATT_HOST_DEVICE int64_t patch_offset(const PatchParams& p, int64_t b, int64_t token) {
  const int64_t column = token % p.grid_w;
  const int64_t row = token / p.grid_w % p.grid_h;
  const int64_t time = token / p.grid_w / p.grid_h;
  return b * p.video_stride_b + time * p.patch_t * p.video_stride_t + row * p.patch_h * p.video_stride_y +
         column * p.run;
}

// Where run r = t * patch_h + y of a patch lies, from its corner.
VATT_HOST_DEVICE int64_t run_offset(const PatchParams& p, int64_t r) {
  return r / p.patch_h * p.video_stride_t + r % p.patch_h * p.video_stride_y;
}

template <typename T>
VATT_HOST_DEVICE T scale_pixel(uint8_t pixel) {
  return from_float<T>(static_cast<float>(pixel) * 2.0f / 255.0f - 1.0f);
}

// Launches on `stream` of `device`; a kept token outside the grid traps.
void tokenize_patches_cuda(const PatchParams& params, DType out_dtype, int device, void* stream);

}  // namespace vatt

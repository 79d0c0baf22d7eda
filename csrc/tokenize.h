// Tokens of raw video: which element of x goes where. Row i of the patch matrix is token k of sample b, and
//   patch[i, (t, y, x, c)] = scale(video[b, T + t, Y + y, X + x, c]),    scale(uint8) = x * 2 / 255 - 1,
// where (T, Y, X) is the corner of kept token k in the sample's window. The index math serves CPU and CUDA code alike.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace vatt {

// A video, the window of each sample that is cut into patches, and the tokens that are kept of it.
struct PatchParams {
  const void* video;    // [batch, T, H, W, C]: strides below, pixels of a row without gaps
  DType video_dtype;    // kUInt8 is scaled, float types are used as they are
  const int64_t* keep;  // [batch or 1, kept] token numbers, or null for all
  const int64_t* crop;  // [batch, 2], contiguous: y and x of the window's corner, or null for 0, 0
  const uint8_t* flip;  // [batch], contiguous: not 0 mirrors the window left to right, or null
  int64_t batch, kept;
  int64_t stride_b, stride_t, stride_y;  // of video, in elements
  int64_t keep_stride_b, keep_stride_k;
  int64_t width, channels;         // of the window, in pixels; of a pixel
  int64_t grid_t, grid_h, grid_w;  // tokens along each axis; what remains of the window is ignored
  int64_t patch_t, patch_h, patch_w;
};

VATT_HOST_DEVICE int64_t num_tokens(const PatchParams& p) { return p.grid_t * p.grid_h * p.grid_w; }

// Elements of one patch that lie in a row of pixels, and how many such runs a patch has.
VATT_HOST_DEVICE int64_t run_length(const PatchParams& p) { return p.patch_w * p.channels; }
VATT_HOST_DEVICE int64_t num_runs(const PatchParams& p) { return p.patch_t * p.patch_h; }
VATT_HOST_DEVICE int64_t patch_size(const PatchParams& p) { return num_runs(p) * run_length(p); }

// The token number of kept position k.
VATT_HOST_DEVICE int64_t kept_token(const PatchParams& p, int64_t b, int64_t k) {
  return p.keep ? p.keep[b * p.keep_stride_b + k * p.keep_stride_k] : k;
}

VATT_HOST_DEVICE bool is_flipped(const PatchParams& p, int64_t b) { return p.flip && p.flip[b]; }

// Where the leftmost pixel of a token's first run lies in the video. In a mirrored window that run is read backwards.
VATT_HOST_DEVICE int64_t patch_offset(const PatchParams& p, int64_t b, int64_t token) {
  const int64_t column = token % p.grid_w;
  const int64_t row = token / p.grid_w % p.grid_h;
  const int64_t time = token / p.grid_w / p.grid_h;
  const int64_t y = row * p.patch_h + (p.crop ? p.crop[2 * b] : 0);
  const int64_t x = is_flipped(p, b) ? p.width - (column + 1) * p.patch_w : column * p.patch_w;
  return b * p.stride_b + time * p.patch_t * p.stride_t + y * p.stride_y +
         (x + (p.crop ? p.crop[2 * b + 1] : 0)) * p.channels;
}

// Where run r = t * patch_h + y of a patch lies, from its first.
VATT_HOST_DEVICE int64_t run_offset(const PatchParams& p, int64_t r) {
  return r / p.patch_h * p.stride_t + r % p.patch_h * p.stride_y;
}

// Where element e = x * channels + c of a run lies, from its leftmost pixel.
VATT_HOST_DEVICE int64_t run_element(const PatchParams& p, int64_t e, bool flipped) {
  return flipped ? (p.patch_w - 1 - e / p.channels) * p.channels + e % p.channels : e;
}

// pixel * 2 / 255 - 1 to the bit, for every pixel, without the division: 2 / 255 in two parts, and pixel * 0x1.01p-7
// exact.
VATT_HOST_DEVICE float scale_pixel(uint8_t pixel) {
  const float x = static_cast<float>(pixel);
  return (x * 0x1.01p-7f + x * 0x1.0101020000000p-23f) - 1.0f;
}

}  // namespace vatt

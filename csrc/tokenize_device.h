// What the CUDA kernels of tokenize take, and the functions that launch them on a stream.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "tokenize.h"

namespace vatt {

// Row i of the patch matrix is token i % (kept + agg) - agg of sample i / (kept + agg); token -1 is the AGG row.
struct TokenizeRows {
  PatchParams patches;
  int64_t max_crop_y, max_crop_x;  // the last corner at which the window lies inside the video; beyond it kernels trap
  int64_t agg;                     // rows before the tokens of each sample: 1 or 0

  VATT_HOST_DEVICE int64_t per_sample() const { return patches.kept + agg; }
  VATT_HOST_DEVICE int64_t count() const { return patches.batch * per_sample(); }
};

struct TokenizeFwdParams {
  TokenizeRows rows;
  int64_t dim;
  const void* weight;  // [dim, patch_size] of the product's dtype, contiguous like all that follow
  const float* bias;   // [dim] or null
  const float* pos;    // [num_tokens, dim] or null
  const float* agg;    // [dim], or null if rows.agg is 0
  void* out;           // [batch, kept + agg, dim]
  DType out_dtype;
};

struct TokenizeBwdParams {
  TokenizeRows rows;
  int64_t dim;
  const void* grad;  // [batch, kept + agg, dim] of the product's dtype
  int64_t splits;    // pieces of the sum over rows, each summed by blocks of its own
  void* out;         // [splits, dim, patch_size]
  DType out_dtype;
};

// y = x W^T, on tensor cores with mma.sync for half dtypes, by FMA for float32.
void tokenize_fwd_mma(const TokenizeFwdParams& params, DType dtype, int device, void* stream);

// dW = dY^T x, likewise; the order of the sum depends on `splits` alone.
void tokenize_bwd_weight_mma(const TokenizeBwdParams& params, DType dtype, int device, void* stream);

// The same with wgmma, for sm_90a and half dtypes.
void tokenize_fwd_wgmma(const TokenizeFwdParams& params, DType dtype, int device, void* stream);
void tokenize_bwd_weight_wgmma(const TokenizeBwdParams& params, DType dtype, int device, void* stream);

// The number of splits that fills the device's multiprocessors without much more to add up.
int64_t tokenize_bwd_splits(int64_t rows, int64_t dim, int64_t patch_size, int device);

}  // namespace vatt

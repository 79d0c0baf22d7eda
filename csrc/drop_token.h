// DropToken: y[b, k] = x[b, keep[k]] and its transpose, and the positions a step keeps. What C++ and CUDA share is
// here: where rows lie, and the hash that draws the positions.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "splitmix.h"

namespace vatt {

// The gather reads rows of tokens [batch, tokens, width], the scatter rows of a gradient [batch, kept, width].
struct DropTokenParams {
  const void* in;                        // strides below, in elements; the values of a row lie without gaps
  const int64_t* keep;                   // [kept] or [batch, kept] positions
  void* out;                             // contiguous
  int64_t batch, tokens, kept, width;    // width in values
  int64_t in_stride_b, in_stride_row;    // the second over tokens (gather) or kept positions (scatter)
  int64_t keep_stride_b, keep_stride_k;  // the first is 0 when all samples share their positions
};

VATT_HOST_DEVICE int64_t kept_position(const DropTokenParams& p, int64_t b, int64_t k) {
  return p.keep[b * p.keep_stride_b + k * p.keep_stride_k];
}

VATT_HOST_DEVICE int64_t input_offset(const DropTokenParams& p, int64_t b, int64_t row) {
  return b * p.in_stride_b + row * p.in_stride_row;
}

struct SampleParams {
  const int64_t* seed;       // one number
  const int64_t* sample_id;  // [batch], contiguous, or null for one draw that all samples share
  int64_t* out;              // [batch, kept], contiguous
  int64_t batch, tokens, kept;
};

constexpr int64_t kPositionMask = (1 << 20) - 1;      // the low bits of a key hold its position
constexpr int64_t kMaxTokens = kPositionMask + 1;     // that can be sampled from
constexpr int64_t kMaxTokensCuda = int64_t{1} << 13;  // whose keys a block sorts in its shared memory

VATT_HOST_DEVICE uint64_t sample_stream(const SampleParams& p, int64_t b) {
  const uint64_t stream = splitmix64(static_cast<uint64_t>(*p.seed));
  return p.sample_id ? splitmix64(stream ^ splitmix64(static_cast<uint64_t>(p.sample_id[b]))) : stream;
}

// The positions of the smallest keys are kept, in the order of their keys. No two keys are equal.
VATT_HOST_DEVICE int64_t position_key(uint64_t stream, int64_t position) {
  const uint64_t hash = splitmix64(stream ^ splitmix64(static_cast<uint64_t>(position)));
  return (static_cast<int64_t>(hash) & ~kPositionMask) | position;
}

// They launch on `stream` of `device`; a position outside the tokens traps.
void drop_token_fwd_cuda(const DropTokenParams& params, DType dtype, int device, void* stream);
void drop_token_bwd_cuda(const DropTokenParams& params, DType dtype, int device, void* stream);
void sample_keep_cuda(const SampleParams& params, int device, void* stream);

}  // namespace vatt

// From a tile of products in shared memory to its parts of the sums of rows and columns.
#pragma once

#include "cuda_utils.cuh"
#include "nce.h"

namespace vatt {

template <typename Combine>
__device__ __forceinline__ float over_warp(float value, const Combine& combine) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  return value;
}

__device__ __forceinline__ float log_of(float sum, float shift) { return sum == 0.0f ? -INFINITY : shift + logf(sum); }

// `products`: [kRows][kStride] in shared memory, those of rows and columns that do not exist are finite. It ends as s,
// or as exp(s - offset), with -inf or 0 where nothing counts. A warp takes a row, then a thread a column, in an order
// that never changes.
template <bool kOffset, int kRows, int kColumns, int kStride, int kThreads>
__device__ __forceinline__ void finish_tile(const NceStatsParams& p, float* products, int64_t row0, int64_t column0) {
  constexpr int kEach = kColumns / 32;
  const int lane = threadIdx.x % 32;
  const auto add = [](float x, float y) { return x + y; };
  const auto larger = [](float x, float y) { return fmaxf(x, y); };
  float scale[kEach];
  unsigned counts = 0;  // bit j: column 32 j + lane
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int64_t column = column0 + 32 * j + lane;
    const bool valid = column < p.columns && (!p.mask || p.mask[column / p.candidates]);
    counts |= static_cast<unsigned>(valid) << j;
    scale[j] = valid ? p.column_scale[column] : 0.0f;
  }
  const int rows = p.rows - row0 < kRows ? static_cast<int>(p.rows - row0) : kRows;
  const int columns = p.columns - column0 < kColumns ? static_cast<int>(p.columns - column0) : kColumns;
#pragma unroll 1
  for (int r = threadIdx.x / 32; r < rows; r += kThreads / 32) {
    float* line = products + r * kStride + lane;
    const float row_scale = p.row_scale[row0 + r];
    const int64_t own = own_candidate(p, row0 + r, column0 + lane);
    float s[kEach], largest = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      s[j] = counts >> j & 1 ? line[32 * j] * row_scale * scale[j] : -INFINITY;
      largest = fmaxf(largest, s[j]);
      const int64_t candidate = own + 32 * j;
      if (candidate >= 0 && candidate < p.candidates && counts >> j & 1) {
        p.positive[(row0 + r) * p.candidates + candidate] = s[j];
      }
    }
    if (!kOffset) largest = over_warp(largest, larger);
    const float shift = kOffset ? p.offset : largest > -INFINITY ? largest : 0.0f;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const float e = expf(s[j] - shift);
      sum += e;
      line[32 * j] = kOffset ? e : s[j];
    }
    sum = over_warp(sum, add);
    if (lane == 0) p.row_part[column0 / kColumns * p.rows + row0 + r] = kOffset ? sum : log_of(sum, shift);
  }
  __syncthreads();
#pragma unroll 1
  for (int c = threadIdx.x; c < columns; c += kThreads) {
    const float* line = products + c;
    float largest = -INFINITY, sum = 0.0f;
    for (int r = 0; !kOffset && r < rows; ++r) largest = fmaxf(largest, line[r * kStride]);
    const float shift = largest > -INFINITY ? largest : 0.0f;
    for (int r = 0; r < rows; ++r) sum += kOffset ? line[r * kStride] : expf(line[r * kStride] - shift);
    p.column_part[row0 / kRows * p.columns + column0 + c] = kOffset ? sum : log_of(sum, shift);
  }
}

}  // namespace vatt

// What the CUDA kernels of nce take, and the functions that launch them on a stream.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace vatt {

// s[row, column] = <a[row], b[column]> row_scale[row] column_scale[column]; column c is candidate c % candidates of
// sample c / candidates, and row r's own sample is first_sample + r. All is contiguous.
struct NceStatsParams {
  int64_t rows, columns, dim, candidates, first_sample;
  const void* a;              // [rows, dim] of the product's dtype
  const void* b;              // [columns, dim]
  const float* row_scale;     // [rows]
  const float* column_scale;  // [columns]
  const uint8_t* mask;        // [columns / candidates], 0 where a sample is no one's candidate; or null
  bool has_offset;            // the parts are sums of exp(s - offset), else log-sum-exps of s
  float offset;
  float* row_part;     // [column tiles, rows]
  float* column_part;  // [row tiles, columns]
  float* positive;     // [rows, candidates], written where a row's own sample is not masked
};

VATT_HOST_DEVICE int64_t tiles_of(int64_t size, int64_t side) { return (size + side - 1) / side; }

// Row tiles come first: the blocks that run at a time share few columns.
VATT_HOST_DEVICE int64_t first_row(const NceStatsParams& p, int64_t side, int64_t block) {
  return block % tiles_of(p.rows, side) * side;
}
VATT_HOST_DEVICE int64_t first_column(const NceStatsParams& p, int64_t row_side, int64_t side, int64_t block) {
  return block / tiles_of(p.rows, row_side) * side;
}

// Which candidate of its own sample a row meets in a column: 0..candidates - 1 where it does.
VATT_HOST_DEVICE int64_t own_candidate(const NceStatsParams& p, int64_t row, int64_t column) {
  return column - (p.first_sample + row) * p.candidates;
}

// Outputs of a block.
constexpr int64_t kNceRows = 128, kNceMmaColumns = 128, kNceWgmmaColumns = 256;

// On tensor cores with mma.sync for half dtypes, by FMA for float32.
void nce_stats_mma(const NceStatsParams& params, DType dtype, int device, void* stream);

// The same with wgmma, for sm_90a and half dtypes.
void nce_stats_wgmma(const NceStatsParams& params, DType dtype, int device, void* stream);

}  // namespace vatt

// Sums of gradients over rows: bias, position embedding, AGG token, and the splits of the weight's gradient.
// Every thread has eight columns. Without atomics but for dpos with a keep per sample.
#include "cuda_utils.cuh"
#include "tensor_core.cuh"
#include "tokenize_device.h"
#include "tokenize_product.cuh"

namespace vatt {
namespace {

constexpr int kSumThreads = 128, kColumns = 8;

__device__ __forceinline__ int first_column() { return (blockIdx.y * kSumThreads + threadIdx.x) * kColumns; }

template <typename T>
__device__ __forceinline__ void add_row(float (&sum)[8], const T* row, int count) {
  if (count >= 8 && reinterpret_cast<uintptr_t>(row) % 16 == 0) {
    constexpr int kVector = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < 8 / kVector; ++i) {
      const uint4 four = reinterpret_cast<const uint4*>(row)[i];
      T values[kVector];
      memcpy(values, &four, sizeof values);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum[i * kVector + j] += to_float(values[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) sum[i] += to_float(row[i]);
    }
  }
}

// The sum of rows(begin) .. rows(end - 1), sixteen at a time, which keeps the error of long sums small.
template <typename Rows>
__device__ __forceinline__ void add_rows(float (&sum)[8], int64_t begin, int64_t end, const Rows& rows, int count) {
  constexpr int kAtOnce = 16;
  for (int64_t first = begin; first < end; first += kAtOnce) {
    const int more = end - first < kAtOnce ? static_cast<int>(end - first) : kAtOnce;
    float some[8] = {};
#pragma unroll 4
    for (int i = 0; i < more; ++i) add_row(some, rows(first + i), count);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] += some[j];
  }
}

// workspace[chunk] = sum of a chunk of the rows: of the tokens of all samples, or of their AGG rows.
template <typename T>
__global__ void __launch_bounds__(kSumThreads, 4)
    sum_rows_kernel(const __grid_constant__ TokenizeBwdRowsParams params, bool agg_rows) {
  const int dim = static_cast<int>(params.dim), column = first_column(), count = dim - column;
  if (count <= 0) return;
  const int64_t rows = params.batch * (agg_rows ? 1 : params.kept);
  const int64_t begin = rows * blockIdx.x / params.chunks, end = rows * (blockIdx.x + 1) / params.chunks;
  float sum[8] = {};
  const auto row = [&](int64_t i) {
    const int64_t at = agg_rows ? i * (params.kept + 1) : params.agg ? i + i / params.kept + 1 : i;
    return static_cast<const T*>(params.grad) + at * dim + column;
  };
  add_rows(sum, begin, end, row, count);
  store8(params.workspace + static_cast<int64_t>(blockIdx.x) * dim + column, sum, count);
}

// out = sum of the chunks.
__global__ void __launch_bounds__(kSumThreads, 4)
    sum_chunks_kernel(const float* workspace, int64_t chunks, int64_t dim, float* out) {
  const int column = first_column(), count = static_cast<int>(dim) - column;
  if (count <= 0) return;
  float sum[8] = {};
  add_rows(sum, 0, chunks, [&](int64_t i) { return workspace + i * dim + column; }, count);
  store8(out + column, sum, count);
}

// dpos[keep[k]] = sum over the samples, for one kept position k and those after it that hold the same token; where an
// earlier one does, that one's block has the sum.
template <typename T>
__global__ void __launch_bounds__(kSumThreads, 4)
    sum_samples_kernel(const __grid_constant__ TokenizeBwdRowsParams params) {
  const int64_t k = blockIdx.x;
  const auto token_at = [&](int64_t i) { return params.keep ? params.keep[i * params.keep_stride_k] : i; };
  const int64_t token = token_at(k);
  if (token < 0 || token >= params.num_tokens) __trap();
  bool before = false, behind = false;
  if (params.keep) {
    for (int64_t i = threadIdx.x; i < params.kept; i += kSumThreads) {
      if (token_at(i) == token) before |= i<k, behind |= i> k;
    }
  }
  if (__syncthreads_or(before)) return;
  const int64_t last = __syncthreads_or(behind) ? params.kept : k + 1;
  const int dim = static_cast<int>(params.dim), column = first_column(), count = dim - column;
  if (count <= 0) return;
  float sum[8] = {};
  for (int64_t i = k; i < last; ++i) {
    if (token_at(i) != token) continue;
    const T* row = static_cast<const T*>(params.grad) + (params.agg + i) * dim + column;
    const int64_t stride = (params.kept + params.agg) * dim;
    add_rows(sum, 0, params.batch, [&](int64_t b) { return row + b * stride; }, count);
  }
  store8(params.dpos + token * dim + column, sum, count);
}

// dpos[keep[b, k]] += dy[b, k], in no fixed order.
template <typename T>
__global__ void __launch_bounds__(kSumThreads, 4)
    scatter_rows_kernel(const __grid_constant__ TokenizeBwdRowsParams params) {
  const int64_t i = blockIdx.x, b = i / params.kept, k = i % params.kept;
  const int64_t token = params.keep[b * params.keep_stride_b + k * params.keep_stride_k];
  if (token < 0 || token >= params.num_tokens) __trap();
  const int dim = static_cast<int>(params.dim), column = first_column(), count = dim - column;
  if (count <= 0) return;
  float values[8] = {};
  add_row(values, static_cast<const T*>(params.grad) + (i + (b + 1) * params.agg) * dim + column, count);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (j < count) atomicAdd(params.dpos + token * dim + column + j, values[j]);
  }
}

// dW[d, p] = scale (sum over the splits + 1/2 sum_i dY[i, d]).
template <bool kBytes>
__global__ void __launch_bounds__(kSumThreads, 4)
    tokenize_bwd_reduce_kernel(const __grid_constant__ TokenizeBwdParams params) {
  const int size = static_cast<int>(patch_size(params.rows.patches)), column = first_column(), count = size - column;
  if (count <= 0) return;
  const int64_t d = blockIdx.x;
  float sum[8] = {};
  const float* first = params.workspace + d * size + column;
  add_rows(sum, 0, params.splits, [&](int64_t i) { return first + i * params.dim * size; }, count);
  if (kBytes) {
    const float half = 0.5f * params.grad_sum[d];
#pragma unroll
    for (float& value : sum) value = kByteScale * (value + half);
  }
  store8(params.dweight, params.dweight_dtype, d * size + column, sum, count);
}

// One row of blocks for each of `rows`.
dim3 grid_of(int64_t rows, int64_t columns) {
  constexpr int64_t kPerBlock = kSumThreads * kColumns;
  return dim3(static_cast<unsigned>(rows), static_cast<unsigned>((columns + kPerBlock - 1) / kPerBlock));
}

template <typename T>
void sum_rows(const TokenizeBwdRowsParams& params, bool agg_rows, float* out, cudaStream_t stream) {
  launch(sum_rows_kernel<T>, grid_of(params.chunks, params.dim), kSumThreads, 0, stream, params, agg_rows);
  launch(sum_chunks_kernel, grid_of(1, params.dim), kSumThreads, 0, stream, params.workspace, params.chunks, params.dim,
         out);
}

template <typename T>
void sum_positions(const TokenizeBwdRowsParams& params, cudaStream_t stream) {
  if (params.batch * params.kept == 0) return;
  if (params.keep && params.keep_stride_b) {
    launch(scatter_rows_kernel<T>, grid_of(params.batch * params.kept, params.dim), kSumThreads, 0, stream, params);
  } else {
    launch(sum_samples_kernel<T>, grid_of(params.kept, params.dim), kSumThreads, 0, stream, params);
  }
}

}  // namespace

void tokenize_bwd_rows(const TokenizeBwdRowsParams& params, int device, void* stream) {
  if (params.dim == 0) return;
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  VATT_DISPATCH_FLOAT(params.grad_dtype, T, {
    if (params.dbias) sum_rows<T>(params, false, params.dbias, on);
    if (params.dagg) sum_rows<T>(params, true, params.dagg, on);
    if (params.dpos) sum_positions<T>(params, on);
  });
}

void tokenize_bwd_reduce(const TokenizeBwdParams& params, void* stream) {
  const dim3 grid = grid_of(params.dim, patch_size(params.rows.patches));
  const bool bytes = params.rows.patches.video_dtype == DType::kUInt8;
  launch(bytes ? tokenize_bwd_reduce_kernel<true> : tokenize_bwd_reduce_kernel<false>, grid, kSumThreads, 0,
         static_cast<cudaStream_t>(stream), params);
}

}  // namespace vatt

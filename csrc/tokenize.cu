// Tokens of raw video without a patch matrix in memory: a matrix product whose left (forward) or right (backward)
// operand is read from the video, tile by tile.
#include <algorithm>

#include "cuda_utils.cuh"
#include "tensor_core.cuh"
#include "tokenize_device.h"
#include "tokenize_product.cuh"
#include "tokenize_tile.cuh"

namespace vatt {
namespace {

// out[i, d] = scale sum_p x[i, p] W[d, p] + bias[d] + pos[token(i), d] for 128 x 128 of (i, d).
template <typename T, bool kBytes>
__global__ void __launch_bounds__(kThreads<T>, kBlocks<T>)
    tokenize_fwd_kernel(const __grid_constant__ TokenizeFwdParams params) {
  constexpr int kChunks = kDepth<T> / kChunk, kRowStep = kThreads<T> / kChunks, kRows = kTile / kRowStep;
  const PatchParams& p = params.rows.patches;
  const int dim = static_cast<int>(params.dim), size = static_cast<int>(patch_size(p));
  const int column_tiles = (dim + kTile - 1) / kTile;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x / column_tiles) * kTile;
  const int column0 = blockIdx.x % column_tiles * kTile;
  unsigned char* video_tiles = dynamic_shared();
  unsigned char* weight_tiles = video_tiles + kVideoBuffers * kTileBytes;
  const T* weight = static_cast<const T*>(params.weight);
  const bool aligned = reinterpret_cast<uintptr_t>(weight) % 16 == 0 && size * sizeof(T) % 16 == 0;

  const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
  int64_t patches[kRows];
#pragma unroll
  for (int j = 0; j < kRows; ++j) patches[j] = find_patch(params.rows, row0 + row + j * kRowStep);
  VideoTile<T, 128, kBytes, kRows, kRowStep> video(row, chunk);
  Product<T, false> product;
  run_steps(
      (size + kDepth<T> - 1) / kDepth<T>, [](int) {},
      [&](int i) {
        copy_tile<T, kThreads<T>, kTile, 128>(weight_tiles + i % kMatrixBuffers * kTileBytes, weight, size, column0,
                                              i * kDepth<T>, aligned, [&](int n) { return column0 + n < dim; });
      },
      [&](int i) { video.fetch(p, ChunkPlace(p, i * kDepth<T> + chunk * kChunk), [&](int j) { return patches[j]; }); },
      [&](int i) {
        video.put(video_tiles + i % kVideoBuffers * kTileBytes, params.rows, row0, i * kDepth<T> + chunk * kChunk);
      },
      [&](int i) {
        product.multiply(video_tiles + i % kVideoBuffers * kTileBytes, weight_tiles + i % kMatrixBuffers * kTileBytes);
      });

  float* staging = reinterpret_cast<float*>(dynamic_shared());
  product.stage(staging);
  __syncthreads();
  const int group = threadIdx.x % 16, column = column0 + group * 8, count = dim - column;
  if (count <= 0) return;
  float bias[8];
  load8(bias, params.bias, column, count);
#pragma unroll 1
  for (int r = threadIdx.x / 16; r < kTile && row0 + r < params.rows.count(); r += kThreads<T> / 16) {
    const int64_t i = row0 + r, b = i / params.rows.per_sample(), k = i % params.rows.per_sample() - params.rows.agg;
    store_tokens(params, kBytes ? kByteScale : 1.0f, staging + r * kStagingRow + group * 8, bias, i,
                 k < 0 ? -1 : kept_token(p, b, k), column);
  }
}

// scale sum_i dY[i, d] x[i, p] for 128 x 128 of (d, p) and one of the splits of i.
template <typename T, bool kBytes>
__global__ void __launch_bounds__(kThreads<T>, kBlocks<T>)
    tokenize_bwd_weight_kernel(const __grid_constant__ TokenizeBwdParams params) {
  constexpr int kRowBytes = Product<T, true>::kRowBytes;
  constexpr int kRowStep = kThreads<T> / (kTile / kChunk), kRows = kDepth<T> / kRowStep;
  const PatchParams& p = params.rows.patches;
  const int dim = static_cast<int>(params.dim), size = static_cast<int>(patch_size(p));
  const int column_tiles = (size + kTile - 1) / kTile;
  const int d0 = blockIdx.x / column_tiles * kTile, p0 = blockIdx.x % column_tiles * kTile;
  unsigned char* video_tiles = dynamic_shared();
  unsigned char* grad_tiles = video_tiles + kVideoBuffers * kTileBytes;
  int64_t* patches = reinterpret_cast<int64_t*>(grad_tiles + kMatrixBuffers * kTileBytes);  // [2][kDepth]
  const T* grad = static_cast<const T*>(params.grad);
  const bool aligned = reinterpret_cast<uintptr_t>(grad) % 16 == 0 && dim * sizeof(T) % 16 == 0;

  const int64_t all_steps = (params.rows.count() + kDepth<T> - 1) / kDepth<T>;
  const int64_t first = all_steps * blockIdx.y / params.splits;
  const int steps = static_cast<int>(all_steps * (blockIdx.y + 1) / params.splits - first);
  // Eight neighbouring threads have two rows and every other 16-byte piece of 256: all banks.
  const int chunk = threadIdx.x % 4 + threadIdx.x / 8 % 2 * 4;
  const int row = threadIdx.x / 16 * 2 + threadIdx.x / 4 % 2;
  const ChunkPlace at(p, p0 + chunk * kChunk);
  VideoTile<T, kRowBytes, kBytes, kRows, kRowStep> video(row, chunk);
  Product<T, true> product;
  const auto first_row = [&](int i) { return (first + i) * kDepth<T>; };
  run_steps(
      steps,
      [&](int i) {  // other warps each time
        const int r = (static_cast<int>(threadIdx.x) + i * kDepth<T>) % kThreads<T>;
        if (r < kDepth<T>) patches[i % 2 * kDepth<T> + r] = find_patch(params.rows, first_row(i) + r);
      },
      [&](int i) {
        const int64_t* found = patches + i % 2 * kDepth<T>;
        copy_tile<T, kThreads<T>, kDepth<T>, kRowBytes>(grad_tiles + i % kMatrixBuffers * kTileBytes, grad, dim,
                                                        first_row(i), d0, aligned,
                                                        [&](int r) { return found[r] != kNoPatch; });
      },
      [&](int i) { video.fetch(p, at, [&](int j) { return patches[i % 2 * kDepth<T> + row + j * kRowStep]; }); },
      [&](int i) {
        video.put(video_tiles + i % kVideoBuffers * kTileBytes, params.rows, first_row(i), p0 + chunk * kChunk);
      },
      [&](int i) {
        product.multiply(grad_tiles + i % kMatrixBuffers * kTileBytes, video_tiles + i % kVideoBuffers * kTileBytes);
      });

  float* staging = reinterpret_cast<float*>(dynamic_shared());
  product.stage(staging);
  __syncthreads();
  const int group = threadIdx.x % 16, column = p0 + group * 8;
  if (column >= size) return;
#pragma unroll 1
  for (int r = threadIdx.x / 16; r < kTile && d0 + r < dim; r += kThreads<T> / 16) {
    store_gradient(params, kBytes ? kByteScale : 1.0f, staging + r * kStagingRow + group * 8, d0 + r, column);
  }
}

template <typename T>
void launch_fwd(const TokenizeFwdParams& params, int64_t blocks, cudaStream_t stream) {
  const bool bytes = params.rows.patches.video_dtype == DType::kUInt8;
  launch(bytes ? tokenize_fwd_kernel<T, true> : tokenize_fwd_kernel<T, false>, static_cast<unsigned>(blocks),
         kThreads<T>, kSharedBytes, stream, params);
}

template <typename T>
void launch_bwd(const TokenizeBwdParams& params, dim3 grid, cudaStream_t stream) {
  const bool bytes = params.rows.patches.video_dtype == DType::kUInt8;
  launch(bytes ? tokenize_bwd_weight_kernel<T, true> : tokenize_bwd_weight_kernel<T, false>, grid, kThreads<T>,
         kSharedBytes + 2 * kDepth<T> * sizeof(int64_t), stream, params);
}

int64_t tiles_of(int64_t size) { return (size + kTile - 1) / kTile; }

}  // namespace

void tokenize_fwd_mma(const TokenizeFwdParams& params, DType dtype, int device, void* stream) {
  const int64_t blocks = tiles_of(params.rows.count()) * tiles_of(params.dim);
  if (blocks == 0) return;
  const DeviceGuard guard(device);
  VATT_DISPATCH_FLOAT(dtype, T, launch_fwd<T>(params, blocks, static_cast<cudaStream_t>(stream)));
}

void tokenize_bwd_weight_mma(const TokenizeBwdParams& params, DType dtype, int device, void* stream) {
  const int64_t blocks = tiles_of(params.dim) * tiles_of(patch_size(params.rows.patches));
  if (blocks == 0) return;
  const DeviceGuard guard(device);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(params.splits));
  VATT_DISPATCH_FLOAT(dtype, T, launch_bwd<T>(params, grid, static_cast<cudaStream_t>(stream)));
}

int64_t tokenize_bwd_splits(int64_t rows, int64_t dim, int64_t patch_size, int device) {
  // Writing and reading a split again costs about as much as multiplying so many rows: estimated from 4 TB/s and
  // 600 TFLOP/s, not measured.
  constexpr double kRowsOfASplit = 600;
  int processors = 0;
  CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t places = 2 * processors;  // blocks at a time
  const int64_t tiles = tiles_of(dim) * tiles_of(patch_size);
  const int64_t most = std::clamp<int64_t>(rows / 512, 1, 32);
  int64_t best = 1;
  double least = 0;
  for (int64_t splits = 1; splits <= most; ++splits) {
    const double rounds = static_cast<double>((tiles * splits + places - 1) / places) / splits;
    const double cost = rounds + splits * kRowsOfASplit / rows * tiles / places;
    if (splits == 1 || cost < least) best = splits, least = cost;
  }
  return best;
}

}  // namespace vatt

// Tokens of raw video on sm_90a. The same products as in tokenize.cu, by two warpgroups with 64 x 256 outputs each:
// wgmma reads both operands from shared memory in the background, and a third warpgroup fills it, converting the video.
#include "check.h"
#include "cuda_utils.cuh"
#include "tokenize_device.h"
#include "tokenize_product.cuh"
#include "tokenize_tile.cuh"
#include "wgmma_product.cuh"

namespace vatt {
namespace sm90 {
namespace {

constexpr int kSharedBytes = kTileBytes + 4 * kDepth * static_cast<int>(sizeof(int64_t));
constexpr int kBwdStagingRow = kLeftSide + 4;
static_assert(kRightSide * kBwdStagingRow * 4 <= kTileBytes);

// out[i, d] = scale sum_p x[i, p] W[d, p] + bias[d] + pos[token(i), d] for 128 x 256 of (i, d).
template <typename T, bool kBytes>
__global__ void __launch_bounds__(kThreads, 1) fwd_kernel(const __grid_constant__ TokenizeFwdParams params) {
#if VATT_HAS_WGMMA
  const PatchParams& p = params.rows.patches;
  const int dim = static_cast<int>(params.dim), size = static_cast<int>(patch_size(p));
  const int column_tiles = (dim + kRightSide - 1) / kRightSide;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x / column_tiles) * kLeftSide;
  const int column0 = static_cast<int>(blockIdx.x) % column_tiles * kRightSide;
  unsigned char* tiles = dynamic_shared();
  int64_t* tokens = reinterpret_cast<int64_t*>(tiles + kTileBytes);  // of the block's rows; -1 for AGG
  int64_t* found = tokens + kLeftSide;
  if (threadIdx.x < kLeftSide) {
    const int64_t i = row0 + threadIdx.x, b = i / params.rows.per_sample();
    const int64_t k = i % params.rows.per_sample() - params.rows.agg;
    found[threadIdx.x] = find_patch(params.rows, i);
    tokens[threadIdx.x] = i < params.rows.count() && k >= 0 ? kept_token(p, b, k) : -1;
  }
  __syncthreads();
  const T* weight = static_cast<const T*>(params.weight);
  const bool aligned = reinterpret_cast<uintptr_t>(weight) % 16 == 0 && size * sizeof(T) % 16 == 0;
  const int steps = (size + kDepth - 1) / kDepth, row = threadIdx.x / 4, chunk = threadIdx.x % 4;
  float* staging = reinterpret_cast<float*>(tiles);
  if (threadIdx.x < kProducers) {
    VideoTile<T, 128, kBytes, 4, 32> video(row, chunk);
    produce(
        steps, [](int) {},
        [&](int i) {
          copy_tile<T, kProducers, kRightSide, 128>(right_tile(tiles, i), weight, size, column0, i * kDepth, aligned,
                                                    [&](int n) { return column0 + n < dim; });
        },
        [&](int i) {
          video.fetch(p, ChunkPlace(p, i * kDepth + chunk * kChunk), [&](int j) { return found[row + j * 32]; });
        },
        [&](int i) { video.put(left_tile(tiles, i), params.rows, row0, i * kDepth + chunk * kChunk); });
  } else {
    float sum[128] = {};
    consume<T, false>(sum, steps, tiles, (threadIdx.x - kProducers) / kWarpgroup);
#pragma unroll
    for (int i = 0; i < 128; i += 2) {
      float* to = staging + left_index(i) * kStagingRow + right_index(i);
      *reinterpret_cast<float2*>(to) = make_float2(sum[i], sum[i + 1]);
    }
  }
  __syncthreads();
  const int column = column0 + threadIdx.x % 32 * 8, count = dim - column;
  if (count <= 0) return;
  float bias[8];
  load8(bias, params.bias, column, count);
#pragma unroll 1
  for (int r = threadIdx.x / 32; r < kLeftSide && row0 + r < params.rows.count(); r += kThreads / 32) {
    store_tokens(params, kBytes ? kByteScale : 1.0f, staging + r * kStagingRow + column - column0, bias, row0 + r,
                 tokens[r], column);
  }
#else
  __trap();
#endif
}

// scale sum_i x[i, p] dY[i, d] for 128 x 256 of (p, d) and one of the splits of i.
template <typename T, bool kBytes>
__global__ void __launch_bounds__(kThreads, 1) bwd_weight_kernel(const __grid_constant__ TokenizeBwdParams params) {
#if VATT_HAS_WGMMA
  const PatchParams& p = params.rows.patches;
  const int dim = static_cast<int>(params.dim), size = static_cast<int>(patch_size(p));
  const int column_tiles = (size + kLeftSide - 1) / kLeftSide;
  const int d0 = static_cast<int>(blockIdx.x) / column_tiles * kRightSide;
  const int p0 = static_cast<int>(blockIdx.x) % column_tiles * kLeftSide;
  unsigned char* tiles = dynamic_shared();
  int64_t* found = reinterpret_cast<int64_t*>(tiles + kTileBytes);  // [4][kDepth]: patches of the rows of a step
  const T* grad = static_cast<const T*>(params.grad);
  const bool aligned = reinterpret_cast<uintptr_t>(grad) % 16 == 0 && dim * sizeof(T) % 16 == 0;
  const int64_t all_steps = (params.rows.count() + kDepth - 1) / kDepth;
  const int64_t first = all_steps * blockIdx.y / params.splits;
  const int steps = static_cast<int>(all_steps * (blockIdx.y + 1) / params.splits - first);
  const int row = threadIdx.x / 4, chunk = threadIdx.x % 4;
  float* staging = reinterpret_cast<float*>(tiles);
  if (threadIdx.x < kProducers) {
    VideoTile<T, 128, kBytes, 2, 32> left(row, chunk), right(row, chunk);
    const ChunkPlace left_at(p, p0 + chunk * kChunk), right_at(p, p0 + 64 + chunk * kChunk);
    produce(
        steps,
        [&](int i) {  // other warps each time
          const int r = (static_cast<int>(threadIdx.x) + i * kDepth) % kProducers;
          if (r < kDepth) found[i % 4 * kDepth + r] = find_patch(params.rows, (first + i) * kDepth + r);
          barrier_sync(kProducersOnly, kProducers);
        },
        [&](int i) {
          const auto has_row = [&](int r) { return found[i % 4 * kDepth + r] != kNoPatch; };
#pragma unroll
          for (int part = 0; part < kRightSide / 64; ++part) {
            copy_tile<T, kProducers, kDepth, 128>(right_tile(tiles, i) + part * kPartBytes, grad, dim,
                                                  (first + i) * kDepth, d0 + part * 64, aligned, has_row);
          }
        },
        [&](int i) {
          const auto patch_of = [&](int j) { return found[i % 4 * kDepth + row + j * 32]; };
          left.fetch(p, left_at, patch_of);
          right.fetch(p, right_at, patch_of);
        },
        [&](int i) {
          const int64_t row0 = (first + i) * kDepth;
          left.put(left_tile(tiles, i), params.rows, row0, left_at.first);
          right.put(left_tile(tiles, i) + kPartBytes, params.rows, row0, right_at.first);
        });
  } else {
    float sum[128] = {};
    consume<T, true>(sum, steps, tiles, (threadIdx.x - kProducers) / kWarpgroup);
#pragma unroll
    for (int i = 0; i < 128; ++i) staging[right_index(i) * kBwdStagingRow + left_index(i)] = sum[i];
  }
  __syncthreads();
  const int group = threadIdx.x % 16, column = p0 + group * 8;
  if (column >= size) return;
#pragma unroll 1
  for (int r = threadIdx.x / 16; r < kRightSide && d0 + r < dim; r += kThreads / 16) {
    store_gradient(params, kBytes ? kByteScale : 1.0f, staging + r * kBwdStagingRow + group * 8, d0 + r, column);
  }
#else
  __trap();
#endif
}

template <typename T>
void launch_fwd(const TokenizeFwdParams& params, int64_t blocks, cudaStream_t stream) {
  const bool bytes = params.rows.patches.video_dtype == DType::kUInt8;
  launch(bytes ? fwd_kernel<T, true> : fwd_kernel<T, false>, static_cast<unsigned>(blocks), kThreads, kSharedBytes,
         stream, params);
}

template <typename T>
void launch_bwd(const TokenizeBwdParams& params, dim3 grid, cudaStream_t stream) {
  const bool bytes = params.rows.patches.video_dtype == DType::kUInt8;
  launch(bytes ? bwd_weight_kernel<T, true> : bwd_weight_kernel<T, false>, grid, kThreads, kSharedBytes, stream,
         params);
}

int64_t tiles_of(int64_t size, int64_t side) { return (size + side - 1) / side; }

void check_dtype(DType dtype) {
  VATT_CHECK(dtype == DType::kHalf || dtype == DType::kBFloat16,
             "tokenize: dtype must be bfloat16 or float16 for wgmma, got another.");
}

}  // namespace
}  // namespace sm90

void tokenize_fwd_wgmma(const TokenizeFwdParams& params, DType dtype, int device, void* stream) {
  using namespace sm90;
  check_dtype(dtype);
  const int64_t blocks = tiles_of(params.rows.count(), kLeftSide) * tiles_of(params.dim, kRightSide);
  if (blocks == 0) return;
  const DeviceGuard guard(device);
  const auto run = dtype == DType::kHalf ? launch_fwd<Half> : launch_fwd<BFloat16>;
  run(params, blocks, static_cast<cudaStream_t>(stream));
}

void tokenize_bwd_weight_wgmma(const TokenizeBwdParams& params, DType dtype, int device, void* stream) {
  using namespace sm90;
  check_dtype(dtype);
  const int64_t size = patch_size(params.rows.patches);
  const int64_t blocks = tiles_of(params.dim, kRightSide) * tiles_of(size, kLeftSide);
  if (blocks == 0) return;
  const DeviceGuard guard(device);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(params.splits));
  const auto run = dtype == DType::kHalf ? launch_bwd<Half> : launch_bwd<BFloat16>;
  run(params, grid, static_cast<cudaStream_t>(stream));
}

}  // namespace vatt

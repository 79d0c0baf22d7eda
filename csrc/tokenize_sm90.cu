// Tokens of raw video on sm_90a. The same products as in tokenize.cu, by two warpgroups with 64 x 256 outputs each:
// wgmma reads both operands from shared memory in the background, and a third warpgroup fills it, converting the video.
#include "check.h"
#include "cuda_utils.cuh"
#include "tokenize_device.h"
#include "tokenize_product.cuh"
#include "tokenize_tile.cuh"
#include "wgmma.cuh"

#if defined(VATT_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VATT_HAS_WGMMA 1
#else
#define VATT_HAS_WGMMA 0
#endif

namespace vatt {
namespace sm90 {

constexpr int kProducers = kWarpgroup, kConsumers = 2 * kWarpgroup, kThreads = kProducers + kConsumers;
constexpr int kVideoSide = 128, kMatrixSide = 256;  // outputs of a block along the operand from the video, the other
constexpr int kDepth = 64;                          // of one step of the sum: a row of 128 bytes
constexpr int kStages = 4;
constexpr int kPartBytes = 64 * 128;  // 64 rows of a tile
constexpr int kVideoBytes = kVideoSide / 64 * kPartBytes;
constexpr int kStageBytes = kVideoBytes + kMatrixSide / 64 * kPartBytes;
constexpr int kTileBytes = kStages * kStageBytes;
constexpr int kSharedBytes = kTileBytes + 4 * kDepth * static_cast<int>(sizeof(int64_t));
constexpr int kFwdStagingRow = kMatrixSide + 8, kBwdStagingRow = kVideoSide + 4;  // floats; keep rows in other banks
static_assert(kVideoSide * kFwdStagingRow * 4 <= kTileBytes && kMatrixSide * kBwdStagingRow * 4 <= kTileBytes);

// Barriers: a stage is full for a group of consumers, a stage is empty, one part among itself.
inline constexpr int kProducersOnly = 1, kConsumersOnly = 2, kFirstFull = 3, kFirstEmpty = kFirstFull + 2 * kStages;
static_assert(kFirstEmpty + kStages <= 16);

__device__ __forceinline__ int full(int i, int group) { return kFirstFull + 2 * (i % kStages) + group; }

__device__ __forceinline__ int empty(int i) { return kFirstEmpty + i % kStages; }

__device__ __forceinline__ unsigned char* video_tile(unsigned char* tiles, int i) {
  return tiles + i % kStages * kStageBytes;
}

__device__ __forceinline__ unsigned char* matrix_tile(unsigned char* tiles, int i) {
  return video_tile(tiles, i) + kVideoBytes;
}

// The producers' part: the tiles of all steps. The video is fetched a step before it is put; copy(i) copies the matrix
// in the background; prepare(i) fills a table that copy(i) and fetch(i) read.
template <typename Prepare, typename Copy, typename Fetch, typename Put>
__device__ __forceinline__ void produce(int steps, const Prepare& prepare, const Copy& copy, const Fetch& fetch,
                                        const Put& put) {
  const auto publish = [&](int i) {
    fence_async_proxy();
    for (int group = 0; group < 2; ++group) barrier_arrive(full(i, group), kProducers + kWarpgroup);
  };
  for (int i = 0; i < min(steps, 2); ++i) prepare(i);
  if (steps > 0) fetch(0);
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    if (i + 2 < steps) prepare(i + 2);
    if (i >= kStages) barrier_sync(empty(i), kProducers + kConsumers);
    copy(i);
    cp_async_commit();
    put(i);
    if (i + 1 < steps) fetch(i + 1);
    cp_async_wait<1>();
    if (i > 0) publish(i - 1);
  }
  cp_async_wait<0>();
  if (steps > 0) publish(steps - 1);
}

// The consumers' part: sum[video, matrix] += the products of all steps.
template <typename T, bool kAcrossRows>
__device__ __forceinline__ void consume(float (&sum)[128], int steps, unsigned char* tiles, int group) {
  if (shared_address(tiles) % kPatternBytes) __trap();
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    barrier_sync(full(i, group), kProducers + kWarpgroup);
    uint64_t left = matrix_descriptor(video_tile(tiles, i) + group * kPartBytes, kPartBytes);
    uint64_t right = matrix_descriptor(matrix_tile(tiles, i), kPartBytes);
    wgmma_fence(sum);
#pragma unroll
    for (int k = 0; k < kDepth; k += kWgmmaK) {
      wgmma_m64n256k16<T, kAcrossRows, kAcrossRows>(sum, left, right);
      left = next_k<kAcrossRows>(left);
      right = next_k<kAcrossRows>(right);
    }
    wgmma_commit();
    wgmma_wait<1>(sum);
    if (i > 0 && i - 1 + kStages < steps) barrier_arrive(empty(i - 1), kProducers + kConsumers);
  }
  wgmma_wait<0>(sum);
  barrier_sync(kConsumersOnly, kConsumers);  // nobody reads the tiles any more
}

// Where sum[i] of a consumer lies: along the video's operand, and along the matrix.
__device__ __forceinline__ int video_index(int i) {
  return static_cast<int>(threadIdx.x - kProducers) / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
}
__device__ __forceinline__ int matrix_index(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

namespace {

// out[i, d] = scale sum_p x[i, p] W[d, p] + bias[d] + pos[token(i), d] for 128 x 256 of (i, d).
template <typename T, bool kBytes>
__global__ void __launch_bounds__(kThreads, 1) fwd_kernel(const __grid_constant__ TokenizeFwdParams params) {
#if VATT_HAS_WGMMA
  const PatchParams& p = params.rows.patches;
  const int dim = static_cast<int>(params.dim), size = static_cast<int>(patch_size(p));
  const int column_tiles = (dim + kMatrixSide - 1) / kMatrixSide;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x / column_tiles) * kVideoSide;
  const int column0 = static_cast<int>(blockIdx.x) % column_tiles * kMatrixSide;
  unsigned char* tiles = dynamic_shared();
  int64_t* tokens = reinterpret_cast<int64_t*>(tiles + kTileBytes);  // of the block's rows; -1 for AGG
  int64_t* found = tokens + kVideoSide;
  if (threadIdx.x < kVideoSide) {
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
          copy_tile<T, kProducers, kMatrixSide, 128>(matrix_tile(tiles, i), weight, size, column0, i * kDepth, aligned,
                                                     [&](int n) { return column0 + n < dim; });
        },
        [&](int i) {
          video.fetch(p, ChunkPlace(p, i * kDepth + chunk * kChunk), [&](int j) { return found[row + j * 32]; });
        },
        [&](int i) { video.put(video_tile(tiles, i), params.rows, row0, i * kDepth + chunk * kChunk); });
  } else {
    float sum[128] = {};
    consume<T, false>(sum, steps, tiles, (threadIdx.x - kProducers) / kWarpgroup);
#pragma unroll
    for (int i = 0; i < 128; i += 2) {
      float* to = staging + video_index(i) * kFwdStagingRow + matrix_index(i);
      *reinterpret_cast<float2*>(to) = make_float2(sum[i], sum[i + 1]);
    }
  }
  __syncthreads();
  const int column = column0 + threadIdx.x % 32 * 8, count = dim - column;
  if (count <= 0) return;
  float bias[8];
  load8(bias, params.bias, column, count);
#pragma unroll 1
  for (int r = threadIdx.x / 32; r < kVideoSide && row0 + r < params.rows.count(); r += kThreads / 32) {
    store_tokens(params, kBytes ? kByteScale : 1.0f, staging + r * kFwdStagingRow + column - column0, bias, row0 + r,
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
  const int column_tiles = (size + kVideoSide - 1) / kVideoSide;
  const int d0 = static_cast<int>(blockIdx.x) / column_tiles * kMatrixSide;
  const int p0 = static_cast<int>(blockIdx.x) % column_tiles * kVideoSide;
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
          for (int part = 0; part < kMatrixSide / 64; ++part) {
            copy_tile<T, kProducers, kDepth, 128>(matrix_tile(tiles, i) + part * kPartBytes, grad, dim,
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
          left.put(video_tile(tiles, i), params.rows, row0, left_at.first);
          right.put(video_tile(tiles, i) + kPartBytes, params.rows, row0, right_at.first);
        });
  } else {
    float sum[128] = {};
    consume<T, true>(sum, steps, tiles, (threadIdx.x - kProducers) / kWarpgroup);
#pragma unroll
    for (int i = 0; i < 128; ++i) staging[matrix_index(i) * kBwdStagingRow + video_index(i)] = sum[i];
  }
  __syncthreads();
  const int group = threadIdx.x % 16, column = p0 + group * 8;
  if (column >= size) return;
#pragma unroll 1
  for (int r = threadIdx.x / 16; r < kMatrixSide && d0 + r < dim; r += kThreads / 16) {
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
  const int64_t blocks = tiles_of(params.rows.count(), kVideoSide) * tiles_of(params.dim, kMatrixSide);
  if (blocks == 0) return;
  const DeviceGuard guard(device);
  const auto run = dtype == DType::kHalf ? launch_fwd<Half> : launch_fwd<BFloat16>;
  run(params, blocks, static_cast<cudaStream_t>(stream));
}

void tokenize_bwd_weight_wgmma(const TokenizeBwdParams& params, DType dtype, int device, void* stream) {
  using namespace sm90;
  check_dtype(dtype);
  const int64_t size = patch_size(params.rows.patches);
  const int64_t blocks = tiles_of(params.dim, kMatrixSide) * tiles_of(size, kVideoSide);
  if (blocks == 0) return;
  const DeviceGuard guard(device);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(params.splits));
  const auto run = dtype == DType::kHalf ? launch_bwd<Half> : launch_bwd<BFloat16>;
  run(params, grid, static_cast<cudaStream_t>(stream));
}

}  // namespace vatt

// The log-sum-exps of rows and columns of a similarity matrix that never reaches global memory.
#include "cuda_utils.cuh"
#include "nce.h"
#include "nce_tile.cuh"
#include "product.cuh"

namespace vatt {
namespace {

constexpr int kBuffers = 3;
constexpr int kSharedBytes = 2 * kBuffers * kTileBytes;
static_assert(kTile * kStagingRow * 4 <= kSharedBytes && kNceRows == kTile && kNceMmaColumns == kTile);

template <typename T, bool kOffset>
__global__ void __launch_bounds__(kThreads<T>, kBlocks<T>)
    nce_stats_kernel(const __grid_constant__ NceStatsParams params) {
  const int64_t row0 = first_row(params, kTile, blockIdx.x);
  const int64_t column0 = first_column(params, kTile, kTile, blockIdx.x);
  const int dim = static_cast<int>(params.dim);
  const T *a = static_cast<const T*>(params.a), *b = static_cast<const T*>(params.b);
  const auto aligned = [&](const T* matrix) {
    return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && dim * sizeof(T) % 16 == 0;
  };
  unsigned char* tiles = dynamic_shared();
  const auto tile_of = [&](int i, int side) { return tiles + (2 * (i % kBuffers) + side) * kTileBytes; };
  const auto nothing = [](int) {};
  Product<T, false> product;
  run_steps((dim + kDepth<T> - 1) / kDepth<T>, nothing,
            [&](int i) {
              copy_tile<T, kThreads<T>, kTile, 128>(tile_of(i, 0), a, dim, row0, i * kDepth<T>, aligned(a),
                                                    [&](int r) { return row0 + r < params.rows; });
              copy_tile<T, kThreads<T>, kTile, 128>(tile_of(i, 1), b, dim, column0, i * kDepth<T>, aligned(b),
                                                    [&](int c) { return column0 + c < params.columns; });
            },
            nothing, nothing, [&](int i) { product.multiply(tile_of(i, 0), tile_of(i, 1)); });
  float* staging = reinterpret_cast<float*>(tiles);
  product.stage(staging);
  __syncthreads();
  finish_tile<kOffset, kTile, kTile, kStagingRow, kThreads<T>>(params, staging, row0, column0);
}

}  // namespace

void nce_stats_mma(const NceStatsParams& params, DType dtype, int device, void* stream) {
  const int64_t blocks = tiles_of(params.rows, kTile) * tiles_of(params.columns, kTile);
  const DeviceGuard guard(device);
  VATT_DISPATCH_FLOAT(dtype, T, {
    launch(params.has_offset ? nce_stats_kernel<T, true> : nce_stats_kernel<T, false>, static_cast<unsigned>(blocks),
           kThreads<T>, kSharedBytes, static_cast<cudaStream_t>(stream), params);
  });
}

}  // namespace vatt

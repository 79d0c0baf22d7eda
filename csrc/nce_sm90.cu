// The statistics of nce.cu on sm_90a: wgmma on 128 x 256 outputs a block, both operands copied by a third warpgroup.
#include "check.h"
#include "cuda_utils.cuh"
#include "nce.h"
#include "nce_tile.cuh"
#include "product.cuh"
#include "wgmma_product.cuh"

namespace vatt {
namespace sm90 {
namespace {

static_assert(kNceRows == kLeftSide && kNceWgmmaColumns == kRightSide);

template <typename T, bool kOffset>
__global__ void __launch_bounds__(kThreads, 1) nce_stats_kernel(const __grid_constant__ NceStatsParams params) {
#if VATT_HAS_WGMMA
  const int64_t row0 = first_row(params, kLeftSide, blockIdx.x);
  const int64_t column0 = first_column(params, kLeftSide, kRightSide, blockIdx.x);
  const int dim = static_cast<int>(params.dim), steps = (dim + kDepth - 1) / kDepth;
  const T *a = static_cast<const T*>(params.a), *b = static_cast<const T*>(params.b);
  const auto aligned = [&](const T* matrix) {
    return reinterpret_cast<uintptr_t>(matrix) % 16 == 0 && dim * sizeof(T) % 16 == 0;
  };
  unsigned char* tiles = dynamic_shared();
  float* staging = reinterpret_cast<float*>(tiles);
  if (threadIdx.x < kProducers) {
    const auto nothing = [](int) {};
    produce(
        steps, nothing,
        [&](int i) {
          copy_tile<T, kProducers, kLeftSide, 128>(left_tile(tiles, i), a, dim, row0, i * kDepth, aligned(a),
                                                   [&](int r) { return row0 + r < params.rows; });
          copy_tile<T, kProducers, kRightSide, 128>(right_tile(tiles, i), b, dim, column0, i * kDepth, aligned(b),
                                                    [&](int c) { return column0 + c < params.columns; });
        },
        nothing, nothing);
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
  finish_tile<kOffset, kLeftSide, kRightSide, kStagingRow, kThreads>(params, staging, row0, column0);
#else
  __trap();
#endif
}

template <typename T>
void launch_stats(const NceStatsParams& params, int64_t blocks, cudaStream_t stream) {
  launch(params.has_offset ? nce_stats_kernel<T, true> : nce_stats_kernel<T, false>, static_cast<unsigned>(blocks),
         kThreads, kTileBytes, stream, params);
}

}  // namespace
}  // namespace sm90

void nce_stats_wgmma(const NceStatsParams& params, DType dtype, int device, void* stream) {
  using namespace sm90;
  VATT_CHECK(dtype == DType::kHalf || dtype == DType::kBFloat16,
             "nce: dtype must be bfloat16 or float16 for wgmma, got another.");
  const int64_t blocks = vatt::tiles_of(params.rows, kLeftSide) * vatt::tiles_of(params.columns, kRightSide);
  const DeviceGuard guard(device);
  const auto run = dtype == DType::kHalf ? launch_stats<Half> : launch_stats<BFloat16>;
  run(params, blocks, static_cast<cudaStream_t>(stream));
}

}  // namespace vatt

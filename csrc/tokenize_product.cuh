// What tokenize adds to the product of two tiles: its buffers, and the way of the outputs to global memory.
#pragma once

#include "product.cuh"
#include "tokenize_tile.cuh"

namespace vatt {

constexpr int kVideoBuffers = 2, kMatrixBuffers = 3;
constexpr int kSharedBytes = (kVideoBuffers + kMatrixBuffers) * kTileBytes;
static_assert(kTile * kStagingRow * 4 <= kSharedBytes);

// Eight values of a row; `count` says how many there are up to its end.
template <typename Out>
__device__ __forceinline__ void store8(Out* to, const float (&values)[8], int count) {
  if (count >= 8 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    uint4* vectors = reinterpret_cast<uint4*>(to);
    if constexpr (std::is_same_v<Out, float>) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        vectors[i] = make_uint4(float_bits(values[4 * i]), float_bits(values[4 * i + 1]), float_bits(values[4 * i + 2]),
                                float_bits(values[4 * i + 3]));
      }
    } else {
      vectors[0] = make_uint4(pack2<Out>(values[0], values[1]), pack2<Out>(values[2], values[3]),
                              pack2<Out>(values[4], values[5]), pack2<Out>(values[6], values[7]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) to[i] = from_float<Out>(values[i]);
    }
  }
}

__device__ __forceinline__ void store8(void* matrix, DType dtype, int64_t index, const float (&values)[8], int count) {
  VATT_DISPATCH_FLOAT(dtype, Out, store8(static_cast<Out*>(matrix) + index, values, count));
}
// Eight floats of a row; zero behind the last and where there is no matrix.
__device__ __forceinline__ void load8(float (&values)[8], const float* matrix, int64_t index, int count) {
#pragma unroll
  for (float& value : values) value = 0.0f;
  if (!matrix) return;
  const float* from = matrix + index;
  if (count >= 8 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 four = reinterpret_cast<const float4*>(from)[i];
      values[4 * i] = four.x, values[4 * i + 1] = four.y, values[4 * i + 2] = four.z, values[4 * i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) values[i] = from[i];
    }
  }
}

// One row's eight outputs: scale sum + bias + pos[token], or agg where the token is -1.
__device__ __forceinline__ void store_tokens(const TokenizeFwdParams& params, float scale, const float* sum,
                                             const float (&bias)[8], int64_t row, int64_t token, int column) {
  const int count = static_cast<int>(params.dim) - column;
  float values[8];
  if (token < 0) {
    load8(values, params.agg, column, count);
  } else {
    float total[8];
    load8(total, sum, 0, 8);
    load8(values, params.pos, token * params.dim + column, count);
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] += scale * total[j] + bias[j];
  }
  store8(params.out, params.out_dtype, row * params.dim + column, values, count);
}

// Eight elements of row d of this split's part of dW.
__device__ __forceinline__ void store_gradient(const TokenizeBwdParams& params, float scale, const float* sum, int d,
                                               int column) {
  const int64_t size = patch_size(params.rows.patches);
  float values[8];
  load8(values, sum, 0, 8);
#pragma unroll
  for (float& value : values) value *= scale;
  store8(params.out, params.out_dtype, (blockIdx.y * params.dim + d) * size + column, values,
         static_cast<int>(size) - column);
}

}  // namespace vatt

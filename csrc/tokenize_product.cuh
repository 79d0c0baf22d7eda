// The product of two tiles in shared memory, 128 x 128 outputs by a block, and its way to global memory.
#pragma once

#include <type_traits>

#include "cuda_utils.cuh"
#include "tensor_core.cuh"
#include "tokenize_tile.cuh"

namespace vatt {

constexpr int kTile = 128;  // outputs of a block along either side
constexpr int kTileBytes = 16 << 10;
constexpr int kVideoBuffers = 2, kMatrixBuffers = 3;
constexpr int kSharedBytes = (kVideoBuffers + kMatrixBuffers) * kTileBytes;
constexpr int kStagingRow = kTile + 8;  // floats; the padding keeps the fragments' rows in different banks
static_assert(kTile * kStagingRow * 4 <= kSharedBytes);

// For halves 2 x 2 warps with 64 x 64 outputs each, and two blocks at a time on a multiprocessor of sm_80; float32
// needs the registers of both for one.
template <typename T>
constexpr int kThreads = std::is_same_v<T, float> ? 256 : 128;
template <typename T>
constexpr int kBlocks = 256 / kThreads<T>;

// Depth of one step of the sum: what fits a tile.
template <typename T>
constexpr int kDepth = kTileBytes / kTile / static_cast<int>(sizeof(T));

// sum += a b over the depth of one tile each. Forward (kDepthFirst false): tiles are a[128, depth] and b[128, depth]
// with rows of 128 bytes. Backward (kDepthFirst true): a[depth, 128] and b[depth, 128].
template <typename T, bool kDepthFirst>
class Product {
 public:
  static constexpr int kRowBytes = kDepthFirst ? kTile * sizeof(T) : 128;

  __device__ __forceinline__ void multiply(const unsigned char* a, const unsigned char* b) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kDepth<T>; k += 16) {
      uint32_t b_fragments[4][4];  // of 16 x 16: two fragments of n = 8
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int n = first_column() + 16 * j;
        if constexpr (kDepthFirst) {
          ldmatrix_x4_trans(b_fragments[j], b + tile_offset<kRowBytes>(k + lane % 16, n / 8 + lane / 16));
        } else {
          ldmatrix_x4(b_fragments[j], b + tile_offset<kRowBytes>(n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = first_row() + 16 * i;
        uint32_t a_fragment[4];
        if constexpr (kDepthFirst) {
          ldmatrix_x4_trans(a_fragment, a + tile_offset<kRowBytes>(k + lane % 8 + lane / 16 * 8, m / 8 + lane / 8 % 2));
        } else {
          ldmatrix_x4(a_fragment, a + tile_offset<kRowBytes>(m + lane % 16, k / 8 + lane / 16));
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t* b_fragment = b_fragments[j / 2] + j % 2 * 2;
          mma_m16n8k16<T>(sum_[i][j], a_fragment, b_fragment[0], b_fragment[1]);
        }
      }
    }
  }

  // Writes the sums to staging[128][kStagingRow].
  __device__ __forceinline__ void stage(float* staging) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float* to = staging + (first_row() + 16 * i + lane / 4) * kStagingRow + first_column() + 8 * j + lane % 4 * 2;
        *reinterpret_cast<float2*>(to) = make_float2(sum_[i][j][0], sum_[i][j][1]);
        *reinterpret_cast<float2*>(to + 8 * kStagingRow) = make_float2(sum_[i][j][2], sum_[i][j][3]);
      }
    }
  }

 private:
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 % 2 * 64; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x / 64 * 64; }

  float sum_[4][8][4] = {};
};

// float32 with its own multiplications: a thread has 8 x 8 outputs. Each step is summed by itself and then added, which
// keeps the error of long sums near that of the library's.
template <bool kDepthFirst>
class Product<float, kDepthFirst> {
 public:
  static constexpr int kRowBytes = kDepthFirst ? kTile * sizeof(float) : 128;

  __device__ __forceinline__ void multiply(const unsigned char* a, const unsigned char* b) {
    float step[8][8] = {};
    if constexpr (kDepthFirst) {
#pragma unroll 4
      for (int k = 0; k < kDepth<float>; ++k) {
        float a_values[8], b_values[8];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          load4(a_values + 4 * i, a + tile_offset<kRowBytes>(k, row() + 16 * i));
          load4(b_values + 4 * i, b + tile_offset<kRowBytes>(k, column() + 16 * i));
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) step[i][j] = fmaf(a_values[i], b_values[j], step[i][j]);
        }
      }
    } else {
#pragma unroll 1
      for (int piece = 0; piece < 8; ++piece) {
        float a_values[8][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) load4(a_values[i], a + tile_offset<kRowBytes>(row() + 16 * i, piece));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float b_values[4];
          load4(b_values, b + tile_offset<kRowBytes>(column() + 16 * j, piece));
#pragma unroll
          for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int i = 0; i < 8; ++i) step[i][j] = fmaf(a_values[i][k], b_values[k], step[i][j]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum_[i][j] += step[i][j];
    }
  }

  __device__ __forceinline__ void stage(float* staging) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) staging[index(row(), i) * kStagingRow + index(column(), j)] = sum_[i][j];
    }
  }

 private:
  static __device__ __forceinline__ int row() { return threadIdx.x / 16; }
  static __device__ __forceinline__ int column() { return threadIdx.x % 16; }

  // Depth first a thread's outputs are pieces of four, 16 pieces apart; else every 16th.
  static __device__ __forceinline__ int index(int first, int i) {
    return kDepthFirst ? 4 * first + i / 4 * 64 + i % 4 : first + 16 * i;
  }

  static __device__ __forceinline__ void load4(float* values, const unsigned char* from) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
  }

  float sum_[8][8] = {};
};

// The loop over the depth. Video goes through registers: fetched two steps ahead, put into its tile one step ahead; the
// matrix is copied in the background two steps ahead; prepare(i) may fill a table, one of two, that fetch(i) and
// copy(i) read. They do nothing for steps that there are not.
template <typename Prepare, typename Copy, typename Fetch, typename Put, typename Multiply>
__device__ __forceinline__ void run_steps(int steps, const Prepare& prepare, const Copy& copy, const Fetch& fetch,
                                          const Put& put, const Multiply& multiply) {
  prepare(0);
#pragma unroll 1
  for (int i = -2; i < steps; ++i) {
    cp_async_wait<1>();
    __syncthreads();  // step i has landed for all, and nobody reads the tiles of step i - 1 any more
    if (i + 2 < steps) copy(i + 2);
    cp_async_commit();
    if (i + 1 >= 0 && i + 1 < steps) put(i + 1);
    if (i + 2 < steps) fetch(i + 2);
    if (i >= 0) multiply(i);
    if (i + 3 < steps) prepare(i + 3);
  }
  cp_async_wait<0>();
  __syncthreads();
}

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

// The product of two tiles in shared memory, 128 x 128 outputs by a block: the tiles, their way there, the loop.
#pragma once

#include <type_traits>

#include "cuda_utils.cuh"
#include "tensor_core.cuh"

namespace vatt {

constexpr int kTile = 128;  // outputs of a block along either side
constexpr int kTileBytes = 16 << 10;
constexpr int kStagingRow = kTile + 8;  // floats; the padding keeps the fragments' rows in different banks

// For halves 2 x 2 warps with 64 x 64 outputs each, and two blocks at a time on a multiprocessor of sm_80; float32
// needs the registers of both for one.
template <typename T>
constexpr int kThreads = std::is_same_v<T, float> ? 256 : 128;
template <typename T>
constexpr int kBlocks = 256 / kThreads<T>;

// Depth of one step of the sum: what fits a tile.
template <typename T>
constexpr int kDepth = kTileBytes / kTile / static_cast<int>(sizeof(T));

// Where 16-byte piece `piece` of a row lies: rows beside each other have their pieces in different banks.
template <int kRowBytes>
__device__ __forceinline__ int tile_offset(int row, int piece) {
  static_assert(kRowBytes % 128 == 0);
  return row * kRowBytes + ((piece ^ (row & 7)) << 4);
}

// Rows row0.. and columns column0.. of a matrix [*, columns] into a tile: in the background where 16 bytes lie aligned,
// element by element otherwise. Columns behind the last, and rows for which has_row(row of the tile) is false, are
// zero.
template <typename T, int kThreads, int kRows, int kRowBytes, typename HasRow>
__device__ __forceinline__ void copy_tile(unsigned char* tile, const T* matrix, int columns, int64_t row0, int column0,
                                          bool aligned, const HasRow& has_row) {
  constexpr int kPieces = kRowBytes / 16, kVector = 16 / sizeof(T), kRowStep = kThreads / kPieces;
  static_assert(kRowStep % 8 == 0);  // rows of one thread have the same swizzle
  const int piece = threadIdx.x % kPieces, first = threadIdx.x / kPieces, column = column0 + piece * kVector;
  unsigned char* to = tile + tile_offset<kRowBytes>(first, piece);
  const T* from = matrix + (row0 + first) * columns + column;
  const int64_t step = static_cast<int64_t>(kRowStep) * columns;
  if (aligned) {
#pragma unroll
    for (int i = 0; i < kRows / kRowStep; ++i, from += step, to += kRowStep * kRowBytes) {
      const bool any = has_row(first + i * kRowStep) && column < columns;
      cp_async<16>(to, any ? from : matrix, any ? 16 : 0);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kRows / kRowStep; ++i, from += step, to += kRowStep * kRowBytes) {
      const bool any = has_row(first + i * kRowStep);
      for (int j = 0; j < kVector; ++j) reinterpret_cast<T*>(to)[j] = any && column + j < columns ? from[j] : T{};
    }
  }
}

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

// The loop over the depth. Matrices are copied in the background two steps ahead; what goes through registers is
// fetched two steps ahead and put into its tile one step ahead; prepare(i) may fill a table, one of two, that fetch(i)
// and copy(i) read. They do nothing for steps that there are not.
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

}  // namespace vatt

#include <algorithm>

#include "cuda_utils.cuh"
#include "drop_token.h"

namespace vatt {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;  // of a block that moves rows, each warp a row at a time
constexpr int kThreads = kWarps * kWarp;
constexpr int kTile = 32;  // tokens whose rows one block of the scatter writes
constexpr int64_t kMaxBlocks = 1 << 20;

__device__ __forceinline__ int64_t checked_position(const DropTokenParams& p, int64_t b, int64_t k) {
  const int64_t position = kept_position(p, b, k);
  if (position < 0 || position >= p.tokens) __trap();
  return position;
}

// A row is moved in units of 16 bytes, or of one value where it is not aligned to that.
template <typename T, typename Unit>
__device__ __forceinline__ void copy_row(T* out, const T* in, int64_t width, int lane) {
  const int64_t units = width * sizeof(T) / sizeof(Unit);
  for (int64_t i = lane; i < units; i += kWarp) {
    reinterpret_cast<Unit*>(out)[i] = reinterpret_cast<const Unit*>(in)[i];
  }
}

template <typename T, typename Unit>
__global__ void __launch_bounds__(kThreads) gather_rows_kernel(const DropTokenParams p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp; i < p.batch * p.kept; i += step) {
    const int64_t b = i / p.kept;
    const T* in = static_cast<const T*>(p.in) + input_offset(p, b, checked_position(p, b, i % p.kept));
    copy_row<T, Unit>(static_cast<T*>(p.out) + i * p.width, in, p.width, lane);
  }
}

// A block looks through all kept positions of a sample for those in its tile, then writes the tile's rows: no atomic
// addition to the result, so that it is the same every time. Positions kept twice are rare, and slow.
template <typename T, typename Unit>
__global__ void __launch_bounds__(kThreads, 4) scatter_rows_kernel(const DropTokenParams p) {
  __shared__ unsigned long long first[kTile];
  __shared__ unsigned int count[kTile];
  const int lane = threadIdx.x % kWarp;
  const int64_t tiles = (p.tokens + kTile - 1) / kTile;
  for (int64_t i = blockIdx.x; i < p.batch * tiles; i += gridDim.x) {
    const int64_t b = i / tiles, begin = i % tiles * kTile;
    if (threadIdx.x < kTile) {
      first[threadIdx.x] = p.kept;
      count[threadIdx.x] = 0;
    }
    __syncthreads();
    for (int64_t k = threadIdx.x; k < p.kept; k += kThreads) {
      const int64_t n = checked_position(p, b, k) - begin;
      if (n >= 0 && n < kTile) {
        atomicMin(&first[n], static_cast<unsigned long long>(k));
        atomicAdd(&count[n], 1u);
      }
    }
    __syncthreads();
    for (int n = threadIdx.x / kWarp; n < kTile && begin + n < p.tokens; n += kWarps) {
      const T* in = static_cast<const T*>(p.in) + b * p.in_stride_b;
      T* out = static_cast<T*>(p.out) + (b * p.tokens + begin + n) * p.width;
      if (count[n] == 1) {
        copy_row<T, Unit>(out, in + first[n] * p.in_stride_row, p.width, lane);
        continue;
      }
      for (int64_t c = lane; c < p.width; c += kWarp) {
        float sum = 0.0f;
        unsigned int left = count[n];
        for (int64_t k = first[n]; left > 0; ++k) {
          if (kept_position(p, b, k) != begin + n) continue;
          sum += to_float(in[k * p.in_stride_row + c]);
          --left;
        }
        out[c] = from_float<T>(sum);
      }
    }
    __syncthreads();
  }
}

// One block per sample sorts the keys of all positions in shared memory (bitonic, `size` a power of two).
__global__ void __launch_bounds__(1024) sample_keep_kernel(const SampleParams p, int size) {
  int64_t* keys = reinterpret_cast<int64_t*>(dynamic_shared());
  const int64_t b = blockIdx.x;
  const uint64_t stream = sample_stream(p, b);
  for (int n = threadIdx.x; n < size; n += blockDim.x) keys[n] = n < p.tokens ? position_key(stream, n) : INT64_MAX;
  for (int run = 2; run <= size; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < size / 2; pair += blockDim.x) {
        const int low = pair / distance * 2 * distance + pair % distance;
        const int64_t x = keys[low], y = keys[low + distance];
        const bool ascending = (low & run) == 0;
        if ((x > y) == ascending) {
          keys[low] = y;
          keys[low + distance] = x;
        }
      }
    }
  }
  __syncthreads();
  for (int k = threadIdx.x; k < p.kept; k += blockDim.x) p.out[b * p.kept + k] = keys[k] & kPositionMask;
}

template <typename T>
bool is_aligned(const DropTokenParams& p) {
  const auto bits = reinterpret_cast<uintptr_t>(p.in) | reinterpret_cast<uintptr_t>(p.out);
  const int64_t sizes = (p.width | p.in_stride_b | p.in_stride_row) * static_cast<int64_t>(sizeof(T));
  return bits % sizeof(uint4) == 0 && sizes % static_cast<int64_t>(sizeof(uint4)) == 0;
}

unsigned grid_size(int64_t blocks) { return static_cast<unsigned>(std::min(blocks, kMaxBlocks)); }

}  // namespace

void drop_token_fwd_cuda(const DropTokenParams& p, DType dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  VATT_DISPATCH_FLOAT(dtype, T, {
    const auto kernel = is_aligned<T>(p) ? gather_rows_kernel<T, uint4> : gather_rows_kernel<T, T>;
    launch(kernel, grid_size((p.batch * p.kept + kWarps - 1) / kWarps), kThreads, 0, static_cast<cudaStream_t>(stream),
           p);
  });
}

void drop_token_bwd_cuda(const DropTokenParams& p, DType dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  VATT_DISPATCH_FLOAT(dtype, T, {
    const auto kernel = is_aligned<T>(p) ? scatter_rows_kernel<T, uint4> : scatter_rows_kernel<T, T>;
    const int64_t tiles = (p.tokens + kTile - 1) / kTile;
    launch(kernel, grid_size(p.batch * tiles), kThreads, 0, static_cast<cudaStream_t>(stream), p);
  });
}

void sample_keep_cuda(const SampleParams& p, int device, void* stream) {
  const DeviceGuard guard(device);
  int size = 2;
  while (size < p.tokens) size *= 2;
  const int threads = std::clamp(size / 2, kWarp, 1024);
  launch(sample_keep_kernel, static_cast<unsigned>(p.batch), threads, size * sizeof(int64_t),
         static_cast<cudaStream_t>(stream), p, size);
}

}  // namespace vatt

// The product of two tiles on sm_90a, 128 x 256 outputs by a block: two warpgroups with 64 x 256 each multiply out of
// shared memory, which a third fills.
#pragma once

#include "cuda_utils.cuh"
#include "wgmma.cuh"

#if defined(VATT_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VATT_HAS_WGMMA 1
#else
#define VATT_HAS_WGMMA 0
#endif

namespace vatt {
namespace sm90 {

constexpr int kProducers = kWarpgroup, kConsumers = 2 * kWarpgroup, kThreads = kProducers + kConsumers;
constexpr int kLeftSide = 128, kRightSide = 256;  // outputs of a block along either operand
constexpr int kDepth = 64;                        // of one step of the sum: a row of 128 bytes
constexpr int kStages = 4;
constexpr int kPartBytes = 64 * 128;  // 64 rows of a tile
constexpr int kLeftBytes = kLeftSide / 64 * kPartBytes;
constexpr int kStageBytes = kLeftBytes + kRightSide / 64 * kPartBytes;
constexpr int kTileBytes = kStages * kStageBytes;
constexpr int kStagingRow = kRightSide + 8;  // floats; the padding keeps rows in other banks
static_assert(kLeftSide * kStagingRow * 4 <= kTileBytes);

// Barriers: a stage is full for a group of consumers, a stage is empty, one part among itself.
inline constexpr int kProducersOnly = 1, kConsumersOnly = 2, kFirstFull = 3, kFirstEmpty = kFirstFull + 2 * kStages;
static_assert(kFirstEmpty + kStages <= 16);

__device__ __forceinline__ int full(int i, int group) { return kFirstFull + 2 * (i % kStages) + group; }

__device__ __forceinline__ int empty(int i) { return kFirstEmpty + i % kStages; }

__device__ __forceinline__ unsigned char* left_tile(unsigned char* tiles, int i) {
  return tiles + i % kStages * kStageBytes;
}

__device__ __forceinline__ unsigned char* right_tile(unsigned char* tiles, int i) {
  return left_tile(tiles, i) + kLeftBytes;
}

// The producers' part: the tiles of all steps. copy(i) copies in the background; what goes through registers is fetched
// a step before it is put; prepare(i) fills a table that copy(i) and fetch(i) read.
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

// The consumers' part: sum[left, right] += the products of all steps.
template <typename T, bool kAcrossRows>
__device__ __forceinline__ void consume(float (&sum)[128], int steps, unsigned char* tiles, int group) {
  if (shared_address(tiles) % kPatternBytes) __trap();
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    barrier_sync(full(i, group), kProducers + kWarpgroup);
    uint64_t left = matrix_descriptor(left_tile(tiles, i) + group * kPartBytes, kPartBytes);
    uint64_t right = matrix_descriptor(right_tile(tiles, i), kPartBytes);
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

// Where sum[i] of a consumer lies: along either operand.
__device__ __forceinline__ int left_index(int i) {
  return static_cast<int>(threadIdx.x - kProducers) / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
}
__device__ __forceinline__ int right_index(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

}  // namespace sm90
}  // namespace vatt

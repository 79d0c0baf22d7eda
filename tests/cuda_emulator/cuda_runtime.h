// Stands in for the CUDA toolkit's header where g++ compiles a .cu file for the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __shared__ static  // keeps its values from block to block; dynamic shared memory is what gets poisoned
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

using std::max;
using std::min;

// ---- vector types -------------------------------------------------------------------------------------------------

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

// ---- runtime --------------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 4, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return memset(to, value, bytes), cudaSuccess;
}

// ---- device functions -----------------------------------------------------------------------------------------------

inline void __syncthreads() { vatt::emulator::barrier_sync(0, blockDim.x * blockDim.y * blockDim.z, "__syncthreads"); }

[[noreturn]] inline void __trap() { vatt::emulator::fail("trap"); }

namespace vatt::emulator {

inline void need_whole_warp(unsigned mask) {
  if (mask != 0xffffffffu) fail("the emulator knows only whole warps");
}

// Every lane brings a value and takes the one of lane from(lane).
template <typename T, typename From>
T shuffle(const char* name, unsigned mask, T value, From from) {
  need_whole_warp(mask);
  struct Slot {
    T given, taken;
  } slot{value, value};
  together(32, name, slot, [&](const auto& at) {
    for (int lane = 0; lane < 32; ++lane) at(lane).taken = at(from(lane)).given;
  });
  return slot.taken;
}

}  // namespace vatt::emulator

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  vatt::emulator::need_whole_warp(mask);
  int nothing = 0;
  vatt::emulator::together(32, "__syncwarp", nothing, [](const auto&) {});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return vatt::emulator::shuffle("__shfl_xor_sync", mask, value, [=](int lane) { return lane ^ lanes; });
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return vatt::emulator::shuffle("__shfl_down_sync", mask, value,
                                 [=](int lane) { return lane + static_cast<int>(delta) < 32 ? lane + delta : lane; });
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  return vatt::emulator::shuffle("__shfl_up_sync", mask, value,
                                 [=](int lane) { return lane >= static_cast<int>(delta) ? lane - delta : lane; });
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return vatt::emulator::shuffle("__shfl_sync", mask, value, [=](int) { return source & 31; });  // alike in all lanes
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  vatt::emulator::need_whole_warp(mask);
  struct Slot {
    bool given;
    unsigned taken;
  } slot{predicate != 0, 0};
  vatt::emulator::together(32, "__ballot_sync", slot, [](const auto& at) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(at(lane).given) << lane;
    for (int lane = 0; lane < 32; ++lane) at(lane).taken = votes;
  });
  return slot.taken;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

inline int __syncthreads_or(int predicate) {
  static int any;
  __syncthreads();
  any = 0;
  __syncthreads();
  any |= predicate != 0;
  __syncthreads();
  return any;
}

template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

template <typename T>
T atomicMin(T* to, T value) {
  const T before = *to;
  *to = min(before, value);
  return before;
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// Bytes 0..3 of the result are the bytes of b:a that the nibbles of `selector` name.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    if (selector >> (4 * i) & 8) vatt::emulator::fail("__byte_perm copies signs only in PTX");
    result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return result;
}

// The low word of (high:low) >> (shift mod 32).
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

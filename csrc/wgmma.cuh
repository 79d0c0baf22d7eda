// The instructions of sm_90a that a warpgroup (128 threads) multiplies with: operands in shared memory, found by
// descriptors, the sum in registers, everything in the background. T is Half or BFloat16.
//
// A tile is [rows][64 halves], each row 128 bytes, eight rows to a pattern of 1024 bytes whose 16-byte piece i of row r
// lies at i ^ r; it starts at a multiple of 1024. Two views of it in the product D[m, n] = sum_k A[m, k] B[n, k]:
//   k within a row ("K-major"):  rows are m or n, the instruction's 16 k lie within the 64 of a row;
//   k across rows ("MN-major"):  rows are k, a row holds 64 of m or n, further ones lie in tiles behind.
#pragma once

#include "tensor_core.cuh"

#ifdef VATT_EMULATE
#include "emulated_wgmma.h"  // the same functions for the CPU, see tests/cuda_emulator
#endif

namespace vatt {

constexpr int kWarpgroup = 128;
constexpr int kPatternBytes = 1024;  // eight rows
constexpr int kWgmmaK = 16;

// Descriptor of a tile; `leading_bytes` from tile to tile where k lies across rows, not used otherwise.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* tile, int leading_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  return static_cast<uint64_t>(shared_address(tile) >> 4 & 0x3fff) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(kPatternBytes >> 4) << 32 | kSwizzle128 << 62;
}

// Where the next 16 k lie: 32 bytes on in a row, or 16 rows on.
template <bool kAcrossRows>
__device__ __forceinline__ uint64_t next_k(uint64_t descriptor) {
  return descriptor + ((kAcrossRows ? 2 * kPatternBytes : kWgmmaK * 2) >> 4);
}

#ifndef VATT_EMULATE

// Barrier `id` of `threads` threads, some of which wait and some of which only arrive; __syncthreads is barrier 0.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Keeps the compiler from moving what it does with these registers across this point.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (float& value : registers) asm volatile("" : "+f"(value)::"memory");
}

// Before the first product, and whenever the threads themselves have touched the registers of the sum.
template <int kCount>
__device__ __forceinline__ void wgmma_fence(float (&sum)[kCount]) {
  pin(sum);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// The products since the last commit become a group.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// All but the last kGroupsInFlight groups have read their operands and written their sums.
template <int kGroupsInFlight, int kCount>
__device__ __forceinline__ void wgmma_wait(float (&sum)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsInFlight) : "memory");
  if constexpr (kGroupsInFlight == 0) pin(sum);
}

// What this thread has written to shared memory, and its copies that have landed, become visible to wgmma.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define VATT_SUM_8(i)                                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define VATT_SUM_32(i) VATT_SUM_8(i), VATT_SUM_8(i + 8), VATT_SUM_8(i + 16), VATT_SUM_8(i + 24)
#define VATT_WGMMA_N256(type)                                                                                    \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                      \
               " {"                                                                                              \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                          \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                \
               "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                \
               "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                \
               "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "    \
               "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127 " \
               "}, %128, %129, 1, 1, 1, %130, %131;"                                                             \
               : VATT_SUM_32(0), VATT_SUM_32(32), VATT_SUM_32(64), VATT_SUM_32(96)                               \
               : "l"(a), "l"(b), "n"(kAcrossA ? 1 : 0), "n"(kAcrossB ? 1 : 0))

// d[64, 256] += a[64, 16] b[256, 16]^T. Lane i of warp w holds rows 16 w + i / 4 and the eighth after it, in columns
// 8 j + 2 (i % 4) and the next: d[4 j], d[4 j + 1] of the first row, d[4 j + 2], d[4 j + 3] of the second.
template <typename T, bool kAcrossA, bool kAcrossB>
__device__ __forceinline__ void wgmma_m64n256k16(float (&d)[128], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    VATT_WGMMA_N256("bf16");
  } else {
    VATT_WGMMA_N256("f16");
  }
}

#undef VATT_WGMMA_N256
#undef VATT_SUM_32
#undef VATT_SUM_8

#endif

}  // namespace vatt

// A product with wgmma, right and with one fault each: what the emulator must notice.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda_utils.cuh"
#include "wgmma.cuh"

namespace vatt {
namespace {

enum Fault { kNone, kNoFence, kNoProxyFence, kNoCommit, kNoWait, kOneInFlight, kOverwrite, kEarlyCopy, kNoBarrier };

constexpr int kK = 64, kTileA = 64 * 128, kTileB = 256 * 128;

// Element [row, k] of a tile, by the words of the PTX ISA: swizzled 16-byte pieces, rows of 128 bytes.
__device__ int place(int row, int k, bool across, int rows) {
  const int line = across ? row / 64 * kK + k : row, column = across ? row % 64 : k;
  return line * 128 + ((column / 8 ^ line % 8) << 4) + column % 8 * 2;
}

// out[m, n] = sum_k a[m, k] b[n, k] of two warpgroups with 64 rows each, 256 columns.
template <Fault kFault, bool kAcrossA, bool kAcrossB>
__global__ void product_kernel(const uint16_t* a, const uint16_t* b, float* out) {
  unsigned char* tile_b = dynamic_shared();
  const int group = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  unsigned char* tile_a = tile_b + kTileB + group * kTileA;
  for (int i = thread; i < 64 * kK; i += kWarpgroup) {
    const int row = i / kK, k = i % kK;
    *reinterpret_cast<uint16_t*>(tile_a + place(row, k, kAcrossA, 64)) = a[(group * 64 + row) * kK + k];
  }
  for (int i = threadIdx.x; i < 256 * kK; i += 2 * kWarpgroup) {
    *reinterpret_cast<uint16_t*>(tile_b + place(i / kK, i % kK, kAcrossB, 256)) = b[i];
  }
  if (kFault != kNoProxyFence) fence_async_proxy();
  if (kFault != kNoBarrier) __syncthreads();
  float sum[128] = {};
  if (kFault != kNoFence) wgmma_fence(sum);
  uint64_t left = matrix_descriptor(tile_a, kK * 128), right = matrix_descriptor(tile_b, kK * 128);
  for (int k = 0; k < kK; k += kWgmmaK) {
    wgmma_m64n256k16<BFloat16, kAcrossA, kAcrossB>(sum, left, right);
    left = next_k<kAcrossA>(left);
    right = next_k<kAcrossB>(right);
  }
  if (kFault != kNoCommit) wgmma_commit();
  if (kFault == kOverwrite && threadIdx.x == 200) tile_b[777] ^= 1;
  if (kFault == kEarlyCopy && threadIdx.x == 100) cp_async<16>(tile_b, b, 16);
  if (kFault == kOneInFlight) wgmma_wait<1>(sum);
  if (kFault != kNoWait && kFault != kOneInFlight) wgmma_wait<0>(sum);
  for (int i = 0; i < 128; ++i) {
    const int row = group * 64 + thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    out[row * 256 + i / 4 * 8 + thread % 4 * 2 + i % 2] = sum[i];
  }
}

using Kernel = void (*)(const uint16_t*, const uint16_t*, float*);

template <bool kAcrossA, bool kAcrossB>
Kernel kernel_of(const std::string& name) {
  const struct {
    const char* name;
    Kernel kernel;
  } kernels[] = {
      {"right", product_kernel<kNone, kAcrossA, kAcrossB>},
      {"without a fence", product_kernel<kNoFence, kAcrossA, kAcrossB>},
      {"without a proxy fence", product_kernel<kNoProxyFence, kAcrossA, kAcrossB>},
      {"without a commit", product_kernel<kNoCommit, kAcrossA, kAcrossB>},
      {"without a wait", product_kernel<kNoWait, kAcrossA, kAcrossB>},
      {"with a group in flight", product_kernel<kOneInFlight, kAcrossA, kAcrossB>},
      {"overwritten too early", product_kernel<kOverwrite, kAcrossA, kAcrossB>},
      {"copied to too early", product_kernel<kEarlyCopy, kAcrossA, kAcrossB>},
      {"without a barrier", product_kernel<kNoBarrier, kAcrossA, kAcrossB>},
  };
  for (const auto& kernel : kernels) {
    if (name == kernel.name) return kernel.kernel;
  }
  throw std::invalid_argument("wgmma_faults: no kernel " + name);
}

void run(const std::string& name, uintptr_t a, uintptr_t b, uintptr_t out, bool across_a, bool across_b) {
  const Kernel kernel = across_a ? (across_b ? kernel_of<true, true>(name) : kernel_of<true, false>(name))
                                 : (across_b ? kernel_of<false, true>(name) : kernel_of<false, false>(name));
  launch(kernel, 1, 2 * kWarpgroup, kTileB + 2 * kTileA, nullptr, reinterpret_cast<const uint16_t*>(a),
         reinterpret_cast<const uint16_t*>(b), reinterpret_cast<float*>(out));
}

}  // namespace

void bind_wgmma_faults(pybind11::module_& m) { m.def("run", &run); }

}  // namespace vatt

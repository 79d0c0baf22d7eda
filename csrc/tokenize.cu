#include "cuda_utils.cuh"
#include "tokenize.h"

namespace vatt {
namespace {

constexpr int kThreads = 256;

// One block per kept token: neighbouring threads read neighbouring bytes and write neighbouring elements.
template <typename T>
__global__ void __launch_bounds__(kThreads) tokenize_patches_kernel(const PatchParams p) {
  const int size = static_cast<int>(p.patch_t * p.patch_h * p.run);
  const int run = static_cast<int>(p.run);
  for (int64_t i = blockIdx.x; i < p.batch * p.kept; i += gridDim.x) {
    const int64_t b = i / p.kept;
    const int64_t token = kept_token(p, b, i % p.kept);
    if (token < 0 || token >= num_tokens(p)) __trap();
    const uint8_t* corner = p.video + patch_offset(p, b, token);
    T* out = static_cast<T*>(p.out) + i * size;
    for (int e = threadIdx.x; e < size; e += kThreads) {
      out[e] = scale_pixel<T>(corner[run_offset(p, e / run) + e % run]);
    }
  }
}

}  // namespace

void tokenize_patches_cuda(const PatchParams& p, DType out_dtype, int device, void* stream) {
  const DeviceGuard guard(device);
  const int64_t blocks = p.batch * p.kept < (1 << 30) ? p.batch * p.kept : (1 << 30);
  VATT_DISPATCH_FLOAT(out_dtype, T, {
    tokenize_patches_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  });
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace vatt

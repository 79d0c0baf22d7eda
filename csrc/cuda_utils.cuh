// What every CUDA launcher needs: checked calls, the device of the tensors for the duration of a call, the launch.
#pragma once

#include <cuda_runtime.h>

#include <sstream>
#include <stdexcept>
#include <type_traits>

#define CUDA_CHECK(call)                                                                   \
  do {                                                                                     \
    const cudaError_t status_ = (call);                                                    \
    if (status_ != cudaSuccess) {                                                          \
      std::ostringstream text_;                                                            \
      text_ << "vatt_engine._C: " #call " failed: " << cudaGetErrorString(status_) << "."; \
      throw std::runtime_error(text_.str());                                               \
    }                                                                                      \
  } while (0)

namespace vatt {

// The CUDA runtime linked into this module has a current device of its own, apart from torch's.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    CUDA_CHECK(cudaGetDevice(&before_));
    CUDA_CHECK(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

template <typename T>
struct same_type {
  using type = T;
};

// kernel<<<grid, block, shared_bytes, stream>>>(args...), in words that a C++ compiler reads too: with VATT_EMULATE the
// kernels run on the CPU (tests/cuda_emulator).
template <typename... Args>
void launch(void (*kernel)(Args...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const typename same_type<Args>::type&... args) {
#ifdef VATT_EMULATE
  (void)stream;
  emulator::run(grid, block, shared_bytes, [&] { kernel(args...); });
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  CUDA_CHECK(cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream));
#endif
}

#if defined(VATT_EMULATE)
inline unsigned char* dynamic_shared() { return emulator::shared_memory(); }
#elif defined(__CUDACC__)
// The block's dynamic shared memory.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char shared_bytes_[];
  return shared_bytes_;
}
#endif

}  // namespace vatt

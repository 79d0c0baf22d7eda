// What every CUDA launcher needs: checked calls, and the device of the tensors for the duration of a call.
#pragma once

#include <cuda_runtime.h>

#include <sstream>
#include <stdexcept>

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

}  // namespace vatt

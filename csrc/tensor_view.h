// A tensor of torch seen from C++: pointer, shape, strides, dtype and device out of a DLPack capsule.
// It borrows: the capsule, an argument of the call, keeps the memory alive and frees it.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

#include "check.h"
#include "dlpack.h"
#include "dtype.h"

namespace vatt {

#ifdef VATT_EMULATE
constexpr int kKernelDevice = kDLCPU;  // tests run the CUDA kernels there
#else
constexpr int kKernelDevice = kDLCUDA;
#endif

struct TensorView {
  static constexpr int kMaxDims = 8;

  void* data = nullptr;
  int ndim = 0;
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> strides{};  // in elements
  DType dtype = DType::kOther;
  DLDevice device{kDLCPU, 0};

  TensorView() = default;

  explicit TensorView(const DLTensor& tensor)
      : data(static_cast<char*>(tensor.data) + tensor.byte_offset), ndim(tensor.ndim), device(tensor.device) {
    VATT_CHECK(ndim <= kMaxDims,
               "vatt_engine._C: tensors must have at most " << kMaxDims << " dimensions, got " << ndim << ".");
    dtype = dtype_of(tensor.dtype);
    int64_t contiguous = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      shape[i] = tensor.shape[i];
      strides[i] = tensor.strides ? tensor.strides[i] : contiguous;
      contiguous *= shape[i];
    }
  }

  bool is_cuda() const { return device.device_type == kDLCUDA; }

  bool is_float() const { return dtype == DType::kFloat || dtype == DType::kHalf || dtype == DType::kBFloat16; }

  bool is_empty() const { return std::find(shape.begin(), shape.begin() + ndim, 0) != shape.begin() + ndim; }

  int64_t numel() const {
    int64_t count = 1;
    for (int i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }

  // Dimensions first..last lie in memory without gaps; a dimension of size 1 has no say.
  bool is_contiguous(int first = 0) const {
    if (is_empty()) return true;
    int64_t expected = 1;
    for (int i = ndim - 1; i >= first; --i) {
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }

  std::string shape_text() const {
    std::string text = "[";
    for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
  }

 private:
  static DType dtype_of(const DLDataType& type) {
    if (type.lanes != 1) return DType::kOther;
    if (type.code == kDLUInt && type.bits == 8) return DType::kUInt8;
    if (type.code == kDLInt && type.bits == 64) return DType::kInt64;
    if (type.code == kDLFloat && type.bits == 32) return DType::kFloat;
    if (type.code == kDLFloat && type.bits == 16) return DType::kHalf;
    if (type.code == kDLBfloat && type.bits == 16) return DType::kBFloat16;
    return DType::kOther;
  }
};

inline bool same_device(const TensorView& a, const TensorView& b) {
  return a.device.device_type == b.device.device_type && a.device.device_id == b.device.device_id;
}

}  // namespace vatt

namespace pybind11::detail {

template <>
struct type_caster<vatt::TensorView> {
  PYBIND11_TYPE_CASTER(vatt::TensorView, const_name("dltensor capsule"));

  bool load(handle source, bool) {
    if (!PyCapsule_IsValid(source.ptr(), "dltensor")) return false;
    const auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(source.ptr(), "dltensor"));
    value = vatt::TensorView(managed->dl_tensor);
    return true;
  }
};

}  // namespace pybind11::detail

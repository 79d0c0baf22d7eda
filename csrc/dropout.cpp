// Dropout on a CPU in one pass: the masks are hashed from a key and the place of each element, and never stored.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "check.h"
#include "clones.h"
#include "parallel.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace vatt {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements for which a thread is worth its start

// Elements whose 31 bits, those of vatt_engine.ops.dropout.hashed, are below `dropped` become 0, others are scaled.
template <typename T>
inline void drop(const T* __restrict x, T* __restrict out, int64_t begin, int64_t end, uint64_t key, uint32_t dropped,
                 float scale) {
  const uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
  for (int64_t i = begin; i < end; ++i) {
    uint32_t bits = static_cast<uint32_t>(i) ^ low;
    bits = (bits ^ (bits >> 16)) * 0x7feb352du;
    bits = (bits ^ (bits >> 15) ^ high) * 0x846ca68bu;
    bits = (bits ^ (bits >> 16)) & 0x7fffffffu;
    const float value = to_float(x[i]) * scale;
    out[i] = from_float<T>(bits >= dropped ? value : 0.0f);
  }
}

void dropout(const TensorView& x, const TensorView& out, uint64_t key, uint32_t dropped, double scale,
             int num_threads) {
  const bool fits = x.is_float() && x.dtype == out.dtype && x.is_contiguous() && out.is_contiguous() &&
                    x.numel() == out.numel() && x.device.device_type == kDLCPU && out.device.device_type == kDLCPU;
  VATT_CHECK(fits, "dropout: x must be contiguous float32, bfloat16 or float16 on the cpu, and out like it, got shape "
                       << x.shape_text() << ".");
  const float factor = static_cast<float>(scale);
  py::gil_scoped_release release;
  parallel_for(x.numel(), num_threads, kGrain, [&](int64_t begin, int64_t end) {
    if (x.dtype == DType::kFloat) {
      clones<drop<float>>(x.as<float>(), out.as<float>(), begin, end, key, dropped, factor);
    } else if (x.dtype == DType::kHalf) {
      clones<drop<Half>>(x.as<Half>(), out.as<Half>(), begin, end, key, dropped, factor);
    } else {
      clones<drop<BFloat16>>(x.as<BFloat16>(), out.as<BFloat16>(), begin, end, key, dropped, factor);
    }
  });
}

}  // namespace

void bind_dropout(py::module_& m) {
  m.def("dropout", &dropout, py::arg("x"), py::arg("out"), py::arg("key"), py::arg("dropped"), py::arg("scale"),
        py::arg("num_threads"), "Write x, scaled where 31 hashed bits of (key, place) are not below dropped, else 0.");
}

}  // namespace vatt

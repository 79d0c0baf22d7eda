// Kernels with one fault each, and their faultless twins: what the emulator must notice, and what it must not.
#include <pybind11/pybind11.h>

#include <string>

#include "cuda_utils.cuh"
#include "tensor_core.cuh"

namespace vatt {
namespace {

constexpr int kThreads = 96, kPerCopy = 4;

// out[i] = in[n - 1 - i] through shared memory.
template <bool kBarrier>
__global__ void reverse_kernel(const float* in, float* out) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

// out[step, i] = in[step, n - 1 - i], two buffers: a copy is in flight while the other buffer is read.
template <bool kWait, bool kBarrierBefore, bool kBarrierAfter>
__global__ void pipeline_kernel(const float* in, float* out) {
  constexpr int kSteps = 4, kRow = kThreads * kPerCopy;
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const auto copy = [&](int step) {
    if (step < kSteps) {
      const int i = threadIdx.x * kPerCopy;
      cp_async<16>(shared + step % 2 * kRow + i, in + step * kRow + i, 16);
    }
    cp_async_commit();
  };
  copy(0);
  for (int step = 0; step < kSteps; ++step) {
    copy(step + 1);
    if (kWait) cp_async_wait<1>();
    if (kBarrierBefore) __syncthreads();
    for (int i = threadIdx.x; i < kRow; i += kThreads) {
      out[step * kRow + i] = shared[step % 2 * kRow + kRow - 1 - i];
    }
    if (kBarrierAfter) __syncthreads();
  }
}

// out[16, 8] = a[16, 16] b[16, 8], a and b of bfloat16; kTransposed: a is stored as [16 (k), 16 (row)].
template <bool kTransposed>
__global__ void product_kernel(const uint16_t* a, const uint16_t* b, float* out) {
  uint16_t* shared = reinterpret_cast<uint16_t*>(dynamic_shared());
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) shared[i] = a[i];
  __syncwarp();
  uint32_t fragment[4];
  if (kTransposed) {
    ldmatrix_x4_trans(fragment, shared + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
  } else {
    ldmatrix_x4(fragment, shared + lane % 16 * 16 + lane / 16 * 8);
  }
  const auto pair = [&](int k) { return b[k * 8 + lane / 4] | static_cast<uint32_t>(b[k * 8 + 8 + lane / 4]) << 16; };
  float sum[4] = {};
  mma_m16n8k16<BFloat16>(sum, fragment, pair(lane % 4 * 2), pair(lane % 4 * 2 + 8));
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

__global__ void sum_kernel(const float* in, float* out) {
  float sum = in[threadIdx.x];
  for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x % 32 == 0) out[threadIdx.x / 32] = sum;
}

__global__ void deadlock_kernel(const float*, float*) {
  if (threadIdx.x < 64) __syncthreads();
}

__global__ void diverge_kernel(const float* in, float* out) {
  if (threadIdx.x % 2) {
    __syncwarp();
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
  }
}

__global__ void trap_kernel(const float*, float*) {
  if (threadIdx.x == 40) __trap();
}

__global__ void read_beyond_kernel(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }

__global__ void write_beyond_kernel(const float* in, float* out) { out[threadIdx.x + 1] = in[threadIdx.x]; }

__global__ void misaligned_kernel(const float* in, float* out) {
  if (threadIdx.x == 0) *reinterpret_cast<float4*>(out) = *reinterpret_cast<const float4*>(in + 1);
}

__global__ void shared_beyond_kernel(const float*, float*) {
  reinterpret_cast<float*>(dynamic_shared())[threadIdx.x + 1] = 1.0f;
}

using Kernel = void (*)(const float*, float*);

void run(const std::string& name, uintptr_t in, uintptr_t out) {
  const struct {
    const char* name;
    Kernel kernel;
  } kernels[] = {
      {"reverse", reverse_kernel<true>},
      {"reverse without a barrier", reverse_kernel<false>},
      {"pipeline", pipeline_kernel<true, true, true>},
      {"pipeline without a wait", pipeline_kernel<false, true, true>},
      {"pipeline without a barrier before", pipeline_kernel<true, false, true>},
      {"pipeline without a barrier after", pipeline_kernel<true, true, false>},
      {"sum", sum_kernel},
      {"deadlock", deadlock_kernel},
      {"diverge", diverge_kernel},
      {"trap", trap_kernel},
      {"read beyond", read_beyond_kernel},
      {"write beyond", write_beyond_kernel},
      {"misaligned", misaligned_kernel},
      {"shared beyond", shared_beyond_kernel},
  };
  for (const auto& kernel : kernels) {
    if (name != kernel.name) continue;
    const size_t shared_bytes = name.rfind("pipeline", 0) == 0 ? 2 * kThreads * kPerCopy * 4 : kThreads * 4;
    launch(kernel.kernel, 1, kThreads, shared_bytes, nullptr, reinterpret_cast<const float*>(in),
           reinterpret_cast<float*>(out));
    return;
  }
  throw std::invalid_argument("faults: no kernel " + name);
}

void multiply(uintptr_t a, uintptr_t b, uintptr_t out, bool transposed) {
  launch(transposed ? product_kernel<true> : product_kernel<false>, 1, 32, 512, nullptr,
         reinterpret_cast<const uint16_t*>(a), reinterpret_cast<const uint16_t*>(b), reinterpret_cast<float*>(out));
}

}  // namespace

void bind_faults(pybind11::module_& m) {
  m.def("run", &run);
  m.def("multiply", &multiply);
}

}  // namespace vatt

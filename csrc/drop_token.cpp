#include "drop_token.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "check.h"
#include "parallel.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace vatt {
namespace {

constexpr int64_t kGrainBytes = 1 << 19;  // copied; fewer do not pay for a thread

int64_t row_grain(int64_t row_bytes) { return kGrainBytes / std::max<int64_t>(row_bytes, 1) + 1; }

// In pieces, because the C library moves more than 2 KiB by `rep movsb`, which is slow where pages are touched first.
constexpr size_t kPiece = 1024;

void copy_bytes(void* out, const void* in, size_t bytes) {
  for (size_t i = 0; i < bytes; i += kPiece) {
    std::memcpy(static_cast<char*>(out) + i, static_cast<const char*>(in) + i, std::min(kPiece, bytes - i));
  }
}

void clear_bytes(void* out, size_t bytes) {
  for (size_t i = 0; i < bytes; i += kPiece) std::memset(static_cast<char*>(out) + i, 0, std::min(kPiece, bytes - i));
}

template <typename T>
void gather_rows_cpu(const DropTokenParams& p, int num_threads) {
  const size_t bytes = p.width * sizeof(T);
  parallel_for(p.batch * p.kept, num_threads, row_grain(bytes), [&p, bytes](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / p.kept;
      const T* in = static_cast<const T*>(p.in) + input_offset(p, b, kept_position(p, b, i % p.kept));
      copy_bytes(static_cast<T*>(p.out) + i * p.width, in, bytes);
    }
  });
}

// For every token of one sample the kept positions that hold it, in ascending order: rows[starts[n]..starts[n + 1]).
struct Occurrences {
  std::vector<int64_t> starts, rows;

  void collect(const DropTokenParams& p, int64_t b) {
    starts.assign(p.tokens + 2, 0);
    rows.resize(p.kept);
    for (int64_t k = 0; k < p.kept; ++k) ++starts[kept_position(p, b, k) + 2];
    for (int64_t n = 0; n < p.tokens; ++n) starts[n + 2] += starts[n + 1];
    for (int64_t k = 0; k < p.kept; ++k) rows[starts[kept_position(p, b, k) + 1]++] = k;
  }
};

template <typename T>
void sum_rows(const DropTokenParams& p, int64_t b, const int64_t* first, const int64_t* last, float* sum, T* out) {
  std::fill(sum, sum + p.width, 0.0f);
  for (const int64_t* row = first; row != last; ++row) {
    const T* in = static_cast<const T*>(p.in) + input_offset(p, b, *row);
    for (int64_t i = 0; i < p.width; ++i) sum[i] += to_float(in[i]);
  }
  for (int64_t i = 0; i < p.width; ++i) out[i] = from_float<T>(sum[i]);
}

// Every row of the result is written once, by one thread: with a copy, with zeros or with a sum.
template <typename T>
void scatter_rows_cpu(const DropTokenParams& p, int num_threads) {
  const size_t bytes = p.width * sizeof(T);
  parallel_for(p.batch * p.tokens, num_threads, row_grain(bytes), [&p, bytes](int64_t begin, int64_t end) {
    Occurrences found;
    std::vector<float> sum(p.width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / p.tokens, n = i % p.tokens;
      if (i == begin || (n == 0 && p.keep_stride_b)) found.collect(p, b);
      const int64_t* first = found.rows.data() + found.starts[n];
      const int64_t* last = found.rows.data() + found.starts[n + 1];
      T* out = static_cast<T*>(p.out) + i * p.width;
      if (first == last) {
        clear_bytes(out, bytes);
      } else if (last - first == 1) {
        copy_bytes(out, static_cast<const T*>(p.in) + input_offset(p, b, *first), bytes);
      } else {
        sum_rows(p, b, first, last, sum.data(), out);
      }
    }
  });
}

void sample_keep_cpu(const SampleParams& p, int num_threads) {
  const int64_t grain = (1 << 13) / p.tokens + 1;  // samples
  parallel_for(p.batch, num_threads, grain, [&p](int64_t begin, int64_t end) {
    std::vector<int64_t> keys(p.tokens);
    for (int64_t b = begin; b < end; ++b) {
      const uint64_t stream = sample_stream(p, b);
      for (int64_t n = 0; n < p.tokens; ++n) keys[n] = position_key(stream, n);
      if (p.kept < p.tokens) std::nth_element(keys.begin(), keys.begin() + p.kept, keys.end());
      std::sort(keys.begin(), keys.begin() + p.kept);
      for (int64_t k = 0; k < p.kept; ++k) p.out[b * p.kept + k] = keys[k] & kPositionMask;
    }
  });
}

// A position outside the tokens would read or write outside the tensors. On a GPU the kernel checks, to spare a
// synchronisation.
void check_positions(const DropTokenParams& p) {
  for (int64_t b = 0; b < (p.keep_stride_b ? p.batch : 1); ++b) {
    for (int64_t k = 0; k < p.kept; ++k) {
      const int64_t position = kept_position(p, b, k);
      VATT_CHECK(position >= 0 && position < p.tokens,
                 "drop_token: keep must hold positions in [0, " << p.tokens << "), got " << position << ".");
    }
  }
}

// Runs on the device of `out`, where all of `inputs` must lie.
template <typename Cpu, typename Cuda>
void run(const char* where, const TensorView& out, std::initializer_list<const TensorView*> inputs, const Cpu& cpu,
         [[maybe_unused]] const Cuda& cuda) {
  for (const TensorView* input : inputs) {
    VATT_CHECK(!input || (input->device.device_type == out.device.device_type &&
                          input->device.device_id == out.device.device_id),
               where << ": all tensors must be on one device, got several.");
  }
  py::gil_scoped_release release;
  if (out.is_cuda()) {
#if VATT_HAS_CUDA
    cuda();
    return;
#else
    VATT_CHECK(false, where << ": tensors must be on the cpu, got cuda. The native module was built without CUDA.");
#endif
  }
  VATT_CHECK(out.device.device_type == kDLCPU,
             where << ": tensors must be on cpu or cuda, got DLPack device type " << out.device.device_type << ".");
  cpu();
}

void drop_token(const TensorView& in, const TensorView& keep, const TensorView& out, bool scatter, int num_threads,
                [[maybe_unused]] uintptr_t stream) {
  VATT_CHECK(in.is_float() && in.ndim == 3 && in.is_contiguous(2),
             "drop_token: tokens must be float32, bfloat16 or float16 [B, N, D] with rows without gaps, got shape "
                 << in.shape_text() << ".");
  const int64_t batch = in.shape[0], width = in.shape[2];
  VATT_CHECK(keep.dtype == DType::kInt64 && (keep.ndim == 1 || (keep.ndim == 2 && keep.shape[0] == batch)),
             "drop_token: keep must be int64 [K] or [" << batch << ", K], got shape " << keep.shape_text() << ".");
  const int last = keep.ndim - 1;
  const int64_t kept = keep.shape[last];
  VATT_CHECK(out.dtype == in.dtype && out.is_contiguous() && out.ndim == 3 && out.shape[0] == batch &&
                 out.shape[2] == width && (scatter ? in : out).shape[1] == kept,
             "drop_token: out must be contiguous, of the dtype of its input and of " << kept << " kept positions, got "
                                                                                     << out.shape_text() << ".");
  const int64_t tokens = (scatter ? out : in).shape[1];
  VATT_CHECK(tokens > 0 || kept == 0 || batch == 0, "drop_token: tokens must be at least 1, got 0.");
  const DropTokenParams p{in.data,
                          keep.as<int64_t>(),
                          out.data,
                          batch,
                          tokens,
                          kept,
                          width,
                          in.strides[0],
                          in.strides[1],
                          keep.ndim == 2 ? keep.strides[0] : 0,
                          keep.strides[last]};
  if (out.is_empty()) return;
  run(
      "drop_token", out, {&in, &keep},
      [&] {
        check_positions(p);
        VATT_DISPATCH_FLOAT(in.dtype, T,
                            scatter ? scatter_rows_cpu<T>(p, num_threads) : gather_rows_cpu<T>(p, num_threads));
      },
      [&] {
#if VATT_HAS_CUDA
        const auto launch = scatter ? drop_token_bwd_cuda : drop_token_fwd_cuda;
        launch(p, in.dtype, out.device.device_id, reinterpret_cast<void*>(stream));
#endif
      });
}

void sample_keep(const TensorView& seed, const std::optional<TensorView>& sample_id, int64_t num_tokens,
                 const TensorView& out, int num_threads, [[maybe_unused]] uintptr_t stream) {
  VATT_CHECK(num_tokens >= 1 && num_tokens <= kMaxTokens,
             "sample_keep: num_tokens must be in 1.." << kMaxTokens << ", got " << num_tokens << ".");
  VATT_CHECK(seed.dtype == DType::kInt64 && seed.ndim == 0,
             "sample_keep: seed must be an int64 scalar, got shape " << seed.shape_text() << ".");
  VATT_CHECK(!sample_id || (sample_id->dtype == DType::kInt64 && sample_id->ndim == 1 && sample_id->is_contiguous()),
             "sample_keep: sample_id must be contiguous int64 [B], got shape " << sample_id->shape_text() << ".");
  VATT_CHECK(out.dtype == DType::kInt64 && out.is_contiguous() && out.ndim == (sample_id ? 2 : 1) &&
                 (!sample_id || out.shape[0] == sample_id->shape[0]) && out.shape[out.ndim - 1] <= num_tokens,
             "sample_keep: out must be contiguous int64 [K] or [B, K] with K <= " << num_tokens << ", got shape "
                                                                                  << out.shape_text() << ".");
  const SampleParams p{seed.as<int64_t>(), sample_id ? sample_id->as<int64_t>() : nullptr,
                       out.as<int64_t>(),  sample_id ? out.shape[0] : 1,
                       num_tokens,         out.shape[out.ndim - 1]};
  if (out.is_empty()) return;
  run(
      "sample_keep", out, {&seed, sample_id ? &*sample_id : nullptr}, [&] { sample_keep_cpu(p, num_threads); },
      [&] {
#if VATT_HAS_CUDA
        VATT_CHECK(num_tokens <= kMaxTokensCuda, "sample_keep: num_tokens must be at most "
                                                     << kMaxTokensCuda << " on cuda, got " << num_tokens << ".");
        sample_keep_cuda(p, out.device.device_id, reinterpret_cast<void*>(stream));
#endif
      });
}

}  // namespace

void bind_drop_token(py::module_& m) {
  m.def("drop_token", &drop_token, py::arg("input"), py::arg("keep"), py::arg("out"), py::arg("scatter"),
        py::arg("num_threads"), py::arg("stream"),
        "Write rows keep of [B, N, D] to out [B, K, D]; with scatter, rows of [B, K, D] to rows keep of [B, N, D].");
  m.def("sample_keep", &sample_keep, py::arg("seed"), py::arg("sample_id").none(true), py::arg("num_tokens"),
        py::arg("out"), py::arg("num_threads"), py::arg("stream"),
        "Write the positions of the smallest keys of num_tokens positions to out [K] or [B, K].");
}

}  // namespace vatt

// The patch matrix on the CPU, a piece at a time for the library's matrix product: it never exists as a whole.
#include "tokenize.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>

#include "check.h"
#include "parallel.h"
#include "tensor_view.h"
#include "tokenize_params.h"

namespace py = pybind11;

namespace vatt {
namespace {

// Compiled for each level of the instruction set, chosen when the module is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VATT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VATT_CLONES
#endif

using Optional = std::optional<TensorView>;

// A stretch of the patch matrix: rows [row, row + rows) of the batch, the elements of runs [run, run + runs) of each.
// With agg every sample's rows begin with one of zeros, to which the product adds nothing.
struct Piece {
  int64_t row, rows, run, runs;
  int64_t agg;
};

struct Row {
  int64_t sample, kept;  // kept < 0: the AGG row
};

Row row_of(const PatchParams& p, int64_t agg, int64_t i) {
  const int64_t per_sample = p.kept + agg;
  return {i / per_sample, i % per_sample - agg};
}

void convert(uint8_t in, float* out) { *out = scale_pixel(in); }
void convert(uint8_t in, BFloat16* out) { *out = from_float<BFloat16>(scale_pixel(in)); }
void convert(float in, float* out) { *out = in; }
void convert(float in, BFloat16* out) { *out = from_float<BFloat16>(in); }

// The runs of one patch. What it calls is inlined, and so compiled anew in every clone below. Runs lie a row of pixels
// apart, too far for the hardware to fetch them ahead (0.42 -> 0.29 ns per element with prefetching).
template <typename In, typename Out>
inline void copy_runs(const PatchParams& p, const Piece& piece, const Row& row, Out* __restrict out) {
  constexpr int64_t kAhead = 8;
  const int64_t n = run_length(p);
  const bool flipped = is_flipped(p, row.sample);
  const In* __restrict in = static_cast<const In*>(p.video) +
                            patch_offset(p, row.sample, kept_token(p, row.sample, row.kept)) + run_offset(p, piece.run);
  int64_t y = piece.run % p.patch_h;
  for (int64_t r = 0; r < piece.runs; ++r, out += n) {
    __builtin_prefetch(in + kAhead * p.stride_y);
    __builtin_prefetch(in + kAhead * p.stride_y + n - 1);
    if (flipped) {
      for (int64_t e = 0; e < n; ++e) convert(in[run_element(p, e, true)], out + e);
    } else {
      for (int64_t e = 0; e < n; ++e) convert(in[e], out + e);
    }
    in += p.stride_y;
    if (++y == p.patch_h) {
      y = 0;
      in += p.stride_t - p.patch_h * p.stride_y;
    }
  }
}

VATT_CLONES void copy_patch(const PatchParams& p, const Piece& piece, const Row& row, float* out) {
  p.video_dtype == DType::kUInt8 ? copy_runs<uint8_t>(p, piece, row, out) : copy_runs<float>(p, piece, row, out);
}

VATT_CLONES void copy_patch(const PatchParams& p, const Piece& piece, const Row& row, BFloat16* out) {
  p.video_dtype == DType::kUInt8 ? copy_runs<uint8_t>(p, piece, row, out) : copy_runs<float>(p, piece, row, out);
}

template <typename Out>
void write_patches(const PatchParams& p, const Piece& piece, Out* out, int num_threads) {
  constexpr int64_t kGrain = 32;  // patches; fewer do not pay for a thread
  const int64_t size = piece.runs * run_length(p);
  parallel_for(piece.rows, num_threads, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Row row = row_of(p, piece.agg, piece.row + i);
      if (row.kept < 0) {
        std::fill_n(out + i * size, size, Out{});
      } else {
        copy_patch(p, piece, row, out + i * size);
      }
    }
  });
}

// Tokens and windows that would be read outside the video. On a GPU the kernel checks, to spare a synchronisation.
void check_reach(const PatchParams& p, int64_t height, int64_t width, int64_t window_height) {
  const int64_t lists = p.keep ? (p.keep_stride_b ? p.batch : std::min<int64_t>(p.batch, 1)) : 0;
  for (int64_t i = 0; i < lists * p.kept; ++i) {
    const int64_t token = kept_token(p, i / p.kept, i % p.kept);
    VATT_CHECK(token >= 0 && token < num_tokens(p),
               "tokenize: keep must hold token numbers in [0, " << num_tokens(p) << "), got " << token << ".");
  }
  for (int64_t b = 0; p.crop && b < p.batch; ++b) {
    const int64_t y = p.crop[2 * b], x = p.crop[2 * b + 1];
    VATT_CHECK(y >= 0 && y <= height - window_height && x >= 0 && x <= width - p.width,
               "tokenize: crop must lie in [0, " << height - window_height << "] x [0, " << width - p.width
                                                 << "], got [" << y << ", " << x << "].");
  }
}

void check_cpu(const TensorView& tensor) {
  VATT_CHECK(tensor.device.device_type == kDLCPU,
             "tokenize: tensors must be on the cpu, got DLPack device type " << tensor.device.device_type << ".");
}

void patches(const TensorView& video, const Optional& keep, const Optional& crop, const Optional& flip,
             const TensorView& out, const std::array<int64_t, 2>& size, const std::array<int64_t, 3>& patch, bool agg,
             int64_t row, int64_t run, int num_threads) {
  const PatchParams p = patch_params(video, keep, crop, flip, size, patch);
  for (const TensorView* tensor : {&video, &out, keep ? &*keep : &out, crop ? &*crop : &out, flip ? &*flip : &out}) {
    check_cpu(*tensor);
  }
  VATT_CHECK(video.dtype == DType::kUInt8 || video.dtype == DType::kFloat,
             "tokenize: video must be uint8 or float32 on the cpu, got a 16-bit float.");
  const int64_t n = run_length(p);
  const bool shaped = out.ndim == 2 && out.is_contiguous() && out.shape[1] % n == 0 &&
                      (out.dtype == DType::kFloat || out.dtype == DType::kBFloat16);
  VATT_CHECK(shaped, "tokenize: out must be contiguous float32 or bfloat16 [rows, runs * " << n << "], got shape "
                                                                                           << out.shape_text() << ".");
  const Piece piece{row, out.shape[0], run, out.shape[1] / n, agg};
  VATT_CHECK(row >= 0 && row + piece.rows <= p.batch * (p.kept + agg) && run >= 0 && run + piece.runs <= num_runs(p),
             "tokenize: out must lie within " << p.batch * (p.kept + agg) << " rows of " << num_runs(p)
                                              << " runs, got shape " << out.shape_text() << " from row " << row
                                              << ", run " << run << ".");
  if (out.is_empty()) return;
  py::gil_scoped_release release;
  check_reach(p, video.shape[2], video.shape[3], size[0]);
  if (out.dtype == DType::kFloat) {
    write_patches(p, piece, out.as<float>(), num_threads);
  } else {
    write_patches(p, piece, out.as<BFloat16>(), num_threads);
  }
}

}  // namespace

void bind_tokenize(py::module_& m) {
  m.def("tokenize_patches", &patches, py::arg("video"), py::arg("keep").none(true), py::arg("crop").none(true),
        py::arg("flip").none(true), py::arg("out"), py::arg("size"), py::arg("patch"), py::arg("agg"), py::arg("row"),
        py::arg("run"), py::arg("num_threads"),
        "Write rows [row, ...) and runs [run, ...) of the patch matrix to out [rows, runs * t*w*C], scaled.");
}

}  // namespace vatt

// The patch matrix on the CPU, a piece at a time for the library's matrix product: it never exists as a whole.
#include "tokenize.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "check.h"
#include "clones.h"
#include "parallel.h"
#include "tensor_view.h"
#include "tokenize_params.h"

namespace py = pybind11;

namespace vatt {
namespace {

using Optional = std::optional<TensorView>;

// A stretch of the patch matrix: rows [row, row + rows) of the batch, the elements of runs [run, run + runs) of each.
// With agg every sample's rows begin with one of zeros, to which the product adds nothing.
struct Piece {
  int64_t row, rows, run, runs;
  int64_t agg;
};

// Where a row of the piece is read: the leftmost pixel of its first run, in elements, or nowhere for AGG.
struct Source {
  int64_t offset;
  bool agg, flipped;
};

// Refuses tokens and windows that would be read outside the video. On a GPU the kernel checks, to spare a wait.
std::vector<Source> find_sources(const PatchParams& p, const Piece& piece, int64_t last_y, int64_t last_x) {
  std::vector<Source> sources(piece.rows);
  const int64_t per_sample = p.kept + piece.agg;
  for (int64_t i = 0; i < piece.rows; ++i) {
    const int64_t b = (piece.row + i) / per_sample, k = (piece.row + i) % per_sample - piece.agg;
    const int64_t token = k < 0 ? 0 : kept_token(p, b, k);
    VATT_CHECK(token >= 0 && token < num_tokens(p),
               "tokenize: keep must hold token numbers in [0, " << num_tokens(p) << "), got " << token << ".");
    const int64_t y = p.crop ? p.crop[2 * b] : 0, x = p.crop ? p.crop[2 * b + 1] : 0;
    VATT_CHECK(y >= 0 && y <= last_y && x >= 0 && x <= last_x, "tokenize: crop must lie in [0, "
                                                                   << last_y << "] x [0, " << last_x << "], got [" << y
                                                                   << ", " << x << "].");
    sources[i] = {patch_offset(p, b, token) + run_offset(p, piece.run), k < 0, is_flipped(p, b)};
  }
  return sources;
}

void convert(uint8_t in, float* out) { *out = scale_pixel(in); }
void convert(uint8_t in, BFloat16* out) { *out = from_float<BFloat16>(scale_pixel(in)); }
void convert(float in, float* out) { *out = in; }
void convert(float in, BFloat16* out) { *out = from_float<BFloat16>(in); }

// The runs of one patch. They lie a row of pixels apart, too far for the hardware to fetch them ahead: the next patch
// is asked for meanwhile.
template <typename In, typename Out>
inline void copy_runs(const PatchParams& p, const Piece& piece, const Source& source, const Source& next,
                      Out* __restrict out) {
  const int64_t n = run_length(p), ahead = next.offset - source.offset;
  const In* __restrict in = static_cast<const In*>(p.video) + source.offset;
  int64_t y = piece.run % p.patch_h;
  for (int64_t r = 0; r < piece.runs; ++r, out += n) {
    __builtin_prefetch(in + ahead);
    __builtin_prefetch(in + ahead + n - 1);
    if (source.flipped) {
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

template <typename Out>
inline void copy_patch(const PatchParams& p, const Piece& piece, const Source& source, const Source& next, Out* out) {
  p.video_dtype == DType::kUInt8 ? copy_runs<uint8_t>(p, piece, source, next, out)
                                 : copy_runs<float>(p, piece, source, next, out);
}

template <typename Out>
void write_patches(const PatchParams& p, const Piece& piece, const std::vector<Source>& sources, Out* out,
                   int num_threads) {
  // What pays for a thread: it may have to share its core with one of torch's, which wait busily for their next
  // product.
  constexpr int64_t kGrain = 3 << 18;  // elements
  const int64_t size = piece.runs * run_length(p);
  parallel_for(piece.rows, num_threads, kGrain / size + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (sources[i].agg) {
        std::fill_n(out + i * size, size, Out{});
      } else {
        clones<copy_patch<Out>>(p, piece, sources[i], sources[std::min(i + 1, end - 1)], out + i * size);
      }
    }
  });
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
  const auto sources = find_sources(p, piece, video.shape[2] - size[0], video.shape[3] - size[1]);
  if (out.dtype == DType::kFloat) {
    write_patches(p, piece, sources, out.as<float>(), num_threads);
  } else {
    write_patches(p, piece, sources, out.as<BFloat16>(), num_threads);
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
